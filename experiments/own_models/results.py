"""What the trials gave, and their table."""

from __future__ import annotations

from datetime import date as Date  # noqa: N812

from experiments.markdown import table as markdown_table
from experiments.own_models.trial import INSTRUCTION_SETS, Engine, Trial
from experiments.results import Made


class Results(Made):
    """All networks, in order."""

    date: Date
    trials: list[Trial]


def table(results: Results) -> str:
    """Markdown: a row for each network."""
    int8 = [f"INT8{'' if name == 'all' else f', {name}'}" for name in INSTRUCTION_SETS]
    head = ["network", "package", "exporter", "options", "opset", "pictures", "labels", "FP32", "FP16", *int8]
    rows = [
        [
            trial.name,
            ", ".join(package.replace("==", " ") for package in trial.packages),
            trial.exporter.strip(),
            f"`{trial.command.removeprefix('trimrt build model.onnx ')}`",
            str(trial.opset),
            str(trial.pictures),
            str(trial.labels),
            *(_right(trial.engine(precision), trial) for precision in ("fp32", "fp16")),
            *(_right(trial.engine("int8", name), trial) for name in INSTRUCTION_SETS),
        ]
        for trial in results.trials
    ]
    return markdown_table(head, rows, left=4)


def _right(engine: Engine | None, trial: Trial) -> str:
    if engine is None:
        return "not tried"
    if engine.refused is not None:
        return "refused"
    if engine.right == trial.pictures:
        return "all"
    return f"{100 * engine.right / trial.pictures:.1f} %"
