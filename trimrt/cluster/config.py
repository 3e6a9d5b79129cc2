"""A Ray Serve configuration for engine packages; `serve run` and `serve deploy` take it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from ray.serve.schema import ServeDeploySchema

from runtime.manifest import EngineError, Manifest, read_manifest
from server.settings import Settings
from trimrt.cluster.arguments import ROUTER, Arguments
from trimrt.cluster.options import Replicas

_ROUTERS: Final = 2  # so that one is left when the other dies
_ROUTER_CPUS: Final = 0.5
_STOP_SECONDS: Final = 60.0  # with HAProxy, Ray serves on for 30 s before it waits for what runs


class Pool(NamedTuple):
    """One deployment.

    Attributes:
        engine: folder of its engine package, the same path on every node.
        replicas: how many.
        cpus: of each replica; also how many threads decode, and how many compute where there is no GPU.
        gpus: of each replica, if its engine runs on one; a fraction shares it.
        target_ongoing: requests under way in a replica, on average, that scaling aims at; None: the
            engine's best batch.
    """

    engine: Path
    replicas: Replicas
    cpus: float
    gpus: float
    target_ongoing: int | None = None


def configure(pools: Sequence[Pool], *, name: str, host: str, port: int, route_prefix: str) -> dict[str, Any]:
    """The configuration, checked by Ray's own schema.

    Args:
        pools: the first is asked first.
        name: of the application.
        host: address that Ray's HTTP proxies listen on.
        port: their TCP port.
        route_prefix: where the application's paths begin.

    Raises:
        EngineError: not a package, or two that cannot answer for each other.
        pydantic.ValidationError: Ray takes no such values.
    """
    manifests = [read_manifest(pool.engine) for pool in pools]
    _check_alike(pools, manifests)
    engines = [
        {"name": manifest.name, "engine": str(pool.engine.resolve())}
        for pool, manifest in zip(pools, manifests, strict=True)
    ]
    deployments = [_deployment(pool, manifest) for pool, manifest in zip(pools, manifests, strict=True)]
    if len(pools) > 1:
        room = sum(
            deployment["max_ongoing_requests"] * pool.replicas.most
            for deployment, pool in zip(deployments, pools, strict=True)
        )
        deployments.append(
            {
                "name": ROUTER,
                "num_replicas": _ROUTERS,
                "max_ongoing_requests": 2 * room,
                "graceful_shutdown_timeout_s": _STOP_SECONDS,
                "ray_actor_options": {"num_cpus": _ROUTER_CPUS},
                "logging_config": {"log_level": "ERROR"},  # back-pressure is normal, not worth a log line
            }
        )
    configuration = {
        "proxy_location": "EveryNode",
        "http_options": {
            "host": host,
            "port": port,
            "request_timeout_s": _defaults().timeout_ms / 1000,
            "keep_alive_timeout_s": _defaults().keep_alive_s,
        },
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": name,
                "route_prefix": route_prefix,
                "import_path": "trimrt.cluster:app",
                "args": Arguments.model_validate({"pools": engines}).model_dump(),
                "deployments": deployments,
            }
        ],
    }
    ServeDeploySchema.model_validate(configuration)
    return configuration


def _defaults() -> Settings:
    """What the server does unless told otherwise, whatever this machine's environment says."""
    return Settings.model_construct()


def _check_alike(pools: Sequence[Pool], manifests: Sequence[Manifest]) -> None:
    names = [manifest.name for manifest in manifests]
    if len(set(names)) < len(names):
        raise EngineError("every pool needs an engine of its own, by another name")
    for pool, manifest in zip(pools[1:], manifests[1:], strict=True):
        if manifest.labels != manifests[0].labels:
            raise EngineError(
                f"{pools[0].engine} and {pool.engine} have different labels, so they cannot answer for each "
                "other; make a configuration for each, and an application of both"
            )


def _deployment(pool: Pool, manifest: Manifest) -> dict[str, Any]:
    resources: dict[str, float] = {"num_cpus": pool.cpus}
    if manifest.backend != "openvino":
        resources["num_gpus"] = pool.gpus
    # A batch that runs and one that waits: more would only wait longer.
    ongoing = min(2 * manifest.batch.max, _defaults().queue_limit)
    deployment: dict[str, Any] = {"name": manifest.name}
    if pool.replicas.least == pool.replicas.most:
        deployment["num_replicas"] = pool.replicas.most
    else:
        deployment["autoscaling_config"] = {
            "min_replicas": pool.replicas.least,
            "max_replicas": pool.replicas.most,
            "target_ongoing_requests": min(pool.target_ongoing or manifest.batch.opt, ongoing),
        }
    return deployment | {
        "max_ongoing_requests": ongoing,
        "max_queued_requests": ongoing,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "graceful_shutdown_timeout_s": _STOP_SECONDS,
        "ray_actor_options": resources,
    }
