"""Which extra of TrimRT's brings a module: the server alone needs none of them."""

from __future__ import annotations

from typing import Final

_MODULES: Final = {
    "batch": ("pyarrow",),
    "cluster": ("ray", "yaml"),
    "compress": (
        *("lief", "ml_dtypes", "modelopt", "onnx", "onnx_graphsurgeon", "onnxruntime", "onnxscript"),
        *("onnxslim", "polygraphy", "safetensors", "torch", "torch_pruning", "torchvision"),
    ),
    "cuda": ("cuda",),
    "grpc": ("google", "grpc"),
    "heif": ("pillow_heif",),
    "loadtest": ("gevent", "geventhttpclient", "httpx", "locust"),
    "nvml": ("pynvml",),
    "otel": ("opentelemetry",),
    "pycuda": ("pycuda",),
    "report": ("jinja2", "matplotlib", "sklearn"),
    "timm": ("timm",),
    "watch": ("websockets",),
}
EXTRA_OF: Final = {module: extra for extra, modules in _MODULES.items() for module in modules}


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install; None where it is no extra's module that was not found."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRA_OF:
        return None
    return f"this needs {module}, which is not installed: pip install 'trimrt[{EXTRA_OF[module]}]'"
