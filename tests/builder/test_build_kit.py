"""A build kit is prepared where torch is, and compiled where it is not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.kit import KIT_NAME, Kit, KitError, open_kit
from runtime.manifest import read_manifest

_ON_THE_DEVICE = """
import sys

BLOCKED = {"torch", "torchvision", "torch_pruning", "modelopt", "onnx", "onnxruntime", "onnxscript",
           "safetensors", "sklearn", "scipy"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from trimrt.cli import main
main(sys.argv[1:], prog_name="trimrt")
"""


def on_the_device(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line where nothing but numpy and OpenVINO is installed."""
    command = [sys.executable, "-c", _ON_THE_DEVICE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "precision", ["int8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp16", "int8-dynamic"))]
)
def test_kit_is_compiled_and_verified_without_torch_modelopt_and_onnx(
    kit: Kit, tmp_path: Path, precision: str
) -> None:
    result = on_the_device(
        *("build", kit.path, "--precision", precision),
        *("--target", "openvino", "--output", tmp_path),
    )

    assert result.returncode == 0, result.stderr
    manifest = read_manifest(tmp_path / f"tiny-digits-{precision}-openvino")
    assert manifest.evidence is not None
    assert manifest.evidence.label_agreement >= 0.98
    assert manifest.provenance.checkpoint_sha256 == kit.student.checkpoint_sha256


def test_checkpoint_on_the_device_is_told_what_to_do(checkpoint: Path, tmp_path: Path) -> None:
    result = on_the_device("build", checkpoint, "--target", "openvino", "--output", tmp_path)

    assert result.returncode == 1
    assert "trimrt prepare" in result.stderr
    assert "Traceback" not in result.stderr


def test_kit_holds_what_compiling_for_every_target_may_need(kit: Kit) -> None:
    assert [
        (graph.precision, graph.calibration and graph.calibration.method) for graph in kit.manifest.graphs
    ] == [
        ("fp32", None),
        ("fp16", None),
        ("int8", "entropy"),
        ("int8", "max"),
        ("int8-dynamic", None),
    ]


def test_kit_is_not_compiled_for_a_precision_it_does_not_have(
    kit: Kit, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    folder = tmp_path / "kit"
    shutil.copytree(kit.path, folder)
    manifest = json.loads((folder / KIT_NAME).read_text())
    manifest["graphs"] = [graph for graph in manifest["graphs"] if graph["precision"] != "fp16"]
    (folder / KIT_NAME).write_text(json.dumps(manifest))

    result = trimrt("build", folder, "-p", "fp16", "--target", "openvino", "-o", tmp_path / "engines")

    assert result.exit_code == 1
    assert "has no fp16 graph" in result.output


def test_options_of_preparation_are_refused_for_a_kit(kit: Kit, trimrt: Callable[..., Result]) -> None:
    result = trimrt("build", kit.path, "--target", "openvino", "--calibration-images", 8)
    assert result.exit_code == 1
    assert "leave out --calibration-images" in result.output


@pytest.fixture(scope="module")
def scratch(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the kit to damage and restore."""
    return Path(shutil.copytree(kit.path, tmp_path_factory.mktemp("scratch") / "kit"))


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_changed_byte_of_any_file_is_found(scratch: Path, kit: Kit, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted({path.name for path in kit.path.iterdir()} - {KIT_NAME})))
    original = (kit.path / name).read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[position] ^= data.draw(st.integers(1, 255))
    (scratch / name).write_bytes(changed)
    try:
        with pytest.raises(KitError, match="damaged or changed"):
            open_kit(scratch)
    finally:
        (scratch / name).write_bytes(original)


@given(
    garbage=st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ).map(lambda value: json.dumps(value).encode())
)
@settings(max_examples=50, deadline=None)
def test_garbage_is_no_kit(scratch: Path, kit: Kit, garbage: bytes) -> None:
    (scratch / KIT_NAME).write_bytes(garbage)
    try:
        with pytest.raises(KitError):
            open_kit(scratch)
    finally:
        shutil.copyfile(kit.path / KIT_NAME, scratch / KIT_NAME)


def test_missing_file_is_named(scratch: Path, kit: Kit) -> None:
    (scratch / "fp16.onnx").unlink()
    try:
        with pytest.raises(KitError, match=r"has no fp16\.onnx"):
            open_kit(scratch)
    finally:
        shutil.copyfile(kit.path / "fp16.onnx", scratch / "fp16.onnx")


def test_file_names_cannot_lead_out_of_the_kit(scratch: Path, kit: Kit) -> None:
    manifest = json.loads((kit.path / KIT_NAME).read_text())
    manifest["graphs"][0]["file"] = "../fp32.onnx"
    (scratch / KIT_NAME).write_text(json.dumps(manifest))
    try:
        with pytest.raises(KitError, match="not a valid kit manifest"):
            open_kit(scratch)
    finally:
        shutil.copyfile(kit.path / KIT_NAME, scratch / KIT_NAME)


def test_verification_set_is_read_without_pickle(scratch: Path, kit: Kit) -> None:
    """Even where its hash is right."""
    from runtime.manifest import sha256_of

    path = scratch / "verification.npz"
    np.savez(path, pixels=np.array([print], dtype=object), targets=np.zeros(1), logits=np.zeros(1))
    changed = kit.manifest.model_copy(update={"verification_sha256": sha256_of(path)})
    (scratch / KIT_NAME).write_text(changed.model_dump_json())
    try:
        with pytest.raises(KitError, match="not a verification set"):
            open_kit(scratch)
    finally:
        for name in (KIT_NAME, "verification.npz"):
            shutil.copyfile(kit.path / name, scratch / name)
