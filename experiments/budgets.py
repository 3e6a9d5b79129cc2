"""Widths chosen for a latency against the same share of all channels, at equal latency.

    python -m experiments.budgets --latency-table resnet18-32.json --minutes 60

For each data set and seed a ResNet18 is trained, and pruned to some shares of its own latency: uniformly, and
to the widths that `trimrt compress --latency-ms` chooses within what the uniform network takes. Both are
fine-tuned alike, from the unpruned network. `--preset` adds the widths of presets. All latencies are
predictions of the table. What is finished is kept, and an interrupted training continues; the command can be
given again with more seeds.

Only some of the training images are used, so that a seed takes minutes and there are errors to count.
"""

from __future__ import annotations

import copy
import shlex
import sys
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import click
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional

from experiments.budget_results import PRESETS, UNPRUNED, WAYS, Course, Results, Row, equal_accuracy, table
from experiments.results import FOLDER, made_here
from models.augmentation import random_affines, transform
from models.datasets import open_dataset
from models.distillation import TeacherViews, label_views
from models.evaluation import count_macs, count_parameters, evaluate, normalise, to_float
from models.files import replace_file
from models.groups import ChannelGroups
from models.latency import LatencyPredictor, LatencyTable, read_latency_table
from models.networks import build_network
from models.preprocessing import Preprocessing
from models.promise import Device
from models.pruning import Pruner, find_ratio
from models.recipe import Augmentation, Distillation, Image, Pruning, Recipe, Training, make_recipe
from models.setup import Setup, fingerprint
from models.training import Objective, TrueLabels, derive_seed, reproducible, supported_precision, train
from models.widths import Budget, choose_widths
from trimrt.options import COUNT, FILE, HELP
from trimrt.options import FOLDER as OUTPUT

AUGMENTATION: Final = {
    "glyphs": Augmentation(flip=False),
    "fashion-mnist": Augmentation(rotation=0, scale=0, shear=0, shift=0, flip=True),
}

_ARCHITECTURE: Final = "resnet18"
_SIDE: Final = 32
_JUDGED: Final = {"validation": 1000, "test": 3000}  # images, at most
_NANOSECONDS: Final = 1e6  # of a millisecond; ratios are found for whole numbers
_GRADIENTS: Final = 32  # batches that Taylor's importance is measured on


