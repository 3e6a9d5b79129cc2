"""One fold of a study: its networks, their engines, and both measured on the part held out.

Run by experiments.reproduce in a process of its own. Finished stages are kept; a rerun continues.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, get_args

from pydantic import BaseModel
from rich.console import Console

from builder.compile.packages import build_package
from builder.compile.targets.choice import open_target
from builder.compile.targets.openvino.target import GRAPH_NAME
from builder.compile.verification import Gate, GateError, compare
from builder.kit import VerificationSet
from builder.prepare.options import PrepareOptions
from builder.prepare.preparation import open_checkpoint, prepare
from experiments.graphs import held_out_images
from experiments.results import Engine, Fold, Network
from experiments.study import STUDIES, Study, Variant
from models.card import WEIGHTS_NAME, Card, Metrics
from models.compression import compress
from models.files import replace_file
from runtime.loading import load_engine
from runtime.manifest import BatchSizes, Manifest, Precision

RESULT: Final = "result.json"

_TIMES: Final = "seconds.json"
_MEMORY: Final = "peak-rss-mb.json"
_BATCH: Final = BatchSizes(min=1, opt=8, max=32)


def fold_folder(runs: Path, study: Study, fold: int, seed: int) -> Path:
    """Where the fold's own run is; those of other variants are beside it."""
    parts = [
        Path(study.source).name,
        *([f"fold{fold}"] if study.folds > 1 else []),
        *([f"seed{seed}"] if seed else []),
    ]
    return runs / "-".join(parts)


def run_fold(study: Study, fold: int, *, seed: int, threads: int, runs: Path, console: Console) -> Fold:
    """Make all networks and engines of the fold, or take them where they are finished.

    Returns:
        What they do on the test images; also written to the fold's folder.
    """
    base = fold_folder(runs, study, fold, seed)
    compiled = [variant for variant in study.variants if variant.engines]
    stages = len(study.variants) + len(compiled)

    def start(variant: Variant) -> Path | None:
        """The checkpoint that the variant's teacher begins with."""
        if study.start is None or study.start == variant.name:
            return None
        first = next(other for other in study.variants if other.name == study.start)
        return _variant_folder(base, first) / first.role

    networks: list[Network] = []
    engines: list[Engines] = []
    precision = ""
    for number, variant in enumerate(study.variants, 1):
        _say(console, f"[{number}/{stages}] {base.name}: {variant.name}")
        folder = _variant_folder(base, variant)
        command = study.command(variant, fold, seed=seed, threads=threads, start=start(variant))
        with _cost_kept(base, variant.name, unless=folder / variant.role):
            card = compress(
                study.source,
                folder,
                study.recipe(variant, seed=seed, threads=threads, start=start(variant)),
                fold=fold,
                until=variant.role,
                reuse=None if folder == base else base,
                console=console,
                command=command,
            ).cards[-1]
        precision = card.recipe["precision"]
        networks.append(_network(variant, card, folder / variant.role, command))
    for number, variant in enumerate(compiled, len(study.variants) + 1):
        _say(console, f"[{number}/{stages}] {base.name}: {variant.name} engines")
        file = _variant_folder(base, variant) / "engines" / RESULT
        with _cost_kept(base, f"{variant.name} engines", unless=file):
            engines.append(_engines(variant, file, console))
    labels = [variant.name for variant in study.variants] + [
        f"{variant.name} engines" for variant in compiled
    ]
    times, memory = _read(base / _TIMES), _read(base / _MEMORY)
    result = Fold(
        fold=fold,
        seed=seed,
        threads=threads,
        training_precision=precision,
        networks=[n.model_copy(update={"seconds": times.get(n.name)}) for n in networks],
        engines=[engine for some in engines for engine in some.engines],
        refused=[words for some in engines for words in some.refused],
        seconds=sum(times[label] for label in labels) if times.keys() >= set(labels) else None,
        peak_rss_mb=max(memory[label] for label in labels) if memory.keys() >= set(labels) else None,
    )
    with replace_file(base / f"{study.name}-{RESULT}") as new:
        new.write_text(result.model_dump_json(indent=1), encoding="utf-8")
    return result


