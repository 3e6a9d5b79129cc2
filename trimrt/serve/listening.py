"""The sockets that the server listens on."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from models.errors import TrimRTError
from models.files import BusyError, locked
from server.settings import Settings

_LOCAL_MODE: Final = 0o660  # who may connect to a Unix socket: those who may write to it
_PROBE_S: Final = 1.0


class CannotListenError(TrimRTError):
    """The address and port, or the path, cannot be had."""


def listen(settings: Settings) -> socket.socket:
    """A socket on the address that `settings` names, not yet listening.

    Raises:
        CannotListenError: it is taken, or not this machine's.
    """
    return _bound(settings.host, settings.port, socket.SO_REUSEADDR, "port")


def reserve_grpc(settings: Settings) -> socket.socket:
    """A socket that keeps the port for gRPC, on which several processes of this user can then listen.

    Raises:
        CannotListenError: it is taken, or not this machine's.
    """
    assert settings.grpc_port is not None
    return _bound(settings.host, settings.grpc_port, socket.SO_REUSEPORT, "grpc-port")


@contextmanager
def listen_locally(path: Path) -> Iterator[socket.socket]:
    """A Unix socket at `path`, not yet listening, to which its owner and its group may connect.

    What a server that was killed left at `path` is replaced. At the end of the block the socket is removed.

    Raises:
        CannotListenError: another server listens there, something is in the way, or it cannot be made.
    """
    try:
        with locked(path, wait=False), _bound_locally(path) as listener:
            ours = path.lstat()
            try:
                yield listener
            finally:
                with suppress(FileNotFoundError):
                    if os.path.samestat(ours, path.lstat()):
                        path.unlink()
    except BusyError:
        raise _in_use(path) from None


@contextmanager
def _bound_locally(path: Path) -> Iterator[socket.socket]:
    try:
        _require_unused(path)
        new = path.with_name(f".{path.name}.new")
        new.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(os.fspath(new))
            new.chmod(_LOCAL_MODE)  # before anyone finds it
            new.replace(path)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise CannotListenError(
            f"cannot listen on {path}: {error.strerror or error}; choose another with --uds"
        ) from None
    with listener:
        yield listener


def _require_unused(path: Path) -> None:
    """Let what nobody listens on be replaced, if it is a socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise CannotListenError(f"{path} exists and is no socket; choose another with --uds")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return
    raise _in_use(path)


def _in_use(path: Path) -> CannotListenError:
    return CannotListenError(f"another server listens on {path}; choose another with --uds")


def _bound(host: str, port: int, reuse: int, setting: str) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, _, _, address = found[0]
        # asyncio turns off Nagle's algorithm, which would hold an answer's body back for 40 ms, only where
        # the protocol is named.
        listener = socket.socket(family, kind, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, reuse, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise CannotListenError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another with --{setting}"
        ) from None
