"""This machine's processor, as Linux describes it."""

from __future__ import annotations

import os
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


# With one of them, x86 kernels add the products of INT8 in 32 bits.
WIDE_SUMS: Final = frozenset(("avx512_vnni", "avx_vnni", "amx_int8"))

# What oneDNN leaves to use at each level of the variable, beside what lower levels do not have either.
# https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
_AVX2: Final = frozenset(("avx2", "fma"))
_AVX512: Final = _AVX2 | {"avx512f", "avx512bw"}
_VNNI: Final = _AVX512 | {"avx512_vnni"}
_BF16: Final = _VNNI | {"avx512_bf16"}
_FP16: Final = _BF16 | {"avx512_fp16", "avx_vnni"}
_LEVELS: Final = {
    "SSE41": frozenset[str](),
    "AVX": frozenset[str](),
    "AVX2": _AVX2,
    "AVX2_VNNI": _AVX2 | {"avx_vnni"},
    "AVX2_VNNI_2": _AVX2 | {"avx_vnni"},
    "AVX512_CORE": _AVX512,
    "AVX512_CORE_VNNI": _VNNI,
    "AVX512_CORE_BF16": _BF16,
    "AVX512_CORE_FP16": _FP16,
    "AVX10_1_512": _FP16,
}
_VARIABLES: Final = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def processor() -> tuple[str | None, list[str]]:
    """This processor's name, and those of its instruction sets that matter and that kernels may use.

    The latter are as far as Linux says, and as far as ONEDNN_MAX_CPU_ISA does not restrict OpenVINO to fewer.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None, []
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (info.get("flags") or info.get("Features") or "").split()
    used = _FEATURES.intersection(flags) & _LEVELS.get(restriction().upper(), _FEATURES)
    return info.get("model name"), sorted(used)


def restriction() -> str:
    """What ONEDNN_MAX_CPU_ISA restricts OpenVINO to; empty where it is not set."""
    return next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), "")
