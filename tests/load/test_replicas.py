"""Replicas on a real Ray cluster that die, come and go under load; actors that die while they score."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from ray_cluster import PATIENCE, Cluster, Load, processes
from running import wait_until

from trimrt.cli import main
from trimrt.predict.command import predict

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1200)]

Encode = Callable[..., bytes]

REPLICA = "ray::ServeReplica:trimrt:tiny"


def test_of_2000_requests_none_is_lost_when_replicas_are_killed(
    cluster: Cluster, engine_dir: Path, encode: Encode
) -> None:
    cluster.deploy(engine_dir / "tiny-v1", "--replicas", "2")
    cluster.wait_for_replicas(2)
    load = Load(cluster.url, encode(0))
    for _ in range(2):
        load.wait_for(500)
        victim, *_ = processes(REPLICA)
        os.kill(victim, signal.SIGKILL)
        load.wait_for(500)
        wait_until(lambda victim=victim: victim not in processes(REPLICA), PATIENCE)
        wait_until(lambda: len(processes(REPLICA)) == 2, PATIENCE)
        cluster.wait_for_replicas(2)
    load.wait_for(200)
    load.stop()
    again = sum(attempts > 1 for attempts in load.attempts)
    print(f"{len(load.attempts)} requests answered, {again} of them after asking again")
    assert len(load.attempts) >= 2000
    assert len(set(load.replicas)) == 4, "two died, and two took their places"


def test_replicas_come_and_go_with_the_load(cluster: Cluster, engine_dir: Path, encode: Encode) -> None:
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 1,
        "look_back_period_s": 1,
    }
    cluster.deploy(engine_dir / "tiny-v1", "--replicas", "1-2", autoscaling_config=scaling)
    cluster.wait_for_replicas(1)
    load = Load(cluster.url, encode(2), clients=12)
    cluster.wait_for_replicas(2)
    load.wait_for(100)
    load.stop()
    cluster.wait_for_replicas(1)
    assert set(load.attempts) == {1}


def test_the_second_pool_answers_when_the_first_has_nobody(
    cluster: Cluster, engine_dir: Path, encode: Encode
) -> None:
    cluster.deploy(engine_dir / "tiny-v1", engine_dir / "other-v1")
    wait_until(lambda: len(processes("ray::ServeReplica:trimrt:")) == 3, PATIENCE)
    load = Load(cluster.url, encode(3), clients=4)
    load.wait_for(50)
    assert set(load.engines) == {"tiny"}, "there was room in the first"
    (victim,) = processes(REPLICA)
    os.kill(victim, signal.SIGKILL)
    load.wait_for(50)
    assert "other" in load.engines
    wait_until(lambda: load.engines[-1] == "tiny", PATIENCE)
    load.stop()
    assert set(load.attempts) == {1}, "the router asks again, not the client"


def test_the_router_refuses_what_is_too_large_itself(cluster: Cluster, engine_dir: Path) -> None:
    cluster.deploy(engine_dir / "tiny-v1", engine_dir / "other-v1")
    with httpx.Client(base_url=cluster.url, timeout=60) as client:
        large = client.post("/predict", content=bytes(33 << 20), headers={"Content-Type": "image/png"})
        assert large.json()["type"] == "urn:trimrt:problem:body-too-large"
        assert client.get("/health/ready").json()["engine"] == "tiny"
        assert client.post("/engines/tiny/unload").status_code == 403


def test_an_engine_that_is_refused_fails_the_deployment_with_the_reason(
    cluster: Cluster, engine_dir: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(engine_dir / "tiny-v1", tmp_path / "damaged"))
    (damaged / "engine.blob").write_bytes(b"damaged")
    cluster.submit(damaged)
    wait_until(lambda: cluster.status().status == "DEPLOY_FAILED", PATIENCE)
    assert "damaged or changed since it was built" in cluster.status().deployments["tiny"].message


def test_every_replica_reports_through_rays_metrics(
    cluster: Cluster, engine_dir: Path, encode: Encode
) -> None:
    import ray

    cluster.deploy(engine_dir / "tiny-v1")
    load = Load(cluster.url, encode(4), clients=2)
    load.wait_for(20)
    load.stop()
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    series = re.compile(r'ray_trimrt_requests_total\{[^}]*outcome="ok"[^}]*replica="(\w+)"[^}]*\} ([0-9.]+)')

    def reported() -> dict[str, float]:
        return {replica: float(count) for replica, count in series.findall(httpx.get(url).text)}

    wait_until(lambda: sum(reported().get(name, 0) for name in set(load.replicas)) >= 20, PATIENCE)
    exported = httpx.get(url).text
    for name in ("trimrt_stage_duration_seconds_bucket", "trimrt_image_batch_size_sum"):
        assert f"ray_{name}{{" in exported


def test_a_part_whose_actor_dies_is_scored_by_another(
    cluster: Cluster, engine_dir: Path, encode: Encode, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(12):
        (photos / f"{number:02d}.png").write_bytes(encode(number))
    pipe = photos / "05-pipe.png"  # whoever reads it waits until it is written
    os.mkfifo(pipe)
    arguments = [str(photos), "--engine", str(engine_dir / "tiny-v1"), "--out", str(tmp_path / "out.parquet")]
    arguments += ["--part-size", "4", "--batch-size", "4", "--ray", "local", "--actors", "1", "--cpus", "0.5"]

    def kill_and_let_through() -> None:
        descriptor = os.open(pipe, os.O_WRONLY)  # the actor reads it
        (actor,) = processes("ray::MapWorker")
        os.kill(actor, signal.SIGKILL)
        readers = select.poll()
        readers.register(descriptor, 0)
        assert readers.poll(PATIENCE * 1000), "still read"
        os.close(descriptor)
        pipe.write_bytes(encode(99))  # the one in its place reads it

    killing = threading.Thread(target=kill_and_let_through)
    killing.start()
    result = CliRunner().invoke(predict, arguments)
    killing.join()
    assert result.exit_code == 0, result.output
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.num_rows == 13
    assert table.column("error").null_count == 13


def test_an_engine_that_actors_refuse_ends_the_run_with_the_reason(
    cluster: Cluster, engine_dir: Path, encode: Encode, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(encode(0))
    damaged = Path(shutil.copytree(engine_dir / "tiny-v1", tmp_path / "damaged"))
    (damaged / "engine.blob").write_bytes(b"damaged")
    arguments = [str(tmp_path / "a.png"), "--engine", str(damaged), "--out", str(tmp_path / "out.parquet")]
    arguments += ["--ray", "local", "--actors", "1", "--cpus", "0.5"]
    result = CliRunner().invoke(main, ["predict", *arguments])
    assert result.exit_code == 1
    assert "damaged or changed since it was built" in result.output
    assert "Traceback" not in result.output
