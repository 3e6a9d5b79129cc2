"""Find TensorRT or TensorRT-RTX, and keep the one logger a process may have.

The two have the same Python API under different module names. TensorRT comes with JetPack or
NVIDIA's packages, TensorRT-RTX with `pip install trimrt[rtx]`.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from runtime.manifest import EngineError
from runtime.tensorrt.layers import LIST_BEGINS

if TYPE_CHECKING:
    import tensorrt as trt

TensorRTBackend = Literal["tensorrt", "tensorrt-rtx"]

MODULES: Final[dict[TensorRTBackend, str]] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
REMEDIES: Final[dict[TensorRTBackend, str]] = {
    "tensorrt": "it comes with JetPack (a virtual environment sees it with --system-site-packages, a "
    "container with --runtime nvidia; libnvdla_compiler.so is of the host's package nvidia-l4t-dla-compiler) "
    "or with NVIDIA's TensorRT packages (on x86 `pip install trimrt[tensorrt]`)",
    "tensorrt-rtx": "`pip install trimrt[rtx]` installs it on x86-64 Linux",
}

logger = logging.getLogger("trimrt.tensorrt")


class TensorRTUnavailableError(EngineError):
    """No usable TensorRT on this machine; the message says what was tried and what to do."""


class LogLine(NamedTuple):
    """One message of TensorRT's: severity as TensorRT spells it (`ERROR`, `WARNING`, `INFO`...)."""

    severity: str
    message: str


@dataclass
class TensorRTLog:
    """TensorRT's messages: captured if someone captures them, else sent to Python's logging.

    TensorRT calls from threads of its own, also while several captures are open.
    """

    _captures: list[list[LogLine]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, severity: str, message: str) -> None:
        """Take one message; called by TensorRT."""
        with self._lock:
            for capture in self._captures:
                capture.append(LogLine(severity, message))
            captured = bool(self._captures)
        if not captured and severity in ("INTERNAL_ERROR", "ERROR", "WARNING"):
            logger.log(logging.WARNING if severity == "WARNING" else logging.ERROR, message)

    @contextmanager
    def capture(self, file: Path | None = None) -> Iterator[list[LogLine]]:
        """Collect the messages of a `with` block, and write them to `file` at its end."""
        lines: list[LogLine] = []
        with self._lock:
            self._captures.append(lines)
        try:
            yield lines
        finally:
            with self._lock:
                self._captures = [capture for capture in self._captures if capture is not lines]
            if file is not None:
                file.write_text("".join(f"{line.severity}: {line.message}\n" for line in lines), "utf-8")


def errors_in(lines: list[LogLine]) -> str:
    """The error messages, one a line, without what only says that the machine has no GPU."""
    errors = [line.message.strip() for line in lines if "ERROR" in line.severity]
    telling = [message for message in errors if "cudaError 35" not in message]
    return "\n".join(dict.fromkeys(telling or errors))


@dataclass(frozen=True)
class TensorRTLibrary:
    """An imported TensorRT.

    Attributes:
        trt: the module, `tensorrt` or `tensorrt_rtx`.
        backend: which of the two it is.
        version: e.g. `10.3.0`.
        log: where its messages go.
        logger: the `trt.ILogger` that feeds `log`. TensorRT ignores a second one in a process.
    """

    trt: Any
    backend: TensorRTBackend
    version: str
    log: TensorRTLog
    logger: Any

    def builder(self) -> trt.Builder | None:
        """What compiles graphs; None where TensorRT makes none, as without a GPU: its messages tell why."""
        try:
            return self.trt.Builder(self.logger)
        except TypeError:  # what the bindings make of a null pointer
            return None

    def runtime(self) -> trt.Runtime | None:
        """What loads plans; None where TensorRT makes none, as with too old a driver."""
        try:
            return self.trt.Runtime(self.logger)
        except TypeError:  # as above
            return None


@cache
def load_tensorrt(backend: TensorRTBackend) -> TensorRTLibrary:
    """The TensorRT of that kind.

    Raises:
        TensorRTUnavailableError: it cannot be imported here.
    """
    name = MODULES[backend]
    try:
        trt = importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: the bindings are there, libnvinfer is not
        raise TensorRTUnavailableError(
            f"{backend} cannot be imported: {error}; {REMEDIES[backend]}"
        ) from error
    if not hasattr(trt, "Builder"):
        raise TensorRTUnavailableError(f"the module {name} ({trt}) is not TensorRT; {REMEDIES[backend]}")
    log = TensorRTLog()
    return TensorRTLibrary(trt, backend, str(trt.__version__), log, _logger_for(trt, log))


def find_tensorrt() -> TensorRTLibrary:
    """TensorRT where there is one, else TensorRT-RTX.

    Raises:
        TensorRTUnavailableError: neither can be imported; the message says why of both.
    """
    try:
        return load_tensorrt("tensorrt")
    except TensorRTUnavailableError as first:
        try:
            return load_tensorrt("tensorrt-rtx")
        except TensorRTUnavailableError as second:
            raise TensorRTUnavailableError(f"{first}\n{second}") from second


def _logger_for(trt: Any, log: TensorRTLog) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is known only now
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            # Hundreds of thousands of lines in one build, of which one lists the engine's layers.
            if severity != trt.ILogger.VERBOSE or msg.startswith(LIST_BEGINS):
                log.write(severity.name, msg)

    return Logger()
