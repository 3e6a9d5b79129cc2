"""Files of any content where TrimRT reads one: each is read, or refused with the error that is documented."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from mutations import changed_bytes, changed_documents
from onnx import TensorProto, helper
from onnx.external_data_helper import uses_external_data
from small_kit import npz, small_arrays, small_graph, write_small_kit

from builder.external_data import has_external_data
from builder.kit import KIT_NAME, KitError, open_kit
from models.card import CARD_NAME, WEIGHTS_NAME, CheckpointError
from runtime.manifest import MANIFEST_NAME, EngineError, read_manifest

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")

fuzzed = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")


# --- manifests of engine packages -----------------------------------------------------------------------


@fuzzed
@given(drawn=st.data())
def test_an_engine_manifest(drawn: st.DataObject, engine_dir: Path, folder: Path) -> None:
    document = json.loads((engine_dir / "tiny-v1" / MANIFEST_NAME).read_text())
    write_json(folder / MANIFEST_NAME, drawn.draw(changed_documents(document)))
    try:
        manifest = read_manifest(folder)
    except EngineError:
        return
    assert FILE_NAME.fullmatch(manifest.name)
    assert int(manifest.version) >= 0
    assert folder / manifest.provenance.artefact == (folder / manifest.provenance.artefact).absolute()


@fuzzed
@given(drawn=st.data())
def test_an_engine_manifest_as_bytes(drawn: st.DataObject, engine_dir: Path, folder: Path) -> None:
    original = (engine_dir / "tiny-v1" / MANIFEST_NAME).read_bytes()
    (folder / MANIFEST_NAME).write_bytes(drawn.draw(changed_bytes(original)))
    try:
        read_manifest(folder)
    except EngineError:
        return


# --- build kits -----------------------------------------------------------------------------------------


@fuzzed
@given(drawn=st.data())
def test_a_kit_manifest(drawn: st.DataObject, folder: Path) -> None:
    kit = write_small_kit(folder / "kit")
    write_json(kit / KIT_NAME, drawn.draw(changed_documents(json.loads((kit / KIT_NAME).read_text()))))
    try:
        opened = open_kit(kit)
    except KitError:
        return
    assert FILE_NAME.fullmatch(opened.student.name)
    assert all(FILE_NAME.fullmatch(graph.file) for graph in opened.manifest.graphs)


@fuzzed
@given(changed_bytes(npz(small_arrays())))
def test_a_verification_set(folder: Path, verification: bytes) -> None:
    try:
        kit = open_kit(write_small_kit(folder / "kit", verification=verification))
    except KitError:
        return
    for name, array in small_arrays().items():
        read = getattr(kit.verification, name)
        assert (read.dtype, read.shape[1:]) == (array.dtype, array.shape[1:])


# --- weights in other files -----------------------------------------------------------------------------

LOCATIONS = st.sampled_from(["weights.bin", "../secret", "/etc/passwd", "a/../../b", "..\\b", "", "\0"])


@st.composite
def tensors(draw: st.DrawFn) -> TensorProto:
    """Some of them external, by either of the marks that ONNX has for it."""
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1])
    if draw(st.booleans()):
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=draw(LOCATIONS))
    else:
        tensor.raw_data = draw(st.binary(min_size=4, max_size=4))
    return tensor


@st.composite
def graphs(draw: st.DrawFn, depth: int = 2) -> onnx.GraphProto:
    """With tensors in any place that ONNX has for them, in subgraphs too."""
    nodes = [
        helper.make_node("Constant", [], ["c"], value=tensor)
        for tensor in draw(st.lists(tensors(), max_size=2))
    ]
    if several := draw(st.lists(tensors(), max_size=2)):
        nodes.append(helper.make_node("Custom", [], ["d"], domain="d", many=several))
    if depth and draw(st.booleans()):
        branch = draw(graphs(depth=depth - 1))
        nodes.append(helper.make_node("If", ["b"], ["e"], then_branch=branch, else_branch=branch))
    return helper.make_graph(nodes, "g", [], [], draw(st.lists(tensors(), max_size=2)))


def tensors_of(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        if attribute.HasField("g"):
            yield from tensors_of(attribute.g)


@fuzzed
@given(graphs())
def test_weights_in_other_files_are_found_wherever_they_are(graph: onnx.GraphProto) -> None:
    model = helper.make_model(graph)
    expected = any(uses_external_data(tensor) for tensor in tensors_of(model.graph))
    assert has_external_data(model.SerializeToString()) == expected


@fuzzed
@given(changed_bytes(small_graph().SerializeToString()))
@example(b"\x80" * 20)
@example(b"\x0a\xff\xff\xff\xff\x0f")
def test_a_graph_that_onnx_reads_is_read_alike(data: bytes) -> None:
    try:
        model = onnx.load_from_string(data)
    except Exception:
        assume(False)
    try:
        found = has_external_data(data)
    except ValueError:
        return  # stricter than protobuf, which lets some groups pass
    assert found or not any(map(uses_external_data, tensors_of(model.graph)))


@fuzzed
@given(st.binary(max_size=60))
def test_bytes_that_are_no_graph(data: bytes) -> None:
    try:
        has_external_data(data)
    except ValueError:
        return


@settings(fuzzed, max_examples=30)
@given(location=LOCATIONS | st.text(max_size=12))
def test_an_onnx_file_reads_no_file_outside_its_folder(location: str, folder: Path) -> None:
    from builder.prepare.export import ExportError
    from builder.prepare.import_onnx import import_onnx

    outside, inside = folder / "outside", folder / "inside"
    for path in (outside, inside):
        path.mkdir(exist_ok=True)
    (folder / "secret").write_bytes(b"secret" * 1000)
    model = small_graph()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    assume(location.isprintable() and "\ud800" not in location)
    tensor.external_data.add(key="location", value=location)
    (inside / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError):
        import_onnx(inside / "model.onnx", "imagenet")


def test_an_onnx_file_reads_no_file_outside_its_folder_by_a_link(tmp_path: Path) -> None:
    from builder.prepare.export import ExportError
    from builder.prepare.import_onnx import import_onnx

    (tmp_path / "secret").write_bytes(small_graph().graph.initializer[0].raw_data)
    model = small_graph()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "model.onnx").write_bytes(model.SerializeToString())
    (inside / "weights").symlink_to(tmp_path / "secret")
    with pytest.raises(ExportError, match="is not a valid ONNX model"):
        import_onnx(inside / "model.onnx", "imagenet")


# --- checkpoints ----------------------------------------------------------------------------------------


def loads(folder: Path) -> bool:
    from models.checkpoint import load_checkpoint

    try:
        load_checkpoint(folder)
    except CheckpointError:
        return False
    return True


@settings(fuzzed, max_examples=50)
@given(drawn=st.data())
def test_a_model_card(drawn: st.DataObject, checkpoint: Path, folder: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, folder / "checkpoint", dirs_exist_ok=True))
    card: dict[str, Any] = json.loads((checkpoint / CARD_NAME).read_text())
    write_json(copy / CARD_NAME, drawn.draw(changed_documents(card)))
    loads(copy)


@settings(fuzzed, max_examples=50)
@given(drawn=st.data())
def test_weights_whose_hash_is_right(drawn: st.DataObject, checkpoint: Path, folder: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, folder / "checkpoint", dirs_exist_ok=True))
    original = (checkpoint / WEIGHTS_NAME).read_bytes()
    head = 8 + int.from_bytes(original[:8], "little")  # safetensors: the header's size, the header
    weights = drawn.draw(changed_bytes(original[:head])) + original[head:]
    card: dict[str, Any] = json.loads((checkpoint / CARD_NAME).read_text())
    (copy / WEIGHTS_NAME).write_bytes(weights)
    write_json(copy / CARD_NAME, {**card, "weights_sha256": hashlib.sha256(weights).hexdigest()})
    assert loads(copy) or weights != original
