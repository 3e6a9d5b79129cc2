"""What Triton's extensions mean here, whatever carries them: what a model is and did, and how it is managed.

What clients get is made of dictionaries, lists, texts and numbers, which the protocol names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from runtime.manifest import Manifest
from server.problems import Problem
from server.registry import Unload
from server.scheduler import Scheduler
from server.service import Service
from server.settings import Settings
from server.stats import EngineStats
from server.telemetry import EngineKey
from server.v2 import core

_STATES: Final = {"loaded": "READY"}  # all else is unavailable
_LEVELS: Final = (  # from the last to the first that is left out
    ("log_verbose_level", logging.DEBUG),
    ("log_info", logging.INFO),
    ("log_warnings", logging.WARNING),
    ("log_errors", logging.ERROR),
)
_FIXED_LOG: Final = {"log_file": "", "log_format": "default"}
_FIXED_TRACE: Final = {
    "trace_file": "",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_mode": "opentelemetry",
}
_RARELY: Final = 1_000_000_000  # a trace of so many requests is as good as none
_LOG: Final = logging.getLogger("trimrt")

# --- what a model is and did ----------------------------------------------------------------------------


def model_config(service: Service, name: str, version: str) -> dict[str, Any]:
    """The configuration that Triton would have been given for the model.

    Raises:
        Problem: `engine-not-found`.
    """
    scheduler = core.find_model(service.registry, name, version)
    manifest, settings = scheduler.engine.manifest, service.settings
    metadata = core.model_metadata(manifest)
    return {
        "name": manifest.name,
        "platform": metadata["platform"],
        "backend": manifest.backend,
        "version_policy": {"specific": {"versions": [int(manifest.version)]}},
        "max_batch_size": settings.max_images,
        "input": [_input(it) for it in metadata["inputs"]],
        "output": [
            {"name": it["name"], "data_type": f"TYPE_{it['datatype']}", "dims": it["shape"][1:]}
            for it in metadata["outputs"]
        ],
        "instance_group": [_instances(scheduler)],
        "default_model_filename": manifest.provenance.artefact,
        "dynamic_batching": _batching(scheduler, settings),
        "parameters": {
            name: {"string_value": value}
            for name, value in (("precision", manifest.precision), ("activation", manifest.activation))
        },
    }


def _input(tensor: Mapping[str, Any]) -> dict[str, Any]:
    shape = tensor["shape"][1:]
    data_type = f"TYPE_{tensor['datatype']}"
    return {"name": tensor["name"], "data_type": data_type, "format": "FORMAT_NHWC", "dims": shape}


def _instances(scheduler: Scheduler) -> dict[str, Any]:
    engine = scheduler.engine
    kind = "KIND_CPU" if engine.on_cpu else "KIND_GPU"
    return {"name": engine.manifest.name, "kind": kind, "count": engine.slots}


def _batching(scheduler: Scheduler, settings: Settings) -> dict[str, Any]:
    return {
        "preferred_batch_size": [scheduler.engine.best_batch],
        "max_queue_delay_microseconds": round(1000 * settings.max_batch_delay_ms),
    }


async def statistics(service: Service, name: str, version: str) -> dict[str, Any]:
    """What the model did since it was loaded first, or all that are loaded; images count as requests.

    Raises:
        Problem: `engine-not-found`.
    """
    if name:
        wanted = [core.find_model(service.registry, name, version)]
    else:
        wanted = list(service.registry.loaded.values())
    counts = await service.fleet.counts()
    return {
        "model_stats": [
            _statistics(
                it.engine.manifest, counts.engines.get(EngineKey.of(it.engine.manifest), EngineStats())
            )
            for it in wanted
        ]
    }


def _statistics(manifest: Manifest, stats: EngineStats) -> dict[str, Any]:
    stages = {
        stage: _duration(distribution.total.count, distribution.total.sum)
        for stage, distribution in stats.stages.items()
    }
    images = stages["total"]["count"]
    return {
        "name": manifest.name,
        "version": manifest.version,
        "last_inference": round(1000 * stats.last),
        "inference_count": images,
        "execution_count": stats.batches.total(),
        "inference_stats": {
            "success": stages["total"],
            "fail": _duration(stats.failed, 0),
            "queue": stages["queue"],
            "compute_input": stages["decode"],
            "compute_infer": stages["inference"],
            "compute_output": _duration(images, 0),  # in `compute_infer`
            "cache_hit": _duration(stats.hits, 0),
            "cache_miss": _duration(stats.misses, 0),
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": _duration(count, 0),
                "compute_infer": _duration(count, stats.inference.get(size, 0.0)),
                "compute_output": _duration(count, 0),
            }
            for size, count in sorted(stats.batches.items())
        ],
    }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(1e9 * seconds)}


# --- the model repository -------------------------------------------------------------------------------


async def repository_index(service: Service, *, ready: bool) -> list[dict[str, str]]:
    """Every engine that is loaded or could be, and every package that is refused; or what is `ready`."""
    default = {"available": "it is not loaded"}
    return [
        {
            "name": row.name,
            "version": row.version or "",
            "state": _STATES.get(row.state, "UNAVAILABLE"),
            "reason": row.reason or default.get(row.state, ""),
        }
        for row in await service.registry.describe()
        if row.state == "loaded" or not ready
    ]


async def load_model(service: Service, name: str, parameters: Mapping[str, object]) -> None:
    """As `POST /engines/{name}/load`.

    Raises:
        Problem: `not-supported`: it is to be loaded with another configuration or other files; or see
            `Service.load`.
    """
    if parameters:
        names = ", ".join(sorted(parameters)[:3])[: core.MOST_TEXT]
        raise Problem(
            "not-supported", f"an engine package is loaded as it is, without parameters; there are {names}"
        )
    await service.load(name)


async def unload_model(service: Service, name: str) -> None:
    """As `POST /engines/{name}/unload`. No engine has others that depend on it.

    Raises:
        Problem: `engine-not-found` or `engine-in-use`.
    """
    await service.fleet.change(Unload(name))


# --- logs and traces ------------------------------------------------------------------------------------


def log_settings(service: Service, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Which levels of the server's log are written, after `changes` of it.

    Raises:
        Problem: `invalid-parameter` or `not-supported`.
    """
    current = _log_settings()
    if not changes:
        return current
    _check_one_process(service)
    _check_names(changes, current)
    for name, value in _FIXED_LOG.items():
        if changes.get(name, value) != value:
            raise Problem("not-supported", f"{name} cannot be changed: the log goes to standard error")
    for name, _ in _LEVELS:
        kind = int if name == "log_verbose_level" else bool
        if type(value := changes.get(name, current[name])) is not kind or value < 0:
            raise Problem("invalid-parameter", f"{name} is {repr(value)[:100]}, which is not what it takes")
    wanted = {**current, **changes}
    written = [bool(wanted[name]) for name, _ in _LEVELS]
    if written != sorted(written):
        raise Problem("not-supported", "a level is written only together with all that are more urgent")
    _LOG.setLevel(next((level for name, level in _LEVELS if wanted[name]), logging.CRITICAL))
    return _log_settings()