class Engines(BaseModel):
    """All engines of one checkpoint."""

    checkpoint_sha256: str
    engines: list[Engine] = []
    refused: list[str] = []


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _variant_folder(base: Path, variant: Variant) -> Path:
    return base if variant.name == variant.role else base.with_name(f"{base.name}-{variant.name}")


def _network(variant: Variant, card: Card, checkpoint: Path, command: str) -> Network:
    shown = set(Network.model_fields) & set(Metrics.model_fields)
    return Network(
        **card.metrics.model_dump(include=shown),
        name=variant.name,
        bytes=(checkpoint / WEIGHTS_NAME).stat().st_size,
        weights_sha256=card.weights_sha256,
        command=command,
        seconds=None,
    )


def _engines(variant: Variant, file: Path, console: Console) -> Engines:
    """Compile the checkpoint in all precisions, and measure each engine on the test images."""
    checkpoint = file.parent.parent / variant.role
    subject = open_checkpoint(checkpoint, None)
    sha256 = subject.student.checkpoint_sha256
    if file.exists():
        kept = Engines.model_validate_json(file.read_text(encoding="utf-8"))
        if kept.checkpoint_sha256 == sha256:
            return kept
    made = Engines(checkpoint_sha256=str(sha256))
    test = held_out_images(subject)
    with tempfile.TemporaryDirectory(prefix="trimrt-") as workspace, console.status("") as status:
        prepared = prepare(subject, Path(workspace), PrepareOptions(), status.update)
        for precision in get_args(Precision):
            try:
                package = build_package(
                    prepared,
                    open_target("openvino"),
                    precision,
                    file.parent,
                    batch=_BATCH,
                    gate=Gate(),
                    command=f"trimrt build {checkpoint} --precision {precision}",
                    report=status.update,
                    replace=True,
                )
            except GateError as error:
                made.refused.append(f"{variant.name}: {error}")
                continue
            made.engines.append(_engine(variant, package.folder, package.manifest, test))
    with replace_file(file) as new:
        new.write_text(made.model_dump_json(indent=1), encoding="utf-8")
    return made


def _engine(variant: Variant, folder: Path, manifest: Manifest, test: VerificationSet) -> Engine:
    with closing(load_engine(folder)) as engine:
        comparison = compare(engine, test)
    assert comparison.engine_top1 is not None, "the test images are labelled"
    calibration = manifest.provenance.calibration
    return Engine(
        network=variant.name,
        precision=manifest.precision,
        wrong=round((1 - comparison.engine_top1) * comparison.images),
        images=comparison.images,
        agreement=comparison.label_agreement,
        max_logit_difference=comparison.max_logit_difference,
        bytes=(folder / GRAPH_NAME).stat().st_size,
        calibration=calibration.method if calibration else None,
    )


@contextmanager
def _cost_kept(base: Path, stage: str, unless: Path) -> Iterator[None]:
    """Keep what the stage takes, interrupted or not, unless it is finished already: reading is no cost.

    The time of all attempts is added up. The memory is the most that a process has held by the stage's end.
    """
    finished, started = unless.exists(), time.monotonic()
    try:
        yield
    finally:
        if not finished:
            times, memory = _read(base / _TIMES), _read(base / _MEMORY)
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            times[stage] = round(times.get(stage, 0.0) + time.monotonic() - started, 1)
            memory[stage] = round(max(memory.get(stage, 0.0), held), 1)
            for name, kept in ((_TIMES, times), (_MEMORY, memory)):
                with replace_file(base / name) as new:
                    new.write_text(json.dumps(kept, indent=1), encoding="utf-8")


def _read(file: Path) -> dict[str, float]:
    """A number for each stage."""
    try:
        numbers: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return numbers


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("fold", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    arguments = vars(parser.parse_args())
    run_fold(STUDIES[arguments.pop("study")], arguments.pop("fold"), console=Console(), **arguments)


if __name__ == "__main__":
    _main()
