"""How much scratch memory the builder may use."""

from __future__ import annotations

from typing import Final

MIB: Final = 1 << 20
WITHOUT_GPU: Final = 1024 * MIB  # TensorRT-RTX on a machine that only compiles
SMALLEST: Final = 64 * MIB
LARGEST: Final = 4096 * MIB  # no layer of an image classifier gains from more


def default_workspace(free: int | None, *, shared: bool) -> int:
    """A workspace limit in bytes; TensorRT's own default is the whole device memory.

    Args:
        free: bytes of device memory that can be had; None without a GPU.
        shared: the memory is also the CPU's (Jetson), where taking all of it stops everything else.
    """
    if free is None:
        return WITHOUT_GPU
    return min(max(free // (4 if shared else 2), SMALLEST), LARGEST)
