"""Quantisation-aware training (QAT): a network fine-tuned with INT8 rounding in its forward pass.

The last resort where calibration alone fails the accuracy gate (Jacob et al. 2018,
https://arxiv.org/abs/1712.05877; Nagel et al. 2021, https://arxiv.org/abs/2106.08295, section 4).
NVIDIA ModelOpt's torch quantisers stand exactly where the exported graph has Q and DQ: at the input and
the weights of convolutions and linear layers, and at one input of a residual sum. Activation ranges are
calibrated and then fixed; weight scales follow the weights. Batch normalisation is folded into the
convolutions beforehand, as the engine has it.
"""

from __future__ import annotations

import operator
import tempfile
from pathlib import Path
from typing import Any, Final, cast

import torch
from rich.progress import Progress
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse, remove_dropout
from torchvision.ops import FrozenBatchNorm2d, stochastic_depth

from builder.prepare.export import OPSET, ExportError, quiet, trace_onnx
from builder.prepare.qdq import SMALLEST_SCALE
from builder.weights import LEVELS, quantise
from models.defaults import PHOTO_SIDE
from models.distillation import TeacherViews, label_views
from models.evaluation import normalise, to_float
from models.preprocessing import Pixels, Preprocessing
from models.recipe import Augmentation, Distillation, Training
from models.training import Images, derive_seed, reproducible, train
from runtime.manifest import Activation

DISTILLATION: Final = Distillation(alpha=0.1)  # weight agreement with the original above the labels

# Activations per tensor, their ranges calibrated and then fixed; weights per output channel, of the range
# that they have at each step. A maximum of rounded values is the rounded maximum: it may be taken in INT8.
_ACTIVATION: Final = {"num_bits": 8, "axis": None}
_WEIGHT: Final = {"num_bits": 8, "axis": 0, "type": "dynamic"}
_LAYERS: Final[list[dict[str, Any]]] = [
    {"quantizer_name": "*", "enable": False},
    *(
        {"parent_class": layer, "quantizer_name": f"*{tensor}_quantizer", "cfg": settings}
        for layer, tensor, settings in (
            ("nn.Conv2d", "input", _ACTIVATION),
            ("nn.Conv2d", "weight", _WEIGHT),
            ("nn.Linear", "input", _ACTIVATION),
            ("nn.Linear", "weight", _WEIGHT),
            ("nn.MaxPool2d", "input", _ACTIVATION),
        )
    ),
]
_SUMS: Final = (operator.add, operator.iadd, torch.add)
_BATCH: Final = 256


def require_modelopt() -> None:
    """Say so now if the library is missing, not after minutes of work.

    Raises:
        ExportError: it is.
    """
    try:
        with quiet():
            import modelopt.torch.quantization  # noqa: F401
    except ImportError as error:
        raise ExportError(f"--qat needs NVIDIA ModelOpt ({error}): pip install 'trimrt[compress]'") from error


