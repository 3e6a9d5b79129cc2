"""`--share-engines`, and engines on a device: one process runs the engines of all workers."""

from __future__ import annotations

import io
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from processes import start_process
from running import wait_until
from tiny_engine import write_graph_that_fails_on_white, write_package
from together import OK, Together, is_right, is_running, load, states, together

from server.settings import Settings

Encode = Callable[..., bytes]
Reference = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def directory(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(engine_dir, tmp_path_factory.mktemp("owner") / "engines"))


@pytest.fixture(scope="module")
def served(directory: Path) -> Iterator[Together]:
    """For tests that leave it as it was: `tiny` is loaded, `other` can be."""
    with together(Settings(engine="tiny", engine_dir=directory, port=0, share_engines=True)) as it:
        yield it


def slots_mapped(process: int) -> int:
    """Slots whose memory a process has."""
    return Path(f"/proc/{process}/maps").read_text().count("/memfd:trimrt-slot")


def open_files(process: int) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


def loads_openvino(process: int) -> bool:
    return "libopenvino_intel_cpu_plugin" in Path(f"/proc/{process}/maps").read_text()


def statuses(outcomes: list[httpx.Response | httpx.TransportError]) -> set[int]:
    return {outcome.status_code for outcome in outcomes if isinstance(outcome, httpx.Response)}


def test_answers_are_right_under_load_and_only_the_owner_runs_the_engine(
    served: Together, encode: Encode, reference: Reference
) -> None:
    images = [encode(seed) for seed in range(8)]

    def ask(seed: int) -> list[httpx.Response]:
        with httpx.Client(base_url=served.url, verify=False, timeout=30) as client:
            return [client.post("/predict", content=images[seed]) for _ in range(20)]

    before = served.samples()
    with ThreadPoolExecutor(8) as pool:
        for seed, answers in enumerate(pool.map(ask, range(8))):
            assert all(is_right(answer, {"tiny": reference(images[seed])}) for answer in answers)
    after = served.samples()
    assert after[OK] - before.get(OK, 0) == 160
    sizes = 'trimrt_batch_size_sum{backend="openvino",engine="tiny",precision="fp32",version="1"}'
    assert after[sizes] - before.get(sizes, 0) == 160
    assert [loads_openvino(process) for process in (served.owner, *served.pids)] == [True, False, False]


def test_many_images_of_one_request_take_all_slots_and_stay_in_order(
    served: Together, encode: Encode, reference: Reference
) -> None:
    images = [encode(seed) for seed in range(30)]
    files = [("file", (f"{number}.png", image)) for number, image in enumerate(images)]
    answer = served.ask("POST", "/predict", files=files).json()
    said = [row["predictions"][0]["probability"] for row in answer["results"]]
    assert said == pytest.approx([reference(image).max() for image in images], abs=1e-4)


def test_batches_hold_images_of_both_workers(directory: Path, encode: Encode) -> None:
    settings = Settings(
        engine="tiny", engine_dir=directory, port=0, share_engines=True, slots=1, max_batch_delay_ms=1000
    )
    with together(settings) as own, ThreadPoolExecutor(8) as pool:
        # Eight images, of eight connections, of which each worker has four: a full batch does not wait.
        answers = list(pool.map(own.predict, [encode(seed) for seed in range(8)]))
        assert {answer.status_code for answer in answers} == {200}
        (engine,) = own.ask("GET", "/stats").json()["engines"]
        assert (engine["batches"], engine["mean_batch_size"]) == (1, 8)


def test_a_killed_worker_loses_its_own_requests_alone_and_the_owner_frees_its_slots(
    served: Together, encode: Encode, reference: Reference
) -> None:
    image = encode(3)
    slots, files = slots_mapped(served.owner), open_files(served.owner)
    assert slots > 0
    owner = served.owner
    with load(served, [image]) as outcomes:
        replaced = served.samples()["trimrt_workers_replaced_total"]
        killed = served.kill_one()
        served.wait_until_replaced(killed)
    answers = [outcome for outcome in outcomes if isinstance(outcome, httpx.Response)]
    assert len(outcomes) - len(answers) <= 4, "a request for each connection of that worker's"
    assert statuses(outcomes) == {200}
    assert all(is_right(answer, {"tiny": reference(image)}) for answer in answers)
    assert served.samples()["trimrt_workers_replaced_total"] == replaced + 1
    assert served.owner == owner
    wait_until(lambda: (slots_mapped(owner), open_files(owner)) == (slots, files))


