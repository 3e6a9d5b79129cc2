"""Signed folders: who made an engine package or a build kit, and that nothing in it has changed since.

The file `signature` has one line of the signature itself and its key. All that follows is signed: the SHA-256
and the name of every other file, as `sha256sum` writes them. It is checked before anything of the folder is
interpreted, and whatever is used of a file are the bytes whose hash was compared.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from models.errors import TrimRTError
from models.files import replace_file
from models.naming import few
from runtime.keys import name_of, read_public_key
from runtime.reading import TEXT_BYTES, read_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNATURE_NAME: Final = "signature"
_DOMAIN: Final = b"TrimRT signature 1\n"  # so that what a key signs elsewhere is no signature here
_HEAD: Final = re.compile(rb"ed25519 ([0-9a-f]{64}) ([0-9a-f]{128})")
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LINE: Final = re.compile(rf"([0-9a-f]{{64}})  ({_FILE_NAME.pattern})")


class SignatureError(TrimRTError):
    """A folder that no trusted key has signed as it is, or that cannot be signed."""


@dataclass(frozen=True)
class Trust:
    """Whose packages and kits are used.

    Attributes:
        keys: the names of the public keys that are trusted; none: no signature is asked for.
    """

    keys: frozenset[str] = frozenset()

    def read(self, path: Path, most: int | None = None) -> bytes:
        """The content of a file in a package or kit, see `read_file`; as it was signed, if that is asked for.

        Raises:
            OSError: see `read_file`.
            SignatureError: no trusted key has signed that content, or all that the folder holds.
        """
        content = read_file(path, most)
        if self.keys:
            _, signed = self._signed(path.parent)
            _compare(path, content, signed.get(path.name))
        return content

    def check(self, folder: Path) -> str | None:
        """Hold every file of a package or kit against the signature; nothing of them is interpreted.

        Returns:
            The key that signed; None where no signature is asked for.

        Raises:
            SignatureError: no trusted key has signed the folder as it is.
        """
        if not self.keys:
            return None
        key, signed = self._signed(folder)
        for name, sha256 in signed.items():
            try:
                content = read_file(folder / name)
            except OSError as error:
                raise SignatureError(
                    f"{folder / name}, which is signed, cannot be read: {error.strerror}"
                ) from error
            _compare(folder / name, content, sha256)
        return key

    def _signed(self, folder: Path) -> tuple[str, Mapping[str, str]]:
        """The key that signed `folder`, and the hash of every file that it holds, by name."""
        path = folder / SIGNATURE_NAME
        try:
            head, _, statement = read_file(path, TEXT_BYTES).partition(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            raise SignatureError(
                f"{folder} is not signed, and only what a trusted key has signed is used (`trimrt sign`)"
            ) from None
        except OSError as error:
            raise SignatureError(f"{path} cannot be read: {error.strerror}") from error
        found = _HEAD.fullmatch(head)
        if found is None:
            raise SignatureError(f"{path} is no signature, or a damaged one")
        key = found[1].decode()
        if key not in self.keys:
            raise SignatureError(f"{folder} is signed by the key {key}, which is not trusted")
        if not _holds(key, bytes.fromhex(found[2].decode()), statement):
            raise SignatureError(f"{path} was changed: the signature does not hold")
        hashes = _hashes(path, statement)
        if unsigned := sorted(_names(folder) - hashes.keys()):
            raise SignatureError(f"{folder} holds files that are not signed: {few(unsigned)}")
        return key, hashes


ANYONE: Final = Trust()


def trust_in(files: str | None) -> Trust:
    """Trust in the public keys in `files`, which are separated by commas; None: no signature is asked for.

    Raises:
        KeyFileError: one of them is no key.
    """
    if files is None:
        return ANYONE
    return Trust(frozenset(read_public_key(Path(file.strip())) for file in files.split(",")))


def sign(folder: Path, key: Ed25519PrivateKey) -> str:
    """Sign every file in `folder` but those whose names begin with a dot, which nothing reads.

    Returns:
        The key's name.

    Raises:
        SignatureError: a file cannot be read, has an odd name, or changed meanwhile.
    """
    lines = [f"{_hash_to_sign(folder / name)}  {name}\n" for name in sorted(_names(folder))]
    statement, public = "".join(lines).encode(), name_of(key.public_key())
    head = f"ed25519 {public} {key.sign(_DOMAIN + statement).hex()}\n".encode()
    with replace_file(folder / SIGNATURE_NAME) as file:
        file.write_bytes(head + statement)
    Trust(frozenset({public})).check(folder)
    return public


def _hash_to_sign(path: Path) -> str:
    if not _FILE_NAME.fullmatch(path.name):
        raise SignatureError(f"{path} cannot be signed: no package or kit has files of such names")
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except OSError as error:
        raise SignatureError(f"{path} cannot be signed: {error.strerror}") from error


def _names(folder: Path) -> set[str]:
    """The names of all that lies in `folder`, but for hidden files and the signature."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise SignatureError(f"{folder} cannot be read: {error.strerror}") from error
    return {name for name in names if not name.startswith(".")} - {SIGNATURE_NAME}


def _holds(key: str, signature: bytes, statement: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(signature, _DOMAIN + statement)
    except InvalidSignature:
        return False
    return True


def _hashes(path: Path, statement: bytes) -> dict[str, str]:
    """The hashes in a statement, whose signature holds, by file name."""
    found = [_LINE.fullmatch(line) for line in statement.decode(errors="replace").splitlines()]
    hashes = {line[2]: line[1] for line in found if line is not None}
    if len(hashes) < len(found):
        raise SignatureError(f"{path} is the signature of something else")
    return hashes


def _compare(path: Path, content: bytes, sha256: str | None) -> None:
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SignatureError(f"{path} was changed since it was signed")
