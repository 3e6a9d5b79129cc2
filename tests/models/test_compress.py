"""`trimrt compress`, from image files to three checkpoints."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from short_run import SHORT

from models.checkpoint import load_checkpoint
from models.datasets import DataSplit, open_dataset
from models.evaluation import count_parameters, evaluate
from models.inputs import choose_inputs
from models.preprocessing import IMAGENET_MEAN
from models.recipe import make_recipe
from trimrt.cli import main
from trimrt.compress import compress

STAGES = ("teacher", "student", "pruned")

Compress = Callable[..., Result]


@pytest.fixture
def run() -> Compress:
    def invoke(*arguments: str | Path, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["compress", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result

    return invoke


def weights(folder: Path) -> dict[str, str]:
    """The hash of each stage's weights."""
    return {stage: load_checkpoint(folder / stage)[1].weights_sha256 for stage in STAGES}


def stopped(line: str, number: signal.Signals, data: Path, out: Path, *more: str) -> tuple[int, str]:
    """Exit status of a run that gets a signal at a line that begins so, and what it prints from then on."""
    command = [sys.executable, "-m", "trimrt", "compress", str(data), "--out", str(out), *SHORT, *more]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Whoever runs the tests in the background may have had them ignore the signal.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        for printed in process.stdout:
            if printed.startswith(line):
                process.send_signal(number)
                break
        rest = process.stdout.read()
    return process.returncode, rest


class TestRun:
    def test_checkpoints_hold_what_their_cards_say(
        self, finished: tuple[Path, str], split: DataSplit
    ) -> None:
        for stage in STAGES:
            network, card = load_checkpoint(finished[0] / stage)
            assert card.role == stage
            assert card.dataset == split.card()
            assert card.metrics.parameters == count_parameters(network)
            assert card.metrics.live_parameters > 0.95
            score = evaluate(
                network, split.test.load_pixels(card.preprocessing), split.test.targets, card.preprocessing
            )
            assert (score.accuracy, score.wrong) == (card.metrics.accuracy, card.metrics.wrong)
            assert score.loss == pytest.approx(card.metrics.loss, rel=1e-6)

    def test_names_and_lineage(self, finished: tuple[Path, str], split: DataSplit) -> None:
        teacher, student, pruned = (load_checkpoint(finished[0] / stage)[1] for stage in STAGES)
        names = [f"{split.name}-{suffix}" for suffix in ("resnet18", "resnet18-unpruned", "resnet18")]
        assert [teacher.name, student.name, pruned.name] == names
        assert [ancestor.weights_sha256 for ancestor in pruned.lineage] == [
            teacher.weights_sha256,
            student.weights_sha256,
        ]
        assert pruned.metrics.parameters <= 0.77 * student.metrics.parameters

    def test_card_records_recipe_and_command(self, finished: tuple[Path, str], few_digits: Path) -> None:
        _, card = load_checkpoint(finished[0] / "pruned")
        assert card.command.startswith(f"trimrt compress {few_digits} --out ")
        recipe = make_recipe(overrides={key: card.recipe[key] for key in ("teacher", "student", "pruning")})
        assert (recipe.teacher.epochs, recipe.student.epochs, recipe.pruning.round_to) == (1, 2, 16)

    def test_ends_with_a_table_and_what_to_do_next(self, finished: tuple[Path, str]) -> None:
        out, output = finished
        assert "measured on 12 test images" in output
        assert f"trimrt build {out / 'pruned'}" in output

    def test_begins_with_an_estimate_and_ends_with_what_came_of_it(self, finished: tuple[Path, str]) -> None:
        _, output = finished
        assert re.search(r"this will take about \d+ s \(teacher \d+ s, its labels \d+ s, student", output)
        assert output.index("this will take") < output.index("teacher: few-digits")
        assert re.search(r"this took \d+ s; about \d+ s were estimated", output)

    def test_leaves_no_training_state_behind(self, finished: tuple[Path, str]) -> None:
        assert not list(finished[0].rglob("*.pt"))
        assert {path.name for path in finished[0].iterdir()} == {*STAGES, ".training"}


