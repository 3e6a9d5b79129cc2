"""The Open Inference Protocol, spoken by NVIDIA's own client."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import start_process
from running import Running
from tiny_engine import LABELS

from models.preprocessing import Preprocessing, load_pixels
from server.problems import Problem
from server.v2.body import parse
from server.v2.regions import Regions
from server.v2.tensors import pack_bytes, unpack_bytes

NO_REGIONS = Regions(enabled=False, largest=0)

Encode = Callable[..., bytes]
Reference = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def process(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A server process: its HTTP and gRPC addresses."""
    options = ["--engine-dir", str(engine_dir), "--engine", "tiny,other", "--grpc-port", "0"]
    with start_process(options, tmp_path_factory.mktemp("v2") / "log") as started:
        yield started.url.removeprefix("http://"), started.said("grpc")


@pytest.fixture(scope="module", params=["http", "grpc"])
def triton(request: pytest.FixtureRequest, process: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
    """Tritonclient's module for one of the two transports, and a client of it."""
    if request.param == "http":
        import tritonclient.http as module

        options = {"concurrency": 8}
    else:
        import tritonclient.grpc as module

        options = {}
    client = module.InferenceServerClient(process[request.param == "grpc"], **options)
    yield module, client
    client.close()


def _metadata(metadata: Any) -> Any:
    """GRPC's message or HTTP's dictionary, as a dictionary."""
    if isinstance(metadata, dict):
        return metadata
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(metadata, preserving_proto_field_name=True)


def _pixels(*images: bytes) -> np.ndarray:
    return np.stack([load_pixels(image, Preprocessing(resize=32, height=32, width=32)) for image in images])


def _input(module: Any, data: np.ndarray, **options: Any) -> Any:
    datatype = "UINT8" if data.dtype == np.uint8 else "BYTES"
    tensor = module.InferInput("pixels", list(data.shape), datatype)
    tensor.set_data_from_numpy(data, **options)
    return tensor


def test_health_and_metadata(triton: tuple[Any, Any]) -> None:
    _, client = triton
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("tiny", "7")
    assert not client.is_model_ready("nobody")
    server = _metadata(client.get_server_metadata())
    assert server["name"] == "trimrt"
    assert "system_shared_memory" not in server["extensions"]
    model = _metadata(client.get_model_metadata("tiny", "1"))
    assert model["name"] == "tiny"
    assert model["versions"] == ["1"]
    assert model["platform"] == "openvino_blob"
    (tensor,) = model["inputs"]
    assert (tensor["name"], tensor["datatype"]) == ("pixels", "UINT8")
    assert [int(side) for side in tensor["shape"]] == [-1, 32, 32, 3]
    assert [output["name"] for output in model["outputs"]] == ["logits", "probabilities"]


def test_pixels_give_what_the_engine_gives(
    triton: tuple[Any, Any], encode: Encode, reference: Reference
) -> None:
    module, client = triton
    images = [encode(seed) for seed in range(3)]
    answer = client.infer("tiny", [_input(module, _pixels(*images))], request_id="42")
    probabilities = answer.as_numpy("probabilities")
    assert probabilities.shape == (3, 10)
    np.testing.assert_allclose(probabilities, [reference(image) for image in images], atol=1e-6)
    logits = answer.as_numpy("logits")
    np.testing.assert_allclose(
        np.exp(logits) / np.exp(logits).sum(1, keepdims=True), probabilities, atol=1e-6
    )
    response = _metadata(answer.get_response())
    assert (response["model_name"], response["model_version"], response["id"]) == ("tiny", "1", "42")


def test_encoded_images_are_decoded_by_the_server(
    triton: tuple[Any, Any], encode: Encode, reference: Reference
) -> None:
    module, client = triton
    images = [encode(1, "JPEG"), encode(2, "PNG", (200, 100)), encode(3, "WEBP")]
    outputs = [module.InferRequestedOutput("probabilities")]
    answer = client.infer("other", [_input(module, np.array(images, object))], outputs=outputs)
    expected = [reference(image, "other-v1") for image in images]
    np.testing.assert_allclose(answer.as_numpy("probabilities"), expected, atol=1e-6)
    assert answer.as_numpy("logits") is None


def test_classification_agrees_with_predict(
    triton: tuple[Any, Any], process: tuple[str, str], encode: Encode
) -> None:
    module, client = triton
    image = encode(5)
    outputs = [module.InferRequestedOutput("probabilities", class_count=3)]
    answer = client.infer("tiny", [_input(module, np.array([image], object))], outputs=outputs)
    classes = [row.decode().split(":") for row in answer.as_numpy("probabilities").ravel()]
    predicted = httpx.post(
        f"http://{process[0]}/predict?top_k=3", content=image, headers={"Content-Type": "image/png"}
    ).json()["results"][0]["predictions"]
    assert [(int(index), label) for _, index, label in classes] == [
        (p["index"], p["label"]) for p in predicted
    ]
    for (score, _, _), prediction in zip(classes, predicted, strict=True):
        assert float(score) == pytest.approx(prediction["probability"], abs=1e-6)


def test_json_tensors_without_the_binary_extension(
    process: tuple[str, str], encode: Encode, reference: Reference
) -> None:
    import tritonclient.http as module

    image = encode(6)
    with module.InferenceServerClient(process[0]) as client:
        tensor = _input(module, _pixels(image), binary_data=False)
        outputs = [module.InferRequestedOutput("probabilities", binary_data=False)]
        answer = client.infer("tiny", [tensor], outputs=outputs)
        assert "parameters" not in answer.get_output("probabilities")
        np.testing.assert_array_equal(answer.as_numpy("probabilities")[0], reference(image))


def test_load_through_the_client(triton: tuple[Any, Any], encode: Encode, reference: Reference) -> None:
    """As perf_analyzer does: many requests in flight, each with its own answer."""
    module, client = triton
    images = [encode(seed) for seed in range(20)]
    expected = [int(reference(image).argmax()) for image in images]

    def ask(number: int) -> int:
        answer = client.infer("tiny", [_input(module, _pixels(images[number % 20]))])
        return int(answer.as_numpy("logits").argmax())

    if (
        module.__name__ == "tritonclient.http"
    ):  # gevent's client belongs to one thread, and is asynchronous itself
        asked = [client.async_infer("tiny", [_input(module, _pixels(images[n % 20]))]) for n in range(200)]
        labels = [int(handle.get_result().as_numpy("logits").argmax()) for handle in asked]
    else:
        with ThreadPoolExecutor(8) as pool:
            labels = list(pool.map(ask, range(200)))
    assert labels == [expected[n % 20] for n in range(200)]


@pytest.mark.parametrize(
    ("model", "version", "data", "message"),
    [
        ("nobody", "", np.zeros((1, 32, 32, 3), np.uint8), "no engine 'nobody' is loaded"),
        ("tiny", "7", np.zeros((1, 32, 32, 3), np.uint8), "version 7 of tiny is not loaded"),
        ("tiny", "", np.zeros((1, 16, 16, 3), np.uint8), "the input's shape is"),
        ("tiny", "", np.zeros((0, 32, 32, 3), np.uint8), "the input has no images"),
        ("tiny", "", np.zeros((65, 32, 32, 3), np.uint8), "the limit is 64"),
        ("tiny", "", np.array([b"no image"], object), "not an image"),
    ],
)
def test_errors_reach_the_client(
    triton: tuple[Any, Any], model: str, version: str, data: np.ndarray, message: str
) -> None:
    from tritonclient.utils import InferenceServerException

    module, client = triton
    with pytest.raises(InferenceServerException, match=message):
        client.infer(model, [_input(module, data)], model_version=version)


def _infer(server: Running, body: Any, **headers: str) -> httpx.Response:
    if isinstance(body, bytes):
        return server.client.post("/v2/models/tiny/infer", content=body, headers=headers)
    return server.client.post("/v2/models/tiny/infer", json=body, headers=headers)


def _json_input(**changes: Any) -> dict[str, Any]:
    pixels = {"name": "pixels", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [7] * 3072}
    return {"inputs": [pixels | changes]}


def test_plain_json_all_the_way(server: Running, encode: Encode, reference: Reference) -> None:
    image = encode(8)
    nested = _json_input(data=_pixels(image).tolist())
    outputs = _infer(server, nested).json()["outputs"]
    assert [output["name"] for output in outputs] == ["logits", "probabilities"]
    np.testing.assert_array_equal(np.float32(outputs[1]["data"]), reference(image))
    text = base64.b64encode(image).decode()
    encoded = _json_input(datatype="BYTES", shape=[1], data=[text])
    assert _infer(server, encoded).json()["outputs"] == outputs


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b"", 400, id="empty"),
        pytest.param(b"[]", 400, id="no object"),
        pytest.param({"inputs": []}, 400, id="no inputs"),
        pytest.param(_json_input(name="image"), 422, id="unknown input"),
        pytest.param(_json_input(datatype="FP32"), 422, id="wrong datatype"),
        pytest.param(_json_input(shape=[1, 3, 32, 32]), 422, id="wrong layout"),
        pytest.param(_json_input(data=[7] * 3071), 400, id="too few numbers"),
        pytest.param(_json_input(data=[256] * 3072), 400, id="numbers too large"),
        pytest.param(_json_input(data=[-1] * 3072), 400, id="negative numbers"),
        pytest.param(_json_input(data=[0.5] * 3072), 400, id="fractions"),
        pytest.param(_json_input(data=["x"] * 3072), 400, id="text for numbers"),
        pytest.param(_json_input(data=[[1], 2]), 400, id="rows and elements"),
        pytest.param(_json_input(data=[True] * 3072), 400, id="truth values for numbers"),
        pytest.param(_json_input(shape=[1] * 9), 400, id="many dimensions"),
        pytest.param(_json_input(name="x" * 1025), 400, id="long name"),
        pytest.param(_json_input() | {"id": "x" * 1025}, 400, id="long id"),
        pytest.param(_json_input() | {"outputs": [{"name": "logits"}] * 2}, 422, id="an output twice"),
        pytest.param(_json_input() | {"outputs": [{"name": "logits"}] * 17}, 400, id="many outputs"),
        pytest.param({"inputs": [1] * 10_000}, 400, id="numbers for inputs"),
        pytest.param(_json_input(datatype="BYTES", shape=[1], data=["!"]), 400, id="not base64"),
        pytest.param(_json_input(datatype="BYTES", shape=[2], data=[""]), 400, id="too few elements"),
        pytest.param(_json_input(shape=[2**62, 32, 32, 3]), 400, id="astronomic shape"),
        pytest.param(_json_input(data=None), 400, id="no data"),
        pytest.param(_json_input(parameters={"binary_data_size": 9}), 400, id="binary data missing"),
        pytest.param(_json_input() | {"outputs": [{"name": "boxes"}]}, 422, id="unknown output"),
        pytest.param(
            _json_input() | {"outputs": [{"name": "logits", "parameters": {"classification": 11}}]},
            422,
            id="too many classes",
        ),
    ],
)
def test_bad_requests_are_answered_as_the_protocol_says(server: Running, body: Any, status: int) -> None:
    response = _infer(server, body)
    assert response.status_code == status, response.text
    assert response.json()["error"]
    assert _infer(server, _json_input()).status_code == 200


