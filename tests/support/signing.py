"""A key pair, and folders that it signs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.keys import new_key, read_private_key
from runtime.signatures import Trust, sign


@dataclass(frozen=True)
class Signer:
    """Someone who signs packages.

    Attributes:
        key: file of the private key.
        public: file of the public key.
        trust: in this signer alone.
    """

    key: Path
    public: Path
    trust: Trust

    @classmethod
    def new(cls, folder: Path, name: str = "signer") -> Signer:
        folder.mkdir(parents=True, exist_ok=True)
        key_name, public = new_key(folder / f"{name}.key")
        return cls(folder / f"{name}.key", public, Trust(frozenset({key_name})))

    def sign(self, folder: Path) -> Path:
        sign(folder, read_private_key(self.key))
        return folder
