"""`--workers 2`: two processes that serve a port as if they were one."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import httpx
import numpy as np
import psutil
import pytest
from processes import TRIMRT, start_process
from running import wait_until
from streaming import stream
from tiny_engine import write_package
from together import OK, Together, is_right, is_running, load, states, together

from server.settings import Settings
from server.v2 import inference_pb2 as pb
from trimrt.serve.command import LOST_CODE

Encode = Callable[..., bytes]
Reference = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def directory(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(engine_dir, tmp_path_factory.mktemp("together") / "engines"))


@pytest.fixture(scope="module")
def served(directory: Path) -> Iterator[Together]:
    """For tests that leave it as it was: `tiny` is loaded, `other` can be."""
    with together(Settings(engine="tiny", engine_dir=directory, port=0)) as it:
        yield it


def probability(response: httpx.Response) -> float:
    return float(response.json()["results"][0]["predictions"][0]["probability"])


def test_answers_are_right_from_both_workers_under_load(
    served: Together, encode: Encode, reference: Reference
) -> None:
    images = [encode(seed) for seed in range(8)]
    expected = [reference(image).max() for image in images]

    def ask(seed: int) -> list[float]:
        with httpx.Client(base_url=served.url, verify=False) as client:
            return [probability(client.post("/predict", content=images[seed])) for _ in range(20)]

    before = served.samples()
    with ThreadPoolExecutor(8) as pool:
        for answers, right in zip(pool.map(ask, range(8)), expected, strict=True):
            assert answers == pytest.approx([right] * 20, abs=1e-4)
    after = served.samples()
    assert after[OK] - before.get(OK, 0) == 160, "counters of all workers add up"
    sizes = 'trimrt_batch_size_sum{backend="openvino",engine="tiny",precision="fp32",version="1"}'
    assert after[sizes] - before.get(sizes, 0) == 160


def open_sockets(process: int) -> int:
    return len(psutil.Process(process).net_connections("tcp"))


def test_connections_that_stay_open_are_spread_evenly_also_after_some_were_closed(served: Together) -> None:
    def spread() -> list[int]:
        return [open_sockets(process) - idle[process] for process in served.pids]

    with ExitStack() as stack:
        wait_until(lambda: all(member.taker.open == 0 for member in served.supervisor.members))
        idle = {process: open_sockets(process) for process in served.pids}
        clients = [stack.enter_context(httpx.Client(base_url=served.url, verify=False)) for _ in range(8)]
        for client in clients:
            client.get("/health/live")
        assert spread() == [4, 4]
        for client in clients[::2]:  # the connections of one worker
            client.close()
        wait_until(lambda: sorted(spread()) == [0, 4])
        for _ in range(4):
            client = stack.enter_context(httpx.Client(base_url=served.url, verify=False))
            client.get("/health/live")
        assert spread() == [4, 4]


def test_streams_are_spread_over_the_workers_and_counted_together(served: Together, encode: Encode) -> None:
    wait_until(lambda: all(member.taker.open == 0 for member in served.supervisor.members))
    ok = OK.replace("predict", "stream")
    before = served.samples().get(ok, 0)
    with stream(served.url) as one, stream(served.url) as two:
        assert [member.taker.open for member in served.supervisor.members] == [1, 1]
        right = [it["results"][0]["predictions"] for it in (one.ask(encode(0)), two.ask(encode(0)))]
        assert right[0] == right[1]
    wait_until(lambda: all(member.taker.open == 0 for member in served.supervisor.members))
    assert served.samples()[ok] - before == 2


def test_statistics_are_those_of_both_workers(served: Together, encode: Encode) -> None:
    before = served.ask("GET", "/stats").json()
    for seed in range(6):
        assert served.predict(encode(seed)).status_code == 200
    after = served.ask("GET", "/stats").json()
    assert after["workers"] == {**before["workers"], "running": 2}

    def images(stats: dict[str, object]) -> int:
        return sum(
            engine["since_start"]["images"] for engine in stats["engines"] if engine["engine"] == "tiny"
        )

    assert images(after) - images(before) == 6
    samples = served.samples()
    assert samples["trimrt_workers"] == 2
    assert samples['trimrt_queue_limit{engine="tiny"}'] == 2 * 128
    assert samples['trimrt_queue_depth{engine="tiny"}'] == 0
    info = [name for name in samples if name.startswith("trimrt_engine_info") and 'engine="tiny"' in name]
    assert len(info) == 1
    assert samples[info[0]] == 1
    resident = sum(
        int(Path(f"/proc/{process}/status").read_text().partition("VmRSS:")[2].split()[0]) << 10
        for process in served.pids
    )
    assert samples["process_resident_memory_bytes"] == pytest.approx(resident, rel=0.1)


def test_each_worker_keeps_answers_of_its_own_in_its_share_of_the_memory(
    engine_dir: Path, encode: Encode
) -> None:
    with together(Settings(engine="tiny", engine_dir=engine_dir, port=0, cache_mib=2)) as it:
        with ExitStack() as stack:
            clients = [stack.enter_context(httpx.Client(base_url=it.url, verify=False)) for _ in range(2)]
            for cached in (False, True):
                for client in clients:
                    (result,) = client.post("/predict", content=encode(0)).json()["results"]
                    assert result["cached"] is cached

        def told() -> tuple[object, ...]:
            stats = it.ask("GET", "/stats").json()
            return stats["cache"]["answers"], stats["cache"]["limit"], stats["engines"][0]["cache"]

        assert told() == (2, 2 << 20, {"hits": 2, "misses": 2})
        it.wait_until_replaced(it.kill_one())
        assert told() == (1, 2 << 20, {"hits": 2, "misses": 2})


def restore(served: Together) -> None:
    """What all tests begin with."""
    served.ask("POST", "/engines/tiny/load")
    served.ask("PUT", "/engines/default", json={"name": "tiny"})
    served.ask("POST", "/engines/other/unload")


def test_a_killed_worker_loses_what_it_has_in_hand_alone_and_is_replaced_and_counted(
    served: Together, encode: Encode, reference: Reference
) -> None:
    image = encode(3)
    expected = {"tiny": reference(image)}
    with load(served, [image]) as outcomes:
        before = served.samples()
        killed = served.kill_one()
        served.wait_until_replaced(killed)
        assert served.samples()[OK] >= before[OK], "no counter falls"
    answers = [outcome for outcome in outcomes if isinstance(outcome, httpx.Response)]
    failed = len(outcomes) - len(answers)
    assert failed <= 4, "a request for each connection of that worker's"
    assert {answer.status_code for answer in answers} == {200}
    assert all(is_right(answer, expected) for answer in answers)
    after = served.samples()
    assert after["trimrt_workers_replaced_total"] == before["trimrt_workers_replaced_total"] + 1
    assert after["trimrt_requests_lost_total"] <= before["trimrt_requests_lost_total"] + failed
    assert served.ask("GET", "/stats").json()["workers"]["running"] == 2


def test_a_worker_that_hangs_is_killed_and_replaced_and_meanwhile_changes_happen_in_no_worker(
    engine_dir: Path, encode: Encode
) -> None:
    settings = Settings(engine="tiny", engine_dir=engine_dir, port=0, worker_timeout_s=4)
    with together(settings) as own:
        with httpx.Client(base_url=own.url, verify=False, timeout=30) as client:
            client.get("/health/live")
            os.kill(hanging := own.unconnected(), signal.SIGSTOP)
            refused = client.post("/engines/other/load")
            assert refused.json()["type"] == "urn:trimrt:problem:not-ready"
            assert "nothing was changed" in refused.json()["detail"]
            own.wait_until_replaced(hanging)
            assert client.get("/stats").json()["workers"] == {"running": 2, "replaced": 1, "lost_requests": 0}
            assert client.post("/engines/other/load").status_code == 200
        assert states(own, "other") == {"loaded"}
        assert {own.predict(encode(0)).status_code for _ in range(4)} == {200}


# Python runs `sitecustomize` at the start of each process. The first batch that finds the file never ends.
BATCHES_THAT_DO_NOT_END = """
import time
from pathlib import Path
from runtime.openvino import OpenVINOSlot

