"""`trimrt inspect`: what an engine package is. It needs no backend, and nothing of the builder."""

from __future__ import annotations

from pathlib import Path

import click
from rich.box import SIMPLE, SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from models.naming import shortened
from models.preprocessing import Preprocessing
from runtime.manifest import Evidence, Manifest, Tensor, read_artefact, read_manifest
from runtime.packages import resolve_package
from runtime.signatures import Trust
from runtime.tensorrt.layers import PlanLayer, read_layers, summarise
from trimrt.options import HELP, Command, engine_dir_option, trusted_key_option
from trimrt.report.provenance import calibration_text


@click.command(
    cls=Command,
    context_settings=HELP,
    examples=[
        "trimrt inspect digits-resnet18-int8-openvino",
        "trimrt inspect engines/digits-resnet18-int8-openvino --json",
    ],
)
@click.argument("engine")
@engine_dir_option
@trusted_key_option
@click.option("--labels", "all_labels", is_flag=True, help="List all labels, however many there are.")
@click.option(
    "--layers", "with_layers", is_flag=True, help="TensorRT: also show what the graph became, layer by layer."
)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON, for programs.")
def inspect(
    engine: str, engine_dir: Path, trust: Trust, all_labels: bool, as_json: bool, with_layers: bool
) -> None:
    """Show what an engine package is: built from what, for which machine, how good and how fast.

    ENGINE is its folder or its name. The exit code is 0 if the artefact matches the manifest, and not 0
    otherwise.
    """
    folder = resolve_package(engine, engine_dir, trust)
    manifest = read_manifest(folder, trust)
    signer = trust.check(folder)
    if as_json:
        click.echo(manifest.model_dump_json(indent=2))
    else:
        _print(folder, manifest, signer, all_labels)
        if with_layers:
            _print_layers(read_layers(folder, trust))
    read_artefact(folder, manifest)


def _print(folder: Path, manifest: Manifest, signer: str | None, all_labels: bool) -> None:
    table = Table(box=SIMPLE, show_header=False, title=escape(str(folder)), title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    signed = [("signed by", signer)] if signer else []
    for name, value in [*_rows(folder, manifest, all_labels), *signed]:
        table.add_row(name, escape(value))
    Console().print(table, highlight=False)


def _print_layers(layers: list[PlanLayer]) -> None:
    table = Table("layer", "kind", "gives", "of the graph", box=SIMPLE_HEAD, title=summarise(layers))
    for layer in layers:
        gives = ", ".join(f"{tensor.dtype} {tensor.shape}" for tensor in layer.outputs)
        table.add_row(escape(layer.name), layer.kind, escape(gives), escape(", ".join(layer.graph_layers)))
    Console().print(table, highlight=False)


def _rows(folder: Path, manifest: Manifest, all_labels: bool) -> list[tuple[str, str]]:
    spec, batch, origin = manifest.preprocessing, manifest.batch, manifest.provenance
    labels = ", ".join(manifest.labels) if all_labels else shortened(manifest.labels)
    machine = manifest.compatibility.model_dump(exclude_defaults=True)
    rows = [
        ("engine", f"{manifest.name}, version {manifest.version}"),
        ("precision", manifest.precision),
        *([("computed in", f"{manifest.arithmetic} where not in INT8")] if manifest.arithmetic else []),
        *([("INT8 weights", "rounded for sums in 16 bits (no VNNI)")] if manifest.saturation_safe else []),
        ("backend", f"{manifest.backend} {manifest.backend_version}"),
        ("built", f"{manifest.created_at:%Y-%m-%d %H:%M:%S %Z} by TrimRT {manifest.builder_version}"),
        *((name.replace("_", " "), _text(value)) for name, value in machine.items()),
        ("input", _tensor(manifest.input)),
        ("outputs", ", ".join(_tensor(tensor) for tensor in manifest.outputs)),
        ("batch", f"{batch.min} to {batch.max}, best at {batch.opt}"),
        ("pixels", _pixels(spec)),
        ("activation", manifest.activation),
        ("labels", f"{len(manifest.labels):,}: {labels}"),
    ]
    if origin.parameters is not None:
        rows.append(("parameters", f"{origin.parameters:,}"))
    if origin.macs is not None:
        rows.append(("MACs", f"{origin.macs:,}"))
    if origin.calibration is not None:
        rows.append(("calibration", calibration_text(origin.calibration)))
    if origin.int8_share is not None:
        rows.append(("in INT8", f"{origin.int8_share:.1%} of the multiply-accumulates"))
    if manifest.promise is not None:
        rows += [("promised", line) for line in manifest.promise.lines()]
    rows += _evidence(manifest.evidence)
    sizes = [f"{path.name} {path.stat().st_size / 1e6:.2f} MB" for path in sorted(folder.iterdir())]
    return [
        *rows,
        ("files", ", ".join(sizes)),
        ("checkpoint", origin.checkpoint_sha256 or "none: an ONNX graph from elsewhere"),
        ("ONNX graph", origin.onnx_sha256),
        (origin.artefact, origin.artefact_sha256),
        ("rebuild with", manifest.build_command),
    ]


def _evidence(evidence: Evidence | None) -> list[tuple[str, str]]:
    if evidence is None:
        return [("verified", "NO: the engine could not be run where it was built")]
    return [
        ("verified on", f"{evidence.images} images of {evidence.image_set}"),
        ("top-1", _top1(evidence)),
        ("agreement", f"{evidence.label_agreement:.2%} of the labels"),
        ("logits", f"differ by at most {evidence.max_logit_difference:.3g}"),
        ("latency", f"{evidence.latency_ms:.3f} ms for the smallest batch"),
        ("throughput", f"{evidence.throughput:,.0f} images per second at the largest batch"),
        *([("power", str(evidence.power))] if evidence.power else []),
        ("weights", f"{evidence.weights_bytes / 1e6:.2f} MB"),
    ]


def _top1(evidence: Evidence) -> str:
    if evidence.engine_top1 is None or evidence.reference_top1 is None:
        return "not known: the images have no labels"
    return (
        f"{evidence.engine_top1:.2%} of {evidence.originals or evidence.images} images "
        f"(the FP32 network: {evidence.reference_top1:.2%})"
    )


def _pixels(spec: Preprocessing) -> str:
    size = f"{spec.height}x{spec.width}"
    return {
        "crop": f"shorter side to {spec.resize}, centre crop {size}, {spec.channels}",
        "squash": f"resized to {'x'.join(map(str, spec.squashed))}, whatever the shape, centre crop {size}, "
        f"{spec.channels}",
        "letterbox": f"fitted into {size}, the rest {spec.fill}, {spec.channels}",
        "none": f"the middle {size}, not resized, {spec.channels}",
    }[spec.fit]


def _tensor(tensor: Tensor) -> str:
    sizes = ["N" if size < 0 else str(size) for size in tensor.shape]
    return f"{tensor.name} {tensor.dtype} ({', '.join(sizes)})" + (
        f" {tensor.layout}" if tensor.layout else ""
    )


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "yes" if value is True else str(value)
