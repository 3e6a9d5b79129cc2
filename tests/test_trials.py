"""The verdict on code that is broken on purpose is the code's, and not the machine's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = """
import os, subprocess
from pathlib import Path
from broken import double

def test_first():
    assert double(1) == 2

def test_second():
    assert double(2) == 4
"""
STANDS_STILL = """
def test_third():
    been_here = Path(__file__).with_suffix(".once")
    if not been_here.exists():
        been_here.touch()
        who = os.getppid()
        subprocess.run(["sh", "-c", f"kill -STOP {who}; sleep 1.5; kill -CONT {who}"], check=True)
        raise AssertionError("it came too late")
"""
TRY = """
import json, sys
from pathlib import Path
from tests.trials import Trial, tried

folder, codes = Path(sys.argv[1]), json.loads(sys.argv[2])
options = "-c", "/dev/null", "-p", "pytest_timeout", "-o", f"pythonpath={folder}"
tests = [*options, str(folder / "test_double.py")]
trials = [Trial(folder / "broken.py", code, tests) for code in codes]
found = {it.code: f"{it.verdict} {it.noticed_by.rpartition(':')[2]}" for it in tried(trials, folder, 2, 200)}
print(json.dumps(found))
"""


def verdicts(folder: Path, *codes: str, tests: str = TESTS) -> dict[str, str]:
    (folder / "broken.py").write_text("def double(x): return 2 * x")
    (folder / "test_double.py").write_text(tests)
    command = [sys.executable, "-c", TRY, str(folder), json.dumps(codes)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return json.loads(subprocess.check_output(command, cwd=ROOT, env=environment, text=True))


def test_a_breakage_is_noticed_by_a_test_or_by_having_no_end(tmp_path: Path) -> None:
    expected = {
        "def double(x): return x + x": "survived ",
        "def double(x): return x + 1": "noticed test_second",
        "def double(x): return 2 * x if x > 1 else exit()": "noticed test_first",
        "double = 1 / 0": "noticed nothing can be collected",
        "def double(x):\n    while True: pass": "endless ",
        "import threading\ndef double(x): threading.Event().wait()": "endless ",
    }
    assert verdicts(tmp_path, *expected) == expected


def test_a_test_that_fails_while_the_machine_stands_still_is_tried_again(tmp_path: Path) -> None:
    right = "def double(x): return x + x"
    assert verdicts(tmp_path, right, tests=TESTS + STANDS_STILL) == {right: "survived "}