infer = OpenVINOSlot.infer
stuck = Path(__file__).with_name("stuck")

def infer_or_hang(self, count, *, alone=False):
    try:
        stuck.unlink()
    except FileNotFoundError:
        return infer(self, count, alone=alone)
    time.sleep(600)

OpenVINOSlot.infer = infer_or_hang
"""


@pytest.mark.parametrize("share_engines", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_process_whose_batch_does_not_end_is_killed_and_replaced(
    engine_dir: Path, tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch, share_engines: bool
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BATCHES_THAT_DO_NOT_END)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    settings = Settings(
        engine="tiny", engine_dir=engine_dir, port=0, worker_timeout_s=4, share_engines=share_engines
    )
    with together(settings) as own:
        (tmp_path / "stuck").touch()
        # The connection ends with a worker; with the owner of engines, the answer says so.
        with suppress(httpx.TransportError):
            assert own.predict(encode(0)).status_code == 503
        wait_until(lambda: own.predict(encode(0)).status_code == 200)
        samples = own.samples()
        assert samples["trimrt_workers_replaced_total"] == 1
        assert samples["trimrt_requests_lost_total"] == (0 if share_engines else 1)


def test_engines_are_loaded_switched_and_unloaded_in_all_workers_and_no_answer_is_wrong(
    served: Together, encode: Encode, reference: Reference
) -> None:
    image = encode(5)
    expected = {"tiny": reference(image), "other": reference(image, "other-v1")}
    with load(served, [image]) as outcomes:
        assert served.ask("POST", "/engines/other/load").json()["state"] == "loaded"
        for name in ("other", "tiny", "other"):
            assert served.ask("PUT", "/engines/default", json={"name": name}).status_code == 200
            assert {served.predict(image).json()["engine"]["name"] for _ in range(6)} == {name}
        assert served.ask("POST", "/engines/tiny/unload").json()["state"] == "available"
        assert {served.predict(image, params={"engine": "tiny"}).status_code for _ in range(4)} == {404}
        assert served.ask("POST", "/engines/tiny/load").status_code == 200
        assert {served.predict(image, params={"engine": "tiny"}).status_code for _ in range(4)} == {200}
    assert {outcome.status_code for outcome in outcomes if isinstance(outcome, httpx.Response)} == {200}
    assert all(is_right(outcome, expected) for outcome in outcomes)
    assert served.ask("POST", "/engines/other/unload").json()["type"] == "urn:trimrt:problem:engine-in-use"
    assert served.ask("POST", "/engines/nobody/load").json()["type"] == "urn:trimrt:problem:engine-not-found"
    assert served.ask("PUT", "/engines/default", json={"name": "nobody"}).status_code == 404
    restore(served)


def test_an_engine_that_one_worker_cannot_load_is_loaded_by_none(served: Together) -> None:
    with httpx.Client(base_url=served.url, verify=False) as client:
        client.get("/health/live")
        other = served.unconnected()
        _, most = resource.prlimit(other, resource.RLIMIT_NOFILE)
        limits = resource.prlimit(other, resource.RLIMIT_NOFILE, (1, most))
        refused = client.post("/engines/other/load")
        resource.prlimit(other, resource.RLIMIT_NOFILE, limits)
    assert refused.status_code == 409
    assert "Too many open files" in refused.json()["detail"]
    assert "loaded" not in states(served, "other")
    assert served.ask("POST", "/engines/other/load").status_code == 200
    assert states(served, "other") == {"loaded"}
    restore(served)


def test_a_replaced_worker_begins_with_what_the_others_serve(served: Together, encode: Encode) -> None:
    served.ask("POST", "/engines/other/load")
    served.ask("PUT", "/engines/default", json={"name": "other"})
    served.ask("POST", "/engines/tiny/unload")
    served.wait_until_replaced(served.kill_one())
    assert {served.predict(encode(0)).json()["engine"]["name"] for _ in range(4)} == {"other"}
    assert [said["default"] for said in served.ask_each("/engines")] == ["other", "other"]
    restore(served)


@pytest.mark.slow
def test_no_worker_begins_with_a_package_that_changed_since_the_others_loaded_it(
    engine_dir: Path, encode: Encode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(engine_dir / "tiny-v1", tmp_path / "tiny-v1")
    with together(Settings(engine="tiny", engine_dir=tmp_path, port=0)) as own:
        shutil.rmtree(tmp_path / "tiny-v1")
        write_package(tmp_path, "tiny", seed=7)
        own.kill_one()
        changed = "has changed since the other workers loaded it"
        wait_until(lambda: any(changed in getattr(record, "reason", "") for record in caplog.records))
        assert own.predict(encode(0)).status_code == 200
        assert own.ask("POST", "/engines/tiny/load").status_code == 200
        wait_until(lambda: len(own.pids) == 2)


def test_a_watched_package_reaches_all_workers(engine_dir: Path, tmp_path: Path) -> None:
    settings = Settings(engine_dir=tmp_path, port=0, watch=True, watch_interval_s=0.02, engine="tiny")
    shutil.copytree(engine_dir / "tiny-v1", tmp_path / "tiny")
    with together(settings) as own:
        shutil.copytree(engine_dir / "other-v1", tmp_path / "other")
        wait_until(lambda: states(own, "other") == {"loaded"})


def test_a_package_that_cannot_be_served_ends_the_start_with_the_reason_once(
    engine_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(engine_dir / "tiny-v1", tmp_path / "tiny"))
    (folder / "engine.blob").write_bytes(b"damaged")
    command = [TRIMRT, "serve", "--engine", str(folder), "--port", "0", "--workers", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert len(re.findall("^Error: .*damaged or changed since it was built", ended.stderr, re.MULTILINE)) == 1
    assert "Traceback" not in ended.stderr


# Python runs `sitecustomize` at the start of each process: from a moment on, this one's engines fail.
ENGINES_THAT_GET_LOST = """
from pathlib import Path
from runtime.manifest import EngineError
from runtime.openvino import OpenVINOSlot

