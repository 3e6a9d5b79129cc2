"""Scoring on a Ray cluster: Ray Data hands the parts to a pool of actors, each with the engine loaded."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Iterator, Sequence
from typing import Final

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from numpy.typing import NDArray
from ray.exceptions import RayError

from models.errors import TrimRTError
from runtime.manifest import EngineError, Manifest
from trimrt.cluster.options import Replicas
from trimrt.predict.parts import SCHEMA, Plan
from trimrt.predict.runs import score_parts
from trimrt.predict.scoring import Scorer, Workload, open_scorer
from trimrt.predict.sources import Source

_PART: Final = "part"
_CONNECT_SECONDS: Final = 10


class ClusterError(TrimRTError):
    """No Ray cluster can be joined; the message says what to do."""


class PartScorer:
    """One actor: an engine on its share of a machine.

    It loads the engine for its first part: an actor that fails to start, Ray would report as one that died.
    """

    def __init__(self, workload: Workload, manifest: Manifest, source: Source, plan: Plan) -> None:
        self._manifest = manifest
        self._source = source
        self._plan = plan
        self._opening = open_scorer(workload)  # held on to: it closes with its last reference
        self._scorer: Scorer | None = None

    def __call__(self, parts: dict[str, NDArray[np.int64]]) -> pa.Table:
        """The rows of one part, and its number beside each of them."""
        if self._scorer is None:
            cv2.setNumThreads(1)  # in the actor's own process; parallelism is across images
            self._scorer = self._opening.__enter__()
        number = int(parts[_PART][0])
        ((_, table),) = score_parts(self._scorer, self._manifest, self._source, self._plan, [number])
        return table.append_column(_PART, pa.array([number] * len(table), pa.int64()))


def connect(address: str) -> None:
    """Join the cluster at `address`; `auto` is the one that runs here, `local` a new one on this machine.

    Raises:
        ClusterError: there is none.
    """
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # progress and errors are shown by the caller
    if ray.is_initialized():
        return
    if address not in ("auto", "local"):
        _check_listening(address)
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError as error:
        if address != "auto":
            raise ClusterError(str(error)) from error
        raise ClusterError(
            "no Ray cluster runs on this machine; start one with `ray start --head`, or use --ray local"
        ) from error


def _check_listening(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ClusterError(f"no Ray cluster listens at {address!r}: {error}") from None


def score_on_cluster(
    workload: Workload,
    manifest: Manifest,
    source: Source,
    plan: Plan,
    parts: Sequence[int],
    *,
    actors: Replicas | None,
    cpus: float,
    gpus: float,
) -> Iterator[tuple[int, pa.Table]]:
    """Score `parts` on the cluster that was connected to.

    The engine package and the images have the same paths on every node. An actor that dies is replaced, and
    its part scored again.

    Args:
        workload: of one actor.
        manifest: of its engine.
        source: the images.
        plan: says which images are a part.
        parts: to score.
        actors: how many; None: as many as the cluster has room for.
        cpus: of each.
        gpus: of each.

    Returns:
        Each part with its rows, in any order.

    Raises:
        EngineError: an actor cannot use the engine, or the cluster failed.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    pool = (
        ray.data.ActorPoolStrategy(min_size=max(1, actors.least), max_size=actors.most)
        if actors
        else ray.data.ActorPoolStrategy(min_size=1)
    )
    scored = ray.data.from_items(
        [{_PART: part} for part in parts], override_num_blocks=len(parts)
    ).map_batches(
        PartScorer,
        fn_constructor_args=(workload, manifest, source, plan),
        compute=pool,
        batch_size=1,
        num_cpus=cpus,
        num_gpus=gpus,
    )
    arrived: dict[int, list[pa.Table]] = {}
    try:
        for block in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
            for part, rows in _by_part(block):
                arrived.setdefault(part, []).append(rows)
                if sum(map(len, arrived[part])) == len(plan.span(part)):
                    yield part, pa.concat_tables(arrived.pop(part))
    except RayError as error:
        raise EngineError(_reason(error)) from error


def _reason(error: RayError) -> str:
    """What the engine said, for Ray keeps no more of an exception than its text; else what Ray says."""
    found = re.search(rf"{EngineError.__name__}: (.+)", str(error))
    return found[1] if found else f"the cluster gave up: {error}"


def _by_part(block: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    for part in block.column(_PART).unique().to_pylist():
        yield part, block.filter(pc.field(_PART) == part).select(SCHEMA.names).cast(SCHEMA)
