"""ONNX to a serialised engine: one strongly typed path from TensorRT 10.3 to 11, and TensorRT-RTX.

Precision is a matter of the graph (FP16 by casts, INT8 by Q and DQ), so no precision flag, dynamic
range or calibrator is used; TensorRT 11 has none of them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.compile.targets.base import CompileError
from builder.compile.targets.tensorrt.options import (
    TensorRTOptions,
    UnsupportedOptionError,
    compute_capabilities,
    hardware_level,
    refuse_unsupported,
)
from builder.compile.targets.tensorrt.progress import BuildListener, Monitoring
from builder.compile.targets.tensorrt.timing_cache import attach_timing_cache, save_timing_cache
from runtime.manifest import BatchSizes
from runtime.tensorrt.layers import LIST_BEGINS, parse_layers, write_layers
from runtime.tensorrt.library import TensorRTLibrary, errors_in

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass(frozen=True)
class BuildResources:
    """What a build may use of the machine.

    Attributes:
        workspace: bytes of scratch memory for one layer, from `memory.default_workspace` or the user.
        timing_cache: file to read and update; None for TensorRT-RTX, which has none.
        log: file for TensorRT's messages.
        layers: folder for `layers.json`.
        jetson: whether this is one.
    """

    workspace: int
    timing_cache: Path | None = None
    log: Path | None = None
    layers: Path | None = None
    jetson: bool = False


def build_engine(
    library: TensorRTLibrary,
    onnx_path: Path,
    options: TensorRTOptions,
    resources: BuildResources,
    listener: BuildListener | None = None,
) -> bytes:
    """Compile a graph.

    Ctrl-C ends the build at TensorRT's next step; the builder runs in a thread of its own for that,
    since Python handles signals only while the main thread runs Python.

    Args:
        library: the TensorRT to build with.
        onnx_path: a graph with one input whose only dynamic dimension, if any, is the first.
        options: what to build.
        resources: what the build may use.
        listener: follows the build's phases.

    Returns:
        The plan.

    Raises:
        UnsupportedOptionError: this TensorRT or device cannot do what the options ask.
        CompileError: TensorRT rejected the graph, a profile, or failed to build.
        KeyboardInterrupt: Ctrl-C ended it; so does any exception of the listener's.
    """
    refuse_unsupported(library, options, jetson=resources.jetson)
    monitoring = Monitoring(listener)
    with library.log.capture(resources.log) as lines, ThreadPoolExecutor(1, "tensorrt-build") as thread:
        build = thread.submit(_build, library, onnx_path, options, resources, monitoring)
        try:
            plan = build.result()
        except KeyboardInterrupt:
            monitoring.cancel()
            raise
        except UnsupportedOptionError:
            raise
        except CompileError as error:
            raise CompileError(f"{library.backend} {library.version}: {error}".rstrip()) from error
    if monitoring.failure is not None:
        raise monitoring.failure
    if plan is None:
        reason = errors_in(lines) or "TensorRT gave no reason"
        raise CompileError(f"{library.backend} {library.version} did not build the engine:\n{reason}")
    if resources.layers is not None:
        listed = next((line.message for line in lines if line.message.startswith(LIST_BEGINS)), "")
        if layers := parse_layers(listed) or parse_layers(_inspected(library, plan)):
            write_layers(resources.layers, layers)
    return plan


def _inspected(library: TensorRTLibrary, plan: bytes) -> str:
    """What the engine inspector lists, for a builder that does not say; nothing without a GPU."""
    with library.log.capture():
        runtime: trt.Runtime | None = library.runtime()
        engine: trt.ICudaEngine | None = None if runtime is None else runtime.deserialize_cuda_engine(plan)
        inspector: trt.EngineInspector | None = None if engine is None else engine.create_engine_inspector()
        if inspector is None:
            return ""
        return str(inspector.get_engine_information(library.trt.LayerInformationFormat.ONELINE))


def _build(
    library: TensorRTLibrary,
    onnx_path: Path,
    options: TensorRTOptions,
    resources: BuildResources,
    monitoring: Monitoring,
) -> bytes | None:
    builder: trt.Builder | None = library.builder()
    if builder is None:
        return None
    # TensorRT 11 knows no other kind and ignores the flag; 10 needs it. Its number differs between them.
    network = builder.create_network(1 << int(library.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    config = builder.create_builder_config()
    parser = library.trt.OnnxParser(network, library.logger)
    if options.dla_core is not None:
        _use_dla(library, builder, config, parser, options)
    if not parser.parse_from_file(str(onnx_path)):
        raise CompileError(f"the graph was rejected: {_parser_errors(parser)}")

    _configure(library, config, options, resources)
    _add_profiles(builder, network, config, options.profiles)
    config.progress_monitor = monitoring.monitor(library.trt)
    cache = attach_timing_cache(config, resources.timing_cache) if resources.timing_cache else None
    plan = builder.build_serialized_network(network, config)
    if plan is not None and cache is not None and resources.timing_cache is not None:
        save_timing_cache(config, resources.timing_cache)
    return None if plan is None else bytes(plan)


def _parser_errors(parser: trt.OnnxParser) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(
        f"{error.node_name() or 'graph'} ({error.node_operator() or 'parser'}): {error.desc()}"
        for error in errors
    )


def _configure(
    library: TensorRTLibrary, config: trt.IBuilderConfig, options: TensorRTOptions, resources: BuildResources
) -> None:
    trt, name = library.trt, f"{library.backend} {library.version}"
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, resources.workspace)
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = {
        "none": trt.ProfilingVerbosity.NONE,
        "layer_names_only": trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
        "detailed": trt.ProfilingVerbosity.DETAILED,
    }[options.profiling]
    if options.aux_streams is not None:
        config.max_aux_streams = options.aux_streams
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.sparsity:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatibility != "none":
        config.hardware_compatibility_level = hardware_level(trt, options.hardware_compatibility, name)
    if options.compute_capabilities:
        _target_gpus(config, compute_capabilities(trt, options.compute_capabilities, name))


def _target_gpus(config: trt.IBuilderConfig, capabilities: list[Any]) -> None:
    if not (hasattr(config, "num_compute_capabilities") and hasattr(config, "set_compute_capability")):
        raise UnsupportedOptionError("--compute-capability is an option of tensorrt-rtx")
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        if not config.set_compute_capability(capability, index):
            raise CompileError(f"compute capability {capability.name} was refused")


def _add_profiles(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    profiles: list[BatchSizes],
) -> None:
    if network.num_inputs != 1:
        raise CompileError(f"the graph has {network.num_inputs} inputs; a classifier of images has one")
    tensor = network.get_input(0)
    batch, *rest = tensor.shape
    if min(rest) < 0:
        raise CompileError(
            f"only the first dimension of {tensor.name} may be dynamic, not all of {tensor.shape}"
        )
    if batch >= 0:  # fixed in the graph: there is nothing to choose, and no profile
        if profiles != [BatchSizes(min=batch, opt=batch, max=batch)]:
            raise CompileError(
                f"the graph's batch size is fixed at {batch}; ask for --profile {batch}:{batch}:{batch}"
            )
        return
    for sizes in profiles:
        profile = builder.create_optimization_profile()
        # Neither raises nor returns anything, whatever it is given; add_optimization_profile tells.
        profile.set_shape(tensor.name, (sizes.min, *rest), (sizes.opt, *rest), (sizes.max, *rest))
        if config.add_optimization_profile(profile) < 0:
            raise CompileError(f"the optimisation profile {sizes.min}..{sizes.opt}..{sizes.max} was refused")


def _use_dla(
    library: TensorRTLibrary,
    builder: trt.Builder,
    config: trt.IBuilderConfig,
    parser: trt.OnnxParser,
    options: TensorRTOptions,
) -> None:
    trt, cores = library.trt, builder.num_DLA_cores
    if options.dla_core is None or options.dla_core >= cores:  # TensorRT itself would silently use the GPU
        raise UnsupportedOptionError(
            f"--dla-core {options.dla_core}: this device has {cores} DLA cores (Orin Nano and Thor have none)"
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = options.dla_core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    if hasattr(trt.OnnxParserFlag, "ADJUST_FOR_DLA") and hasattr(parser, "set_builder_config"):
        parser.set_builder_config(config)
        parser.set_flag(trt.OnnxParserFlag.ADJUST_FOR_DLA)
