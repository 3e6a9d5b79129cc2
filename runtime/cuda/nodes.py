"""The device files that CUDA opens, and which of them this process may not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

# Those of a Jetson, whose CUDA opens the render node too since JetPack 6, and those of PCs.
_PATTERNS: Final = (
    "nvmap",
    "nvhost-*",
    "nvgpu/*/*",
    "dri/renderD*",
    "nvidiactl",
    "nvidia[0-9]*",
    "nvidia-uvm",
)
_FOLDERS: Final = ("dri", "nvgpu")


def device_nodes(root: Path = Path("/")) -> list[Path]:
    """The device files of NVIDIA GPUs below `root`/dev; none where there is no such GPU.

    A render node alone is any maker's GPU. A folder that this process may not look into stands for its files.
    """
    named = [path for pattern in _PATTERNS for path in sorted((root / "dev").glob(pattern))]
    found = [path for path in named if os.access(path, os.F_OK)]  # some containers have links to nowhere
    folders = [root / "dev" / name for name in _FOLDERS]
    found += [path for path in folders if path.is_dir() and not os.access(path, os.R_OK | os.X_OK)]
    return found if any(path.name.startswith("nv") or "nvgpu" in path.parts for path in found) else []


def closed_nodes(root: Path = Path("/")) -> list[str]:
    """Those that this process may not open, each with the group that may: `/dev/nvmap (group video, 44)`."""
    return [
        f"/{path.relative_to(root)} (group {_group(path)})"
        for path in device_nodes(root)
        if not os.access(path, os.R_OK | os.W_OK)
    ]


def advice(root: Path = Path("/")) -> str:
    """What to do about device files that this process may not open; empty where there are none."""
    closed = closed_nodes(root)
    if not closed:
        return ""
    return (
        f" This process may not open {', '.join(closed)}: add the user to these groups (containers: "
        "--group-add with the number, since names differ there)"
    )


def _group(path: Path) -> str:
    import grp  # Unix alone has it

    number = path.stat().st_gid
    try:
        return f"{grp.getgrgid(number).gr_name}, {number}"
    except KeyError:
        return str(number)
