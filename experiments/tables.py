"""`python -m experiments.tables`: the tables of docs and README, from the result files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Final, get_args

import click
from rich.console import Console

from experiments import architectures, budget_results, calibration, ladder, predictions, qat, training_cost
from experiments.markdown import megabytes, percent, percents, spread, table
from experiments.onnx_forms import results as onnx_forms
from experiments.own_models import results as own_models
from experiments.results import FOLDER, Engine, Fold, Made, Network, Results
from models.files import replace_file
from runtime.manifest import Precision
from trimrt.options import HELP
from trimrt.report.statistics import wilson_interval

ROOT: Final = Path(__file__).parent.parent

DOCUMENTS: Final = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("results", "architectures", "your-model")),
)

# The report that TrimRT starts from, "Inference Efficient Vision Models": its three tables.
_REPORT_TRAINING: Final = {"teacher": ("99.44 %", "0.0219"), "student": ("100 %", "0.0067")}
_REPORT_QUANTISATION: Final = {
    "fp32": ("36.16 MB", "1x", "99.72 %"),
    "fp16": ("18.11 MB", "2x", "100 %"),
    "int8": ("9.06 MB", "3.95x", "96.66 to 98.88 %"),
    "int8-dynamic": ("36.16 MB", "1x", "100 %"),
}

NAMES: Final = {
    "teacher-augmented": "teacher, ResNet50, its first six epochs",
    "teacher": "teacher, ResNet50",
    "student": "student, ResNet18, distilled",
    "student-labels": "student without distillation",
    "report": "pruned, preset `report`",
    "aligned": "pruned, preset `aligned`",
    "aggressive": "pruned, preset `aggressive`",
    "narrow-report": "as narrow as `report`, from random weights",
    "narrow-aggressive": "as narrow as `aggressive`, from random weights",
    "student-kl-t1": "student, KL divergence, temperature 1",
    "student-dist-t1": "student, DIST, temperature 1",
    "student-dist-t4": "student, DIST, temperature 4",
}
PRECISIONS: Final = {"fp32": "FP32", "fp16": "FP16", "int8": "static INT8", "int8-dynamic": "dynamic INT8"}


def _pooled(items: Sequence[Network | Engine]) -> tuple[int, int]:
    return sum(item.wrong for item in items), sum(item.images for item in items)


def _accuracies(items: Sequence[Network | Engine]) -> str:
    return percents([1 - item.wrong / item.images for item in items])


def _wrong(items: Sequence[Network | Engine]) -> str:
    wrong, images = _pooled(items)
    return f"{wrong} of {images}"


def _interval(items: Sequence[Network | Engine]) -> str:
    wrong, images = _pooled(items)
    low, high = wilson_interval(images - wrong, images)
    return f"{100 * low:.2f} to {100 * high:.2f} %"


def _networks(results: Results, name: str) -> list[Network]:
    return [network for fold in results.folds for network in fold.networks if network.name == name]


def _engines(results: Results, network: str, precision: Precision) -> list[Engine]:
    found = [fold.engine(network, precision) for fold in results.folds]
    return [engine for engine in found if engine is not None]


def _first(fold: Fold, name: str) -> str:
    network = fold.network(name)
    return percent(1 - network.wrong / network.images)


def training(results: Results) -> str:
    """Teacher and students: the report's first table beside ours."""
    first = results.folds[0]
    rows = []
    for name in ("teacher", "student", "student-labels"):
        theirs = _REPORT_TRAINING.get(name, ("", ""))
        ours = _networks(results, name)
        rows.append(
            [
                NAMES[name],
                *theirs,
                _first(first, name),
                _accuracies(ours),
                spread([network.loss for network in ours], "{:.4f}".format),
                _wrong(ours),
                _interval(ours),
            ]
        )
    head = ["", "report, fold 0", "its loss", f"ours, fold {first.fold}", _folds(results), "loss", "wrong"]
    return table([*head, "95 % interval"], rows)


def _folds(results: Results) -> str:
    return f"{len(results.folds)} folds" if len(results.folds) > 1 else "test images"