def test_rows_of_unequal_length_are_named(server: Running) -> None:
    refused = _infer(server, _json_input(data=[[[1, 2]], [[3]]]))
    assert refused.status_code == 400
    assert refused.json()["detail"] == "input 'pixels' has rows of unequal length: 1 and 2 elements"


def _asking(**parameters: Any) -> dict[str, Any]:
    return _json_input() | {"outputs": [{"name": "logits", "parameters": parameters}]}


MISTYPED = [
    *((_json_input(shape=[value, 32, 32, 3]), "inputs.0.shape.0") for value in ("1", True, 1.0, None, [1])),
    *((_asking(classification=value), "outputs.0.parameters.classification") for value in ("1", True, 1.0)),
    *((_asking(binary_data=value), "outputs.0.parameters.binary_data") for value in ("true", 1)),
    (_json_input(parameters={"binary_data_size": "3072"}), "inputs.0.parameters.binary_data_size"),
    (_json_input() | {"parameters": {"binary_data_output": 1}}, "parameters.binary_data_output"),
    (_json_input() | {"id": 7}, "id"),
    (_json_input(name=7), "inputs.0.name"),
]


@pytest.mark.parametrize(("body", "field"), MISTYPED)
def test_a_value_of_another_type_is_refused_and_its_field_named(
    server: Running, body: dict[str, Any], field: str
) -> None:
    refused = _infer(server, body)
    assert refused.status_code == 400
    assert refused.json()["detail"].startswith(f"not an inference request: {field}: Input should be ")


