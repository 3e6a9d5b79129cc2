"""`trimrt cluster`: what a Ray cluster needs to serve engine packages."""

from __future__ import annotations

from pathlib import Path

import click
from pydantic import ValidationError

from runtime.packages import resolve_package
from trimrt.cluster import options
from trimrt.options import COUNT, HELP, POSITIVE, Command, engine_dir_option
from trimrt.output import OutputFile, write_output

_HEADER = "# From `trimrt cluster config`. On one machine: serve run FILE; on a cluster: serve deploy FILE\n"


@click.group(context_settings=HELP)
def cluster() -> None:
    """Serve engine packages on a Ray cluster."""


def _prefix(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not value.startswith("/") or (value.endswith("/") and value != "/") or set(value) & set("{}"):
        raise click.BadParameter("it begins with a slash, does not end with one, and has no braces")
    return value


@cluster.command(
    cls=Command,
    context_settings=HELP,
    examples=[
        "trimrt cluster config digits-resnet18-int8-openvino --replicas 1-4",
        "trimrt cluster config digits-resnet18-int8-openvino --output serve.yaml",
    ],
)
@click.argument("engines", nargs=-1, required=True, metavar="ENGINE...")
@engine_dir_option
@click.option(
    "--replicas",
    multiple=True,
    type=options.replicas,
    metavar="N[-M]",
    help="Replicas of an engine; a range such as 1-4 scales with the load. Once for all engines, or once "
    "for each in their order.  [default: 1]",
)
@click.option("--cpus", default=1.0, type=POSITIVE, help="CPU cores of a replica.")
@click.option(
    "--gpus",
    default=1.0,
    type=POSITIVE,
    help="GPUs of a replica, if its engine needs one; 0.25 lets four share a GPU.",
)
@click.option(
    "--target-ongoing",
    type=COUNT,
    help="Requests under way in a replica that scaling aims at.  [default: the engine's best batch]",
)
@click.option("--name", default="trimrt", help="Name of the application.")
@click.option("--route-prefix", default="/", callback=_prefix, help="Where its paths begin.")
@click.option("--host", default="127.0.0.1", help="Address to listen on, on every node.")
@click.option("--port", default=8000, type=click.IntRange(1, 65535), help="TCP port.")
@click.option("--output", type=OutputFile(), help="Write it here, not on the terminal.")
def config(
    engines: tuple[str, ...],
    engine_dir: Path,
    replicas: tuple[options.Replicas, ...],
    cpus: float,
    gpus: float,
    target_ongoing: int | None,
    name: str,
    route_prefix: str,
    host: str,
    port: int,
    output: Path | None,
) -> None:
    """Write a Ray Serve configuration for engine packages, which are folders or names.

    With several engines of one student (a TensorRT plan, an OpenVINO blob) the first is asked first, and
    the others answer what it has no room for. `serve run FILE` serves on this machine, `serve deploy FILE`
    on a cluster.
    """
    if len(replicas) not in (0, 1, len(engines)):
        raise click.UsageError(f"--replicas is given {len(replicas)} times for {len(engines)} engines")
    each = replicas or (options.Replicas(1, 1),)
    if len(each) == 1:
        each *= len(engines)
    import yaml

    from trimrt.cluster.config import Pool, configure

    pools = [
        Pool(resolve_package(engine, engine_dir), number, cpus, gpus, target_ongoing)
        for engine, number in zip(engines, each, strict=True)
    ]
    try:
        configuration = configure(pools, name=name, host=host, port=port, route_prefix=route_prefix)
    except ValidationError as error:
        raise click.UsageError("; ".join(item["msg"] for item in error.errors())) from None
    text = _HEADER + yaml.safe_dump(configuration, sort_keys=False)
    if output is None:
        click.echo(text, nl=False)
        return
    write_output(output, text)
    click.echo(f"wrote {output}; on one machine: serve run {output}; on a cluster: serve deploy {output}")
