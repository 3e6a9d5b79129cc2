"""What can be asked of TensorRT's builder, and which version or machine cannot do it."""

from __future__ import annotations

import itertools
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from builder.compile.targets.base import CompileError
from runtime.manifest import BatchSizes
from runtime.tensorrt.library import TensorRTLibrary

DLA_SINCE: Final = (11, 4, 1)


class UnsupportedOptionError(CompileError):
    """An option that this TensorRT or this machine does not have; the message names the version."""


class TensorRTOptions(BaseModel):
    """How TensorRT is to build an engine. The defaults suit a server on a GPU."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profiles: list[BatchSizes] = Field(
        default=[],
        description="Batch sizes to tune for, one optimisation profile each; min = max fixes the batch.",
    )
    workspace_mib: int | None = Field(
        default=None,
        ge=1,
        description="Scratch memory a layer may use; by default half of what is free, on Jetson a quarter.",
    )
    optimization_level: int = Field(default=3, ge=0, le=5, description="5 searches longest.")
    aux_streams: int | None = Field(
        default=None,
        ge=0,
        description="Streams for parallel layers; 0 saves memory; by default TensorRT decides.",
    )
    profiling: Literal["none", "layer_names_only", "detailed"] = Field(
        default="detailed", description="What the plan, and layers.json, tell of its layers."
    )
    tf32: bool = Field(default=True, description="Let FP32 layers use TF32 tensor cores.")
    sparsity: bool = Field(
        default=False, description="Use 2:4 sparse kernels where weights fit; the output says where they do."
    )
    version_compatible: bool = Field(default=False, description="Loads on newer TensorRT too.")
    hardware_compatibility: Literal["none", "ampere+", "same-compute-capability"] = Field(
        default="none", description="Other GPUs that the plan is to run on; not on Jetson."
    )
    compute_capabilities: list[str] = Field(
        default=[], description="TensorRT-RTX: GPUs to compile for, e.g. `8.6`; none means Ampere and later."
    )
    dla_core: int | None = Field(
        default=None,
        ge=0,
        description="Run on this DLA core; the GPU runs what it cannot.",
    )

    @model_validator(mode="after")
    def _without_gaps(self) -> TensorRTOptions:
        """A server may form any batch between the smallest and the largest."""
        ordered = sorted(self.profiles, key=lambda sizes: sizes.min)
        for lower, upper in itertools.pairwise(ordered):
            if upper.min > lower.max + 1:
                raise ValueError(f"no profile takes batches of {lower.max + 1}..{upper.min - 1}")
        return self


def refuse_unsupported(library: TensorRTLibrary, options: TensorRTOptions, *, jetson: bool = False) -> None:
    """Check the options against the TensorRT that is here, before it builds anything.

    Args:
        library: the TensorRT to build with.
        options: what was asked for.
        jetson: whether this is one.

    Raises:
        UnsupportedOptionError: with the version at hand, and what to do instead.
    """
    trt, name = library.trt, f"{library.backend} {library.version}"
    if options.compute_capabilities:
        compute_capabilities(trt, options.compute_capabilities, name)
    if options.hardware_compatibility != "none":
        if library.backend == "tensorrt-rtx":
            raise UnsupportedOptionError(
                f"{name} has no hardware compatibility level: its engines run on Ampere and later GPUs "
                "anyway; --compute-capability names others"
            )
        if jetson:
            raise UnsupportedOptionError(
                "hardware-compatible engines are not supported on Jetson; build one engine per device model"
            )
        hardware_level(trt, options.hardware_compatibility, name)
    if options.version_compatible and library.backend == "tensorrt-rtx":
        raise UnsupportedOptionError(
            f"{name} cannot build version-compatible engines (it has no lean runtime); "
            "rebuild after an upgrade"
        )
    if options.dla_core is not None:
        _refuse_dla(library, options, name)


def compute_capabilities(trt: Any, wanted: list[str], name: str) -> list[Any]:
    """TensorRT-RTX's enum values for compute capabilities like `8.6`.

    Raises:
        UnsupportedOptionError: this is not TensorRT-RTX, or it does not know one of them.
    """
    if not hasattr(trt, "ComputeCapability"):
        raise UnsupportedOptionError(
            f"{name} builds for the GPU at hand only; --compute-capability is an option of tensorrt-rtx"
        )
    known = {
        f"{member[2:-1]}.{member[-1]}": value
        for member, value in trt.ComputeCapability.__members__.items()
        if member.startswith("SM")
    }
    for capability in wanted:
        if capability not in known:
            raise UnsupportedOptionError(
                f"{name} cannot build for compute capability {capability}, only for {', '.join(known)}"
            )
    return [known[capability] for capability in wanted]


def hardware_level(trt: Any, level: str, name: str) -> Any:
    """The enum value of a hardware compatibility level.

    Raises:
        UnsupportedOptionError: this TensorRT is too old for it.
    """
    if level == "ampere+":
        return trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if not hasattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY"):
        raise UnsupportedOptionError(
            f"{name} has no hardware compatibility level {level}; use ampere+, or a newer TensorRT"
        )
    return trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY


def _refuse_dla(library: TensorRTLibrary, options: TensorRTOptions, name: str) -> None:
    if library.backend == "tensorrt-rtx":
        raise UnsupportedOptionError(f"{name} has no DLA; it is for PCs")
    version = tuple(int(part) for part in library.version.split(".")[:3])
    if version < (11,):
        raise UnsupportedOptionError(
            f"{name} has a DLA only for weakly typed networks, which TensorRT 11 removed and TrimRT does not "
            "build; leave --dla-core out to use the GPU, or use TensorRT 11.4.1 or later (JetPack 7.2.2)"
        )
    if version < DLA_SINCE:
        raise UnsupportedOptionError(
            f"{name} has no DLA support; it came back with TensorRT 11.4.1 (JetPack 7.2.2, AGX Orin)"
        )
    if any(profile.min != profile.max for profile in options.profiles):
        raise UnsupportedOptionError("a DLA needs a fixed batch size; compile for one, e.g. --profile 8:8:8")
