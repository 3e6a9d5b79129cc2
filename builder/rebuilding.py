"""The command lines that make a package or a kit again, as its manifest records them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from builder.compile.targets.base import INT8_REST
from builder.compile.targets.tensorrt.options import TensorRTOptions
from builder.options import BuildOptions
from builder.prepare.options import PrepareOptions
from models.recipe import as_options
from runtime.manifest import Backend


def build_command(
    source: str | Path, output: Path, options: BuildOptions, precision: str, target: Backend
) -> str:
    """The `trimrt build` command for one package; options that have their default are left out."""
    words = ["trimrt", "build", str(source), "--precision", precision, "--target", target]
    words += ["--output", str(output)]
    default = BuildOptions()
    for name in ("min", "opt", "max"):
        words += _changed(f"--{name}-batch", getattr(options.batch, name), getattr(default.batch, name))
    words += _changed("--max-drop", *_percent(options.gate.max_drop, default.gate.max_drop))
    words += _changed("--min-agreement", *_percent(options.gate.min_agreement, default.gate.min_agreement))
    if precision == "best":
        words += _changed("--objective", options.objective, default.objective)
    words += ["--replace"] if options.replace else []
    return shlex.join([*words, *_tensorrt_words(options.tensorrt), *_prepare_words(options.prepare)])


def prepare_command(
    source: str | Path,
    output: Path,
    precisions: Sequence[str],
    targets: Sequence[Backend],
    options: PrepareOptions,
) -> str:
    """The `trimrt prepare` command for a kit; options that have their default are left out."""
    words = ["trimrt", "prepare", str(source), "--precision", ",".join(precisions)]
    if list(targets) != list(INT8_REST):
        words += [word for target in targets for word in ("--target", target)]
    return shlex.join([*words, "--output", str(output), *_prepare_words(options)])


def changed_options(options: PrepareOptions) -> list[str]:
    """Names of the options that do not have their default, as the command line writes them."""
    return [word for word in _prepare_words(options) if word.startswith("--")]


def _prepare_words(options: PrepareOptions) -> list[str]:
    return as_options(options, PrepareOptions())


def _tensorrt_words(options: TensorRTOptions) -> Iterator[str]:
    for profile in options.profiles:
        yield from ("--profile", f"{profile.min}:{profile.opt}:{profile.max}")
    lists: dict[str, list[str]] = {"profiles": [], "compute_capabilities": []}
    yield from as_options(options.model_copy(update=lists), TensorRTOptions())
    for capability in options.compute_capabilities:
        yield from ("--compute-capability", capability)


def _changed(flag: str, value: Any, default: Any) -> list[str]:
    return [] if value == default else [flag, str(value)]


def _percent(*shares: float) -> Iterator[str]:
    return (f"{100 * share:.10g}" for share in shares)
