"""System shared memory: what a client may register, read and write, and what it may not do to the server."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from running import Running, running, wait_until

from server.auth import Caller
from server.problems import Problem
from server.settings import Settings
from server.v2.regions import Placement, Regions
from server.v2.tensors import pack_bytes
from trimrt.serve.command import serve

Encode = Callable[..., bytes]
Reference = Callable[..., np.ndarray]

SIZE = 64 << 10
LOCAL = Caller("127.0.0.1", {"host": "localhost"}, "http")


@pytest.fixture(scope="module")
def server(engine_dir: Path) -> Iterator[Running]:
    settings = Settings(
        **{"engine": "tiny", "engine_dir": engine_dir, "port": 0},
        client_shared_memory=True,
        max_body_bytes=1 << 20,
    )
    with running(settings) as it:
        yield it


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    memory = SharedMemory(f"trimrt-test-{secrets.token_hex(8)}", create=True, size=SIZE)
    yield memory
    memory.close()
    memory.unlink()


@pytest.fixture
def region(server: Running, shared: SharedMemory) -> Iterator[str]:
    """The name of a registered region, which is all of `shared`."""
    assert _register(server, "region", shared.name, SIZE).status_code == 200
    yield "region"
    server.client.post("/v2/systemsharedmemory/unregister")


def _register(server: Running, name: str, key: str, size: int, offset: int = 0) -> httpx.Response:
    body = {"key": key, "byte_size": size, "offset": offset}
    return server.client.post(f"/v2/systemsharedmemory/region/{name}/register", json=body)


def _infer(
    server: Running, size: int, *, output: dict[str, Any] | None = None, headers: dict[str, str] | None = None
) -> httpx.Response:
    """Ask for what the first `size` bytes of the region are: packed image files."""
    parameters = {"shared_memory_region": "region", "shared_memory_byte_size": size}
    tensor = {"name": "pixels", "shape": [1], "datatype": "BYTES", "parameters": parameters}
    outputs = [{"name": "probabilities", "parameters": output or {}}]
    body = {"inputs": [tensor], "outputs": outputs}
    return server.client.post("/v2/models/tiny/infer", json=body, headers=headers)


def _put(shared: SharedMemory, data: bytes) -> int:
    shared.buf[: len(data)] = data
    return len(data)


def test_an_encoded_image_is_read_from_it(
    server: Running, shared: SharedMemory, region: str, encode: Encode, reference: Reference
) -> None:
    image = encode(1)
    answer = _infer(server, _put(shared, pack_bytes([image])))
    np.testing.assert_allclose(answer.json()["outputs"][0]["data"], reference(image), atol=1e-6)


def test_an_output_is_written_to_it_and_nothing_beside_it(
    server: Running, shared: SharedMemory, region: str, encode: Encode, reference: Reference
) -> None:
    image = encode(2)
    size = _put(shared, pack_bytes([image]))
    shared.buf[32_000:32_048] = b"#" * 48
    place = {"shared_memory_region": region, "shared_memory_byte_size": 40, "shared_memory_offset": 32_004}
    (output,) = _infer(server, size, output=place).json()["outputs"]
    assert output == {"name": "probabilities", "datatype": "FP32", "shape": [1, 10]}
    written = np.frombuffer(bytes(shared.buf[32_004:32_044]), np.float32)
    np.testing.assert_allclose(written, reference(image), atol=1e-6)
    assert bytes(shared.buf[32_000:32_004]) == bytes(shared.buf[32_044:32_048]) == b"####"


def test_an_object_that_was_made_smaller_is_an_error_and_not_the_end_of_the_server(
    server: Running, shared: SharedMemory, region: str
) -> None:
    os.truncate(f"/dev/shm/{shared.name}", 0)
    answer = _infer(server, 1000)
    assert answer.status_code == 422
    assert "has become smaller" in answer.json()["error"]
    assert server.client.get("/v2/health/ready").status_code == 200


def test_an_output_does_not_make_an_object_grow(server: Running, shared: SharedMemory, region: str) -> None:
    regions = server.service.regions
    os.truncate(f"/dev/shm/{shared.name}", 100)
    with pytest.raises(Problem, match="are not in object"):
        regions.write(Placement(region, 0, 40), bytes(40))
    assert Path(f"/dev/shm/{shared.name}").stat().st_size == 100


def test_a_region_goes_with_its_object(server: Running) -> None:
    memory = SharedMemory(f"trimrt-test-{secrets.token_hex(8)}", create=True, size=100)
    assert _register(server, "brief", memory.name, 100).status_code == 200
    memory.close()
    memory.unlink()
    assert server.client.get("/v2/systemsharedmemory/status").json() == []


def test_a_region_whose_object_is_gone_is_closed_unasked(shared: SharedMemory, engine_dir: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.v2.regions._LOOK_S", 0.01)
        settings = Settings(engine="tiny", engine_dir=engine_dir, port=0, client_shared_memory=True)
        with running(settings) as it:
            memory = SharedMemory(f"trimrt-test-{secrets.token_hex(8)}", create=True, size=100)
            assert _register(it, "brief", memory.name, 100).status_code == 200
            memory.close()
            memory.unlink()
            wait_until(lambda: not [fd for fd in _open_files() if memory.name in fd])


def _open_files() -> list[str]:
    files = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            files.append(str(descriptor.readlink()))
        except FileNotFoundError:  # that of the listing itself
            continue
    return files


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("nothing-there", "No such file"),
        ("../etc/passwd", "is no name"),
        ("a/b", "is no name"),
        ("..", "is no name"),
        (".", "is no name"),
        ("", "is no name"),
        ("/", "is no name"),
        ("sem.lock", "is no name"),
        ("a\0b", "is no name"),
        ("k" * 201, "is no name"),
    ],
)
def test_a_key_that_names_no_object_is_refused(server: Running, key: str, words: str) -> None:
    answer = _register(server, "region", key, 10)
    assert answer.status_code == 422
    assert words in answer.json()["error"]


def test_links_and_pipes_are_refused(server: Running, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(100))
    for make, words in (
        (lambda path: path.symlink_to(tmp_path / "secret"), "symbolic links"),
        (lambda path: os.mkfifo(path), "is no shared memory object"),
        (lambda path: path.mkdir(), "is no shared memory object"),
    ):
        path = Path(f"/dev/shm/trimrt-test-{secrets.token_hex(8)}")
        make(path)
        try:
            assert words in _register(server, "region", path.name, 10).json()["error"]
        finally:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize(
    ("size", "offset"), [(SIZE + 1, 0), (SIZE, 1), (0, 0), (-1, 0), (10, -1), (1 << 62, 1 << 62)]
)
def test_a_region_that_is_not_in_its_object_is_refused(
    server: Running, shared: SharedMemory, size: int, offset: int
) -> None:
    answer = _register(server, "region", shared.name, size, offset)
    assert answer.status_code == 422
    assert "are not in object" in answer.json()["error"]


def test_a_name_is_given_once(server: Running, shared: SharedMemory, region: str) -> None:
    answer = _register(server, region, shared.name, 10)
    assert "registered already" in answer.json()["error"]


def test_there_is_a_limit_to_the_regions(server: Running, shared: SharedMemory) -> None:
    before = sum(shared.name in file for file in _open_files())
    for number in range(256):
        assert _register(server, f"region-{number}", shared.name, 10).status_code == 200
    assert _register(server, "one-more", shared.name, 10).status_code == 429
    server.client.post("/v2/systemsharedmemory/unregister")
    assert sum(shared.name in file for file in _open_files()) == before


def test_what_killed_clients_leave_behind_gives_way(
    server: Running, shared: SharedMemory, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("region", *(f"region-{number}" for number in range(255))):
        assert _register(server, name, shared.name, SIZE).status_code == 200
    assert _infer(server, _put(shared, pack_bytes([encode(1)]))).status_code == 200
    monkeypatch.setattr("server.v2.regions._UNUSED_S", 0)
    assert _register(server, "one-more", shared.name, 10).status_code == 200
    regions = {it["name"] for it in server.client.get("/v2/systemsharedmemory/status").json()}
    server.client.post("/v2/systemsharedmemory/unregister")
    assert len(regions) == 256
    assert "region-0" not in regions
    assert {"region", "one-more"} <= regions


def test_outputs_of_one_request_may_overlap_and_stay_within(
    server: Running, shared: SharedMemory, region: str, encode: Encode
) -> None:
    size = _put(shared, pack_bytes([encode(1)]))
    tensor = {"name": "pixels", "shape": [1], "datatype": "BYTES"}
    tensor["parameters"] = {"shared_memory_region": region, "shared_memory_byte_size": size}
    shared.buf[60_000:60_100] = b"#" * 100
    places = [
        {"shared_memory_region": region, "shared_memory_byte_size": 40, "shared_memory_offset": offset}
        for offset in (60_000, 60_020)
    ]
    outputs = [
        {"name": name, "parameters": place}
        for name, place in zip(("logits", "probabilities"), places, strict=True)
    ]
    answer = server.client.post("/v2/models/tiny/infer", json={"inputs": [tensor], "outputs": outputs})
    assert answer.status_code == 200
    assert bytes(shared.buf[60_060:60_100]) == b"#" * 40


def test_an_object_that_was_replaced_is_read_as_it_was_registered(
    server: Running, shared: SharedMemory, region: str, encode: Encode, reference: Reference
) -> None:
    image = encode(4)
    size = _put(shared, pack_bytes([image]))
    path = Path("/dev/shm", shared.name)
    other = path.with_name(f"{path.name}-other")
    other.write_bytes(bytes(10))
    other.rename(path)
    answer = _infer(server, size)
    np.testing.assert_allclose(answer.json()["outputs"][0]["data"], reference(image), atol=1e-6)
    assert server.client.get("/v2/systemsharedmemory/status").json() == []  # looked, and saw that it is gone


@pytest.mark.parametrize("name", ["a/b", "a%2Fb", "..", "r" * 201, "%00"])
def test_a_regions_name_leads_nowhere(server: Running, shared: SharedMemory, name: str) -> None:
    answer = _register(server, name, shared.name, 10)
    assert answer.status_code in (200, 400, 404, 405, 422)
    names = [it["name"] for it in server.client.get("/v2/systemsharedmemory/status").json()]
    server.client.post("/v2/systemsharedmemory/unregister")
    assert len(names) == (answer.status_code == 200)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"shared_memory_region": "region"}, "needs shared_memory_region"),
        ({"shared_memory_byte_size": 10}, "needs shared_memory_region"),
        ({"shared_memory_region": "region", "shared_memory_byte_size": SIZE + 1}, "are not in region"),
        ({"shared_memory_region": "region", "shared_memory_byte_size": -1}, "are not in region"),
        (
            {"shared_memory_region": "region", "shared_memory_byte_size": 1, "shared_memory_offset": SIZE},
            "are not in region",
        ),
        ({"shared_memory_region": "region", "shared_memory_byte_size": 2 << 20}, "has at most"),
        ({"shared_memory_region": "other", "shared_memory_byte_size": 1}, "no region 'other'"),
        ({"shared_memory_region": True, "shared_memory_byte_size": True}, "needs shared_memory_region"),
        (
            {"shared_memory_region": "region", "shared_memory_byte_size": 9, "binary_data_size": 0},
            "is here and in shared memory",
        ),
    ],
)
def test_an_input_that_is_not_in_the_region_is_refused(
    server: Running, region: str, parameters: dict[str, Any], words: str
) -> None:
    tensor = {"name": "pixels", "shape": [1], "datatype": "BYTES", "parameters": parameters}
    answer = server.client.post("/v2/models/tiny/infer", json={"inputs": [tensor]})
    assert answer.is_client_error
    assert words in answer.json()["error"]


def test_an_output_without_room_is_refused(
    server: Running, shared: SharedMemory, region: str, encode: Encode
) -> None:
    size = _put(shared, pack_bytes([encode(3)]))
    place = {"shared_memory_region": region, "shared_memory_byte_size": 39}
    answer = _infer(server, size, output=place)
    assert answer.status_code == 422
    assert "the output has 40 bytes" in answer.json()["error"]


@pytest.mark.parametrize(
    "headers", [{"X-Forwarded-For": "198.51.100.7"}, {"Origin": "https://elsewhere.example"}]
)
def test_only_programs_on_this_machine_may_use_it(
    server: Running, region: str, headers: dict[str, str]
) -> None:
    answer = _infer(server, 10, headers=headers)
    assert answer.status_code == 403
    status = server.client.get("/v2/systemsharedmemory/status", headers=headers)
    assert status.status_code == 403


def test_another_machine_is_refused_with_the_key_too() -> None:
    regions = Regions(enabled=True, largest=100)
    regions.check(LOCAL)
    with pytest.raises(Problem, match="for programs on this machine"):
        regions.check(Caller("198.51.100.7", {"x-api-key": "the key"}, "http"))


def test_its_bytes_count_among_the_bodies(engine_dir: Path, shared: SharedMemory) -> None:
    settings = Settings(
        **{"engine": "tiny", "engine_dir": engine_dir, "port": 0, "client_shared_memory": True},
        max_body_memory_bytes=2000,
    )
    with running(settings) as it:
        assert _register(it, "region", shared.name, SIZE).status_code == 200
        answer = _infer(it, _put(shared, pack_bytes([bytes(2000)])))
        assert answer.status_code == 429
        wait_until(lambda: it.service.body_memory.held == 0)


def test_all_tensors_of_a_request_together_are_bounded(engine_dir: Path, shared: SharedMemory) -> None:
    settings = Settings(
        **{"engine": "tiny", "engine_dir": engine_dir, "port": 0, "client_shared_memory": True},
        max_body_bytes=50_000,
    )
    parameters = {"shared_memory_region": "region", "shared_memory_byte_size": 30_000}
    tensor = {"name": "pixels", "shape": [1], "datatype": "BYTES", "parameters": parameters}
    with running(settings) as it:
        assert _register(it, "region", shared.name, SIZE).status_code == 200
        answer = it.client.post("/v2/models/tiny/infer", json={"inputs": [tensor, tensor]})
        assert answer.status_code == 413
        assert "has in shared memory" in answer.json()["error"]


def test_several_workers_have_no_shared_memory() -> None:
    result = CliRunner().invoke(serve, ["--client-shared-memory", "--workers", "2"])
    assert result.exit_code == 2
    assert "works with one worker" in result.output
