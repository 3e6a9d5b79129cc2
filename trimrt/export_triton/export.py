"""Writing an engine package into a Triton model repository.

The folder `REPOSITORY/ENGINE` holds `config.pbtxt` (what Triton is to do with it), `labels.txt` (for the
classification extension), `README.md` (how to serve it and how to ask it), the package's own
`manifest.json`, and `VERSION/model.plan` or `VERSION/model.onnx`.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Final, Literal

import click

from models.files import replace_folder
from runtime.manifest import MANIFEST_NAME, EngineError, Manifest, read_artefact, read_manifest
from runtime.packages import resolve_package
from trimrt.export_triton.config import (
    LABELS_NAME,
    Backend,
    Options,
    TritonError,
    choose_backend,
    model_config,
    model_file,
)
from trimrt.export_triton.readme import write_readme
from trimrt.export_triton.textproto import dump
from trimrt.options import COUNT, HELP, Choice, Command, engine_dir_option

CONFIG_NAME: Final = "config.pbtxt"
README_NAME: Final = "README.md"

_GRAPH_NAME: Final = "model.onnx"


def export_model(package: Path, repository: Path, options: Options | None = None) -> Path:
    """Write the engine package in `package` to `repository`, as a folder that appears whole or not at all.

    An earlier export of the same engine is replaced.

    Returns:
        The model's folder, named as the engine.

    Raises:
        EngineError: no engine package, or one whose files are not what its manifest says.
        TritonError: Triton cannot serve it so, or something else is in the way.
    """
    options = options or Options()
    manifest = read_manifest(package)
    backend = choose_backend(manifest, options)
    model = _model(package, manifest, backend)
    folder = repository / manifest.name
    _check_replaceable(folder)
    with replace_folder(folder) as new:
        version = new / manifest.version
        version.mkdir()
        (version / model_file(backend)).write_bytes(model)
        shutil.copyfile(package / MANIFEST_NAME, new / MANIFEST_NAME)
        _write(new / CONFIG_NAME, dump(model_config(manifest, options)))
        _write(new / LABELS_NAME, "".join(f"{_one_line(label)}\n" for label in manifest.labels))
        _write(new / README_NAME, write_readme(manifest, backend))
    return folder


def _model(package: Path, manifest: Manifest, backend: Backend) -> bytes:
    """What Triton is given: the plan, or the ONNX graph that the blob was compiled from."""
    if backend == "tensorrt":
        return read_artefact(package, manifest)
    graph = package / _GRAPH_NAME
    content = graph.read_bytes() if graph.is_file() else b""
    if hashlib.sha256(content).hexdigest() != manifest.provenance.onnx_sha256:
        raise EngineError(
            f"{graph} is missing or was changed since the build; rebuild it: {manifest.build_command}"
        )
    return content


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace anything but an earlier export of this engine."""
    if not folder.exists() and not folder.is_symlink():
        return
    try:
        earlier = read_manifest(folder)
    except EngineError:
        earlier = None
    if folder.is_symlink() or earlier is None or earlier.name != folder.name:
        raise TritonError(
            f"{folder} is in the way and is no earlier export of this engine; "
            "move it away, or export to another repository"
        )
    ours = {CONFIG_NAME, LABELS_NAME, README_NAME, MANIFEST_NAME, earlier.version}
    others = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    if others:
        raise TritonError(
            f"{folder} also holds {', '.join(others)}, which no export wrote; "
            "move that away, or export to another repository"
        )


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())  # the same line ends on every system


def _one_line(label: str) -> str:
    """Triton reads a label a line, and knows no way to quote one."""
    return label.replace("\n", " ")


@click.command(
    cls=Command,
    context_settings=HELP,
    examples=[
        "trimrt export-triton digits-resnet18-int8-openvino triton-models",
        "trimrt export-triton digits-resnet18-int8-openvino triton-models --instances 2",
    ],
)
@click.argument("engine")
@click.argument("repository", type=click.Path(path_type=Path))
@engine_dir_option
@click.option(
    "--backend",
    type=Choice(["openvino", "onnxruntime"]),
    help="Triton's backend for an OpenVINO package: openvino, which does not batch, or onnxruntime, "
    "which does.  [default: openvino]",
)
@click.option(
    "--instances", type=COUNT, help="Batches that run at once on each device.  [default: 2 on GPUs, else 1]"
)
@click.option(
    "--max-queue-delay-us",
    type=click.IntRange(min=0),
    default=0,
    help="How long a request may wait for others to fill its batch, microseconds.",
)
def export_triton(
    engine: str,
    repository: Path,
    engine_dir: Path,
    backend: Literal["openvino", "onnxruntime"] | None,
    instances: int | None,
    max_queue_delay_us: int,
) -> None:
    """Write the package ENGINE, a folder or a name, as a model into the Triton model repository REPOSITORY.

    TensorRT packages become plans, OpenVINO packages ONNX graphs. TensorRT-RTX has no Triton backend.
    """
    package = resolve_package(engine, engine_dir)
    try:
        folder = export_model(package, repository, Options(backend, instances, max_queue_delay_us))
    except OSError as error:
        raise click.ClickException(f"cannot write to {repository}: {error.strerror or error}") from error
    click.echo(f"exported {folder}; its {README_NAME} says how to serve it and how to ask it")
