"""Fixtures that need an engine or a server; conftest.py says which tests see them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import Running, running
from tiny_engine import write_package

from server.settings import Settings


@pytest.fixture(scope="session")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two engines that give different answers."""
    directory = tmp_path_factory.mktemp("engines")
    write_package(directory, "tiny", seed=0)
    write_package(directory, "other", seed=1, precision="fp16")
    return directory


@pytest.fixture(scope="session")
def server(engine_dir: Path) -> Iterator[Running]:
    """One server for all tests that leave it as it was."""
    settings = Settings(
        engine="tiny,other", engine_dir=engine_dir, port=0, max_body_bytes=1 << 20, max_images=16
    )
    with running(settings) as it:
        yield it


def encoded(seed: int, form: str = "PNG", size: tuple[int, int] = (48, 40), **options: object) -> bytes:
    """An image file of random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    image = Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """`encode(seed)`, or `encode(seed, "JPEG", quality=90)`."""
    return encoded


@pytest.fixture(scope="session")
def reference(engine_dir: Path) -> Callable[..., np.ndarray]:
    """Probabilities of one image, straight from the engine: no server, no batch."""
    from models.preprocessing import load_pixels
    from runtime.loading import load_engine

    slots = {}

    def probabilities(image: bytes, folder: str = "tiny-v1") -> np.ndarray:
        if folder not in slots:
            engine = load_engine(engine_dir / folder)
            slots[folder] = engine, engine.open_slot()
        engine, slot = slots[folder]
        slot.pixels[0] = load_pixels(image, engine.manifest.preprocessing)
        return slot.infer(1).probabilities[0].copy()

    return probabilities