def test_null_is_as_good_as_nothing(server: Running) -> None:
    """Some clients write every field of the schema."""
    body = _json_input(parameters=None) | {"id": None, "parameters": None, "outputs": None}
    assert _infer(server, body).json()["outputs"] == _infer(server, _json_input()).json()["outputs"]
    asked = _infer(server, _asking(classification=None, binary_data=None, shared_memory_region=None))
    assert asked.json()["outputs"] == _infer(server, _asking()).json()["outputs"]


@pytest.mark.parametrize(("datatype", "data"), [("FP32", [0.5] * 3072), ("INT3", [1] * 3072)])
def test_another_datatype_is_named_whatever_the_data_is(server: Running, datatype: str, data: Any) -> None:
    refused = _infer(server, _json_input(datatype=datatype, data=data))
    assert refused.status_code == 422
    assert refused.json()["detail"] == (
        f"input 'pixels' takes UINT8 pixels or BYTES images, not '{datatype}'"
    )


@pytest.mark.parametrize("datatype", ["BYTES", "UINT8"])
@pytest.mark.parametrize("depth", [9, 990, 5000])
def test_lists_nested_deeply_are_refused(server: Running, datatype: str, depth: int) -> None:
    body = _json_input(datatype=datatype, data=["DEEP"])
    text = json.dumps(body).replace('["DEEP"]', "[" * depth + '"aaaa"' + "]" * depth)
    assert _infer(server, text.encode()).status_code == 400