def is_unready(served: Together, reasons: list[str]) -> bool:
    """Whether readiness is refused; the reason is added."""
    answer = served.ask("GET", "/health/ready")
    if answer.status_code == 503:
        reasons.append(answer.json()["detail"])
    return answer.status_code == 503


def test_while_the_owner_is_replaced_requests_are_answered_with_503_and_the_reason(
    served: Together, encode: Encode, reference: Reference
) -> None:
    image = encode(4)
    with load(served, [image]) as outcomes:
        replaced = served.samples()["trimrt_workers_replaced_total"]
        workers = served.pids
        os.kill(killed := served.owner, signal.SIGKILL)
        refusals: list[str] = []
        wait_until(lambda: is_unready(served, refusals))
        served.wait_until_owner_replaced(killed)
        wait_until(lambda: all("engine" in said for said in served.ask_each("/health/ready")))
    assert "another takes its place" in refusals[0]
    answers = [outcome for outcome in outcomes if isinstance(outcome, httpx.Response)]
    assert len(answers) == len(outcomes), "no connection breaks"
    assert statuses(outcomes) == {200, 503}
    refused = [answer.json() for answer in answers if answer.status_code == 503]
    assert {answer["type"] for answer in refused} == {"urn:trimrt:problem:not-ready"}
    assert all("another takes its place" in answer["detail"] for answer in refused)
    right = {"tiny": reference(image)}
    assert all(is_right(answer, right) for answer in answers if answer.status_code == 200)
    assert outcomes[-1].status_code == 200
    assert served.samples()["trimrt_workers_replaced_total"] == replaced + 1
    assert served.pids == workers


@pytest.mark.slow
def test_an_owner_that_hangs_is_killed_and_replaced(directory: Path, encode: Encode) -> None:
    settings = Settings(engine="tiny", engine_dir=directory, port=0, share_engines=True, worker_timeout_s=4)
    with together(settings) as own:
        os.kill(hanging := own.owner, signal.SIGSTOP)
        answer = own.predict(encode(0))
        assert answer.status_code == 503
        assert "another takes its place" in answer.json()["detail"]
        own.wait_until_owner_replaced(hanging)
        wait_until(lambda: own.predict(encode(0)).status_code == 200)
        assert own.samples()["trimrt_workers_replaced_total"] == 1


def test_engines_are_loaded_switched_and_unloaded_under_load_and_no_answer_is_wrong(
    served: Together, encode: Encode, reference: Reference
) -> None:
    image = encode(5)
    expected = {"tiny": reference(image), "other": reference(image, "other-v1")}
    slots = slots_mapped(served.owner)
    with load(served, [image]) as outcomes:
        assert served.ask("POST", "/engines/other/load").json()["state"] == "loaded"
        for name in ("other", "tiny", "other"):
            assert served.ask("PUT", "/engines/default", json={"name": name}).status_code == 200
            assert {served.predict(image).json()["engine"]["name"] for _ in range(6)} == {name}
        assert served.ask("POST", "/engines/tiny/unload").json()["state"] == "available"
        for _ in range(2):  # the second takes the first one's place
            assert served.ask("POST", "/engines/tiny/load").status_code == 200
        assert {served.predict(image, params={"engine": "tiny"}).status_code for _ in range(4)} == {200}
    assert statuses(outcomes) == {200}
    assert all(is_right(outcome, expected) for outcome in outcomes)
    assert served.ask("PUT", "/engines/default", json={"name": "tiny"}).status_code == 200
    assert served.ask("POST", "/engines/other/unload").status_code == 200
    wait_until(lambda: slots_mapped(served.owner) == slots)


