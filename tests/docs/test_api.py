"""docs/api.md: its examples run, and its claims about imports hold."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import builder
import models
import runtime
from models.datasets import DataSplit
from runtime.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/api.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute on two idle cores
def test_the_examples_run_one_after_another(
    data: DataSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has its own names; files of one are there for the next."""
    monkeypatch.chdir(tmp_path)
    for image, target in list(zip(data.train.paths, data.train.targets, strict=True))[::8]:
        folder = Path("photos") / data.train.labels[target]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / image.name).symlink_to(image)
    for number, example in enumerate(EXAMPLES):
        exec(compile(example, f"docs/api.md, example {number}", "exec"), {"__name__": "__main__"})

    printed = capsys.readouterr().out
    assert "the last checkpoint: runs/photos/pruned" in printed
    assert "published engines/digits-resnet18-fp16-openvino" in printed
    labels = re.findall(r"^\S+\.png (\d) ", printed, re.MULTILINE)
    assert labels == [data.test.labels[target] for target in data.test.targets[:4]]
    for precision in ("fp32", "fp16", "int8"):
        assert read_manifest(tmp_path / f"engines/digits-resnet18-{precision}-openvino").evidence is not None


@pytest.mark.parametrize("package", [models, builder, runtime], ids=lambda package: package.__name__)
def test_every_public_name_can_be_imported(package) -> None:
    for name in package.__all__:
        assert getattr(package, name).__doc__, f"{package.__name__}.{name} is not documented"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_importing_the_packages_loads_no_library() -> None:
    program = (
        "import sys, models, builder, runtime\n"
        "print(*sorted({'torch', 'onnx', 'openvino', 'numpy', 'cv2'} & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == ""


def test_a_build_needs_torch_onnx_and_openvino_only_when_it_runs() -> None:
    program = (
        "import sys; from builder import build, make_kit, BuildOptions; BuildOptions(); "
        "print(*sorted({'torch', 'onnx', 'openvino'} & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == ""


def test_the_page_names_what_the_packages_offer() -> None:
    functions = {"models.compress", "models.make_recipe", "builder.build", "builder.make_kit"}
    functions |= {"builder.measure_layers", "builder.open_teacher"}
    assert functions | {"runtime.load_engine"} == set(re.findall(r"^\| `([a-z_.]+)` \|", PAGE, re.MULTILINE))