infer = OpenVINOSlot.infer

def infer_or_fail(self, count, *, alone=False):
    if Path(__file__).with_name("lost").exists():
        raise EngineError("gone")
    return infer(self, count, alone=alone)

OpenVINOSlot.infer = infer_or_fail
"""


def test_a_lost_engine_of_one_worker_ends_all_with_its_own_code_where_that_is_asked_for(
    engine_dir: Path, tmp_path: Path, encode: Encode
) -> None:
    (tmp_path / "sitecustomize.py").write_text(ENGINES_THAT_GET_LOST)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    options = ["--engine-dir", str(engine_dir), "--engine", "tiny", "--workers", "2"]
    options += ["--exit-when-lost", "--max-failed-batches", "1"]
    with start_process(options, tmp_path / "log", PYTHONPATH=path) as started:
        (tmp_path / "lost").touch()
        assert httpx.post(f"{started.url}/predict", content=encode(0)).status_code == 500
        assert started.process.wait(timeout=20) == LOST_CODE


def test_grpc_reaches_the_workers_also_after_one_was_killed(engine_dir: Path, tmp_path: Path) -> None:
    options = ["--engine-dir", str(engine_dir), "--engine", "tiny", "--workers", "2", "--grpc-port", "0"]
    with start_process(options, tmp_path / "log") as started:

        def is_ready() -> bool:
            # Without it, channels to one address share a connection.
            alone = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(started.said("grpc"), options=alone) as channel:
                message = pb.ModelReadyRequest(name="tiny").SerializeToString()
                answer = channel.unary_unary("/inference.GRPCInferenceService/ModelReady")(
                    message, timeout=10, wait_for_ready=True
                )
            return bool(pb.ModelReadyResponse.FromString(answer).ready)

        assert all(is_ready() for _ in range(8))
        first = int(started.said("pid"))
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: started.log.read_text().count('"worker ready"') == 3)
        assert all(is_ready() for _ in range(8))


def test_workers_end_when_their_supervisor_is_killed(engine_dir: Path, tmp_path: Path) -> None:
    options = ["--engine-dir", str(engine_dir), "--engine", "tiny", "--workers", "2"]
    with start_process(options, tmp_path / "log") as started:
        workers = [int(number) for number in re.findall(r'"pid":(\d+)', started.log.read_text())]
        assert len(workers) == 2
        started.process.send_signal(signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, workers)))


def test_auto_is_a_worker_for_every_core() -> None:
    assert Settings(workers="auto").workers == len(os.sched_getaffinity(0))
