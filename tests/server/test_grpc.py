"""What is gRPC's own: messages that are not what they should be, or never come, and the port."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st
from processes import TRIMRT, Started, start_process
from running import wait_until

from server.problems import Problem
from server.v2 import inference_pb2 as pb
from server.v2.grpc_call import REQUEST
from server.v2.tensors import pack_bytes
from server.v2.wire import MOST_OTHER, check_size

Encode = Callable[..., bytes]
InferInputTensor = pb.ModelInferRequest.InferInputTensor

BODY = 8 << 20


@pytest.fixture(scope="module")
def process(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    options = ["--engine-dir", str(engine_dir), "--engine", "tiny", "--grpc-port", "0"]
    limits = ["--max-body-bytes", str(BODY), "--max-body-memory-bytes", str(32 * BODY)]
    with start_process([*options, *limits], tmp_path_factory.mktemp("grpc") / "log") as started:
        yield started


@pytest.fixture
def channel(process: Started) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(process.said("grpc")) as channel:
        yield channel


@pytest.fixture(autouse=True)
def still_serving(process: Started, channel: grpc.Channel, encode: Encode) -> Iterator[None]:
    yield
    assert _code(channel, "ModelInfer", _request(encode(0))) == "OK"
    assert "Traceback" not in process.log.read_text()


def _call(channel: grpc.Channel, method: str, message: bytes | Message) -> Any:
    body = message if isinstance(message, bytes) else message.SerializeToString()
    return channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(body, timeout=30)


def _code(channel: grpc.Channel, method: str, message: bytes | Message) -> str:
    try:
        _call(channel, method, message)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def _request(*images: bytes) -> pb.ModelInferRequest:
    tensor = InferInputTensor(name="pixels", datatype="BYTES", shape=[len(images)])
    return pb.ModelInferRequest(model_name="tiny", inputs=[tensor], raw_input_contents=[pack_bytes(images)])


# --- messages that are not what they should be ----------------------------------------------------------


@pytest.mark.parametrize("method", ["ModelInfer", "ModelReady", "ModelMetadata"])
@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"\xff" * 1000, id="garbage"),
        pytest.param(b"\x0a\x64short", id="truncated"),
        pytest.param(b"\x0a\x02\xff\xfe", id="name that is no UTF-8"),
        pytest.param(b"\x0b" * 1000, id="groups that never end"),
    ],
)
def test_a_message_that_cannot_be_parsed_is_an_invalid_argument(
    channel: grpc.Channel, method: str, message: bytes
) -> None:
    assert _code(channel, method, message) == "INVALID_ARGUMENT"


def test_a_call_without_a_message_is_an_invalid_argument(channel: grpc.Channel) -> None:
    call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
    with pytest.raises(grpc.RpcError) as error:
        call(iter(()), timeout=30)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def _with(**changes: Any) -> pb.ModelInferRequest:
    request = _request(b"image")
    request.MergeFrom(pb.ModelInferRequest(**changes))
    return request


def _numbers(count: int, value: int = 1) -> pb.ModelInferRequest:
    contents = pb.InferTensorContents(uint_contents=[value] * count)
    tensor = InferInputTensor(name="pixels", datatype="UINT8", shape=[1, 32, 32, 3], contents=contents)
    return pb.ModelInferRequest(model_name="tiny", inputs=[tensor])


def _elements(count: int) -> pb.ModelInferRequest:
    contents = pb.InferTensorContents(bytes_contents=[b""] * count)
    tensor = InferInputTensor(name="pixels", datatype="BYTES", shape=[count], contents=contents)
    return pb.ModelInferRequest(model_name="tiny", inputs=[tensor])


def _shaped(*shape: int) -> pb.ModelInferRequest:
    request = _request(b"image")
    request.inputs[0].shape[:] = shape
    return request


def _classification(**value: Any) -> pb.ModelInferRequest:
    request = _request(b"image")
    request.outputs.add(name="logits").parameters["classification"].MergeFrom(pb.InferParameter(**value))
    return request


LOGITS = pb.ModelInferRequest.InferRequestedOutputTensor(name="logits")


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        pytest.param(
            lambda: _with(inputs=[InferInputTensor()] * 1_000_000),
            "RESOURCE_EXHAUSTED",
            "fields",
            id="inputs",
        ),
        pytest.param(lambda: _with(outputs=[LOGITS] * 50_000), "RESOURCE_EXHAUSTED", "fields", id="outputs"),
        pytest.param(
            lambda: _with(outputs=[LOGITS] * 20), "INVALID_ARGUMENT", "more than 16", id="20 outputs"
        ),
        pytest.param(lambda: _with(outputs=[LOGITS] * 2), "INVALID_ARGUMENT", "twice", id="an output twice"),
        pytest.param(lambda: _elements(3_000_000), "RESOURCE_EXHAUSTED", "fields", id="elements"),
        pytest.param(lambda: _elements(65), "INVALID_ARGUMENT", "the limit is 64", id="65 elements"),
        pytest.param(
            lambda: _request(*[b""] * 1_000_000), "INVALID_ARGUMENT", "the limit is 64", id="raw elements"
        ),
        pytest.param(lambda: _numbers(2 << 20), "RESOURCE_EXHAUSTED", "raw_input_contents", id="numbers"),
        pytest.param(lambda: _numbers(3072, 256), "INVALID_ARGUMENT", "from 0 to 255", id="large numbers"),
        pytest.param(lambda: _with(id="x" * 100_000), "INVALID_ARGUMENT", "1024 characters", id="long id"),
        pytest.param(lambda: _shaped(-1, -1), "INVALID_ARGUMENT", "negative", id="negative shape"),
        pytest.param(lambda: _shaped(*[1] * 9), "INVALID_ARGUMENT", "8 dimensions", id="many dimensions"),
        pytest.param(
            lambda: _classification(int64_param=-5), "INVALID_ARGUMENT", "-5", id="negative classification"
        ),
        pytest.param(
            lambda: _classification(string_param="3"), "INVALID_ARGUMENT", "whole number", id="words for it"
        ),
    ],
)
def test_a_message_that_asks_too_much_is_refused_in_words(
    channel: grpc.Channel, request_: Callable[[], pb.ModelInferRequest], code: str, words: str
) -> None:
    with pytest.raises(grpc.RpcError) as error:
        _call(channel, "ModelInfer", request_())
    assert error.value.code().name == code
    assert words in error.value.details()


def test_numbers_are_taken_as_contents(channel: grpc.Channel) -> None:
    in_contents, in_raw = _numbers(3072, 200), _numbers(0)
    in_raw.raw_input_contents.append(bytes([200]) * 3072)
    answers = [
        pb.ModelInferResponse.FromString(_call(channel, "ModelInfer", request))
        for request in (in_contents, in_raw)
    ]
    logits = [np.frombuffer(answer.raw_output_contents[0], np.float32) for answer in answers]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize(("name", "version"), [("nobody", ""), ("tiny", "7"), ("", "")])
def test_a_model_that_is_not_loaded_is_not_ready(channel: grpc.Channel, name: str, version: str) -> None:
    answer = _call(channel, "ModelReady", pb.ModelReadyRequest(name=name, version=version))
    assert not pb.ModelReadyResponse.FromString(answer).ready


# --- messages on their way in ---------------------------------------------------------------------------


def _peak_mib(process: Started) -> float:
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def test_many_large_messages_are_not_all_held_at_once(process: Started) -> None:
    large = _request(bytes(BODY - 1000)).SerializeToString()

    def ask(_: int) -> str:
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        with grpc.insecure_channel(process.said("grpc"), options) as channel:
            return _code(channel, "ModelInfer", large)

    before = _peak_mib(process)
    with ThreadPoolExecutor(64) as clients:
        codes = set(clients.map(ask, range(64)))
    assert codes <= {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}  # no image; or no room
    sent = 64 * BODY / 2**20
    assert _peak_mib(process) - before < sent / 2  # the bodies' quarter, and what allocators keep


def test_the_memory_of_a_message_is_free_once_it_is_answered(process: Started, channel: grpc.Channel) -> None:
    large = _request(bytes(BODY - 1000))
    for _ in range(5):
        _code(channel, "ModelInfer", large)
    before = process.resident_mib()
    for _ in range(20):
        assert _code(channel, "ModelInfer", large) == "INVALID_ARGUMENT"
    assert process.resident_mib() - before < 5 * BODY / 2**20


def test_calls_whose_message_never_comes_do_not_keep_others_out(
    channel: grpc.Channel, encode: Encode
) -> None:
    over = threading.Event()

    def never() -> Iterator[bytes]:
        over.wait(60)
        yield from ()

    call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
    idle = [call.future(never(), timeout=60) for _ in range(6)]
    try:
        assert _code(channel, "ServerLive", b"") == "OK"
        assert _code(channel, "ModelInfer", _request(encode(0))) == "OK"
        # Each call is told in its own time.
        wait_until(lambda: any(it.done() and it.code() is grpc.StatusCode.DEADLINE_EXCEEDED for it in idle))
    finally:
        over.set()
        for it in idle:
            it.cancel()


def test_a_connection_gets_no_more_than_its_share_of_all_calls(process: Started) -> None:
    """Others of its calls wait with the client, not before those of other clients."""
    host, _, port = process.said("grpc").rpartition(":")
    no_settings = bytes(3) + b"\4" + bytes(5)
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + no_settings)
        with connection.makefile("rb") as frames:
            size = int.from_bytes(frames.read(9)[:3], "big")
            settings = dict(struct.iter_unpack(">HI", frames.read(size)))
    assert settings[3] == 128  # calls at once (RFC 9113, section 6.5.2)


# --- fields that are counted before they are parsed -----------------------------------------------------


@given(st.binary(max_size=200))
def test_what_counting_finds_malformed_the_parser_does_too(message: bytes) -> None:
    try:
        check_size(memoryview(message), REQUEST, 64)
    except Problem:
        with pytest.raises(DecodeError):
            pb.ModelInferRequest.FromString(message)


_TENSORS = st.builds(
    lambda name, shape, elements, numbers: InferInputTensor(
        name=name,
        datatype="BYTES",
        shape=shape,
        parameters={name: pb.InferParameter(string_param=name)},
        contents=pb.InferTensorContents(bytes_contents=elements, uint_contents=numbers),
    ),
    st.text(max_size=9),
    st.lists(st.integers(-1, 2**62), max_size=5),
    st.lists(st.binary(max_size=300), max_size=5),
    st.lists(st.integers(0, 2**32 - 1), max_size=5),
)


@given(st.lists(_TENSORS, max_size=3), st.lists(st.binary(max_size=300), max_size=3))
def test_any_request_of_usual_size_passes(tensors: list[InferInputTensor], raw: list[bytes]) -> None:
    request = pb.ModelInferRequest(inputs=tensors, outputs=[LOGITS], raw_input_contents=raw)
    check_size(memoryview(request.SerializeToString()), REQUEST, 0)


def test_tensors_own_bytes_are_not_counted_and_all_others_are() -> None:
    check_size(memoryview(_request(bytes(2 * MOST_OTHER)).SerializeToString()), REQUEST, 64)
    for request in (_with(id="x" * MOST_OTHER), _numbers(MOST_OTHER)):
        with pytest.raises(Problem, match="bytes beside raw contents"):
            check_size(memoryview(request.SerializeToString()), REQUEST, 64)


_CLIENTS = """
import random, sys, threading
import grpc

