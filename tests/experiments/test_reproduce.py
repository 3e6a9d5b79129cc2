"""A study from its recipe to its result file, on few images and for few epochs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

import experiments.fold
import trimrt.compress
from experiments.fold import Engines, fold_folder, run_fold
from experiments.reproduce import reproduce
from experiments.results import Fold, Results
from experiments.study import STUDIES, Study, Variant
from models.checkpoint import load_checkpoint
from models.datasets import DataSplit
from models.recipe import Recipe, make_recipe

_SHORT = {
    "image": {"size": 16, "stem": "small"},
    "teacher": {"architecture": "resnet18", "epochs": 1, "batch_size": 16},
    "student": {"epochs": 1, "batch_size": 16},
    "distillation": {"views": 1},
    "pruning": {"ratio": 0.75, "epochs": 1, "batch_size": 16},
}
_RELAXED = experiments.fold.Gate(max_drop=1, min_agreement=0)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, data: DataSplit) -> Study:
    """Three networks and the engines of the last, on three of the digits."""
    folder = tmp_path_factory.mktemp("data") / "three-digits"
    for part, images, count in (("train", data.train, 16), ("test", data.test, 4)):
        for target in range(3):
            directory = folder / part / str(target)
            directory.mkdir(parents=True)
            for index in np.flatnonzero(images.targets == target)[:count]:
                shutil.copy(images.paths[index], directory)
    variants = (
        Variant("teacher", "teacher"),
        Variant("student", "student"),
        Variant("student-labels", "student", settings={"distillation": {"loss": "labels"}}),
        Variant("aggressive", engines=True),
    )
    return Study("three", str(folder), 1, variants, settings=_SHORT)


@pytest.fixture(scope="module")
def finished(study: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Fold]:
    """The folder of the runs, and what was measured."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        # A network of one epoch may lose more than a good one would.
        patch.setattr(experiments.fold, "Gate", lambda: _RELAXED)
        return runs, run_fold(study, 0, seed=0, threads=1, runs=runs, console=Console(quiet=True))


@pytest.mark.slow
class TestFold:
    def test_every_network_is_measured_as_its_card_says(self, finished: tuple[Path, Fold]) -> None:
        runs, fold = finished
        assert [network.name for network in fold.networks] == [
            "teacher",
            "student",
            "student-labels",
            "aggressive",
        ]
        for network in fold.networks:
            base = runs / "three-digits"
            folder = base if network.name in ("teacher", "student") else Path(f"{base}-{network.name}")
            role = {"student-labels": "student", "aggressive": "pruned"}.get(network.name, network.name)
            card = load_checkpoint(folder / role)[1]
            assert (network.wrong, network.images) == (card.metrics.wrong, 12)
            assert network.weights_sha256 == card.weights_sha256
            assert network.command == card.command

    def test_variants_take_the_folds_teacher(self, finished: tuple[Path, Fold]) -> None:
        runs, fold = finished
        teachers = {
            load_checkpoint(folder / "teacher")[1].weights_sha256 for folder in runs.glob("three-digits*")
        }
        assert teachers == {fold.network("teacher").weights_sha256}

    def test_engines_of_all_precisions(self, finished: tuple[Path, Fold]) -> None:
        _, fold = finished
        assert [engine.precision for engine in fold.engines] == ["fp32", "fp16", "int8", "int8-dynamic"]
        reference = fold.engine("aggressive", "fp32")
        assert reference is not None
        assert reference.wrong == fold.network("aggressive").wrong
        assert reference.max_logit_difference < 1e-3
        int8 = fold.engine("aggressive", "int8")
        assert int8 is not None
        assert reference.bytes / int8.bytes > 3.5

    def test_a_rerun_reuses_everything(self, study: Study, finished: tuple[Path, Fold]) -> None:
        runs, fold = finished
        again = run_fold(study, 0, seed=0, threads=1, runs=runs, console=Console(quiet=True))
        assert again == fold

    def test_what_a_fold_took_is_kept_when_it_is_only_measured_again(
        self, study: Study, finished: tuple[Path, Fold], tmp_path: Path
    ) -> None:
        shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
        file = tmp_path / "three-digits" / "peak-rss-mb.json"
        stages = json.loads(file.read_text(encoding="utf-8"))
        assert finished[1].peak_rss_mb == max(stages.values())
        file.write_text(json.dumps({**stages, "teacher": 1.0, "student": 1e6}), encoding="utf-8")
        again = run_fold(study, 0, seed=0, threads=1, runs=tmp_path, console=Console(quiet=True))
        assert again.peak_rss_mb == 1e6
        assert again.seconds == finished[1].seconds
        file.unlink()
        again = run_fold(study, 0, seed=0, threads=1, runs=tmp_path, console=Console(quiet=True))
        assert again.peak_rss_mb is None

    def test_engines_are_built_anew_for_other_weights(
        self, study: Study, finished: tuple[Path, Fold], tmp_path: Path
    ) -> None:
        shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
        file = tmp_path / "three-digits-aggressive" / "engines" / "result.json"
        kept = Engines.model_validate_json(file.read_text(encoding="utf-8"))
        file.write_text(
            kept.model_copy(update={"checkpoint_sha256": "0"}).model_dump_json(), encoding="utf-8"
        )
        with pytest.MonkeyPatch.context() as patch:
            strict = experiments.fold.Gate(max_drop=-1)  # no engine can gain a whole point of accuracy
            patch.setattr(experiments.fold, "Gate", lambda: strict)
            fold = run_fold(study, 0, seed=0, threads=1, runs=tmp_path, console=Console(quiet=True))
        assert fold.engines == []
        assert len(fold.refused) == 4
        assert all("at most -100 allowed" in words for words in fold.refused)