def fine_tune(
    network: nn.Module,
    calibration: Pixels,
    images: Images,
    spec: Preprocessing,
    training: Training,
    limits: Augmentation,
    seed: int,
    progress: Progress,
) -> nn.Module:
    """A copy of `network` that rounds as an INT8 engine does, fine-tuned to compute what `network` computes.

    Its teacher is `network` itself, beside the labels: the accuracy gate asks for agreement with it.

    Args:
        network: takes normalised float32 NCHW images, gives logits; not changed.
        calibration: training images that fix the activation ranges, uint8 NHWC.
        images: all training images.
        spec: for mean and standard deviation.
        training: epochs, learning rate and so on.
        limits: how the training images are varied.
        seed: of shuffling and augmentation.
        progress: running.

    Raises:
        ExportError: a network whose forward pass torch.fx cannot follow.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if limits.flip is None:
        limits = limits.model_copy(update={"flip": spec.height >= PHOTO_SIDE})
    views_seed = derive_seed(seed, "qat views")
    with reproducible(torch.get_num_threads()), tempfile.TemporaryDirectory() as folder:
        network = network.to(device)
        quantised = _quantise(network, calibration, spec)
        logits = label_views(
            network.eval(),
            images.pixels,
            spec,
            limits,
            views=training.epochs,
            seed=views_seed,
            progress=progress,
            device=device,
        )
        train(
            quantised,
            images,
            images,  # for early stopping, of which there is none
            spec,
            TeacherViews(logits, torch.from_numpy(images.targets), limits, DISTILLATION, views_seed),
            training,
            name="qat",
            seed=derive_seed(seed, "qat"),
            state_file=Path(folder) / "state.pt",
            fingerprint="qat",
            progress=progress,
        )
        network.to("cpu")
    return quantised.to("cpu")


def export_quantised(
    quantised: nn.Module, spec: Preprocessing, path: Path, activation: Activation = "softmax"
) -> None:
    """Write the INT8 graph of a fine-tuned network, with the rest in FP32, in the form of `int8`'s.

    Args:
        quantised: from `fine_tune`; used up, for its quantisers become ONNX operators.
        spec: input size and normalisation, which become part of the graph.
        path: the `.onnx` file to write.
        activation: makes its probabilities.
    """
    import onnx
    from modelopt.torch.quantization.nn import TensorQuantizer

    for module in list(quantised.modules()):
        for name, quantizer in list(module.named_children()):
            if not isinstance(quantizer, TensorQuantizer):
                continue
            if not quantizer.is_enabled:
                operators: nn.Module = nn.Identity()
            elif name == "weight_quantizer":
                operators = _Weight(cast(Tensor, module.weight))
            elif quantizer.amax is None:
                operators = nn.Identity()  # no image came by: a layer that the forward pass does not call
            else:
                operators = _Activation(quantizer.amax)
            setattr(module, name, operators)
    onnx.save(trace_onnx(quantised, spec, activation), str(path))


def convert_rest_to_fp16(graph: Path, path: Path) -> None:
    """Write the INT8 graph in `graph` to `path`, with FP16 instead of FP32 wherever it is not quantised."""
    import onnx

    with quiet():
        from modelopt.onnx.autocast.convert import convert_to_f16

        model = convert_to_f16(onnx.load(str(graph)))
    onnx.save(model, str(path))


def _quantise(network: nn.Module, calibration: Pixels, spec: Preprocessing) -> nn.Module:
    """A copy of `network` with calibrated quantisers, without batch normalisation and dropout."""
    with quiet():
        import modelopt.torch.quantization as mtq
        from modelopt.torch.quantization.nn import TensorQuantizer

        try:
            model = fuse(remove_dropout(network.eval()))
        except (fx.proxy.TraceError, TypeError) as error:
            raise ExportError(
                f"--qat cannot follow this network's forward pass ({error}); it has to be free of branches "
                "that depend on the image"
            ) from error
        assert isinstance(model, fx.GraphModule)
        _freeze_batch_norms(model)
        shortcuts = _shortcuts(model)
        mtq.quantize(model, {"quant_cfg": _LAYERS, "algorithm": None})
        for number, (node, position) in enumerate(shortcuts):
            name = f"shortcut_quantizer_{number}"
            model.add_submodule(name, TensorQuantizer())  # of INT8, per tensor
            with model.graph.inserting_before(node):
                node.update_arg(position, model.graph.call_module(name, (node.args[position],)))
        model.recompile()
        device = next(model.parameters()).device

        def run(model: nn.Module) -> None:
            for start in range(0, len(calibration), _BATCH):
                model(normalise(to_float(calibration[start : start + _BATCH], device), spec))

        mtq.calibrate(model, "max", run)
    return model


def _freeze_batch_norms(model: fx.GraphModule) -> None:
    """Fix the statistics of those that do not follow a convolution, and so could not be folded into it."""
    for name, norm in list(model.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(norm.num_features, norm.eps)
            frozen.load_state_dict(norm.state_dict())
            model.add_submodule(name, frozen)


def _shortcuts(model: fx.GraphModule) -> list[tuple[fx.Node, int]]:
    """Residual sums, and which of their operands is not the convolution to fuse with the sum."""
    for node in model.graph.find_nodes(op="call_function", target=stochastic_depth):
        node.replace_all_uses_with(node.args[0])  # which it returns, outside of training
        model.graph.erase_node(node)
    modules = dict(model.named_modules())
    found = []
    for node in model.graph.nodes:
        if node.target in _SUMS and all(isinstance(operand, fx.Node) for operand in node.args):
            is_convolution = [
                isinstance(modules.get(str(operand.target)), nn.Conv2d) for operand in node.args[:2]
            ]
            if any(is_convolution):
                found.append((node, 1 if is_convolution[0] else 0))
    return found


class _Quantised(nn.Module):
    """A tensor's scales, as ONNX operators take them."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros_like(scale, dtype=torch.int8))

    def operator(self, name: str, values: Tensor, dtype: torch.dtype, axis: int = 1) -> Tensor:
        """QuantizeLinear or DequantizeLinear of `values`; `axis` matters for one scale a channel."""
        result: Tensor = torch.onnx.ops.symbolic(
            name,
            (values, self.scale, self.zero_point),
            {"axis": axis},
            dtype=dtype,
            shape=values.shape,
            version=OPSET,
        )
        return result


class _Activation(_Quantised):
    """An activation's quantiser."""

    def __init__(self, amax: Tensor) -> None:
        super().__init__((amax.detach().float() / LEVELS).clamp(min=SMALLEST_SCALE).reshape(()))

    def forward(self, values: Tensor) -> Tensor:
        """QuantizeLinear and DequantizeLinear."""
        return self.operator(
            "DequantizeLinear", self.operator("QuantizeLinear", values, torch.int8), torch.float32
        )


class _Weight(_Quantised):
    """A weight's quantiser: the INT8 values, and DequantizeLinear."""

    integers: Tensor

    def __init__(self, weight: Tensor) -> None:
        integers, scale = quantise(weight.detach().float().numpy(), smallest_scale=SMALLEST_SCALE)
        super().__init__(torch.from_numpy(scale.ravel()))
        self.register_buffer("integers", torch.from_numpy(integers))

    def forward(self, _: Tensor) -> Tensor:
        """The dequantised weight; the layer's own is ignored."""
        return self.operator("DequantizeLinear", self.integers, torch.float32, axis=0)
