"""The command line without what only a workstation installs, as devices have it; machines without a GPU."""

from __future__ import annotations

import pytest

from runtime.cuda import CudaUnavailableError, open_cuda

# For `python -c`: none of these can be imported.
WITHOUT = """
import sys
for name in ("torch", "torchvision", "torch_pruning", "modelopt", "onnx", "onnxruntime", "sklearn", "pytest"):
    sys.modules[name] = None
from trimrt.cli import main
main()
"""


def _has_gpu() -> bool:
    try:
        open_cuda()
    except CudaUnavailableError:
        return False
    return True


without_gpu = pytest.mark.skipif(_has_gpu(), reason="this machine has a GPU")
