"""The server on Ray Serve, and batch scoring by Ray Data: on a real cluster, of this machine alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from ray_cluster import PATIENCE, PNG, Cluster, Load, configuration, processes
from running import wait_until
from tiny_engine import write_package

from trimrt.cli import main
from trimrt.cluster.arguments import Arguments, on_share

# Ray's code warns, in this process too.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

Encode = Callable[..., bytes]
Reference = Callable[..., np.ndarray]


# --- the configuration ------------------------------------------------------------------------------


def refusal(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["cluster", "config", *map(str, arguments)])
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_one_engine_is_one_deployment(engine_dir: Path) -> None:
    (application,) = configuration(engine_dir / "tiny-v1", "--replicas", "2", "--cpus", "0.5")["applications"]
    assert application["import_path"] == "trimrt.cluster:app"
    engine = str((engine_dir / "tiny-v1").resolve())
    assert application["args"] == {"pools": [{"name": "tiny", "engine": engine}]}
    (deployment,) = application["deployments"]
    assert deployment["name"] == "tiny"
    assert deployment["num_replicas"] == 2
    assert deployment["ray_actor_options"] == {"num_cpus": 0.5}
    assert deployment["max_ongoing_requests"] == 16, "a batch that runs, and one that waits"


def test_a_range_scales_with_the_load(engine_dir: Path) -> None:
    (application,) = configuration(engine_dir / "tiny-v1", "--replicas", "1-4")["applications"]
    (deployment,) = application["deployments"]
    assert deployment["autoscaling_config"] == {
        "min_replicas": 1,
        "max_replicas": 4,
        "target_ongoing_requests": 4,
    }
    assert "num_replicas" not in deployment


def test_a_gpu_engine_gets_its_share_of_a_gpu_and_is_asked_first(engine_dir: Path, tmp_path: Path) -> None:
    gpu = Path(shutil.copytree(engine_dir / "other-v1", tmp_path / "gpu"))
    manifest = json.loads((gpu / "manifest.json").read_text())
    (gpu / "manifest.json").write_text(json.dumps(manifest | {"backend": "tensorrt", "name": "on-gpu"}))

    options = ("--gpus", "0.25", "--replicas", "1-8", "--replicas", "2")
    (application,) = configuration(gpu, engine_dir / "tiny-v1", *options)["applications"]

    assert [pool["name"] for pool in application["args"]["pools"]] == ["on-gpu", "tiny"]
    on_gpu, on_cpu, router = application["deployments"]
    assert on_gpu["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.25}
    assert on_gpu["autoscaling_config"]["max_replicas"] == 8
    assert on_cpu["ray_actor_options"] == {"num_cpus": 1.0}
    assert on_cpu["num_replicas"] == 2
    assert router["name"] == "router"
    assert router["max_ongoing_requests"] >= 8 * on_gpu["max_ongoing_requests"]


def test_the_configuration_goes_into_a_file(engine_dir: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(
        main, ["cluster", "config", str(engine_dir / "tiny-v1"), "--output", str(tmp_path / "a.yaml")]
    )
    assert f"serve deploy {tmp_path / 'a.yaml'}" in said.output
    assert yaml.safe_load((tmp_path / "a.yaml").read_text()) == configuration(engine_dir / "tiny-v1")


def test_what_cannot_be_served_is_refused(engine_dir: Path, tmp_path: Path) -> None:
    tiny = engine_dir / "tiny-v1"
    assert "is not an engine package" in refusal(tmp_path)
    assert "neither a number such as 2 nor a range" in refusal(tiny, "--replicas", "many")
    assert "the larger number comes second" in refusal(tiny, "--replicas", "4-1")
    assert "at least 1" in refusal(tiny, "--replicas", "0")
    assert "given 2 times for 1 engines" in refusal(tiny, "--replicas", "1", "--replicas", "2")
    assert "begins with a slash" in refusal(tiny, "--route-prefix", "digits")
    assert "an engine of its own" in refusal(tiny, tiny)
    cats = write_package(tmp_path, "cats")
    manifest = json.loads((cats / "manifest.json").read_text())
    (cats / "manifest.json").write_text(json.dumps(manifest | {"labels": [f"cat {n}" for n in range(10)]}))
    assert "have different labels" in refusal(tiny, cats)


@pytest.mark.parametrize(
    ("pools", "says"),
    [
        ([], "at least 1 item"),
        ([{"name": "a"}], "engine"),
        ([{"engine": "x"}], "name"),
        ([{"name": "a", "engine": "x"}, {"name": "a", "engine": "y"}], "a name of its own"),
        ([{"name": "a", "engine": "x", "port": 80}], "sets port, which is Ray's to decide"),
        ([{"name": "a", "engine": "x", "queue_limit": 0}], "pool 'a': queue_limit: Input should be greater"),
        ([{"name": "a", "engine": "x", "colour": "red"}], "pool 'a': colour: Extra inputs"),
        ([{"name": "router", "engine": "x"}], "the deployment in front"),
    ],
)
def test_wrong_arguments_are_said_when_ray_builds_the_application(
    pools: list[dict[str, Any]], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Arguments.model_validate({"pools": pools})


def test_a_replica_computes_on_its_share_of_the_machine() -> None:
    assert on_share({"engine": "x"}, cpus=2.5).inference_threads == 2
    assert on_share({"engine": "x"}, cpus=0.25).decode_threads == 1
    assert on_share({"engine": "x", "decode_threads": 7}, cpus=2).decode_threads == 7


def test_without_ray_it_says_what_to_install(engine_dir: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; from trimrt.cli import main; main()"
    command = [sys.executable, "-c", code, "cluster", "config", str(engine_dir / "tiny-v1")]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert outcome.returncode == 1
    assert "pip install 'trimrt[cluster]'" in outcome.stderr


# --- a running cluster ------------------------------------------------------------------------------


@pytest.fixture
def pair(cluster: Cluster, engine_dir: Path) -> Cluster:
    """Two replicas of one engine."""
    cluster.deploy(engine_dir / "tiny-v1", "--replicas", "2")
    cluster.wait_for_replicas(2)
    return cluster


def test_two_replicas_answer_as_the_engine_does(pair: Cluster, encode: Encode, reference: Reference) -> None:
    replicas = set()
    with httpx.Client(base_url=pair.url, timeout=60, headers=PNG) as client:
        for seed in range(30):
            image = encode(seed)
            response = client.post(
                "/predict", content=image, params={"top_k": 10}, headers={"X-Request-Id": f"mine-{seed}"}
            )
            assert response.status_code == 200, response.text
            assert response.headers.get_list("x-request-id") == [f"mine-{seed}"]
            assert response.json()["request_id"] == f"mine-{seed}"
            assert response.json()["engine"]["name"] == "tiny"
            replicas.add(response.headers["x-replica-id"])
            (result,) = response.json()["results"]
            probabilities = {found["index"]: found["probability"] for found in result["predictions"]}
            np.testing.assert_allclose(
                [probabilities[index] for index in range(10)], reference(image), atol=1e-5
            )
    assert len(replicas) == 2


def test_everything_but_what_is_each_replicas_own_is_served(pair: Cluster, encode: Encode) -> None:
    with httpx.Client(base_url=pair.url, timeout=60) as client:
        assert client.get("/health/ready").json()["engine"] == "tiny"
        assert client.get("/v2/models/tiny/ready").status_code == 200
        assert "<html" in client.get("/").text
        broken = client.post("/predict", content=b"x", headers=PNG)
        assert broken.json()["type"] == "urn:trimrt:problem:image-damaged"
        managed = client.post("/engines/other/load")
        assert managed.status_code == 403
        assert "change the configuration" in managed.json()["detail"]
        assert client.put("/engines/default", json={"name": "tiny"}).status_code == 403
        metrics = client.get("/metrics")
        assert metrics.status_code == 404
        assert "scrape the metrics of Ray's nodes" in metrics.json()["detail"]


def test_no_accepted_request_is_lost_when_a_replica_is_killed(pair: Cluster, encode: Encode) -> None:
    load = Load(pair.url, encode(0))
    load.wait_for(100)
    victim, _ = processes("ray::ServeReplica:trimrt:tiny")
    os.kill(victim, signal.SIGKILL)
    load.wait_for(200)
    load.stop()  # raises if a client got no answer
    pair.wait_for_replicas(2)
    wait_until(lambda: len(processes("ray::ServeReplica:trimrt:tiny")) == 2, PATIENCE)


def test_a_new_configuration_takes_a_replica_away_without_a_retry(
    pair: Cluster, engine_dir: Path, encode: Encode
) -> None:
    load = Load(pair.url, encode(1), clients=4)
    load.wait_for(20)
    pair.deploy(engine_dir / "tiny-v1", "--replicas", "1")
    pair.wait_for_replicas(1)
    load.wait_for(20)
    load.stop()
    assert set(load.attempts) == {1}
    assert len(set(load.replicas[-10:])) == 1


def test_a_cluster_scores_as_one_machine_does(
    cluster: Cluster,
    engine_dir: Path,
    encode: Encode,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # which is not where the actors are
    for number in range(30):
        path = Path(f"photos/{number:02d}.png")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(number) if number != 7 else b"broken")
    outputs = []
    for name, more in [("local.parquet", []), ("cluster.parquet", ["--ray", "local", "--cpus", "0.5"])]:
        arguments = ["photos", "--engine", str(engine_dir / "tiny-v1"), "--out", name]
        result = CliRunner().invoke(main, ["predict", *arguments, "--part-size", "8", *more])
        assert result.exit_code == 0, result.output
        assert "1 could not be scored" in result.output
        outputs.append(pq.read_table(name))
    local, on_cluster = outputs
    assert on_cluster == local
