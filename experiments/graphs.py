"""A graph, run as an OpenVINO engine runs it, beside its FP32 network: what two experiments share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
from pydantic import BaseModel, Field

from builder.compile.verification import Gate, GateError
from builder.kit import VerificationSet
from builder.prepare.preparation import Subject
from runtime.openvino import CONFIGURATION

_BATCH = 32


class Measurement(BaseModel):
    """A graph on some images, beside the FP32 network in PyTorch."""

    wrong: int
    images: int
    reference_wrong: int = Field(description="by the FP32 network")
    agreement: float = Field(description="share of the images that both label alike")
    max_logit_difference: float


class Measured(BaseModel):
    """A graph on the images that decide about it, and on those that only measure."""

    bytes: int = Field(description="of the ONNX graph with its weights")
    validation: Measurement = Field(description="what the accuracy gate sees")
    refused: str | None = Field(description="the gate's words; None: it passes")
    test: Measurement


def measure_graph(graph: Path, validation: VerificationSet, test: VerificationSet) -> Measured:
    """Run an ONNX file over both sets of images."""
    compiled = openvino.Core().compile_model(graph, "CPU", CONFIGURATION)
    measurements, refused = [], None
    for images in (validation, test):
        parts = [images.pixels[start : start + _BATCH] for start in range(0, len(images.pixels), _BATCH)]
        comparison = images.compare(np.concatenate([compiled([part])[0] for part in parts]))
        if images is validation:
            try:
                Gate().check(comparison)
            except GateError as error:
                refused = str(error)
        assert comparison.engine_top1 is not None, "they are labelled"
        assert comparison.reference_top1 is not None, "they are labelled"
        measurements.append(
            Measurement(
                wrong=round((1 - comparison.engine_top1) * comparison.images),
                images=comparison.images,
                reference_wrong=round((1 - comparison.reference_top1) * comparison.images),
                agreement=comparison.label_agreement,
                max_logit_difference=comparison.max_logit_difference,
            )
        )
    return Measured(
        bytes=graph.stat().st_size, validation=measurements[0], refused=refused, test=measurements[1]
    )


def held_out_images(subject: Subject) -> VerificationSet:
    """The network's test images, with its FP32 logits; nothing is decided by them."""
    images = subject.data.test
    pixels = images.load_pixels(subject.student.preprocessing, progress=False)
    return VerificationSet(images.name, pixels, images.targets, subject.reference(pixels), len(pixels))
