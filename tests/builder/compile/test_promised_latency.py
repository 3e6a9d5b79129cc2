"""Whether an engine costs what its network was pruned to cost."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_engine import write_package

from builder.compile.packages import Package
from models.promise import Cost, Device, Promise
from runtime.manifest import Evidence, read_manifest


@pytest.mark.parametrize(
    ("median_ms", "least_ms", "missed"),
    [(2.0, 1.0, None), (2.0, 1.06, "1.06 ms, 6% over the 1 asked"), (2.0, None, "2 ms, 100% over")],
)
def test_a_latency_is_kept_by_the_least_time_as_latency_tables_have_it(
    tmp_path: Path, median_ms: float, least_ms: float | None, missed: str | None
) -> None:
    folder = write_package(tmp_path)
    manifest = read_manifest(folder)
    device = Device(
        machine=manifest.compatibility.machine,
        cores=1,
        backend=manifest.backend,
        precision=manifest.precision,
        batch=manifest.batch.min,
    )
    promise = Promise(costs={"latency_ms": Cost(asked=1, predicted=1)}, device=device)
    evidence = Evidence(
        image_set="noise",
        images=1,
        reference_top1=None,
        engine_top1=None,
        label_agreement=1,
        max_logit_difference=0,
        latency_ms=median_ms,
        least_ms=least_ms,
        throughput=1,
        weights_bytes=1,
    )
    manifest = manifest.model_copy(update={"promise": promise, "evidence": evidence})
    found = Package(folder, manifest, rejected=(), unverified=None).missed
    assert len(found) == (missed is not None)
    assert all(str(missed) in line for line in found)
