"""Loads an engine package. Each backend has a module, imported only when an engine of its kind is loaded."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Final

from runtime.engine import Engine, Options
from runtime.manifest import Backend, EngineError, Manifest, read_manifest
from runtime.signatures import SignatureError
from runtime.tuning import with_tuning

# Each module has `load(folder, manifest, options) -> Engine`.
_RUNTIMES: Final[dict[Backend, str]] = {
    "openvino": "runtime.openvino",
    "tensorrt": "runtime.tensorrt.engine",
    "tensorrt-rtx": "runtime.tensorrt.engine",
}


def load_engine(folder: str | Path, options: Options | None = None) -> Engine:
    """The engine package in `folder`, checked against this machine and ready to open slots.

    Nothing in the package but its manifest is interpreted before versions, device and hashes fit; nothing at
    all, where `options` trust some keys only, before the signature does. What `options` leave open is taken
    from the package's tuning for this machine, if it has one.

    Raises:
        EngineError: no package, or one that is damaged, not signed by a trusted key, was built for something
            else or changes meanwhile; the message says what was built, what is here, and which command
            rebuilds it.
    """
    folder, options = Path(folder), options or Options()
    manifest = read_manifest(folder, options.trust)
    try:
        options.trust.check(folder)
    except SignatureError as error:
        raise EngineError(str(error)) from error
    pixels = [manifest.preprocessing.height, manifest.preprocessing.width, 3]
    if manifest.input.shape[1:] != pixels:
        raise EngineError(
            f"{folder} takes {manifest.input.shape[1:]}, but its preprocessing gives {pixels}; "
            f"rebuild it: {manifest.build_command}"
        )
    try:
        runtime = importlib.import_module(_RUNTIMES[manifest.backend])
    except ImportError as error:
        raise EngineError(
            f"{folder} needs {manifest.backend} {manifest.backend_version}, "
            f"which cannot be imported here: {error}"
        ) from error
    options = with_tuning(folder, manifest.batch, options)
    engine: Engine = runtime.load(folder, manifest, options)
    try:
        _check_unchanged(folder, manifest, options)
    except EngineError:
        engine.close()
        raise
    return engine


def _check_unchanged(folder: Path, manifest: Manifest, options: Options) -> None:
    """The artefact has a hash to be held against; of the manifest, a copy half made may look whole."""
    again = read_manifest(folder, options.trust)
    if again.model_dump_json() != manifest.model_dump_json():  # NaN is not equal to itself
        raise EngineError(f"{folder} changed while it was loaded; load it again when it is complete")
