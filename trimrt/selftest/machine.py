"""What a test's figures depend on: the machine, as far as it tells."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from models.cores import cores
from runtime.cuda.nodes import closed_nodes
from runtime.jetson import available_memory, jetson_linux, jetson_model, power
from runtime.processor import processor
from trimrt import __version__


def machine(root: Path = Path("/")) -> dict[str, str]:
    """Facts by name, in words.

    Args:
        root: where `proc`, `sys`, `etc`, `var` and `dev` are found.
    """
    facts = {
        "TrimRT": f"{__version__}, Python {sys.version.split()[0]}, {platform.system()} {platform.release()}",
        "processor": f"{processor()[0] or platform.machine()}, {cores()} cores for this process",
    }
    if (model := jetson_model(root)) is not None:
        facts["board"] = f"{model}, Jetson Linux {jetson_linux(root) or 'of an unknown release'}"
        facts["power"] = str(power(root))
    if (free := available_memory(root)) is not None:
        facts["memory"] = f"{free / 2**30:.1f} GiB available"
    if closed := closed_nodes(root):
        facts["may not open"] = ", ".join(closed)
    return facts