@dataclass(frozen=True)
class Trial:
    """One data set and seed.

    Attributes:
        runs: folder of what all trials keep.
    """

    data: str
    seed: int
    course: Course
    table: LatencyTable
    runs: Path
    progress: Progress = field(repr=False)

    @cached_property
    def folder(self) -> Path:
        """Of what is finished."""
        return self.runs / f"{self.data}-seed{self.seed}-{self._fingerprint[:8]}"

    @cached_property
    def _fingerprint(self) -> str:
        """Of all that decides the unpruned network."""
        return fingerprint([self.data, self.seed, self.course.model_dump(), torch.__version__])

    def _name(self, share: float, way: str) -> str:
        """Of a network, by all that decides its widths."""
        if way == UNPRUNED:
            return way
        table = fingerprint(self.table.model_dump(mode="json"))[:8]
        return f"{way}-{table}" if way in PRESETS else f"{share:g}-{way}-{table}"

    def file(self, share: float, way: str) -> Path:
        """Where the row of a network is kept."""
        return self.folder / f"{self._name(share, way)}.json"

    def row(self, share: float, way: str) -> Row:
        """A network of that share of the latency, or of a preset, made or kept."""
        file = self.file(share, way)
        if file.exists():
            return Row.model_validate_json(file.read_text(encoding="utf-8"))
        network = self._network if way == UNPRUNED else self._pruned(share, way)
        row = self._measured(network, share, way)
        with replace_file(file) as new:
            new.write_text(row.model_dump_json(indent=1), encoding="utf-8")
        return row

    def _pruned(self, share: float, way: str) -> nn.Module:
        settings = make_recipe(preset=way).pruning if way in PRESETS else self._uniform(share)
        network = copy.deepcopy(self._network)
        Pruner(network, self._spec, settings.model_copy(update={"steps": 1}), settings.ratio).step()
        if way in ("magnitude", "taylor"):
            budget = Budget("ms", self._predicted(network), self._predictor.predict)
            network = copy.deepcopy(self._network)
            groups = ChannelGroups(network, self._spec, self._taylor if way == "taylor" else None)
            groups.prune(choose_widths(groups.worth(), [budget], self.table.block))
        self._train(network, self._name(share, way), self._views, self.course.fine_tuning)
        return network

    def _uniform(self, share: float) -> Pruning:
        """The same share of all channels: the least whose network takes no more of the latency than that."""
        settings = Pruning(round_to=self.table.block, steps=1)
        most = share * self._predicted(self._network)
        ratio = find_ratio(
            self._network,
            self._spec,
            settings,
            lambda network: round(_NANOSECONDS * self._predicted(network)),
            _NANOSECONDS * most,
        )
        return settings.model_copy(update={"ratio": ratio})

    @cached_property
    def _setup(self) -> Setup:
        """Some of the images, and how networks see them."""
        data, limits = open_dataset(self.data, fold=0), AUGMENTATION[self.data]
        recipe = Recipe(device="cpu", image=Image(size=_SIDE), augmentation=limits)
        parts = {
            part: getattr(data, part).spread(most, f"{self.data}-{part}-{most}")
            for part, most in ({"train": self.course.images} | _JUDGED).items()
        }
        return Setup(replace(data, **parts), recipe, self.folder, None, None, Console(quiet=True))

    @property
    def _spec(self) -> Preprocessing:
        return self._setup.spec

    @cached_property
    def _predictor(self) -> LatencyPredictor:
        return LatencyPredictor(self.table)

    @cached_property
    def _network(self) -> nn.Module:
        """Trained on the true labels, and unpruned."""
        torch.manual_seed(derive_seed(self.seed, "weights"))
        network = build_network(_ARCHITECTURE, len(self._setup.data.labels), "small").eval()
        targets = torch.from_numpy(self._setup.train_images.targets)
        objective = TrueLabels(targets, self._setup.limits, derive_seed(self.seed, "labels"))
        self._train(network, UNPRUNED, objective, self.course.epochs)
        return network

    @cached_property
    def _views(self) -> TeacherViews:
        """What every fine-tuning learns from: the unpruned network's answers, and the true labels."""
        setup, seed = self._setup, derive_seed(self.seed, "views")
        logits = label_views(
            self._network,
            setup.train_images.pixels,
            setup.spec,
            setup.limits,
            views=self.course.fine_tuning,
            seed=seed,
            progress=self.progress,
            precision=setup.precision,
            kept=self.folder / "views.safetensors",
            fingerprint=self._fingerprint,
        )
        targets = torch.from_numpy(setup.train_images.targets)
        return TeacherViews(logits, targets, setup.limits, Distillation(), seed)

    @cached_property
    def _taylor(self) -> dict[str, Tensor]:
        """What the loss would change without a weight, squared (Molchanov et al. 2019), by parameter.

        https://arxiv.org/abs/1906.10771, equation 8, over some batches of augmented images.
        """
        network, images = copy.deepcopy(self._network), self._setup.train_images
        sums = {name: torch.zeros_like(weight) for name, weight in network.named_parameters()}
        shuffle = torch.Generator().manual_seed(derive_seed(self.seed, "gradients"))
        order = torch.randperm(len(images.targets), generator=shuffle)
        for number, batch in enumerate(torch.split(order, self.course.batch_size)[:_GRADIENTS]):
            affines = random_affines(len(batch), self._setup.limits, number)
            views = transform(to_float(images.pixels[batch.numpy()], torch.device("cpu")), affines)
            targets = torch.from_numpy(images.targets[batch.numpy()])
            network.zero_grad()
            loss = functional.cross_entropy(network(normalise(views, self._spec)), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            for name, weight in network.named_parameters():
                assert weight.grad is not None, "all parameters are trained"
                sums[name] += (weight * weight.grad).detach().square()
        return sums

    def _predicted(self, network: nn.Module) -> float:
        return self._predictor.predict(ChannelGroups(network, self._spec).channels)

    def _train(self, network: nn.Module, name: str, objective: Objective, epochs: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        train(
            network,
            self._setup.train_images,
            self._setup.validation_images,
            self._spec,
            objective,
            Training(
                epochs=epochs, learning_rate=self.course.learning_rate, batch_size=self.course.batch_size
            ),
            name=f"{self.data}, seed {self.seed}, {name}",
            seed=derive_seed(self.seed, name),
            state_file=self.folder / f"{name}.pt",
            fingerprint=self._fingerprint,
            progress=self.progress,
            precision=self._setup.precision,
        )

    def _measured(self, network: nn.Module, share: float, way: str) -> Row:
        validation, test = (
            evaluate(network, images.pixels, images.targets, self._spec)
            for images in (self._setup.validation_images, self._setup.test_images)
        )
        widths = ChannelGroups(network, self._spec).channels
        predicted = self._predictor.predict(widths)
        return Row(
            data=self.data,
            seed=self.seed,
            share=round(predicted / self._predicted(self._network), 4) if way in PRESETS else share,
            way=way,
            widths=widths,
            predicted_ms=round(predicted, 4),
            parameters=count_parameters(network),
            macs=count_macs(network, _SIDE, _SIDE),
            validation_wrong=validation.wrong,
            validation_images=validation.images,
            test_wrong=test.wrong,
            test_images=test.images,
        )


@click.command(context_settings=HELP)
@click.option("--latency-table", "table_file", type=FILE, required=True, help="Of a ResNet18 at 32x32.")
@click.option(
    "--data", "names", type=click.Choice(list(AUGMENTATION)), multiple=True, default=list(AUGMENTATION)
)
@click.option("--seeds", type=COUNT, default=3)
@click.option(
    "--share", "shares", type=float, multiple=True, default=(0.15, 0.2, 0.3), help="Of the latency."
)
@click.option("--way", "ways", type=click.Choice(list(WAYS)), multiple=True, default=("uniform", "magnitude"))
@click.option(
    "--preset", "presets", type=click.Choice(list(PRESETS)), multiple=True, help="Their widths too."
)
@click.option("--images", type=COUNT, default=3000, help="To train on.")
@click.option("--epochs", type=COUNT, default=4, help="Of the unpruned network.")
@click.option("--fine-tuning", type=COUNT, default=3, help="Epochs of a pruned network.")
@click.option("--minutes", type=float, default=60.0, help="After which no other network is begun.")
@click.option("--runs", type=OUTPUT, default=Path("runs/budgets"))
@click.option(
    "--out", type=FILE, default=FOLDER / "budgets.json", show_default="experiments/results/budgets.json"
)
def main(
    table_file: Path,
    names: tuple[str, ...],
    seeds: int,
    shares: tuple[float, ...],
    ways: tuple[str, ...],
    presets: tuple[str, ...],
    images: int,
    epochs: int,
    fine_tuning: int,
    minutes: float,
    runs: Path,
    out: Path,
) -> None:
    """Train, prune and compare; write what is finished."""
    deadline = time.monotonic() + 60 * minutes
    latencies = read_latency_table(table_file)
    course = Course(images=images, epochs=epochs, fine_tuning=fine_tuning)
    results = Results(
        **made_here(shlex.join(["python", "-m", "experiments.budgets", *sys.argv[1:]])),
        device=Device.model_validate(latencies.model_dump(include=set(Device.model_fields))),
        timed_networks=len(latencies.networks()),
        course=course,
        precision=supported_precision(torch.device("cpu")),
        rows=[],
    )
    networks = [(1.0, way) for way in (UNPRUNED, *presets)]
    networks += [(share, way) for share in shares for way in ways]
    with reproducible(course.threads), Progress() as progress:
        for seed in range(seeds):
            for data in names:
                trial = Trial(data, seed, course, latencies, runs, progress)
                for share, way in networks:
                    if time.monotonic() > deadline and not trial.file(share, way).exists():
                        continue
                    results.rows.append(trial.row(share, way))
                    results.write(out)
    click.echo(f"{table(results)}\n{equal_accuracy(results)}")


if __name__ == "__main__":
    main()