def pruning(results: Results) -> str:
    """The pruned students: the report's second table beside ours."""
    first, rows = results.folds[0], []
    baseline = _networks(results, "student")
    for name in ("student", "report", "aligned", "aggressive"):
        ours = _networks(results, name)
        theirs = {"student": ("11.7 M", ""), "report": ("9.02 M", "99.72 %")}.get(name, ("", ""))
        rows.append(
            [
                NAMES[name],
                *theirs,
                f"{ours[0].parameters / 1e6:.3f} M",
                f"{ours[0].parameters / baseline[0].parameters - 1:+.1%}" if ours[0] != baseline[0] else "",
                f"{ours[0].macs / 1e6:.1f} M",
                _first(first, name),
                _accuracies(ours),
                _wrong(ours),
                percent(min(network.live_parameters for network in ours)),
            ]
        )
    head = ["", "report: parameters", "accuracy", "ours: parameters", "", "MACs", f"fold {first.fold}"]
    return table([*head, _folds(results), "wrong", "alive"], rows)


def quantisation(results: Results, network: str) -> str:
    """The engines of one network: the report's third table beside ours, where it has that network."""
    rows = []
    reference = _engines(results, network, "fp32")
    for precision in get_args(Precision):
        ours = _engines(results, network, precision)
        theirs = list(_REPORT_QUANTISATION[precision]) if network == "report" else []
        if not ours:
            rows.append([PRECISIONS[precision], *theirs, "refused by the gate", *[""] * 5])
            continue
        size = fmean(engine.bytes for engine in ours)
        rows.append(
            [
                PRECISIONS[precision],
                *theirs,
                megabytes(size),
                f"{fmean(engine.bytes for engine in reference) / size:.2f}x",
                _accuracies(ours),
                _wrong(ours),
                percent(min(engine.agreement for engine in ours)),
                f"{max(engine.max_logit_difference for engine in ours):.4f}",
            ]
        )
    theirs = ["report: size", "", "accuracy"] if network == "report" else []
    head = [*theirs, "size", "", _folds(results), "wrong", "worst agreement", "worst logit difference"]
    return table(["", *head], rows)


def networks(results: Results, *names: str) -> str:
    """Some networks of a study, in FP32."""
    rows = []
    for name in names:
        ours = _networks(results, name)
        rows.append(
            [
                NAMES[name],
                f"{ours[0].parameters / 1e6:.3f} M",
                percents([network.validation_accuracy for network in ours]),
                _accuracies(ours),
                percent(min(1 - network.wrong / network.images for network in ours)),
                spread([network.loss for network in ours], "{:.4f}".format),
                _wrong(ours),
                _interval(ours),
            ]
        )
    head = ["", "parameters", "validation", _folds(results), "worst", "loss", "wrong", "95 % interval"]
    return table(head, rows)


def seeds(results: Results, *names: str) -> str:
    """Some networks of a study, and what they became in static INT8, by seed: the same test images each."""
    rows = []
    for name in names:
        ours = _networks(results, name)
        rows.append([NAMES[name], *_by_seed(ours)])
        if engines := _engines(results, name, "int8"):
            rows.append([f"{NAMES[name]}, static INT8", *_by_seed(engines)])
    return table(["wrong", *(f"seed {fold.seed}" for fold in results.folds), "accuracy"], rows)


def _by_seed(items: Sequence[Network | Engine]) -> list[str]:
    return [*(f"{item.wrong} of {item.images}" for item in items), _accuracies(items)]


def losses(results: Results) -> str:
    """The student learning by several losses: validation, which settings are chosen by, and test."""
    rows = []
    for name in ("student", *(name for name in NAMES if name.startswith(("student-kl", "student-dist")))):
        ours = _networks(results, name)
        rows.append(
            [
                "student, KL divergence, temperature 4" if name == "student" else NAMES[name],
                percents([network.validation_accuracy for network in ours]),
                _accuracies(ours),
                spread([network.loss for network in ours], "{:.4f}".format),
                _wrong(ours),
            ]
        )
    return table(["", "validation", _folds(results), "loss", "wrong"], rows)


def summary(results: Results) -> str:
    """All networks of a study and their engines, the best known first line for a reader in a hurry."""
    rows = []
    names = [network.name for network in results.folds[0].networks]
    baseline = max(network.bytes for network in results.folds[0].networks)
    for name in names:
        ours = _networks(results, name)
        size = fmean(network.bytes for network in ours)
        rows.append([NAMES[name], "FP32", *_summary_cells(ours, size, baseline, ours)])
        for precision in get_args(Precision)[1:]:
            engines = _engines(results, name, precision)
            if engines:
                size = fmean(engine.bytes for engine in engines)
                rows.append(["", PRECISIONS[precision], *_summary_cells(engines, size, baseline, ours)])
    head = ["", "parameters", "size", "", f"accuracy, {_folds(results)}", "wrong"]
    return table(["network", *head], rows, left=2)


