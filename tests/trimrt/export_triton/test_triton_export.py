"""`trimrt export-triton`, held against Triton's own protobuf schema, the runtimes and the real client."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
from click.testing import CliRunner, Result
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from running import Running
from tiny_engine import write_package
from tritonclient.grpc import model_config_pb2

from models.preprocessing import load_pixels
from runtime.manifest import (
    MANIFEST_NAME,
    Backend,
    BatchSizes,
    Compatibility,
    Manifest,
    Provenance,
    Tensor,
    read_manifest,
    sha256_of,
)
from server.settings import Settings
from trimrt.cli import main
from trimrt.export_triton import textproto
from trimrt.export_triton.config import Options, model_config
from trimrt.export_triton.export import export_model

Encode = Callable[..., bytes]
Config = model_config_pb2.ModelConfig

NUMPY_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("engines"), version="3")


def export(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export-triton", *map(str, arguments)])


def parse(folder: Path) -> Config:
    """Triton's own reading of the configuration; a field it does not know is an error."""
    return text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), Config())


def tensorrt_package(folder: Path, backend: Backend = "tensorrt", **changes: object) -> Path:
    """A package with a plan that no test runs."""
    folder.mkdir()
    (folder / "engine.plan").write_bytes(b"a plan")
    tiny = read_manifest(write_package(folder.parent / f"{folder.name}-source"))
    manifest = tiny.model_copy(
        update={
            "name": folder.name,
            "backend": backend,
            "backend_version": "10.3.0.30",
            "compatibility": Compatibility(os="Linux", cpu_architecture="aarch64", gpu_name="Orin"),
            "provenance": Provenance(
                onnx_sha256="0" * 64,
                artefact="engine.plan",
                artefact_sha256=sha256_of(folder / "engine.plan"),
            ),
            **changes,
        }
    )
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(), "utf-8")
    return folder


# OpenVINO packages --------------------------------------------------------------------------------------


def test_an_openvino_package_becomes_a_model_of_its_graph(package: Path, tmp_path: Path) -> None:
    result = export(package, tmp_path / "models")

    folder = tmp_path / "models/tiny"
    assert result.exit_code == 0
    assert str(folder) in result.output
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == [
        "3",
        "3/model.onnx",
        "README.md",
        "config.pbtxt",
        "labels.txt",
        "manifest.json",
    ]
    assert read_manifest(folder) == read_manifest(package)
    config = parse(folder)
    assert (config.name, config.backend) == ("tiny", "openvino")
    assert config.default_model_filename == "model.onnx"
    assert [group.kind for group in config.instance_group] == [config.instance_group[0].KIND_CPU]


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_tensors_are_the_manifests_and_the_graphs(package: Path, tmp_path: Path, backend: str) -> None:
    assert export(package, tmp_path, "--backend", backend).exit_code == 0
    folder, manifest = tmp_path / "tiny", read_manifest(package)
    config = parse(folder)

    # Triton puts the batch before `dims` where it batches.
    batch = [-1] if config.max_batch_size else []
    data_type = config.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    said = [(t.name, data_type[t.data_type].name, [*batch, *t.dims]) for t in (*config.input, *config.output)]
    assert said == [
        (t.name, NUMPY_TYPES[t.dtype], list(t.shape)) for t in (manifest.input, *manifest.outputs)
    ]
    graph = openvino.Core().read_model(folder / "3/model.onnx")
    ports = [*graph.inputs, *graph.outputs]
    assert [port.get_any_name() for port in ports] == [name for name, _, _ in said]
    assert [[d.get_length() if d.is_static else -1 for d in port.partial_shape] for port in ports] == [
        shape for _, _, shape in said
    ]


def test_only_onnx_runtime_is_left_to_form_batches(package: Path, tmp_path: Path) -> None:
    export_model(package, tmp_path / "a")
    alone = parse(tmp_path / "a/tiny")
    assert alone.max_batch_size == 0
    assert not alone.HasField("dynamic_batching")
    assert alone.parameters["NUM_STREAMS"].string_value == "1"

    export_model(package, tmp_path / "b", Options(backend="onnxruntime", instances=3))
    batching = parse(tmp_path / "b/tiny")
    assert batching.max_batch_size == 8
    assert batching.instance_group[0].count == 3
    assert batching.HasField("dynamic_batching")
    assert not batching.parameters