def _log_settings() -> dict[str, Any]:
    least = _LOG.getEffectiveLevel()
    levels = {name: least <= level for name, level in _LEVELS}
    return {**_FIXED_LOG, **levels, "log_verbose_level": int(levels["log_verbose_level"])}


def trace_settings(service: Service, model: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Which requests leave a trace, after `changes` of it: None for what is to be as it was at the start.

    Raises:
        Problem: `engine-not-found`, `invalid-parameter` or `not-supported`.
    """
    if model:
        core.find_model(service.registry, model)
    if changes:
        _check_one_process(service)
        _check_names(changes, _trace_settings(service))
        if model:
            raise Problem("not-supported", "trace settings are the server's; no model has its own")
        for name, value in _FIXED_TRACE.items():
            if changes.get(name) not in (None, "", value, [value]):
                raise Problem("not-supported", f"{name} cannot be changed: traces go to --otlp-endpoint")
        _sample(service, changes)
    return _trace_settings(service)


def _sample(service: Service, changes: Mapping[str, Any]) -> None:
    sampling = service.telemetry.sampling
    level, rate = changes.get("trace_level"), _first(changes.get("trace_rate"))
    levels = [level] if isinstance(level, str) else level
    if levels not in (None, [], ["OFF"], ["TIMESTAMPS"]):
        raise Problem("not-supported", "trace_level is OFF or TIMESTAMPS")
    if rate is not None and not (
        rate.isascii() and rate.isdecimal() and len(rate) <= 10 and 1 <= int(rate) <= _RARELY
    ):
        raise Problem("invalid-parameter", f"trace_rate is a whole number from 1 to {_RARELY:,}")
    if sampling is None:
        if levels == ["TIMESTAMPS"]:
            raise Problem("not-supported", "there is nowhere for traces to go; --otlp-endpoint says where")
        return
    every = int(rate) if rate is not None else 1 if "trace_rate" in changes else max(1, sampling.every)
    is_off = levels == ["OFF"] if "trace_level" in changes else not sampling.every
    sampling.every = 0 if is_off else every


def _trace_settings(service: Service) -> dict[str, Any]:
    sampling = service.telemetry.sampling
    every = 0 if sampling is None else sampling.every
    return {**_FIXED_TRACE, "trace_level": ["TIMESTAMPS" if every else "OFF"], "trace_rate": str(every or 1)}


def _first(value: Any) -> str | None:
    if isinstance(value, list):
        value = value[0] if value else None
    return None if value in (None, "") else str(value)


def _check_names(changes: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise Problem(
            "invalid-parameter", f"no setting {unknown[0][:100]!r}; there are {', '.join(sorted(known))}"
        )


def _check_one_process(service: Service) -> None:
    if service.settings.workers > 1:
        raise Problem("not-supported", "with several workers, set this when the server starts")
