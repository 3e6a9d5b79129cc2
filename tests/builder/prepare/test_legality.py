"""The legality checker: its rules, and that NVIDIA's own importer agrees with them."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import onnx
import pytest
from qdq_corpus import Case, corpus, residual_network

from builder.prepare.legality import IllegalGraphError, check_legality, require_legal

CASES = corpus()
VERDICTS = Path(__file__).with_name("rtx_verdicts.py")


def by_name(cases: list[Case]):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture(scope="session")
def rtx_accepts(tmp_path_factory) -> dict[str, bool]:
    """What TensorRT-RTX's parser and builder say of every case; a crash is a rejection."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install trimrt[rtx]")
    folder = tmp_path_factory.mktemp("corpus")
    files = []
    for number, case in enumerate(CASES):
        files.append(str(folder / f"{number}.onnx"))
        onnx.save(case.model, files[-1])
    accepted: list[bool] = []
    while len(accepted) < len(files):
        command = [sys.executable, str(VERDICTS), *files[len(accepted) :]]
        child = subprocess.run(command, capture_output=True, text=True, timeout=120)
        accepted += [json.loads(line)["accepted"] for line in child.stdout.splitlines()]
        crashed = child.returncode < 0
        assert crashed or child.returncode == 0, child.stderr
        accepted += [False] * crashed
    return dict(zip((case.name for case in CASES), accepted, strict=True))


@cache
def findings(name: str):
    return check_legality(next(case.model for case in CASES if case.name == name))


def test_the_corpus_is_large_and_has_both_kinds():
    broken = [case for case in CASES if case.verdict == "error"]
    assert len(CASES) >= 45
    assert len(broken) >= 25
    assert len({case.name for case in CASES}) == len(CASES)


@by_name([case for case in CASES if case.verdict == "clean"])
def test_a_legal_graph_gives_no_finding(case):
    assert findings(case.name).errors == []
    assert findings(case.name).warnings == []


@by_name([case for case in CASES if case.verdict == "warning"])
def test_a_slow_or_less_accurate_graph_gives_a_warning_only(case):
    assert findings(case.name).errors == []
    assert len(findings(case.name).warnings) == 1


@by_name([case for case in CASES if case.verdict == "error"])
def test_a_broken_graph_is_an_error(case):
    assert findings(case.name).errors


@by_name(CASES)
def test_tensorrts_own_importer_agrees(case, rtx_accepts):
    refused = bool(findings(case.name).errors)
    if case.stricter:
        assert (rtx_accepts[case.name], refused) == (True, True), f"the reason was: {case.stricter}"
    else:
        assert rtx_accepts[case.name] == (not refused)


@pytest.mark.parametrize(
    ("name", "node", "advice"),
    [
        ("activation zero point 3", "a1/q", "ActivationSymmetric"),
        ("INT32 bias", "bias/dq", "QuantizeBias=False"),
        ("UINT8 into Transpose", "layout", "put a Cast to float before it"),
        ("QLinearConv", "conv2", "QuantFormat.QDQ"),
        ("activation scale 0.0", "a1/q", "calibrate with images that vary"),
        ("no zero point", "a1/q", "write it as INT8 zeros"),
        ("weight scales on axis 1", "conv2/weight/dq", "axis 0"),
    ],
)
def test_the_message_names_the_node_and_the_remedy(name, node, advice):
    (message, *_) = [str(finding) for finding in findings(name).errors if finding.node.startswith(node)]
    assert advice in message


def test_require_legal_lists_every_error():
    broken = residual_network()
    broken.constant("a1/zero", 3, onnx.TensorProto.INT8)
    broken.constant("a2/scale", -1.0)
    with pytest.raises(IllegalGraphError, match=r"(?s)a1/q.*zero point.*a2/q.*positive"):
        require_legal(broken.model())


def test_require_legal_returns_the_warnings():
    (case,) = [case for case in CASES if case.name == "one scale for all weights"]
    assert "more accurate" in str(require_legal(case.model)[0])
