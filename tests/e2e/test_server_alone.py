"""The server works where none of the training libraries is installed."""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import tomllib
from PIL import Image
from tiny_engine import write_package

from trimrt.extras import EXTRA_OF

ROOT = Path(__file__).parents[2]
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


def run_without(code: str, *more: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(absent=(*ABSENT, *more)) + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
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


@pytest.mark.parametrize(
    ("target", "remedy"),
    [
        ("auto", "`pip install openvino`"),
        ("openvino", "`pip install openvino`"),
        ("tensorrt", "it comes with JetPack"),
    ],
)
def test_building_without_any_runtime_says_what_is_missing_and_where_it_comes_from(
    target: str, remedy: str
) -> None:
    code = f"from trimrt.cli import main; main(['build', 'digits-resnet18', '--target', {target!r}])"
    done = run_without(code, "openvino", "tensorrt", "tensorrt_rtx")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert remedy in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an engine, photographs, an ONNX file, and a file that is called Parquet."""
    folder = tmp_path_factory.mktemp("place")
    package = write_package(folder / "engines")
    for name in ("model.onnx", "../../model.onnx"):
        (package / name).write_bytes((package / "source.onnx").read_bytes())
    for label in ("cat", "dog"):
        (folder / "photos" / label).mkdir(parents=True)
        Image.new("RGB", (48, 48)).save(folder / "photos" / label / "one.png")
    (folder / "photos.parquet").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        ("compress digits", "compress"),
        ("compress photos", "compress"),
        ("prepare digits-resnet18 -o kit", "compress"),
        ("build digits-resnet18", "compress"),
        ("build model.onnx --data photos --preprocess imagenet", "compress"),
        ("build torchvision:resnet18 --weights pretrained --data photos", "compress"),
        ("demo", "compress"),
        ("report engines", "report"),
        ("loadtest --images photos", "loadtest"),
        ("serve --engine tiny --port 0 --grpc-port 0", "grpc"),
        ("serve --engine tiny --port 0 --otlp-endpoint http://127.0.0.1:4318", "otel"),
        ("predict photos --engine tiny --out labels.csv", "batch"),
        ("predict photos.parquet --engine tiny --out labels.parquet", "batch"),
        ("cluster config tiny", "cluster"),
    ],
)
def test_what_an_extra_brings_is_told_in_one_line(place: Path, arguments: str, extra: str) -> None:
    code = f"from trimrt.cli import main; main({arguments.split()!r}, prog_name='trimrt')"
    before = sorted(place.rglob("*"))

    done = run_without(code, *EXTRA_OF, cwd=place)

    assert done.returncode == 1, done.stdout + done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line and not line.startswith("target: ")]
    assert said.startswith("Error: ")
    assert f"pip install 'trimrt[{extra}]'" in said
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments", ["inspect tiny", "bench tiny --seconds 0.01 --warm-up 0", "export-triton tiny repository"]
)
def test_other_commands_need_none(place: Path, arguments: str) -> None:
    code = f"from trimrt.cli import main; main({arguments.split()!r}, prog_name='trimrt')"
    done = run_without(code, *EXTRA_OF, cwd=place)
    assert done.returncode == 0, done.stderr


def modules_of_extras() -> Iterator[str]:
    """The modules of the distributions that the extras name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {
        re.split(r"[^A-Za-z0-9_.-]|[<>=~]", requirement)[0].lower().replace("_", "-")
        for extra, requirements in project["optional-dependencies"].items()
        if extra not in ("benchmark", "dev")
        for requirement in requirements
    }
    for module, distributions in packages_distributions().items():
        if any(name.lower().replace("_", "-") in named - {"trimrt"} for name in distributions):
            yield module


def test_every_module_of_an_extra_that_is_imported_has_its_extra() -> None:
    folders = ("models", "runtime", "builder", "server", "trimrt")
    ours = "".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    imported = [name for name in modules_of_extras() if re.search(rf"\b(import|from) {name}\b", ours)]
    assert len(imported) > 10
    assert set(imported) - {"tensorrt_rtx"} <= set(EXTRA_OF)  # a backend, of which runtime/ speaks