class TestRerun:
    def test_finished_stages_are_reused(
        self, run: Compress, finished: tuple[Path, str], few_digits: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
        result = run(few_digits, "--out", tmp_path, *SHORT)
        assert result.output.count("is finished already") == 3
        assert weights(tmp_path) == weights(finished[0])

    @pytest.mark.slow
    def test_elsewhere_it_comes_out_the_same(
        self, run: Compress, finished: tuple[Path, str], few_digits: Path, tmp_path: Path
    ) -> None:
        run(few_digits, "--out", tmp_path, *SHORT)
        assert weights(tmp_path) == weights(finished[0])

    def test_only_what_changed_is_made_anew(
        self, run: Compress, finished: tuple[Path, str], few_digits: Path, tmp_path: Path
    ) -> None:
        ratio = ["--pruning-ratio", "0.5", "--pruning-steps", "2"]
        result = run(few_digits, "--out", tmp_path, "--reuse", finished[0], *SHORT, *ratio)
        assert result.output.count("is finished already") == 2
        before, after = weights(finished[0]), weights(tmp_path)
        assert [before[stage] == after[stage] for stage in STAGES] == [True, True, False]
        plan = load_checkpoint(tmp_path / "pruned")[1].channel_plan
        assert plan is not None
        assert plan["fc"] == {"in_features": 256}

    def test_a_damaged_stage_is_made_anew(
        self, run: Compress, finished: tuple[Path, str], few_digits: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
        (tmp_path / "pruned" / "student.safetensors").write_bytes(b"")
        result = run(few_digits, "--out", tmp_path, *SHORT)
        assert "pruned: made again" in result.output
        assert weights(tmp_path) == weights(finished[0])

    @pytest.mark.slow
    def test_interrupted_it_says_so_and_leaves_whole_stages_only(
        self, few_digits: Path, tmp_path: Path
    ) -> None:
        # The teacher is published, and the student is next.
        status, rest = stopped("teacher:", signal.SIGINT, few_digits, tmp_path, "--student-epochs", "1000")
        assert status == 1
        assert "continues from here" in rest
        assert "Traceback" not in rest
        load_checkpoint(tmp_path / "teacher")
        assert {path.name for path in tmp_path.iterdir()} <= {"teacher", ".training"}

    @pytest.mark.parametrize(
        ("number", "status"),
        [
            pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
            pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
        ],
    )
    def test_the_same_command_ends_as_if_nothing_had_stopped_it(
        self,
        number: signal.Signals,
        status: int,
        run: Compress,
        finished: tuple[Path, str],
        few_digits: Path,
        tmp_path: Path,
    ) -> None:
        assert stopped("this will take about", number, few_digits, tmp_path)[0] == status
        assert not (tmp_path / "pruned").exists()
        run(few_digits, "--out", tmp_path, *SHORT)
        assert weights(tmp_path) == weights(finished[0])
        assert not list(tmp_path.rglob("*.pt"))


class TestChoices:
    @pytest.mark.slow
    def test_target_instead_of_a_ratio(
        self, run: Compress, finished: tuple[Path, str], few_digits: Path, tmp_path: Path
    ) -> None:
        target = ["--pruning-target-parameters", "0.25", "--pruning-target-macs", "0.9"]
        run(few_digits, "--out", tmp_path, "--reuse", finished[0], *SHORT, *target)
        _, student = load_checkpoint(tmp_path / "student")
        _, pruned = load_checkpoint(tmp_path / "pruned")
        assert 0.2 < pruned.metrics.parameters / student.metrics.parameters <= 0.25
        assert pruned.recipe["pruning"]["ratio"] == pytest.approx(0.5, abs=0.05)

    @pytest.mark.slow
    def test_pretrained_teacher_with_another_head(
        self, run: Compress, finished: tuple[Path, str], few_digits: Path, tmp_path: Path
    ) -> None:
        state = load_checkpoint(finished[0] / "teacher")[0].state_dict()
        file = tmp_path / "imagenet.pth"
        torch.save(state | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, file)
        result = run(
            few_digits, "--out", tmp_path / "out", *SHORT, "--teacher-weights", file, "--teacher-epochs", 0
        )
        assert "trained from scratch: fc.weight, fc.bias" in result.output
        network, card = load_checkpoint(tmp_path / "out" / "teacher")
        assert torch.equal(network.get_parameter("layer4.0.conv1.weight"), state["layer4.0.conv1.weight"])
        assert card.preprocessing.mean == IMAGENET_MEAN

    def test_a_teacher_that_begins_with_our_own_checkpoint_keeps_its_normalisation(
        self, run: Compress, finished: tuple[Path, str], few_digits: Path, tmp_path: Path
    ) -> None:
        file = finished[0] / "teacher" / "student.safetensors"
        run(few_digits, "--out", tmp_path, *SHORT, "--teacher-weights", file, "--until", "teacher")
        before, after = (load_checkpoint(folder / "teacher")[1] for folder in (finished[0], tmp_path))
        assert after.preprocessing == before.preprocessing
        assert after.preprocessing.mean != IMAGENET_MEAN
        assert after.weights_sha256 != before.weights_sha256

    @pytest.mark.slow
    def test_dead_weights_are_warned_of(self, run: Compress, few_digits: Path, tmp_path: Path) -> None:
        small = ["--image-size", "32", "--image-stem", "standard"]
        result = run(few_digits, "--out", tmp_path, *SHORT, *small)
        assert "warning: only 38% of resnet18's parameters receive a gradient" in result.output

    @pytest.mark.parametrize(
        ("side", "size", "resize", "stem"),
        [(8, 24, 24, "small"), (40, 40, 40, "small"), (120, 224, 256, "standard")],
    )
    def test_inputs_fit_the_images(
        self, tmp_path: Path, side: int, size: int, resize: int, stem: str
    ) -> None:
        for label in ("a", "b"):
            (tmp_path / label).mkdir()
            for index in range(10):
                pixels = np.full((side, side + 7, 3), 25 * index, np.uint8)
                Image.fromarray(pixels).save(tmp_path / label / f"{label}{index}.png")
        data = open_dataset(str(tmp_path))
        spec, chosen = choose_inputs(data.train, make_recipe())
        assert (spec.height, spec.width, spec.resize, chosen) == (size, size, resize, stem)
        values = data.train.load_pixels(spec) / 255
        assert spec.mean == pytest.approx(values.mean(axis=(0, 1, 2)), abs=1e-3)
        assert spec.std == pytest.approx(values.std(axis=(0, 1, 2)), abs=1e-3)

    @pytest.mark.slow
    def test_networks_of_timm(self, run: Compress, few_digits: Path, tmp_path: Path) -> None:
        names = ["--teacher-architecture", "timm:test_resnet", "--student-architecture", "timm:lcnet_035"]
        run(few_digits, "--out", tmp_path, *SHORT, *names, "--pruning-ratio", "0.5")
        _, teacher = load_checkpoint(tmp_path / "teacher")
        _, student = load_checkpoint(tmp_path / "student")
        network, pruned = load_checkpoint(tmp_path / "pruned")
        assert (teacher.architecture, pruned.architecture) == ("timm:test_resnet", "timm:lcnet_035")
        assert teacher.name.endswith("-timm-test_resnet")
        assert pruned.metrics.parameters == count_parameters(network) < 0.8 * student.metrics.parameters

    @pytest.mark.slow
    def test_what_cannot_be_pruned_can_be_a_student_all_the_same(
        self, run: Compress, few_digits: Path, tmp_path: Path
    ) -> None:
        names = ["--teacher-architecture", "regnet_x_400mf", "--student-architecture", "shufflenet_v2_x0_5"]
        run(few_digits, "--out", tmp_path, *SHORT, *names, "--until", "student")
        assert load_checkpoint(tmp_path / "student")[1].architecture == "shufflenet_v2_x0_5"

    @pytest.mark.slow
    def test_until_the_student(self, run: Compress, few_digits: Path, tmp_path: Path) -> None:
        run(few_digits, "--out", tmp_path, *SHORT, "--until", "student")
        assert {path.name for path in tmp_path.iterdir()} == {"teacher", "student", ".training"}

    @pytest.mark.slow
    def test_without_distillation_the_teachers_views_are_the_same(
        self, run: Compress, finished: tuple[Path, str], few_digits: Path, tmp_path: Path
    ) -> None:
        labels = ["--distillation-loss", "labels", "--until", "student"]
        result = run(few_digits, "--out", tmp_path, "--reuse", finished[0], *SHORT, *labels)
        assert result.output.count("is finished already") == 1
        assert not (tmp_path / ".training" / "views.safetensors").exists()  # the other run's served
        student = load_checkpoint(tmp_path / "student")[1]
        assert student.weights_sha256 != weights(finished[0])["student"]
        assert student.recipe["distillation"]["loss"] == "labels"

    def test_random_weights_as_a_control(
        self, run: Compress, finished: tuple[Path, str], few_digits: Path, tmp_path: Path
    ) -> None:
        random = ["--pruning-weights", "random", "--pruning-epochs", "0"]
        run(few_digits, "--out", tmp_path, "--reuse", finished[0], *SHORT, *random)
        kept, _ = load_checkpoint(finished[0] / "pruned")
        drawn, _ = load_checkpoint(tmp_path / "pruned")
        old, new = kept.state_dict(), drawn.state_dict()
        assert {name: tensor.shape for name, tensor in old.items()} == {n: t.shape for n, t in new.items()}
        assert not any(torch.equal(old[name], new[name]) for name, tensor in old.items() if tensor.ndim > 1)
        assert not new["layer1.0.bn2.weight"].any()  # residual branches start at zero

    @pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
    def test_the_card_says_what_it_was_trained_in(
        self, run: Compress, few_digits: Path, tmp_path: Path, precision: str
    ) -> None:
        result = run(few_digits, "--out", tmp_path, *SHORT, "--precision", precision, "--until", "teacher")
        assert f"training in {precision}" in result.output
        network, card = load_checkpoint(tmp_path / "teacher")
        assert card.recipe["precision"] == precision
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere"], "no such file or folder: nowhere"),
            (["digits", "--fold", "7"], "0<=x<=4"),
            (["digits", "--pruning-ratio", "2"], "pruning.ratio: input should be less than 1, not 2.0"),
            (["digits", "--config", "missing.toml"], "no such file or folder: missing.toml"),
            (
                ["{data}", "--teacher-architecture", "resnet19"],
                "no classifier 'resnet19' (did you mean",
            ),
            (["{data}", "--student-architecture", "timm:resnet19"], "timm has no classifier 'resnet19'"),
            (
                ["{data}", "--teacher-architecture", "alexnet", "--image-size", "8"],
                "alexnet cannot take 8x8 images",
            ),
            (["{data}", "--teacher-architecture", "vit_b_16"], "--image-stem standard"),
            (
                ["{data}", "--teacher-architecture", "vit_b_16", "--image-stem", "standard"],
                "Expected 224 but got 24!; choose another --image-size (it is made for 224), or another",
            ),
            (
                [
                    "{data}",
                    "--student-architecture",
                    "inception_v3",
                    "--image-size=48",
                    "--image-stem=standard",
                ],
                "inception_v3 cannot take 48x48 images",
            ),
            (
                ["{data}", "--student-architecture", "shufflenet_v2_x0_5"],
                "docs/architectures.md lists what can be",
            ),
            (
                [
                    "{data}",
                    "--student-architecture",
                    "convnext_tiny",
                    "--image-stem=standard",
                    "--image-size=64",
                ],
                "convolutions, batch normalisations and linear layers, in CNBlock, LayerNorm",
            ),
            (
                ["{data}", "--student-architecture", "alexnet", "--image-size", "8"],
                "alexnet cannot take 8x8 images",
            ),
            (["{data}", "--teacher-weights", "missing.pth"], "cannot read weights from missing.pth"),
        ],
    )
    def test_a_message_and_no_traceback(
        self, few_digits: Path, tmp_path: Path, run: Compress, arguments: list[str], message: str
    ) -> None:
        given = [argument.format(data=few_digits) for argument in arguments]
        code = 2 if any(option in given for option in ("--fold", "--pruning-ratio", "--config")) else 1
        result = run(*SHORT, "--out", tmp_path / "out", *given, code=code)
        assert message in " ".join(result.output.split())
        assert "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit)
        assert not (tmp_path / "out").exists()

    def test_no_place_to_write(self, run: Compress, few_digits: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        result = run(few_digits, "--out", tmp_path / "file" / "out", *SHORT, code=1)
        assert "Error:" in result.output
        assert isinstance(result.exception, SystemExit)


class TestHelp:
    def test_names_every_setting_with_its_default(self, run: Compress) -> None:
        text = " ".join(run("--help").output.split())
        assert "--teacher-weights" in text
        assert (
            "--pruning-round-to INTEGER channel counts become multiples of this; 1 leaves them [default: 16]"
            in text
        )
        for section in ("Image:", "Augmentation:", "Teacher:", "Student:", "Distillation:", "Pruning:"):
            assert section in text

    def test_every_setting_of_the_recipe_has_an_option(self) -> None:
        def leaves(settings: dict, prefix: str = "") -> set[str]:
            found: set[str] = set()
            for key, value in settings.items():
                path = f"{prefix}{key}".replace("_", "-")
                found |= leaves(value, f"{path}-") if isinstance(value, dict) else {f"--{path}"}
            return found

        options = {option for parameter in compress.params for option in parameter.opts}
        assert leaves(json.loads(make_recipe().model_dump_json())) <= options
