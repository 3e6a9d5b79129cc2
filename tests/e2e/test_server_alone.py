"""The server works where none of the training libraries is installed."""

import subprocess
import sys

import pytest

ABSENT = (
    "torch",
    "torchvision",
    "modelopt",
    "onnx",
    "onnxruntime",
    "sklearn",
    "safetensors",
    "torch_pruning",
)

BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run_without(code: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(absent=(*ABSENT, *more)) + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "module", ["server", "server.app", "runtime.loading", "runtime.manifest", "models.card"]
)
def test_imports_without_training_libraries_and_runtimes(module: str) -> None:
    done = run_without(f"import {module}", "openvino", "tensorrt", "tensorrt_rtx", "pycuda", "cuda")
    assert done.returncode == 0, done.stderr


def test_the_block_is_real() -> None:
    assert "No module named 'torch'" in run_without("import torch").stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "from trimrt.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'numpy', 'fastapi', 'openvino', 'pydantic'} & set(sys.modules), 'too much'\n"
    )
    done = run_without(code)
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout


@pytest.mark.parametrize("target", ["auto", "tensorrt", "openvino"])
def test_building_without_any_runtime_says_what_is_missing_and_where_it_comes_from(target: str) -> None:
    code = f"from trimrt.cli import main; main(['build', 'kit', '--target', {target!r}])"
    done = run_without(code, "openvino", "tensorrt", "tensorrt_rtx")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    remedies = {"tensorrt": "it comes with JetPack", "openvino": "`pip install openvino`"}
    said = " ".join(done.stderr.split())
    for backend, remedy in remedies.items():
        assert (remedy in said) is (target in ("auto", backend)), said
