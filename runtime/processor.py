"""This machine's processor, as Linux describes it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Final

# The instruction sets that decide which kernels a graph is lowered to.
_FEATURES: Final = frozenset(
    (
        *("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
        *("amx_int8", "amx_bf16", "asimd", "asimddp", "asimdhp", "i8mm", "sve", "sve2", "bf16"),
    )
)


def processor() -> tuple[str | None, list[str]]:
    """This processor's name and those of its instruction sets that matter, as far as Linux says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None, []
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (info.get("flags") or info.get("Features") or "").split()
    return info.get("model name"), sorted(_FEATURES.intersection(flags))
