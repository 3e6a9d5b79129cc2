"""Files of keys: made for their owner alone, taken from OpenSSL too, refused in one line."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from runtime.keys import KeyFileError, name_of, new_key, read_private_key, read_public_key
from runtime.signatures import trust_in

PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8
SUBJECT = serialization.PublicFormat.SubjectPublicKeyInfo


def private_pem(
    key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey, password: bytes | None = None
) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(PEM, PKCS8, encryption)


def test_a_new_private_key_is_its_owners_alone(tmp_path: Path) -> None:
    name, public = new_key(tmp_path / "builder.key")
    assert public == tmp_path / "builder.key.pub"
    assert stat.S_IMODE((tmp_path / "builder.key").stat().st_mode) == 0o600
    assert name == read_public_key(public)
    assert name == name_of(read_private_key(tmp_path / "builder.key").public_key())
    assert sorted(tmp_path.iterdir()) == [tmp_path / "builder.key", public]


@pytest.mark.parametrize("name", ["builder.key", "builder.key.pub"])
def test_no_key_is_overwritten_and_none_is_half_made(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(KeyFileError, match=f"{name} exists; keys are not overwritten"):
        new_key(tmp_path / "builder.key")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_key_in_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be written: No such file or directory"):
        new_key(tmp_path / "no" / "builder.key")


def test_keys_as_openssl_writes_them_are_taken(tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "key").write_bytes(private_pem(key))
    (tmp_path / "public").write_bytes(key.public_key().public_bytes(PEM, SUBJECT))
    assert read_public_key(tmp_path / "public") == name_of(read_private_key(tmp_path / "key").public_key())


def test_several_keys_are_trusted(tmp_path: Path) -> None:
    files = [new_key(tmp_path / f"{number}.key")[1] for number in range(3)]
    assert trust_in(", ".join(map(str, files))).keys == {read_public_key(file) for file in files}


def test_trust_in_no_key_at_all_is_not_trust_in_everyone(tmp_path: Path) -> None:
    _, public = new_key(tmp_path / "builder.key")
    for files in ("", " ", ",", f"{public},"):
        with pytest.raises(KeyFileError):
            trust_in(files)
    assert trust_in(None).keys == frozenset()


CURVE = ec.generate_private_key(ec.SECP256R1())
EDWARDS = ed25519.Ed25519PrivateKey.generate()

WRONG_PUBLIC: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "holds no public key in PEM"),
    "text": (b"trust me", "holds no public key in PEM"),
    "binary": (bytes(range(256)), "holds no public key in PEM"),
    "half": (EDWARDS.public_key().public_bytes(PEM, SUBJECT)[:60], "holds no public key in PEM"),
    "huge": (b"-" * (1 << 20), "cannot be read: larger than"),
    "private": (private_pem(EDWARDS), "is a private key, which only signs; give its public key"),
    "another kind": (CURVE.public_key().public_bytes(PEM, SUBJECT), "is not an Ed25519 key"),
}
WRONG_PRIVATE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "holds no private key in PEM"),
    "public": (EDWARDS.public_key().public_bytes(PEM, SUBJECT), "holds no private key in PEM"),
    "encrypted": (private_pem(EDWARDS, b"secret"), "is encrypted; decrypt it"),
    "another kind": (private_pem(CURVE), "is not an Ed25519 key"),
}


def _is_refused_in_one_line(read: Callable[[Path], object], file: Path, content: bytes, says: str) -> None:
    file.write_bytes(content)
    with pytest.raises(KeyFileError, match=says) as error:
        read(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", WRONG_PUBLIC)
def test_what_is_no_public_key_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    _is_refused_in_one_line(read_public_key, tmp_path / "key", *WRONG_PUBLIC[kind])


@pytest.mark.parametrize("kind", WRONG_PRIVATE)
def test_what_is_no_private_key_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    _is_refused_in_one_line(read_private_key, tmp_path / "key", *WRONG_PRIVATE[kind])


@pytest.mark.parametrize("read", [read_public_key, read_private_key])
def test_a_missing_key_is_named(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"the key .*missing cannot be read: No such file"):
        read(tmp_path / "missing")
