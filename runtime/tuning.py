"""What `trimrt bench --tune` found out about an engine, and its use when the engine is loaded."""

from __future__ import annotations

import logging
import platform
from dataclasses import replace
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.cores import cores
from runtime.engine import Options
from runtime.manifest import BatchSizes
from runtime.processor import processor
from runtime.reading import TEXT_BYTES
from runtime.signatures import SignatureError

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


def most_slots() -> int:
    """The most slots or threads that tuning tries here: one more than there are cores."""
    return cores() + 1


def this_processor() -> str:
    """The processor's name, as far as the system says."""
    return processor()[0] or platform.machine()


def with_tuning(folder: Path, batch: BatchSizes, options: Options) -> Options:
    """`options`, completed from the package's tuning if it was made on the same kind of machine.

    A tuning that is damaged, or of another machine or package, is logged and ignored.

    Args:
        folder: the package's.
        batch: the sizes that its engine takes.
        options: those that are given win.
    """
    path = folder / TUNING_NAME
    if options.slots or options.threads:
        return options
    try:
        tuning = Tuning.model_validate_json(options.trust.read(path, TEXT_BYTES))
    except FileNotFoundError:
        return options
    except (OSError, SignatureError, ValidationError) as error:
        log.warning("%s cannot be read: %s; `trimrt bench --tune` makes a new one", path, error)
        return options
    if (tuning.processor, tuning.cores) != (this_processor(), cores()):
        log.info("%s is not used: it was made on another machine (`trimrt bench --tune`)", path)
        return options
    best = tuning.setting
    if max(best.slots, best.threads) > most_slots() or not batch.min <= best.batch <= batch.max:
        log.warning("%s is not used: it was not made for this package (`trimrt bench --tune`)", path)
        return options
    return replace(
        options,
        slots=best.slots,
        threads=best.threads,
        batch=options.batch or best.batch,
        pinning=best.pinning,
    )
