"""A report that nobody measured, for what the page makes of unusual figures and hostile names."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import numpy as np

from runtime.manifest import Evidence
from trimrt.report.measuring import score
from trimrt.report.results import (
    Accuracy,
    Agreement,
    Claim,
    Fact,
    Group,
    Latency,
    LayerError,
    LayerRange,
    LayerTime,
    LeftOut,
    Model,
    Report,
)


def accuracy(wrong: int, images: int, classes: int = 10) -> Accuracy:
    """The first `wrong` images are taken for the next class."""
    targets = np.arange(images) % classes
    labels = targets.copy()
    labels[:wrong] = (labels[:wrong] + 1) % classes
    return score(labels, targets)


def model(number: int, **fields: Any) -> Model:
    milliseconds = 10 / number
    return Model(
        **{
            "number": number,
            "label": f"model-{number}",
            "name": "model",
            "kind": "engine",
            "path": f"engines/model-{number}",
            "architecture": "resnet18",
            "backend": "openvino",
            "precision": "fp32",
            "parameters": 1000,
            "macs": 2000,
            "size_bytes": 3_000_000 // number,
            "group": 0,
            "accuracy": accuracy(number, 360),
            "latency": Latency(
                batch=1,
                runs=3,
                median_ms=milliseconds,
                best_ms=milliseconds,
                p10_ms=milliseconds,
                p90_ms=1.1 * milliseconds,
            ),
            "missing": dict.fromkeys(("agreement", "profile", "ranges", "sensitivity"), "not for this one"),
            **fields,
        }
    )


def group(classes: int = 10, images: int = 360, **fields: Any) -> Group:
    counts = np.bincount(np.arange(images) % classes, minlength=classes).tolist()
    labels = [str(index) for index in range(classes)]
    return Group(
        **{"name": "digits", "test_images": images, "labels": labels, "class_images": counts, **fields}
    )


def report(models: list[Model], groups: list[Group] | None = None, **fields: Any) -> Report:
    return Report(
        **{
            "created_at": datetime(2026, 1, 1, tzinfo=timezone.utc),
            "command": "trimrt report",
            "machine": {"processor": "a processor", "cores": "2"},
            "versions": {"trimrt": "0"},
            "timing_seconds": 1.0,
            "groups": groups or [group()],
            "models": models,
            **fields,
        }
    )


def hostile(text: str) -> Report:
    """A report whose every text is `text`."""
    first = model(1, label=text, name=text, path=text, architecture=text, notes=[text])
    second = model(
        2,
        kind="checkpoint",
        role=text,
        backend=None,
        label=text,
        agreement=Agreement(reference=1, share=0.5),
        claim=Claim(top1=0.5, images=2, image_set=text),
        provenance=[Fact(term=text, text=text), Fact(term="made by", text=text)],
    )
    third = model(
        3,
        precision="int8",
        label=text,
        accuracy=None,
        latency=None,
        missing=dict.fromkeys(("accuracy", "agreement", "latency"), text),
        profile=[LayerTime(name=text, kind=text, kernel=text, mean_ms=1, title=text)],
        ranges=[LayerRange(layer=text, activation=1, weights_low=0.1, weights_median=0.2, weights_high=0.3)],
        sensitivity=[LayerError(layer=text, error=0.1)],
        claim=Claim(top1=0.5, images=2, image_set=text),
        evidence=Evidence(
            image_set=text,
            images=2,
            reference_top1=0.5,
            engine_top1=0.5,
            label_agreement=0.5,
            max_logit_difference=0.5,
            latency_ms=0.5,
            throughput=2,
            weights_bytes=1,
        ),
    )
    return report(
        [first, second, third],
        [group(labels=[text] * 10, name=text, source=text, split=text, sha256=text)],
        command=text,
        machine={"processor": text, "cores": text, text: text},
        versions={"trimrt": text, text: text},
        left_out=[LeftOut(path=text, reason=text)],
        cautions=[text],
    )
