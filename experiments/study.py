"""What is trained: for each study its data, its recipe and the networks of a fold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from models.card import WEIGHTS_NAME, Role
from models.recipe import Recipe, Settings, as_options, make_recipe

_HERE: Final = Path(__file__).parent


@dataclass(frozen=True)
class Variant:
    """One network of a fold, made from the fold's teacher and, if it is pruned, from its student.

    Attributes:
        name: of its folder and in the results.
        role: the stage that makes it.
        settings: of the recipe, beyond the preset.
        engines: whether it is compiled, in all precisions.
    """

    name: str
    role: Role = "pruned"
    preset: str = "aligned"
    settings: Settings = field(default_factory=dict)
    engines: bool = False


@dataclass(frozen=True)
class Study:
    """Networks trained alike on every fold.

    Attributes:
        name: of its result file.
        source: the data set's name.
        folds: how many there are to hold out; 1 where the data comes with a test part.
        variants: ordered so that each finds the teacher and student that it takes from the fold's own run.
        settings: of all variants.
        config: file of settings, below them.
        seeds: runs of each fold, with seeds from 0.
        start: a teacher among the variants, whose weights that of all others begins with.
    """

    name: str
    source: str
    folds: int
    variants: tuple[Variant, ...]
    settings: Settings = field(default_factory=dict)
    config: Path | None = None
    seeds: int = 1
    start: str | None = None

    def recipe(self, variant: Variant, *, seed: int, threads: int, start: Path | None = None) -> Recipe:
        """The variant's recipe; `start` is the checkpoint that its teacher begins with."""
        settings = self._settings(variant, seed, threads, start)
        return make_recipe(preset=variant.preset, file=self.config, overrides=settings)

    def command(
        self, variant: Variant, fold: int, *, seed: int, threads: int, start: Path | None = None
    ) -> str:
        """The `trimrt compress` command of the same recipe."""
        words = ["trimrt compress", self.source]
        if self.folds > 1:
            words.append(f"--fold {fold}")
        if variant.preset != "aligned":
            words.append(f"--preset {variant.preset}")
        if self.config:
            words.append(f"--config {self.config.relative_to(_HERE.parent)}")
        if variant.role != "pruned":
            words.append(f"--until {variant.role}")
        recipe = self.recipe(variant, seed=seed, threads=threads, start=start)
        plain = make_recipe(preset=variant.preset, file=self.config)
        # The number of threads is told even where it is this machine's default.
        return " ".join([*words, *as_options(recipe, plain.model_copy(update={"threads": None}))])

    def _settings(self, variant: Variant, seed: int, threads: int, start: Path | None) -> Settings:
        weights = {"teacher": {"weights": start / WEIGHTS_NAME}} if start else {}
        return _merged(self.settings, variant.settings, weights, {"seed": seed, "threads": threads})


def _merged(*layers: Settings) -> Settings:
    merged: Settings = {}
    for layer in layers:
        for key, value in layer.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


_TEACHER: Final = Variant("teacher", "teacher")
_STUDENT: Final = Variant("student", "student")
_ALIGNED: Final = Variant("aligned", engines=True)
_AGGRESSIVE: Final = Variant("aggressive", preset="aggressive", engines=True)
_REPORT: Final = Variant("report", preset="report", engines=True)
_LABELS: Final = Variant("student-labels", "student", settings={"distillation": {"loss": "labels"}})

_PRUNED: Final = (replace(_REPORT, engines=False), replace(_AGGRESSIVE, engines=False))

# As long as the student and its fine-tuning together.
_NARROW: Final = (
    Variant(
        "narrow-report",
        preset="report",
        settings={"pruning": {"weights": "random", "epochs": 44, "learning_rate": 2e-3}},
    ),
    Variant(
        "narrow-aggressive",
        preset="aggressive",
        settings={"pruning": {"weights": "random", "epochs": 92, "learning_rate": 3e-3}},
    ),
)
_LOSSES: Final = tuple(
    Variant(
        f"student-{loss}-t{temperature}",
        "student",
        settings={"distillation": {"loss": loss, "temperature": temperature}},
    )
    for loss, temperature in (("kl", 1), ("dist", 1), ("dist", 4))
)

# Few epochs are too few for turned and scaled images alone: the last ones see images as they are.
_AUGMENTED: Final = Variant(
    "teacher-augmented",
    "teacher",
    settings={
        "augmentation": {"rotation": 5.0, "scale": 0.06, "shift": 0.06},
        "teacher": {"epochs": 6, "learning_rate": 1.5e-3},
    },
)

STUDIES: Final = {
    study.name: study
    for study in (
        Study("digits", "digits", 5, (_TEACHER, _STUDENT, _LABELS, _REPORT, _ALIGNED, _AGGRESSIVE)),
        Study("digits-controls", "digits", 5, (_TEACHER, _STUDENT, *_PRUNED, *_NARROW)),
        Study("digits-losses", "digits", 5, (_TEACHER, _STUDENT, *_LOSSES)),
        Study("digits-seeds", "digits", 5, (_TEACHER, _STUDENT, _AGGRESSIVE), seeds=3),
        Study(
            "digits-unshuffled",
            "digits-unshuffled",
            5,
            (_TEACHER, _STUDENT, _AGGRESSIVE),
            settings={"teacher": {"epochs": 16}},
        ),
        Study(
            "glyphs",
            "glyphs",
            5,
            (_TEACHER, _STUDENT, _LABELS, _AGGRESSIVE),
            config=_HERE / "glyphs.toml",
        ),
        Study(
            "fashion-mnist",
            "fashion-mnist",
            1,
            (_AUGMENTED, _TEACHER, _STUDENT, _AGGRESSIVE),
            config=_HERE / "fashion-mnist.toml",
            start=_AUGMENTED.name,
        ),
    )
}