def call_and_leave(seed):
    patience, options = random.Random(seed), [("grpc.use_local_subchannel_pool", 1)]
    for _ in range(int(sys.argv[2])):
        with grpc.insecure_channel(sys.argv[1], options) as channel:
            method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            for _ in range(5):
                try:
                    method(b"*\\0" * (2 << 20), timeout=patience.uniform(0.005, 0.03))
                except grpc.RpcError:
                    pass

for seed in range(4):
    threading.Thread(target=call_and_leave, args=[seed]).start()
"""


def _resident_after_calls(process: Started, times: int) -> int:
    """Bytes that the server holds after clients with less patience than their messages take to arrive."""
    subprocess.run([sys.executable, "-c", _CLIENTS, process.said("grpc"), str(times)], check=True, timeout=60)
    return int(psutil.Process(process.process.pid).memory_info().rss)


@pytest.mark.slow
def test_messages_whose_senders_left_are_freed(process: Started) -> None:
    before = _resident_after_calls(process, 10)
    assert _resident_after_calls(process, 150) < before + (96 << 20)


# --- the port -------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_told_in_one_line(engine_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = [
            "--engine-dir",
            str(engine_dir),
            "--engine",
            "tiny",
            "--port",
            "0",
            "--grpc-port",
            str(port),
        ]
        ended = subprocess.run([TRIMRT, "serve", *options], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert lines == [
        f"Error: cannot listen on 127.0.0.1 port {port} for gRPC; choose another with --grpc-port"
    ]