class TestStudies:
    @pytest.mark.parametrize("name", STUDIES)
    def test_the_recorded_command_has_the_same_recipe(self, name: str) -> None:
        study = STUDIES[name]
        for variant in study.variants:
            start = Path("runs/first/teacher") if study.start else None
            command = study.command(variant, 3, seed=2, threads=1, start=start).split()
            assert command[:2] == ["trimrt", "compress"]
            assert _typed(command[2:]) == study.recipe(variant, seed=2, threads=1, start=start)
            assert ("--fold" in command) == (study.folds > 1)

    @pytest.mark.parametrize("name", STUDIES)
    def test_a_fold_begins_with_the_teacher_and_student_that_others_take(self, name: str) -> None:
        names = [variant.name for variant in STUDIES[name].variants if variant.name != STUDIES[name].start]
        assert names[:2] == ["teacher", "student"]

    def test_folds_and_seeds_have_folders_of_their_own(self) -> None:
        folders = {
            fold_folder(Path("runs"), study, fold, seed)
            for study in (STUDIES["digits"], STUDIES["digits-unshuffled"], STUDIES["fashion-mnist"])
            for fold in range(study.folds)
            for seed in range(3)
        }
        assert len(folders) == 3 * (5 + 5 + 1)
        assert fold_folder(Path("runs"), STUDIES["digits"], 1, 0) == Path("runs/digits-fold1")


def _typed(arguments: list[str]) -> Recipe:
    """The recipe that `trimrt compress` makes of its arguments."""
    values = trimrt.compress.compress.make_context("compress", arguments).params
    options = {key: value for key, value in values.items() if "__" in key or key in ("seed", "threads")}
    overrides = trimrt.compress._overrides(options)
    return make_recipe(preset=values["preset"], file=values["config"], overrides=overrides)


class TestCommand:
    @pytest.mark.slow
    def test_result_file_of_finished_folds(
        self, study: Study, finished: tuple[Path, Fold], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # In a process of their own the folds do not know this study, so they are finished already.
        monkeypatch.setitem(STUDIES, "three", study)
        monkeypatch.setattr("experiments.reproduce._command", lambda *_: ["true"])
        monkeypatch.setattr(reproduce.params[0].type, "choices", [*reproduce.params[0].type.choices, "three"])
        result = CliRunner().invoke(
            reproduce, ["three", "--runs", str(finished[0]), "--results", str(tmp_path)]
        )
        assert result.exit_code == 0, result.output
        results = Results.model_validate_json((tmp_path / "three.json").read_text(encoding="utf-8"))
        assert results.folds == [finished[1]]
        assert results.command == "python -m experiments.reproduce three --folds 0"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--folds", "first"], "neither `all` nor numbers"),
            (["--folds", "5"], "digits has folds 0 to 4"),
            (["fashion-mnist", "--folds", "1"], "fashion-mnist has folds 0 to 0"),
            (["cifar"], "'digits'"),
        ],
    )
    def test_errors_say_what_to_do(self, arguments: list[str], message: str) -> None:
        result = CliRunner().invoke(reproduce, arguments)
        assert result.exit_code == 2
        assert message in result.output