def test_json_of_a_megabyte_of_numbers_is_taken(server: Running, encode: Encode) -> None:
    images = np.repeat(_pixels(encode(8)), 16, 0)
    answer = _infer(server, _json_input(shape=list(images.shape), data=images.tolist()))
    assert answer.status_code == 200
    assert answer.json()["outputs"][0]["shape"] == [16, 10]


def test_json_answers_have_a_limit_that_binary_ones_do_not(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.v2.rest._MOST_NUMBERS", 19)
    assert "binary" in _infer(server, _json_input()).json()["detail"]
    one = _json_input() | {"outputs": [{"name": "logits"}]}
    assert _infer(server, one).status_code == 200
    binary = _json_input() | {"parameters": {"binary_data_output": True}}
    assert _infer(server, binary).status_code == 200


def test_shared_memory_is_refused_and_never_ignored(triton: tuple[Any, Any], encode: Encode) -> None:
    from tritonclient.utils import InferenceServerException

    module, client = triton
    shared_input = module.InferInput("pixels", [1, 32, 32, 3], "UINT8")
    shared_input.set_shared_memory("region", 3072)
    with pytest.raises(InferenceServerException, match="shared memory is off"):
        client.infer("tiny", [shared_input])
    shared_output = module.InferRequestedOutput("logits")
    shared_output.set_shared_memory("region", 40)
    with pytest.raises(InferenceServerException, match="shared memory is off"):
        client.infer("tiny", [_input(module, _pixels(encode(0)))], outputs=[shared_output])


@pytest.mark.parametrize("length", ["-1", "x", "999999", "9" * 5000, "²"])
def test_a_wrong_header_length(server: Running, length: str) -> None:
    headers = {"Inference-Header-Content-Length": length.encode("latin-1")}
    response = server.client.post("/v2/models/tiny/infer", content=b"{}", headers=headers)
    assert response.status_code == 400


@given(st.lists(st.binary(max_size=40)))
def test_bytes_tensors_round_trip(elements: list[bytes]) -> None:
    assert unpack_bytes(pack_bytes(elements), len(elements)) == elements


def _refusal(call: Callable[[], Any]) -> str:
    """The name of the problem that `call` raises, if any."""
    try:
        call()
    except Problem as problem:
        return problem.name
    return ""


@given(st.binary(max_size=60), st.none() | st.text(max_size=4))
def test_any_body_is_parsed_or_refused(body: bytes, header_length: str | None) -> None:
    refusal = _refusal(lambda: parse(body, header_length, 64, NO_REGIONS.read))
    assert refusal in ("", "malformed-request", "invalid-parameter")


@given(st.binary(max_size=40))
def test_any_bytes_tensor_is_unpacked_or_refused(packed: bytes) -> None:
    if not (refusal := _refusal(lambda: unpack_bytes(packed, 8))):
        assert pack_bytes(unpack_bytes(packed, 8)) == packed
    assert refusal in ("", "malformed-request", "too-many-images")


def test_the_committed_messages_are_those_of_the_proto(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]

    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(root), f"--python_out={tmp_path}"]
    subprocess.run([*command, str(root / "server/v2/inference.proto")], check=True)
    made, committed = (
        (folder / "server/v2/inference_pb2.py").read_text().partition("AddSerializedFile(")[2].splitlines()[0]
        for folder in (tmp_path, root)
    )
    assert made == committed, "run `make proto`"


def test_labels_are_the_engines(server: Running) -> None:
    body = _json_input() | {"outputs": [{"name": "probabilities", "parameters": {"classification": 10}}]}
    (output,) = _infer(server, body).json()["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1, 10])
    assert sorted(row.split(":")[2] for row in output["data"]) == sorted(LABELS)