def test_streams_are_as_many_as_instances(package: Path, tmp_path: Path) -> None:
    export_model(package, tmp_path, Options(instances=4))
    config = parse(tmp_path / "tiny")
    assert config.instance_group[0].count == 4
    assert config.parameters["NUM_STREAMS"].string_value == "4"


def test_both_runtimes_compute_what_the_engine_computes(
    engine_dir: Path, tmp_path: Path, encode: Encode, reference: Callable[..., np.ndarray]
) -> None:
    folder = export_model(engine_dir / "tiny-v1", tmp_path)
    model, images = folder / "1/model.onnx", [encode(seed) for seed in range(3)]
    spec = read_manifest(folder).preprocessing
    pixels = np.stack([load_pixels(image, spec) for image in images])
    expected = np.stack([reference(image) for image in images])

    # As Triton's backend compiles it, which means in BF16 on processors that have it.
    configuration = {"NUM_STREAMS": "1"}
    if "ONEDNN_MAX_CPU_ISA" in os.environ:  # OpenVINO would choose BF16, which oneDNN then may not use
        configuration["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(model, "CPU", configuration)
    np.testing.assert_allclose(compiled(pixels)["probabilities"], expected, atol=0.02)
    session = onnxruntime.InferenceSession(model)
    (probabilities,) = session.run(["probabilities"], {"pixels": pixels})
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_every_warm_up_is_a_request_that_the_model_takes(package: Path, tmp_path: Path) -> None:
    for backend in ("openvino", "onnxruntime"):
        export(package, tmp_path, "--backend", backend)
        config = parse(tmp_path / "tiny")
        sizes = []
        for warmup in config.model_warmup:
            (pixels,) = warmup.inputs.values()
            assert list(warmup.inputs) == [config.input[0].name]
            assert pixels.data_type == config.input[0].data_type
            assert pixels.random_data
            shape = [warmup.batch_size, *pixels.dims] if config.max_batch_size else list(pixels.dims)
            assert shape[1:] == [32, 32, 3]
            sizes.append(shape[0])
        assert sizes == [1, 4, 8]


@pytest.mark.parametrize("damage", ["remove", "change"])
def test_a_graph_that_is_not_what_was_built_is_refused(package: Path, tmp_path: Path, damage: str) -> None:
    copy = shutil.copytree(package, tmp_path / "copy")
    (copy / "model.onnx").unlink()
    if damage == "change":
        (copy / "model.onnx").write_bytes(b"another")

    result = export(copy, tmp_path / "models")

    assert result.exit_code == 1
    assert "missing or was changed since the build; rebuild it: trimrt build" in result.output
    assert not (tmp_path / "models").exists()


# TensorRT packages --------------------------------------------------------------------------------------


def test_a_plan_is_batched_in_a_bounded_queue_that_waits_for_nothing(tmp_path: Path) -> None:
    package = tensorrt_package(tmp_path / "plan")

    folder = export_model(package, tmp_path / "models")

    assert (folder / "1/model.plan").read_bytes() == b"a plan"
    config = parse(folder)
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    assert config.max_batch_size == 8
    assert list(config.input[0].dims) == [32, 32, 3]
    (group,) = config.instance_group
    assert (group.kind, group.count, list(group.profile)) == (group.KIND_GPU, 2, [])
    batching, server = config.dynamic_batching, Settings()
    assert batching.max_queue_delay_microseconds == 0
    assert list(batching.preferred_batch_size) == []
    policy = batching.default_queue_policy
    assert policy.timeout_action == policy.REJECT
    assert policy.allow_timeout_override
    assert policy.max_queue_size == server.queue_limit
    assert policy.default_timeout_microseconds == 1000 * server.timeout_ms
    readme = (folder / "README.md").read_text("utf-8")
    assert "TensorRT 10.3.0.30" in readme
    assert "Orin" in readme


def test_with_a_delay_a_batch_of_the_best_size_waits_no_longer(tmp_path: Path) -> None:
    tensorrt_package(tmp_path / "plan")
    assert export(tmp_path / "plan", tmp_path / "models", "--max-queue-delay-us", 300).exit_code == 0
    batching = parse(tmp_path / "models/plan").dynamic_batching
    assert batching.max_queue_delay_microseconds == 300
    assert list(batching.preferred_batch_size) == [4, 8]


def test_every_optimisation_profile_is_given_to_triton(tmp_path: Path) -> None:
    profiles = [BatchSizes(min=1, opt=1, max=1), BatchSizes(min=2, opt=6, max=16)]
    package = tensorrt_package(tmp_path / "plan", batch=BatchSizes(min=1, opt=1, max=16), profiles=profiles)
    config = parse(export_model(package, tmp_path / "models"))
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert list(config.dynamic_batching.preferred_batch_size) == [6, 16]


@pytest.mark.parametrize(
    ("batch", "dims"),
    [((4, 4, 4), [4, 32, 32, 3]), ((1, 1, 1), [1, 32, 32, 3]), ((2, 4, 8), [-1, 32, 32, 3])],
)
def test_an_engine_that_takes_not_every_size_gets_the_clients_batches(
    tmp_path: Path, batch: tuple[int, int, int], dims: list[int]
) -> None:
    low, best, high = batch
    package = tensorrt_package(tmp_path / "plan", batch=BatchSizes(min=low, opt=best, max=high))
    config = parse(export_model(package, tmp_path / "models"))
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == dims
    assert [warmup.inputs["pixels"].dims[0] for warmup in config.model_warmup] == sorted(set(batch))


def test_dla_and_version_compatible_plans_tell_triton_so(tmp_path: Path) -> None:
    machine = Compatibility(os="Linux", cpu_architecture="aarch64", dla_core=1, version_compatible=True)
    folder = export_model(tensorrt_package(tmp_path / "plan", compatibility=machine), tmp_path / "models")
    (device,) = parse(folder).instance_group[0].secondary_devices
    assert (device.kind, device.device_id) == (device.KIND_NVDLA, 1)
    assert "--backend-config=tensorrt,version-compatible=true" in (folder / "README.md").read_text("utf-8")


def test_tensorrt_rtx_is_refused_with_the_remedy(tmp_path: Path) -> None:
    package = tensorrt_package(tmp_path / "plan", backend="tensorrt-rtx")
    result = export(package, tmp_path / "models")
    assert result.exit_code == 1
    assert "Triton has no backend" in result.output
    assert "trimrt build --target tensorrt" in result.output
    assert not (tmp_path / "models").exists()


def test_options_that_would_do_nothing_are_refused(package: Path, tmp_path: Path) -> None:
    plan = tensorrt_package(tmp_path / "plan")
    for arguments, reason in (
        ((plan, "--backend", "onnxruntime"), "is for OpenVINO packages"),
        ((package, "--max-queue-delay-us", 100), "forms no batches to wait for"),
    ):
        result = export(*arguments, tmp_path / "models")
        assert result.exit_code == 1
        assert reason in result.output


# The repository -----------------------------------------------------------------------------------------


def test_a_newer_version_takes_the_place_of_the_earlier_export(package: Path, tmp_path: Path) -> None:
    export_model(write_package(tmp_path / "engines", version="2"), tmp_path)
    (tmp_path / "another-model").mkdir()
    export_model(package, tmp_path)
    assert [path.name for path in (tmp_path / "tiny").iterdir() if path.is_dir()] == ["3"]
    assert (tmp_path / "another-model").is_dir()


@pytest.mark.parametrize(
    ("occupy", "reason"),
    [
        (lambda folder: folder.write_text("a file"), "is in the way"),
        (lambda folder: folder.mkdir(), "is in the way"),
        (lambda folder: folder.symlink_to(folder.parent), "is in the way"),
        (lambda folder: (folder / "1").mkdir(parents=True), "is in the way"),
        (lambda folder: folder.with_name("other").rename(folder), "is in the way"),
    ],
)
def test_what_is_no_export_of_the_engine_is_left_alone(
    package: Path, tmp_path: Path, occupy: Callable[[Path], object], reason: str
) -> None:
    export_model(write_package(tmp_path / "engines", "other"), tmp_path)
    occupy(tmp_path / "tiny")
    before = sorted(path for path in tmp_path.rglob("*"))

    result = export(package, tmp_path)

    assert result.exit_code == 1
    assert reason in result.output
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_an_export_that_somebody_added_to_is_left_alone(package: Path, tmp_path: Path) -> None:
    folder = export_model(package, tmp_path)
    (folder / "configs").mkdir()
    result = export(package, tmp_path)
    assert result.exit_code == 1
    assert "also holds configs" in result.output
    assert (folder / "configs").is_dir()


def test_an_unwritable_repository_and_a_missing_package_are_messages(package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments, reason in (
        ((package, tmp_path / "file"), "cannot write to"),
        ((tmp_path / "nothing", tmp_path), "no such file or folder"),
    ):
        result = export(*arguments)
        assert result.exit_code == 1
        assert result.output.startswith("Error: ")
        assert reason in result.output


def test_a_failed_export_leaves_nothing(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(package, tmp_path)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", no_space)
    result = export(package, tmp_path)
    assert result.exit_code == 1
    assert "No space left on device" in result.output
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


# What is written for others to read ---------------------------------------------------------------------


def test_the_readmes_example_gets_the_servers_answer(
    server: Running, engine_dir: Path, tmp_path: Path, encode: Encode
) -> None:
    """TrimRT's server stands in for Triton: it speaks the same protocol to the same client."""
    folder, image = export_model(engine_dir / "tiny-v1", tmp_path), encode(7)
    (folder / "image.jpg").write_bytes(image)
    example = re.search("```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    assert example is not None
    code = example[1].replace("localhost:8000", server.url.removeprefix("http://"))
    assert code != example[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = server.predict(image, params={"top_k": 3, "engine": "tiny"}).json()
    assert [line.split(":")[2] for line in done.stdout.split()] == [
        guess["label"] for guess in answer["results"][0]["predictions"]
    ]


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_the_readme_has_no_line_that_needs_scrolling(package: Path, tmp_path: Path, backend: str) -> None:
    export(package, tmp_path, "--backend", backend)
    lines = (tmp_path / "tiny/README.md").read_text("utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("    docker run")] == []


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(labels=st.lists(any_text, min_size=2, max_size=6), name=any_text)
@settings(deadline=None, derandomize=True)  # a busy machine is no failure
def test_whatever_labels_and_tensors_are_called_triton_reads_it(
    package: Path, labels: list[str], name: str
) -> None:
    manifest = read_manifest(package)
    tensor = Tensor(name=name, dtype="uint8", shape=[-1, 8, 8, 3])
    manifest = Manifest.model_validate(
        {**manifest.model_dump(), "labels": labels, "input": tensor.model_dump()}
    )

    text = textproto.dump(model_config(manifest, Options()))

    config = text_format.Parse(text, Config())
    assert config.input[0].name == name
    assert list(config.model_warmup[0].inputs) == [name]


@given(labels=st.lists(any_text, min_size=2, max_size=6))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_the_labels_file_has_a_line_for_every_label(
    package: Path, labels: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = tmp_path_factory.mktemp("package")
    shutil.copyfile(package / "model.onnx", source / "model.onnx")
    manifest = read_manifest(package).model_copy(update={"labels": labels})
    (source / MANIFEST_NAME).write_text(manifest.model_dump_json(), "utf-8")

    folder = export_model(source, source / "models")

    # Triton splits at line feeds and nothing else (core/src/label_provider.cc).
    lines = (folder / "labels.txt").read_bytes().decode().split("\n")
    assert lines == [*(label.replace("\n", " ") for label in labels), ""]
    assert all(output.label_filename == "labels.txt" for output in parse(folder).output)
