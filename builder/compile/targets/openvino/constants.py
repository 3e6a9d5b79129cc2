"""The values of those parts of an OpenVINO graph that depend on no input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino
from numpy.typing import NDArray

from runtime.openvino import CONFIGURATION


def constants(core: openvino.Core, outputs: Sequence[openvino.Output]) -> list[NDArray[np.float64]]:
    """The value of each output, as float64."""
    if not outputs:
        return []
    results = core.compile_model(openvino.Model(list(outputs), []), "CPU", CONFIGURATION)([])
    return [np.asarray(results[place], np.float64) for place in range(len(outputs))]
