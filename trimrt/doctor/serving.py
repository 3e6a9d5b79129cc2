"""What `trimrt serve` would do with its settings: the same steps, short of serving."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import socket

from models.errors import TrimRTError
from runtime.manifest import EngineError, Manifest
from runtime.packages import find_package_folders
from server.registry import Load, Registry, resolve_engines
from server.settings import Settings
from server.telemetry import Telemetry
from trimrt.doctor.findings import Finding, State
from trimrt.extras import missing_extra
from trimrt.serve.command import import_extras
from trimrt.serve.listening import listen, listen_locally, reserve_grpc


def look_at_ports(settings: Settings) -> Iterator[Finding]:
    """Whether the server could listen where it is to."""
    yield _port(settings.port, "port", lambda: listen(settings))
    if settings.grpc_port is not None:
        yield _port(settings.grpc_port, "gRPC port", lambda: reserve_grpc(settings))
    if (path := settings.uds) is not None:
        try:
            with listen_locally(path):
                yield Finding(subject="Unix socket", state="ok", found=f"{path} can be had")
        except TrimRTError as error:
            yield Finding(subject="Unix socket", state="stop", found=str(error))


def look_at_extras(settings: Settings) -> Iterator[Finding]:
    """Whether what the settings need besides is installed."""
    try:
        import_extras(settings)
    except ModuleNotFoundError as error:
        yield Finding(subject="extras", state="stop", found=missing_extra(error) or str(error))


def look_at_engines(settings: Settings) -> Iterator[Finding]:
    """Each engine that would be served or could be: it is loaded as the server loads it, and freed."""
    folders: list[Path] = []
    try:
        folders = resolve_engines(settings)
    except TrimRTError as error:
        yield Finding(subject="engines", state="stop", found=str(error))
    else:
        names = ", ".join(map(str, folders))
        found = f"to be served: {names}" if names else f"none yet: --watch looks at {settings.engine_dir}"
        yield Finding(subject="engines", state="ok" if names else "note", found=found)
    for folder in folders:
        yield _engine(settings, folder, refused="stop")
    for folder in _others(settings, folders):
        yield _engine(settings, folder, refused="note")


def _port(number: int, subject: str, listen: Callable[[], socket]) -> Finding:
    try:
        listen().close()
    except TrimRTError as error:
        return Finding(subject=subject, state="stop", found=str(error))
    found = f"{number} is free" if number else "a free one is taken"
    return Finding(subject=subject, state="ok", found=found)


def _engine(settings: Settings, folder: Path, refused: State) -> Finding:
    subject = f"engine {folder.name}"
    try:
        manifest = asyncio.run(_load(settings, folder))
    except TrimRTError as error:
        return Finding(subject=subject, state=refused, found=str(error))
    found = f"loads: {manifest.name} version {manifest.version}, {manifest.precision}, {manifest.backend}"
    return Finding(subject=subject, state="ok", found=found)


async def _load(settings: Settings, folder: Path) -> Manifest:
    registry = Registry(settings, Telemetry())
    try:
        prepared = await registry.prepare(Load(folder))
        await prepared.discard()
    finally:
        await registry.close()
    return prepared.scheduler.engine.manifest


def _others(settings: Settings, folders: list[Path]) -> list[Path]:
    """The packages in the engine directory that are not to be served."""
    served = {folder.absolute() for folder in folders}
    try:
        found = find_package_folders(settings.engine_dir)
    except EngineError:  # which the choice of engines has told
        return []
    return [folder for folder in found if folder.absolute() not in served]
