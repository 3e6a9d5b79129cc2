"""Kits whose hashes are right and whose contents are not: each is refused in words, with nothing written."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result
from onnx import TensorProto, helper
from small_kit import npz, small_arrays, small_graph, write_small_kit

from builder.kit import KitError, open_kit

Edit = Callable[[dict[str, Any]], object]


def test_the_kit_of_these_tests_is_a_kit(tmp_path: Path) -> None:
    kit = open_kit(write_small_kit(tmp_path / "kit"))
    for name, array in small_arrays().items():
        np.testing.assert_array_equal(getattr(kit.verification, name), array)


# --- names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../escape", "a/b", "/tmp/a", "..", "", "--help", ".hidden", "a\n", "n" * 129]
)
def test_a_network_whose_name_could_leave_the_output_folder_is_refused(
    name: str, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    kit = write_small_kit(tmp_path / "in/kit", edit=lambda manifest: manifest["student"].update(name=name))
    before = sorted(tmp_path.rglob("*"))
    result = trimrt("build", kit, "-p", "fp32", "--target", "openvino", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "student.name: String should" in " ".join(result.output.split())
    assert sorted(path for path in tmp_path.rglob("*") if path != tmp_path / "out") == before


@pytest.mark.parametrize("file", ["../fp32.onnx", "/etc/passwd", "a/b.onnx", ".onnx", ""])
def test_a_graph_whose_file_could_lie_outside_the_kit_is_refused(file: str, tmp_path: Path) -> None:
    kit = write_small_kit(tmp_path / "kit", edit=lambda manifest: manifest["graphs"][0].update(file=file))
    with pytest.raises(KitError, match=r"graphs\.0\.file: String should match pattern"):
        open_kit(kit)


def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "kit.json").mkdir()
    with pytest.raises(KitError, match=r"kit\.json cannot be read: not a regular file"):
        open_kit(tmp_path)


# --- graphs ---------------------------------------------------------------------------------------------


def external(location: str) -> TensorProto:
    tensor = TensorProto(name="weights", data_type=TensorProto.FLOAT, dims=[192, 3])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def in_initializer(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.initializer[0].CopyFrom(tensor)


def in_constant(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.node.insert(0, helper.make_node("Constant", [], ["weights"], value=tensor))


def in_list(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("tensors", [tensor]))


def in_sparse(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.sparse_initializer.add().values.CopyFrom(tensor)


def in_branch(model: onnx.ModelProto, tensor: TensorProto) -> None:
    branch = helper.make_graph([], "branch", [], [], [tensor])
    model.graph.node.insert(0, helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch))


def in_function(model: onnx.ModelProto, tensor: TensorProto) -> None:
    node = helper.make_node("Constant", [], ["w"], value=tensor)
    model.functions.append(helper.make_function("d", "F", [], ["w"], [node], model.opset_import))


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "weights.bin"])
@pytest.mark.parametrize("put", [in_initializer, in_constant, in_list, in_sparse, in_branch, in_function])
def test_a_graph_with_weights_in_another_file_is_refused(
    put: Callable[[onnx.ModelProto, TensorProto], None], location: str, tmp_path: Path
) -> None:
    model = small_graph()
    put(model, external(location))
    with pytest.raises(KitError, match="keeps weights in other files"):
        open_kit(write_small_kit(tmp_path / "kit", graph=model.SerializeToString()))


@pytest.mark.parametrize(
    "graph", [b"\x0b", b"\xff" * 30, small_graph().SerializeToString()[:-40]], ids=["group", "noise", "cut"]
)
def test_a_graph_that_is_no_message_is_refused(graph: bytes, tmp_path: Path) -> None:
    with pytest.raises(KitError, match="is not an ONNX model"):
        open_kit(write_small_kit(tmp_path / "kit", graph=graph))


# --- the verification set -------------------------------------------------------------------------------


def bomb() -> bytes:
    """Says that it holds 20 GB of pixels."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in small_arrays().items():
            with archive.open(f"{name}.npy", "w") as member:
                if name == "pixels":
                    header = {"descr": "|u1", "fortran_order": False, "shape": (104_166_666, 8, 8, 3)}
                    np.lib.format.write_array_header_1_0(member, header)
                    member.write(bytes(1 << 20))
                else:
                    np.lib.format.write_array(member, array)
    return file.getvalue()


def long_header() -> bytes:
    """NumPy refuses to parse it, for its length."""
    fields = [(f"{number:05d}", "u1") for number in range(2000)]
    return npz({**small_arrays(), "pixels": np.zeros(1, fields)})


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


ARRAYS = small_arrays()
VERIFICATION_SETS = {
    "objects": (npz({**ARRAYS, "pixels": np.array([print], object)}), "pixels is object of shape"),
    "structures": (npz({**ARRAYS, "targets": np.zeros(4, "i4,i4")}), "targets is"),
    "no images": (npz({name: array[:0] for name, array in ARRAYS.items()}), "0 images, 0 targets"),
    "fewer targets": (npz({**ARRAYS, "targets": ARRAYS["targets"][:3]}), "4 images, 3 targets"),
    "targets too large": (npz({**ARRAYS, "targets": ARRAYS["targets"] + 3}), "none of the 3 classes"),
    "targets negative": (npz({**ARRAYS, "targets": -1 - ARRAYS["targets"]}), "none of the 3 classes"),
    "logits NaN": (npz({**ARRAYS, "logits": ARRAYS["logits"] * np.nan}), "not finite"),
    "fewer classes": (npz({**ARRAYS, "logits": ARRAYS["logits"][:, :2]}), "logits is float32 of shape"),
    "float pixels": (npz({**ARRAYS, "pixels": ARRAYS["pixels"] / 255}), "pixels is float64"),
    "larger pixels": (npz({**ARRAYS, "pixels": ARRAYS["pixels"].repeat(2, 1)}), "pixels is uint8 of shape"),
    "flat pixels": (npz({**ARRAYS, "pixels": ARRAYS["pixels"][..., 0]}), "pixels is uint8 of shape"),
    "a number": (npz({**ARRAYS, "targets": np.int64(3)}), r"targets is int64 of shape \(\)"),
    "no pixels": (npz({"targets": ARRAYS["targets"], "logits": ARRAYS["logits"]}), "no item named 'pixels"),
    "bomb": (bomb(), "does not fit its file"),
    "long header": (long_header(), "unknown format|Header info length"),
    "no archive": (b"hello", "not a zip file"),
    "empty": (b"", "not a zip file"),
    "truncated": (npz(ARRAYS)[:-100], "not a zip file"),
    "damaged": (damaged(npz(ARRAYS)), ""),
}


@pytest.mark.parametrize(("verification", "says"), VERIFICATION_SETS.values(), ids=VERIFICATION_SETS)
def test_an_odd_verification_set_is_refused(verification: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(KitError, match=rf"is not a verification set: .*({says})"):
        open_kit(write_small_kit(tmp_path / "kit", verification=verification))