def test_an_engine_that_the_owner_cannot_load_is_loaded_by_nobody(served: Together) -> None:
    _, most = resource.prlimit(served.owner, resource.RLIMIT_NOFILE)
    limits = resource.prlimit(served.owner, resource.RLIMIT_NOFILE, (1, most))
    refused = served.ask("POST", "/engines/other/load")
    resource.prlimit(served.owner, resource.RLIMIT_NOFILE, limits)
    assert refused.status_code == 409
    assert "Too many open files" in refused.json()["detail"]
    assert "loaded" not in states(served, "other")
    assert served.ask("POST", "/engines/other/load").status_code == 200
    assert states(served, "other") == {"loaded"}
    assert served.ask("POST", "/engines/other/unload").status_code == 200


def test_a_replaced_owner_runs_what_the_workers_serve(served: Together, encode: Encode) -> None:
    served.ask("POST", "/engines/other/load")
    served.ask("PUT", "/engines/default", json={"name": "other"})
    served.ask("POST", "/engines/tiny/unload")
    os.kill(killed := served.owner, signal.SIGKILL)
    served.wait_until_owner_replaced(killed)
    wait_until(lambda: {served.predict(encode(0)).status_code for _ in range(4)} == {200})
    assert {served.predict(encode(0)).json()["engine"]["name"] for _ in range(4)} == {"other"}
    served.ask("POST", "/engines/tiny/load")
    served.ask("PUT", "/engines/default", json={"name": "tiny"})
    served.ask("POST", "/engines/other/unload")


def plain(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (grey, grey, grey)).save(file, "PNG")
    return file.getvalue()


def test_an_image_whose_outputs_are_no_numbers_costs_no_other_its_answer(tmp_path: Path) -> None:
    write_package(tmp_path, write_graph=write_graph_that_fails_on_white)
    with (
        together(Settings(engine="tiny", engine_dir=tmp_path, port=0, share_engines=True)) as own,
        ThreadPoolExecutor(8) as pool,
    ):
        greys = [255 if number % 4 == 0 else 100 for number in range(64)]
        answers = list(pool.map(own.predict, map(plain, greys)))
        assert [answer.status_code for answer in answers] == [500 if grey == 255 else 200 for grey in greys]


def test_a_network_of_one_batch_size_serves_single_images(tmp_path: Path, encode: Encode) -> None:
    write_package(tmp_path, min_batch=4, max_batch=4)
    with together(Settings(engine="tiny", engine_dir=tmp_path, port=0, share_engines=True)) as own:
        assert own.predict(encode(0)).json()["results"][0]["predictions"][0]["probability"] > 0


def test_sigterm_answers_what_was_accepted_and_ends_owner_and_workers(
    engine_dir: Path, tmp_path: Path, encode: Encode
) -> None:
    options = ["--engine-dir", str(engine_dir), "--engine", "tiny", "--workers", "2", "--share-engines"]
    with start_process(options, tmp_path / "log") as started:
        processes = [int(number) for number in re.findall(r'"pid":(\d+)', started.log.read_text())]
        assert len(processes) == 3
        outcomes: list[int] = []

        def ask() -> None:
            with httpx.Client(base_url=started.url, verify=False) as client:
                while 503 not in outcomes:
                    outcomes.append(client.post("/predict", content=encode(0)).status_code)

        with ThreadPoolExecutor(8) as pool:
            asking = [pool.submit(ask) for _ in range(8)]
            wait_until(lambda: len(outcomes) > 20)
            started.process.send_signal(signal.SIGTERM)
            assert started.process.wait(timeout=20) == 0
        for client in asking:
            client.result()  # a broken connection would be a request accepted and dropped
        assert set(outcomes) == {200, 503}
        assert not any(map(is_running, processes))
    assert "Traceback" not in started.log.read_text()


def test_owner_and_workers_end_when_their_supervisor_is_killed(engine_dir: Path, tmp_path: Path) -> None:
    options = ["--engine-dir", str(engine_dir), "--engine", "tiny", "--workers", "2", "--share-engines"]
    with start_process(options, tmp_path / "log") as started:
        processes = [int(number) for number in re.findall(r'"pid":(\d+)', started.log.read_text())]
        assert len(processes) == 3
        started.process.send_signal(signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, processes)))