def _summary_cells(
    items: Sequence[Network | Engine], size: float, baseline: int, networks: Sequence[Network]
) -> list[str]:
    parameters = f"{networks[0].parameters / 1e6:.2f} M" if items is networks else ""
    return [parameters, megabytes(size), f"{baseline / size:.1f}x", _accuracies(items), _wrong(items)]


def cost(results: Results) -> str:
    """What a fold costs, where it was recorded."""
    rows = []
    for fold in results.folds:
        minutes = f"{fold.seconds / 60:.1f}" if fold.seconds is not None else "not recorded"
        memory = f"{fold.peak_rss_mb / 1000:.2f} GB" if fold.peak_rss_mb is not None else "not recorded"
        rows.append([str(fold.fold), str(fold.threads), minutes, memory])
    return table(["fold", "threads", "minutes", "largest memory"], rows)


def machine(made: Made) -> str:
    """Where and by what command something was measured."""
    where = made.machine
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    training = ""
    if isinstance(made, Results):
        first = made.folds[0]
        threads = f"{first.threads} thread{'s' if first.threads > 1 else ''} a fold"
        training = f", {threads}, trained in {first.training_precision}, measured in FP32"
    return (
        f"Made by `{made.command}` on {where.cores} cores of an {where.processor} without GPU "
        f"({where.memory_gb:g} GB, Python {where.python}){training}; {versions}.\n"
    )


MARKER: Final = re.compile(r"(<!-- results: ([a-z-]+) ([a-z0-9 -]+?) -->\n).*?(<!-- /results -->)", re.DOTALL)
_FILES: Final[dict[str, type[Made]]] = {
    "architectures": architectures.Results,
    "budgets": budget_results.Results,
    "calibration": calibration.Results,
    "ladder": ladder.Results,
    "onnx-forms": onnx_forms.Results,
    "own-models": own_models.Results,
    "predictions": predictions.Results,
    "qat": qat.Results,
    "training-cost": training_cost.Results,
}
_RENDERERS: Final[dict[str, Callable[..., str]]] = {
    "architectures": architectures.table,
    "budgets": budget_results.table,
    "equal-accuracy": budget_results.equal_accuracy,
    "calibration": calibration.table,
    "forms": onnx_forms.table,
    "ladder": ladder.table,
    "own-models": own_models.table,
    "predictions": predictions.table,
    "qat": qat.table,
    "training-cost": training_cost.table,
    "abilities": architectures.summary,
    "training": training,
    "pruning": pruning,
    "quantisation": quantisation,
    "networks": networks,
    "seeds": seeds,
    "losses": losses,
    "summary": summary,
    "cost": cost,
    "machine": machine,
}


def render(text: str, folder: Path = FOLDER) -> str:
    """`text` with the parts between its markers replaced.

    A marker is `<!-- results: FILE TABLE [NAMES] -->`, closed by `<!-- /results -->`; FILE is a study's
    name, or that of an experiment of its own.

    Raises:
        FileNotFoundError: of what was not run.
    """

    def block(match: re.Match[str]) -> str:
        kind, *names = match[3].split()
        content = (folder / f"{match[2]}.json").read_text(encoding="utf-8")
        results = _FILES.get(match[2], Results).model_validate_json(content)
        return f"{match[1]}\n{_RENDERERS[kind](results, *names)}\n{match[4]}"

    return MARKER.sub(block, text)


@click.command(context_settings=HELP)
def main() -> None:
    """Bring the tables in README.md and docs up to date with experiments/results."""
    console = Console()
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        try:
            new = render(text)
        except FileNotFoundError as error:
            name = Path(str(error.filename)).stem
            command = name if name in _FILES else f"reproduce {name}"
            raise click.ClickException(
                f"{path.name} has a table of {name}; run `python -m experiments.{command}` first"
            ) from None
        if new != text:
            with replace_file(path) as file:
                file.write_text(new, encoding="utf-8")
        console.print(f"{path.name}: {'changed' if new != text else 'is up to date'}")


if __name__ == "__main__":
    main()
