"""Every public method of NVIDIA's four clients: it works, or is refused in words, as docs/triton.md says."""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from processes import Started, start_process
from tiny_engine import SIDE, write_package
from tritonclient.utils import InferenceServerException, shared_memory

# tritonclient leaves the connection of a refusal to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning")

FORMS = ("http", "http.aio", "grpc", "grpc.aio")
PAGE = Path(__file__).parents[2] / "docs/triton.md"
KEY = "a key"
PIXELS = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """A server whose engines may come and go."""
    engines = tmp_path_factory.mktemp("engines")
    for name in ("tiny", "other", "third"):
        write_package(engines, name)
    options = ["--engine-dir", str(engines), "--engine", "tiny,other", "--grpc-port", "0"]
    folder = tmp_path_factory.mktemp("server")
    more = ["--client-shared-memory", "--api-key", KEY, "--otlp-endpoint", "http://127.0.0.1:9"]
    with start_process([*options, *more], folder / "log") as started:
        yield started


class Client:
    """One of the four clients; its methods are called by name, and waited for."""

    def __init__(self, form: str, process: Started) -> None:
        self.form = form
        self.url = process.url
        self.module: ModuleType = importlib.import_module(f"tritonclient.{form}")
        self._loop = asyncio.new_event_loop() if form.endswith("aio") else None
        address = process.said("grpc") if "grpc" in form else process.url.removeprefix("http://")
        self._client = self.run(lambda: self.module.InferenceServerClient(address))

    def run(self, make: Callable[[], Any]) -> Any:
        async def waited() -> Any:
            made = make()
            return await made if inspect.isawaitable(made) else made

        return make() if self._loop is None else self._loop.run_until_complete(waited())

    def method(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **options: getattr(self._client, name)(*arguments, **options)

    def __call__(self, name: str, *arguments: Any, **options: Any) -> Any:
        if name not in ("generate_request_body", "parse_response_body", "close"):
            options["headers"] = {"x-api-key": KEY}
        told = self.run(lambda: self.method(name)(*arguments, **options))
        return MessageToDict(told, preserving_proto_field_name=True) if hasattr(told, "DESCRIPTOR") else told

    def inputs(self) -> list[Any]:
        tensor = self.module.InferInput("pixels", list(PIXELS.shape), "UINT8")
        tensor.set_data_from_numpy(PIXELS)
        return [tensor]

    def close(self) -> None:
        self("close")
        if self._loop is not None:
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()
        gc.collect()  # or another test gets the warning


@pytest.fixture(params=FORMS)
def client(request: pytest.FixtureRequest, process: Started) -> Iterator[Client]:
    client = Client(request.param, process)
    yield client
    if request.node.originalname != "test_close":
        client.close()


def public_methods(form: str) -> set[str]:
    kind = importlib.import_module(f"tritonclient.{form}").InferenceServerClient
    return {name for name, _ in inspect.getmembers(kind, callable) if not name.startswith("_")} - PLUGINS


PLUGINS = {"register_plugin", "unregister_plugin", "plugin"}  # of the client alone: they ask no server


def rows() -> dict[str, str]:
    """The page's table: what becomes of each method."""
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", PAGE.read_text("utf-8"), re.MULTILINE))


def refused(method: str) -> str:
    """The words in which it is, by the page; empty if it works."""
    match = re.search(r"refused: “(.+)”", rows()[method])
    return re.escape(match[1]) if match else ""


def test_the_page_has_every_method_and_no_other() -> None:
    assert set(rows()) == set().union(*(public_methods(form) for form in FORMS))


def test_every_method_of_the_page_is_tried_here() -> None:
    tried = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(rows()) <= tried


def _works(client: Client, method: str) -> bool:
    """Whether the client has the method; then the page has to say that it works."""
    assert not refused(method)
    return method in public_methods(client.form)


def _is_refused(client: Client, method: str, *arguments: Any, **options: Any) -> None:
    words = refused(method)
    assert words
    if method in public_methods(client.form):
        with pytest.raises(InferenceServerException, match=words):
            client(method, *arguments, **options)


# --- health, metadata, inference ------------------------------------------------------------------------


def test_is_server_live(client: Client) -> None:
    assert _works(client, "is_server_live")
    assert client("is_server_live")


def test_is_server_ready(client: Client) -> None:
    assert _works(client, "is_server_ready")
    assert client("is_server_ready")


def test_is_model_ready(client: Client) -> None:
    assert _works(client, "is_model_ready")
    assert client("is_model_ready", "tiny")
    assert not client("is_model_ready", "third")


def test_get_server_metadata(client: Client) -> None:
    assert _works(client, "get_server_metadata")
    assert client("get_server_metadata")["extensions"] == [
        *("binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"),
        *("trace", "logging", "system_shared_memory"),
    ]


def test_get_model_metadata(client: Client) -> None:
    assert _works(client, "get_model_metadata")
    assert client("get_model_metadata", "tiny")["platform"] == "openvino_blob"


def test_infer(client: Client) -> None:
    assert _works(client, "infer")
    assert client("infer", "tiny", client.inputs()).as_numpy("logits").shape == (1, 10)


def test_async_infer(client: Client) -> None:
    if not _works(client, "async_infer"):
        return
    if client.form == "http":
        result = client("async_infer", "tiny", client.inputs()).get_result()
    else:
        results: SimpleQueue[Any] = SimpleQueue()
        client.method("async_infer")("tiny", client.inputs(), lambda result, error: results.put(result))
        result = results.get(timeout=60)
    assert result.as_numpy("logits").shape == (1, 10)


def test_generate_request_body(client: Client) -> None:
    if not _works(client, "generate_request_body"):
        return
    body, length = client.method("generate_request_body")(client.inputs())
    headers = {"Inference-Header-Content-Length": str(length)} if length else {}
    url = f"{client.url}/v2/models/tiny/infer"
    assert httpx.post(url, content=body, headers=headers).status_code == 200


def test_parse_response_body(client: Client) -> None:
    if not _works(client, "parse_response_body"):
        return
    body, length = client.method("generate_request_body")(client.inputs())
    answer = httpx.post(
        f"{client.url}/v2/models/tiny/infer",
        content=body,
        headers={"Inference-Header-Content-Length": str(length)},
    )
    result = client.method("parse_response_body")(
        answer.content, header_length=int(answer.headers["inference-header-content-length"])
    )
    assert result.as_numpy("probabilities").shape == (1, 10)


def test_start_stream(client: Client) -> None:
    """It sends nothing by itself, but what opens the stream; the refusal comes to its callback."""
    if "start_stream" not in public_methods(client.form):
        return
    assert re.search(refused("start_stream"), str(_streamed(client)))


def test_async_stream_infer(client: Client) -> None:
    if "async_stream_infer" not in public_methods(client.form):
        return
    assert re.search(refused("async_stream_infer"), str(_streamed(client)))


def test_stop_stream(client: Client) -> None:
    if _works(client, "stop_stream"):
        _streamed(client)


def _streamed(client: Client) -> Any:
    """Open a stream, send a request, close the stream; the error of which the callback was told."""
    errors: SimpleQueue[Any] = SimpleQueue()
    client.method("start_stream")(callback=lambda result, error: errors.put(error))
    with suppress(InferenceServerException):  # the stream may be over already, which the callback was told
        client.method("async_stream_infer")("tiny", client.inputs())
    error = errors.get(timeout=60)
    client.method("stop_stream")()
    return error


def test_stream_infer(client: Client) -> None:
    if "stream_infer" not in public_methods(client.form):
        return

    async def requests() -> Any:
        yield {"model_name": "tiny", "inputs": client.inputs()}

    async def answers() -> list[Any]:
        return [answer async for answer in client.method("stream_infer")(requests())]

    with pytest.raises(grpc.RpcError, match=refused("stream_infer")):  # which the client passes on
        client.run(answers)


def test_close(client: Client) -> None:
    assert _works(client, "close")
    client.close()


# --- model configuration, statistics --------------------------------------------------------------------


def test_get_model_config(client: Client) -> None:
    assert _works(client, "get_model_config")
    told = client("get_model_config", "tiny")
    config = told.get("config", told)
    assert (config["name"], config["platform"], config["max_batch_size"]) == ("tiny", "openvino_blob", 64)
    (tensor,) = config["input"]
    assert (tensor["data_type"], tensor["format"]) == ("TYPE_UINT8", "FORMAT_NHWC")
    assert [int(side) for side in tensor["dims"]] == [SIDE, SIDE, 3]
    assert [output["name"] for output in config["output"]] == ["logits", "probabilities"]
    with pytest.raises(InferenceServerException, match="no engine 'nobody' is loaded"):
        client("get_model_config", "nobody")


def test_get_inference_statistics(client: Client) -> None:
    assert _works(client, "get_inference_statistics")

    def counted() -> dict[str, Any]:
        (stats,) = client("get_inference_statistics", "other")["model_stats"]
        return stats

    client("infer", "other", client.inputs())
    before = counted()
    client("infer", "other", client.inputs())
    after = counted()
    assert int(after["inference_count"]) == int(before["inference_count"]) + 1
    assert int(after["execution_count"]) == int(before["execution_count"]) + 1
    assert int(after["last_inference"]) > 1.7e12
    for stage in ("success", "queue", "compute_input", "compute_infer"):
        earlier, later = before["inference_stats"][stage], after["inference_stats"][stage]
        assert int(later["count"]) == int(earlier["count"]) + 1
        if stage in ("success", "compute_infer"):  # pixels need not be decoded, and waited for nobody
            assert int(later["ns"]) > int(earlier["ns"])
    (alone,) = (it for it in after["batch_stats"] if int(it["batch_size"]) == 1)
    assert int(alone["compute_infer"]["ns"]) > 0
    every = client("get_inference_statistics")["model_stats"]
    assert {it["name"] for it in every} >= {"tiny", "other"}


# --- the model repository -------------------------------------------------------------------------------


def _states(client: Client) -> dict[str, str]:
    index = client("get_model_repository_index")
    models = index["models"] if isinstance(index, dict) else index
    return {model["name"]: model["state"] for model in models}


def test_get_model_repository_index(client: Client) -> None:
    assert _works(client, "get_model_repository_index")
    assert _states(client) == {"tiny": "READY", "other": "READY", "third": "UNAVAILABLE"}


def test_load_model(client: Client) -> None:
    assert _works(client, "load_model")
    client("load_model", "third")
    assert _states(client)["third"] == "READY"
    client("unload_model", "third")
    with pytest.raises(InferenceServerException, match="loaded as it is, without parameters"):
        client("load_model", "third", config="{}")
    with pytest.raises(InferenceServerException, match="nobody"):
        client("load_model", "nobody")


def test_unload_model(client: Client) -> None:
    assert _works(client, "unload_model")
    client("load_model", "third")
    client("unload_model", "third", unload_dependents=True)
    assert _states(client)["third"] == "UNAVAILABLE"
    with pytest.raises(InferenceServerException, match="tiny is the default engine"):
        client("unload_model", "tiny")


@pytest.mark.parametrize("method", ["load_model", "unload_model"])
def test_managing_needs_the_key(client: Client, method: str) -> None:
    with pytest.raises(InferenceServerException, match="send the API key"):
        client.run(lambda: client.method(method)("third"))


# --- logs and traces ------------------------------------------------------------------------------------


def _log(client: Client, method: str, *arguments: Any) -> dict[str, Any]:
    told = client(method, *arguments)
    settings = told.get("settings", told)
    return {
        name: next(iter(value.values())) if isinstance(value, dict) else value
        for name, value in settings.items()
    }


def test_get_log_settings(client: Client) -> None:
    assert _works(client, "get_log_settings")
    assert _log(client, "get_log_settings") == {
        **{"log_file": "", "log_info": True, "log_warnings": True, "log_errors": True},
        **{"log_verbose_level": 0, "log_format": "default"},
    }


def test_update_log_settings(client: Client) -> None:
    assert _works(client, "update_log_settings")
    assert _log(client, "update_log_settings", {"log_verbose_level": 1})["log_verbose_level"] == 1
    quiet = _log(client, "update_log_settings", {"log_verbose_level": 0, "log_info": False})
    assert (quiet["log_info"], quiet["log_warnings"]) == (False, True)
    assert _log(client, "update_log_settings", {"log_info": True})["log_info"]
    for settings, words in (
        ({"log_errors": False}, "a level is written only together with all that are more urgent"),
        ({"log_file": "/tmp/log"}, "log_file cannot be changed"),
        ({"log_colour": True}, "no setting 'log_colour'"),
    ):
        with pytest.raises(InferenceServerException, match=words):
            client("update_log_settings", settings)


def _trace(client: Client, method: str, *arguments: Any, **options: Any) -> dict[str, Any]:
    told = client(method, *arguments, **options)
    settings = told.get("settings", told)
    values = {name: value["value"] if isinstance(value, dict) else value for name, value in settings.items()}
    return {
        name: value[0] if isinstance(value, list) and name != "trace_level" else value
        for name, value in values.items()
    }


def test_get_trace_settings(client: Client) -> None:
    assert _works(client, "get_trace_settings")
    settings = _trace(client, "get_trace_settings")
    assert (settings["trace_level"], settings["trace_rate"]) == (["TIMESTAMPS"], "1")
    assert settings["trace_mode"] == "opentelemetry"
    assert _trace(client, "get_trace_settings", model_name="tiny") == settings


def test_update_trace_settings(client: Client) -> None:
    assert _works(client, "update_trace_settings")

    def update(**settings: Any) -> dict[str, Any]:
        return _trace(client, "update_trace_settings", settings=settings)

    assert update(trace_rate="1000")["trace_rate"] == "1000"
    assert update(trace_level=["OFF"])["trace_level"] == ["OFF"]
    assert update(trace_level=["TIMESTAMPS"], trace_rate=None)["trace_rate"] == "1"
    for settings, words in (
        ({"trace_level": ["TENSORS"]}, "trace_level is OFF or TIMESTAMPS"),
        ({"trace_rate": "0"}, "trace_rate is a whole number"),
        ({"trace_rate": f"1{'0' * 20}"}, "trace_rate is a whole number"),
        ({"trace_file": "/tmp/trace"}, "trace_file cannot be changed"),
    ):
        with pytest.raises(InferenceServerException, match=words):
            update(**settings)
    with pytest.raises(InferenceServerException, match="no model has its own"):
        client("update_trace_settings", model_name="tiny", settings={"trace_rate": "2"})


# --- shared memory --------------------------------------------------------------------------------------


@pytest.fixture
def object_in_memory() -> Iterator[tuple[str, Any]]:
    """An object in shared memory: its name, and the client's handle."""
    key = f"trimrt-test-{secrets.token_hex(8)}"
    handle = shared_memory.create_shared_memory_region("region", key, PIXELS.nbytes + 80)
    yield key, handle
    shared_memory.destroy_shared_memory_region(handle)


def test_register_system_shared_memory(client: Client, object_in_memory: tuple[str, Any]) -> None:
    assert _works(client, "register_system_shared_memory")
    key, handle = object_in_memory
    shared_memory.set_shared_memory_region(handle, [PIXELS])
    client("register_system_shared_memory", "region", key, PIXELS.nbytes + 80)
    tensor = client.module.InferInput("pixels", list(PIXELS.shape), "UINT8")
    tensor.set_shared_memory("region", PIXELS.nbytes)
    outputs = [client.module.InferRequestedOutput(name) for name in ("logits", "probabilities")]
    for number, output in enumerate(outputs):
        output.set_shared_memory("region", 40, PIXELS.nbytes + 40 * number)
    client("infer", "tiny", [tensor], outputs=outputs)
    sent = client("infer", "tiny", client.inputs())
    for number, name in enumerate(("logits", "probabilities")):
        laid_down = shared_memory.get_contents_as_numpy(
            handle, np.float32, [1, 10], PIXELS.nbytes + 40 * number
        )
        np.testing.assert_array_equal(laid_down, sent.as_numpy(name))
    client("unregister_system_shared_memory", "region")


def test_get_system_shared_memory_status(client: Client, object_in_memory: tuple[str, Any]) -> None:
    assert _works(client, "get_system_shared_memory_status")
    key, _ = object_in_memory
    client("register_system_shared_memory", "region", key, 100, offset=20)
    told = client("get_system_shared_memory_status")
    (region,) = told if isinstance(told, list) else told["regions"].values()
    assert (region["name"], region["key"]) == ("region", key)
    assert (int(region["byte_size"]), int(region["offset"])) == (100, 20)
    client("unregister_system_shared_memory")
    with pytest.raises(InferenceServerException, match="no region 'region' is registered"):
        client("get_system_shared_memory_status", "region")


def test_unregister_system_shared_memory(client: Client, object_in_memory: tuple[str, Any]) -> None:
    assert _works(client, "unregister_system_shared_memory")
    client("register_system_shared_memory", "region", object_in_memory[0], 100)
    client("unregister_system_shared_memory", "region")
    tensor = client.module.InferInput("pixels", list(PIXELS.shape), "UINT8")
    tensor.set_shared_memory("region", PIXELS.nbytes)
    with pytest.raises(InferenceServerException, match="no region 'region' is registered"):
        client("infer", "tiny", [tensor])


def test_get_cuda_shared_memory_status(client: Client) -> None:
    _is_refused(client, "get_cuda_shared_memory_status")


def test_register_cuda_shared_memory(client: Client) -> None:
    handle = "aGFuZGxl" if "http" in client.form else b"aGFuZGxl"
    _is_refused(client, "register_cuda_shared_memory", "region", handle, 0, 100)


def test_unregister_cuda_shared_memory(client: Client) -> None:
    _is_refused(client, "unregister_cuda_shared_memory")
