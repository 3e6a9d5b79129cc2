"""`trimrt predict`: label a folder, some files, or a column of a Parquet file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.cores import cores
from runtime.manifest import Manifest, read_manifest
from runtime.packages import resolve_package
from runtime.signatures import Trust
from trimrt.cluster import options
from trimrt.options import HELP, Command, Existing, engine_dir_option, trusted_key_option
from trimrt.output import OutputFile

if TYPE_CHECKING:
    import pyarrow as pa

    from trimrt.predict.parts import Failures, Parts, Plan
    from trimrt.predict.scoring import Workload
    from trimrt.predict.sources import Source

_PART_SIZE: Final = 1024
_TOP_K: Final = 3
_INTERRUPTED: Final = 130  # as shells have it


class _Cluster(NamedTuple):
    address: str
    actors: options.Replicas | None
    cpus: float
    gpus: float


@click.command(
    cls=Command,
    context_settings=HELP,
    examples=[
        "trimrt predict photos --engine digits-resnet18-int8-openvino --out labels.csv",
        "trimrt predict 7.png --engine digits-resnet18-int8-openvino --out seven.csv",
    ],
)
@click.argument("inputs", nargs=-1, required=True, type=Existing(), metavar="INPUT...")
@click.option(
    "--engine", required=True, help="Engine package: its path, or its name in the engine directory."
)
@engine_dir_option
@trusted_key_option
@click.option(
    "--out",
    "output",
    required=True,
    type=OutputFile(),
    help="Parquet file to write; CSV if its suffix says so.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    help=f"Labels per image.  [default: {_TOP_K}, or all of fewer]",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Images in a batch; the engine's most if not given."
)
@click.option("--column", help="Column of a Parquet file with the images or their paths.")
@click.option("--id-column", help="Column of a Parquet file that names the rows of the output.")
@click.option(
    "--part-size",
    default=_PART_SIZE,
    type=click.IntRange(min=1),
    help="Images in a part, which is what an interruption may cost; rounded up to whole batches.",
)
@click.option("--restart", is_flag=True, help="Forget what an interrupted run has done; replace the output.")
@click.option(
    "--slots", type=click.IntRange(min=1), help="Batches at once; the engine's choice if not given."
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads of an engine on the CPU; all if not given."
)
@click.option(
    "--decode-threads",
    type=click.IntRange(min=1),
    help="Threads that read and decode; one a core if not given.",
)
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Score on a Ray cluster: its address, `auto` for the one that runs here, `local` for a new one.",
)
@click.option(
    "--actors",
    type=options.replicas,
    metavar="N[-M]",
    help="Engines on the cluster; as many as fit if not given.",
)
@click.option(
    "--cpus",
    default=1.0,
    type=click.FloatRange(min=0, min_open=True),
    help="CPU cores of each of them.",
)
@click.option(
    "--gpus",
    default=1.0,
    type=click.FloatRange(min=0, min_open=True),
    help="GPUs of each worker, if the engine needs one; 0.25 lets four share a GPU.",
)
def predict(
    inputs: tuple[Path, ...],
    engine: str,
    engine_dir: Path,
    trust: Trust,
    output: Path,
    top_k: int | None,
    batch_size: int | None,
    column: str | None,
    id_column: str | None,
    part_size: int,
    restart: bool,
    slots: int | None,
    threads: int | None,
    decode_threads: int | None,
    address: str | None,
    actors: options.Replicas | None,
    cpus: float,
    gpus: float,
) -> None:
    """Label many images at once.

    INPUT is a folder, image files, or one Parquet file. An image that cannot be decoded gets a row that
    says why. After an interruption the same command continues where it stopped.
    """
    from trimrt.predict import parts, scoring, sources

    folder = resolve_package(engine, engine_dir, trust)
    manifest = read_manifest(folder, trust)
    top_k = top_k or min(_TOP_K, len(manifest.labels))
    batch_size = _checked_sizes(manifest, batch_size, top_k)
    source = sources.open_source(inputs, column, id_column)
    plan = parts.Plan(
        engine=manifest.name,
        engine_version=manifest.version,
        engine_sha256=manifest.provenance.artefact_sha256,
        images=len(source),
        images_sha256=source.digest(),
        top_k=top_k,
        batch_size=batch_size,
        part_size=-(-part_size // batch_size) * batch_size,
    )
    cluster = None
    if address is not None:
        cluster = _Cluster(address, actors, cpus, 0 if manifest.backend == "openvino" else gpus)
        threads, decode_threads = threads or max(1, int(cpus)), decode_threads or max(1, int(cpus))
    workload = scoring.Workload(
        folder.resolve(), top_k, batch_size, decode_threads or cores(), slots, threads, trust
    )
    with parts.open_parts(output, plan, restart=restart) as kept:
        _run(workload, manifest, source, plan, kept, cluster)
    click.echo(f"wrote {output}")


def _checked_sizes(manifest: Manifest, batch_size: int | None, top_k: int) -> int:
    """The batch size, once it and the number of labels are known to fit the engine."""
    sizes, classes = manifest.batch, len(manifest.labels)
    if top_k > classes:
        raise click.BadParameter(f"{manifest.name} knows {classes} labels", param_hint="'--top-k'")
    if batch_size is not None and not sizes.min <= batch_size <= sizes.max:
        raise click.BadParameter(
            f"{manifest.name} takes batches of {sizes.min} to {sizes.max}", param_hint="'--batch-size'"
        )
    return batch_size or sizes.max


def _run(
    workload: Workload,
    manifest: Manifest,
    source: Source,
    plan: Plan,
    kept: Parts,
    cluster: _Cluster | None,
) -> None:
    missing = kept.missing()
    images = sum(len(plan.span(part)) for part in missing)
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("{task.fields[rate]}"), TimeRemainingColumn()),
    )
    began = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("scoring", total=plan.images, completed=plan.images - images, rate="")
        scored = 0

        def advance(more: int) -> None:
            nonlocal scored
            scored += more
            rate = scored / (time.monotonic() - began)
            progress.update(task, advance=more, rate=f"{rate:,.0f} images/s")

        try:
            with closing(_score(workload, manifest, source, plan, missing, cluster, advance)) as tables:
                for part, table in tables:
                    kept.write(part, table)
            seconds = time.monotonic() - began
            failures = kept.assemble()
        except KeyboardInterrupt:
            progress.stop()
            click.echo(f"interrupted: {_done(plan, kept)}", err=True)
            raise SystemExit(_INTERRUPTED) from None
        except OSError as error:  # the disk is full, say
            progress.stop()
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise click.ClickException(f"{reason}: {_done(plan, kept)}") from error
    _report(plan, failures, images, seconds)


def _done(plan: Plan, kept: Parts) -> str:
    left = sum(len(plan.span(part)) for part in kept.missing())
    return (
        f"{plan.images - left:,} of {plan.images:,} images are scored; "
        "the same command, without --restart, continues"
    )


def _score(
    workload: Workload,
    manifest: Manifest,
    source: Source,
    plan: Plan,
    missing: list[int],
    cluster: _Cluster | None,
    advance: Callable[[int], None],
) -> Generator[tuple[int, pa.Table], None, None]:
    """The missing parts, here or on the cluster; `advance` gets the number of images as they are scored."""
    if not missing:
        return
    if cluster is None:
        from trimrt.predict.interrupts import deferred_interrupts
        from trimrt.predict.runs import score_parts
        from trimrt.predict.scoring import open_scorer

        with deferred_interrupts() as check, open_scorer(workload) as scorer:

            def note(images: int) -> None:
                check()
                advance(images)

            yield from score_parts(scorer, manifest, source, plan, missing, note)
        return
    from trimrt.predict.cluster import connect, score_on_cluster

    connect(cluster.address)
    for part, table in score_on_cluster(
        *(workload, manifest, source, plan, missing),
        actors=cluster.actors,
        cpus=cluster.cpus,
        gpus=cluster.gpus,
    ):
        advance(len(table))
        yield part, table


def _report(plan: Plan, failures: Failures, images: int, seconds: float) -> None:
    counted = f"{plan.images:,} image{'s' * (plan.images != 1)}"
    click.echo(
        f"{counted} by {plan.engine}: {images:,} now, in {seconds:.1f} s "
        f"({images / seconds:,.0f} images/s)"
        + (f", {plan.images - images:,} before an interruption" if images < plan.images else "")
    )
    if failures.count:
        click.echo(f"{failures.count:,} could not be scored; their rows say why:")
        for path, error in failures.first:
            click.echo(f"  {path}: {error}")
        if failures.count > len(failures.first):
            click.echo(f"  and {failures.count - len(failures.first):,} more")
