"""The command line's options for TensorRT's builder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from builder.compile.targets.tensorrt.options import TensorRTOptions
from runtime.manifest import BatchSizes

_Command = TypeVar("_Command", bound=Callable[..., Any])

_OPTIONS: Final = (
    click.option(
        "--profile",
        "profiles",
        multiple=True,
        metavar="MIN:OPT:MAX",
        help="Batch sizes to tune for, instead of --min-batch, --opt-batch and --max-batch; repeatable.",
    ),
    click.option(
        "--workspace-mib",
        type=click.IntRange(1),
        help="Scratch memory a layer may use.  [default: half of what is free, on Jetson a quarter]",
    ),
    click.option("--optimization-level", type=click.IntRange(0, 5), help="5 searches longest.  [default: 3]"),
    click.option(
        "--aux-streams",
        type=click.IntRange(0),
        help="Streams for parallel layers; 0 saves memory.  [default: auto]",
    ),
    click.option(
        "--profiling",
        type=click.Choice(["none", "layer_names_only", "detailed"]),
        help="What the plan tells profilers of its layers.  [default: layer_names_only]",
    ),
    click.option(
        "--tf32/--no-tf32", default=None, help="TF32 tensor cores for FP32 layers.  [default: tf32]"
    ),
    click.option("--sparsity/--no-sparsity", default=None, help="Use 2:4 sparse kernels where weights fit."),
    click.option("--version-compatible", is_flag=True, default=None, help="Loads on newer TensorRT too."),
    click.option(
        "--hardware-compatibility",
        type=click.Choice(["none", "ampere+", "same-compute-capability"]),
        help="Other GPUs that the plan is to run on; not on Jetson.",
    ),
    click.option(
        "--compute-capability",
        "compute_capabilities",
        multiple=True,
        metavar="X.Y",
        help="tensorrt-rtx: a GPU to compile for; repeatable.  [default: Ampere and later]",
    ),
    click.option(
        "--dla-core",
        type=click.IntRange(0),
        help="Run on this DLA core; the GPU runs what it cannot.",
    ),
)


def tensorrt_options(command: _Command) -> _Command:
    """Add the options to a command; `take_tensorrt_options` takes their values."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def take_tensorrt_options(values: dict[str, Any]) -> TensorRTOptions:
    """What was given on the command line, taken out of `values`.

    Raises:
        click.UsageError: values that contradict each other.
    """
    given = {name: values.pop(name) for name in TensorRTOptions.model_fields}
    try:
        profiles = [_batch_sizes(text) for text in given.pop("profiles")]
        return TensorRTOptions(
            profiles=profiles, **{name: value for name, value in given.items() if value not in (None, ())}
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _batch_sizes(text: str) -> BatchSizes:
    try:
        low, best, high = (int(part) for part in text.split(":"))
        return BatchSizes(min=low, opt=best, max=high)
    except ValueError:
        raise ValueError(f"--profile {text}: that is not MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX") from None
