"""What `trimrt bench --tune` found out about an engine, and its use when the engine is loaded."""

from __future__ import annotations

import logging
import platform
from dataclasses import replace
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.engine import Options, cores
from runtime.processor import processor

log = logging.getLogger("trimrt.engines")

TUNING_NAME: Final = "tuning.json"


class Setting(BaseModel):
    """How an engine uses the machine; see `runtime.engine.Options`."""

    model_config = ConfigDict(frozen=True)

    slots: int = Field(ge=1)
    threads: int = Field(ge=1)
    batch: int = Field(ge=1, description="most images in one batch")
    pinning: bool = False


class Trial(BaseModel):
    """What a setting gave."""

    setting: Setting
    throughput: float = Field(description="images a second")


class Tuning(BaseModel):
    """`tuning.json`: the best setting, and where it was found."""

    processor: str
    cores: int
    setting: Setting
    trials: list[Trial]


def this_processor() -> str:
    """The processor's name, as far as the system says."""
    return processor()[0] or platform.machine()


def with_tuning(folder: Path, options: Options) -> Options:
    """`options`, completed from the package's tuning if it was made on the same kind of machine.

    A tuning that is damaged or from another machine is logged and ignored.
    """
    path = folder / TUNING_NAME
    if options.slots or options.threads or not path.is_file():
        return options
    try:
        tuning = Tuning.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        log.warning("%s cannot be read: %s; `trimrt bench --tune` makes a new one", path, error)
        return options
    if (tuning.processor, tuning.cores) != (this_processor(), cores()):
        log.info("%s is not used: it was made on another machine (`trimrt bench --tune`)", path)
        return options
    best = tuning.setting
    return replace(
        options,
        slots=best.slots,
        threads=best.threads,
        batch=options.batch or best.batch,
        pinning=best.pinning,
    )
