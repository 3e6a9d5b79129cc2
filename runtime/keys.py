"""Files of Ed25519 keys, in PEM as OpenSSL writes them (`openssl genpkey -algorithm ed25519`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from models.errors import TrimRTError
from runtime.reading import read_file

if TYPE_CHECKING:  # imported where they are used: few processes sign or verify
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PUBLIC_SUFFIX: Final = ".pub"
_PRIVATE_MODE: Final = 0o600
_PUBLIC_MODE: Final = 0o644
_MOST_BYTES: Final = 64 << 10


class KeyFileError(TrimRTError):
    """A file that is not the key it should be, or that cannot be made."""


def new_key(file: Path) -> tuple[str, Path]:
    """Make a key pair: the private key in `file`, which its owner alone may read, the public one beside it.

    Returns:
        The public key's name, and its file: `file` with `.pub` behind.

    Raises:
        KeyFileError: one of the files exists or cannot be written; neither is made.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    public_file = file.with_name(file.name + PUBLIC_SUFFIX)
    _create(public_file, public, _PUBLIC_MODE)
    try:
        _create(file, private, _PRIVATE_MODE)
    except BaseException:
        public_file.unlink(missing_ok=True)
        raise
    return name_of(key.public_key()), public_file


def read_private_key(file: Path) -> Ed25519PrivateKey:
    """The key to sign with.

    Raises:
        KeyFileError: there is none in `file`.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _content(file)
    try:
        key = load_pem_private_key(content, password=None)
    except TypeError:
        raise KeyFileError(f"the key in {file} is encrypted; decrypt it: openssl pkey -in {file}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise KeyFileError(f"{file} holds no private key in PEM; `trimrt sign --new-key` makes one") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"the key in {file} is not an Ed25519 key; `trimrt sign --new-key` makes one")
    return key


def read_public_key(file: Path) -> str:
    """The name of the public key in `file`.

    Raises:
        KeyFileError: there is none.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = _content(file)
    if b"PRIVATE KEY" in content:
        raise KeyFileError(f"{file} is a private key, which only signs; give its public key, {file}.pub")
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise KeyFileError(f"{file} holds no public key in PEM; `trimrt sign --new-key` makes one") from None
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"the key in {file} is not an Ed25519 key; `trimrt sign --new-key` makes one")
    return name_of(key)


def name_of(key: Ed25519PublicKey) -> str:
    """What a key is called: its 32 bytes in hexadecimal."""
    return key.public_bytes_raw().hex()


def _content(file: Path) -> bytes:
    try:
        return read_file(file, _MOST_BYTES)
    except OSError as error:
        raise KeyFileError(f"the key {file} cannot be read: {error.strerror}") from error


def _create(file: Path, content: bytes, mode: int) -> None:
    """Write a new file, of which nobody else sees a byte that `mode` does not let them see."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise KeyFileError(f"{file} exists; keys are not overwritten") from None
    except OSError as error:
        raise KeyFileError(f"{file} cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        file.unlink(missing_ok=True)
        raise KeyFileError(f"{file} cannot be written: {error.strerror}") from error
