"""What may happen to the folder of a package that is served; and clients that notice a wrong answer."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import httpx
import numpy as np

# Each is given the package's folder and another package's, whose weights are different.
Spoil = Callable[[Path, Path], None]


def copy_over(folder: Path, _other: Path) -> None:
    """`cp -r` of the same package: each file is emptied, then written again."""
    for file in folder.iterdir():
        content = file.read_bytes()
        with file.open("wb") as written:
            written.write(content[: len(content) // 2])
            written.flush()
            written.write(content[len(content) // 2 :])


def copy_other_over(folder: Path, other: Path) -> None:
    for file in other.iterdir():
        shutil.copyfile(file, folder / file.name)


def replace(folder: Path, other: Path) -> None:
    """The folder is moved aside, and another put in its place."""
    new, old = folder.with_name(".new"), folder.with_name(".moved")
    shutil.copytree(other, new)
    folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old)


def zero(folder: Path, _other: Path) -> None:
    blob = folder / "engine.blob"
    with blob.open("r+b") as file:
        file.write(bytes(blob.stat().st_size))


def overwrite_half_with_noise(folder: Path, _other: Path) -> None:
    blob = folder / "engine.blob"
    size = blob.stat().st_size
    with blob.open("r+b") as file:
        file.seek(size // 2)
        file.write(os.urandom(size - size // 2))


def empty(folder: Path, _other: Path) -> None:
    for file in folder.iterdir():
        os.truncate(file, 0)


def halve(folder: Path, _other: Path) -> None:
    os.truncate(folder / "engine.blob", (folder / "engine.blob").stat().st_size // 2)


def remove(folder: Path, _other: Path) -> None:
    shutil.rmtree(folder)


SPOILS: Final[Sequence[Spoil]] = (
    copy_over,
    copy_other_over,
    replace,
    zero,
    overwrite_half_with_noise,
    empty,
    halve,
    remove,
)


def mend(folder: Path, original: Path) -> None:
    """Put the package back as it was; files that are still there stay the same files."""
    folder.mkdir(exist_ok=True)
    for file in original.iterdir():
        with (folder / file.name).open("r+b" if (folder / file.name).exists() else "wb") as mended:
            mended.write(file.read_bytes())
            mended.truncate()


# The probabilities of each image, by the version of the engine that computed them.
Expected = Mapping[str, Sequence[np.ndarray]]


def ask_while(
    url: str, images: Sequence[bytes], expected: Expected, requests: int, disturb: Callable[[], None]
) -> Counter[str]:
    """Send `requests`, four at a time, calling `disturb` again and again until all are answered.

    Returns:
        How many answers were `right`, how many `wrong`, and how many had which other status.
    """

    def ask(client: httpx.Client, number: int) -> str:
        image = number % len(images)
        headers = {"Content-Type": "image/png"}
        response = client.post("/predict?top_k=10", content=images[image], headers=headers)
        if response.status_code != 200:
            return str(response.status_code)
        answer = response.json()
        want = expected[answer["engine"]["version"]][image]
        got = np.zeros_like(want)
        for prediction in answer["results"][0]["predictions"]:
            got[prediction["index"]] = prediction["probability"]
        return "right" if np.allclose(got, want, atol=1e-5) else "wrong"

    def ask_in_turn(first: int) -> list[str]:
        with httpx.Client(base_url=url, timeout=30) as client:
            return [ask(client, number) for number in range(first, requests, 4)]

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask_in_turn, first) for first in range(4)]
        disturb()
        while not all(future.done() for future in asking):
            disturb()
        return Counter(outcome for future in asking for outcome in future.result())
