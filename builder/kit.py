"""The build kit: all that compiling needs, in one portable folder.

Preparing (`builder.prepare`) needs torch and ModelOpt and happens on a workstation; compiling
(`builder.compile`) happens on the device. A kit is what is carried from one to the other:
`kit.json`, an ONNX graph for each precision, and `verification.npz`, the held-out images with the
FP32 network's logits that the compiled engine is judged by. This module needs numpy only.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from builder.comparison import Comparison
from builder.external_data import has_external_data
from models.errors import TrimRTError, faults
from models.files import restore
from models.preprocessing import Pixels, Preprocessing
from models.promise import Promise
from runtime.manifest import Activation, Calibration, LeftOut, Precision
from runtime.reading import TEXT_BYTES, read_file
from runtime.signatures import ANYONE, SignatureError, Trust

# The tensors that every graph takes and gives.
INPUT: Final = "images"
LOGITS: Final = "logits"
PROBABILITIES: Final = "probabilities"

UNKNOWN: Final = -1  # the class of an image that nobody has labelled
Rest = Literal["fp32", "fp16"]  # precision of what an INT8 graph does not quantise
Report = Callable[[str], None]  # takes a line of progress
# What else INT8 graphs leave unquantised, in a graph each, for `--precision best` to compare. On GPUs FP16 is
# fast enough for that to pay; CPUs are slower with either (docs/cpus.md).
LEFT_OUT: Final[dict[Rest, tuple[LeftOut, ...]]] = {"fp32": (), "fp16": get_args(LeftOut)}

_Number = TypeVar("_Number", np.uint8, np.int64, np.float32)

KIT_NAME: Final = "kit.json"
VERIFICATION_NAME: Final = "verification.npz"

_FILE_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
LONGEST_NAME: Final = 128  # of a network; packages' names add precision and backend to it
# What reading a damaged or odd .npz raises.
_DAMAGED: Final = (
    *(KeyError, ValueError, EOFError, OSError),
    *(NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error),
)
_MOST_BYTES: Final = 8 << 30  # of a verification set: 50,000 images of 224x224 pixels


class KitError(TrimRTError):
    """A build kit that cannot be used; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class VerificationSet:
    """Held-out images with the FP32 network's logits.

    Attributes:
        name: which images these are; never test images.
        pixels: uint8, shape (N, H, W, 3).
        targets: true classes, int64, shape (N,); all `UNKNOWN` where nobody knows them.
        logits: the reference's, float32, shape (N, classes).
        originals: how many of the first images are as they are; the others are shifted copies of them.
    """

    name: str
    pixels: Pixels
    targets: NDArray[np.int64]
    logits: NDArray[np.float32]
    originals: int

    @property
    def labelled(self) -> bool:
        """Whether the true classes are known."""
        return bool((self.targets != UNKNOWN).all())

    def compare(self, logits: NDArray[np.float32], activation: Activation = "softmax") -> Comparison:
        """Hold logits of all images, shape (N, classes), against the reference's."""
        labels, reference = logits.argmax(axis=1), self.logits.argmax(axis=1)
        if activation == "softmax":
            alike = labels == reference
        else:
            alike = ((logits > 0) == (self.logits > 0)).all(axis=1)
        right, reference_right = labels == self.targets, reference == self.targets
        known = self.labelled
        return Comparison(
            images=len(logits),
            originals=self.originals,
            reference_top1=float(np.mean(reference_right[: self.originals])) if known else None,
            engine_top1=float(np.mean(right[: self.originals])) if known else None,
            drop=float(np.mean(reference_right) - np.mean(right)) if known else None,
            label_agreement=float(np.mean(alike)),
            max_logit_difference=float(np.abs(logits - self.logits).max()),
        )


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Student(_Strict):
    """The network whose graphs a kit holds."""

    name: str = Field(pattern=_FILE_NAME, max_length=LONGEST_NAME, description="part of file names")
    labels: list[str] = Field(min_length=2)
    preprocessing: Preprocessing
    activation: Activation = Field(default="softmax", description="makes probabilities of its logits")
    source: str | None = Field(default=None, description="the file or folder it was read from, or its name")
    checkpoint_sha256: str | None = Field(description="of the weights; None for an ONNX from elsewhere")
    parameters: int | None
    macs: int | None
    promise: Promise | None = Field(
        default=None, description="what it was pruned to cost; None: it was given no budget"
    )


class Sparsity(_Strict):
    """How many layers TensorRT's sparse kernels could take."""

    layers: int = Field(description="convolutions and matrix products with constant weights")
    sparse: int = Field(description="of these: two of every four weights along the input channels are zero")

    def __str__(self) -> str:
        effect = ", so --sparsity has no effect" if self.sparse == 0 else ""
        return f"{self.sparse} of {self.layers} layers have 2:4 sparse weights{effect}"


class Graph(_Strict):
    """One ONNX file: the student in one precision."""

    file: str = Field(pattern=_FILE_NAME)
    sha256: str
    precision: Precision
    rest: Rest = Field(description="precision of what is not quantised")
    calibration: Calibration | None = None
    weights_bytes: int = Field(description="weights as stored in the file")
    int8_share: float | None = Field(
        default=None, description="of an INT8 graph: share of the multiply-accumulates that run in INT8"
    )
    exact: Comparison | None = Field(
        default=None, description="of a static INT8 graph: what it gives where its sums are exact"
    )
    seconds: float | None = Field(default=None, description="that making it took")
    sparsity: Sparsity | None = Field(default=None, description="None: not recorded")

    @property
    def left_out(self) -> LeftOut | None:
        """What of an INT8 graph is not quantised, as it may be faster so."""
        return self.calibration.left_out if self.calibration is not None else None


class GraphSource(Protocol):
    """Where graphs to compile come from: a kit, or a checkpoint that is converted on demand."""

    @property
    def path(self) -> Path:
        """What the user named, and would name to build again."""

    @property
    def student(self) -> Student:
        """The network."""

    @property
    def verification(self) -> VerificationSet:
        """What its engines are judged by."""

    def graphs(
        self, precision: Precision, rest: Rest, left_out: LeftOut | None = None
    ) -> Iterator[tuple[Graph, Path]]:
        """Graphs of one precision, the preferred one first; later ones are for when it fails the gate.

        Args:
            precision: of the graphs.
            rest: precision of what INT8 graphs do not quantise.
            left_out: what they are not to quantise besides.

        Raises:
            KitError: there is none, or no more of them.
        """


class KitManifest(_Strict):
    """`kit.json`."""

    format: Literal[1] = 1
    builder_version: str
    student: Student
    graphs: list[Graph] = Field(min_length=1)
    verification_sha256: str
    verification_images: str = Field(description="name of the image set, never the test images")
    verification_originals: int | None = Field(
        default=None, description="how many of them are no shifted copies; None: not recorded, so all count"
    )
    export_difference: float = Field(description="largest logit difference of the FP32 graph and PyTorch")
    command: str = Field(description="the command that made it")


@dataclass(frozen=True)
class Kit:
    """A kit on disk whose files match the hashes in `kit.json`.

    Attributes:
        path: its folder.
        manifest: what it says of itself.
        verification: what engines are judged by.
        copies: folder for checked copies of the graphs that are compiled, which nobody else may write to;
            None: they are taken from the kit.
    """

    path: Path
    manifest: KitManifest
    verification: VerificationSet
    copies: Path | None = None

    @property
    def student(self) -> Student:
        """The network."""
        return self.manifest.student

    def graphs(
        self, precision: Precision, rest: Rest, left_out: LeftOut | None = None
    ) -> Iterator[tuple[Graph, Path]]:
        """The kit's graphs of one precision, in the order in which they were prepared."""
        found = [
            graph
            for graph in self.manifest.graphs
            if graph.precision == precision
            and (graph.rest == rest or precision != "int8")
            and graph.left_out == left_out
        ]
        if not found and left_out:
            raise KitError(f"{self.path} has no {precision} graph with the {left_out} left out")
        if not found:
            held = sorted({f"{graph.precision} (rest {graph.rest})" for graph in self.manifest.graphs})
            raise KitError(
                f"{self.path} has no {precision} graph with the rest in {rest}; it has {', '.join(held)}. "
                "Make another with `trimrt prepare`"
            )
        for graph in found:
            yield graph, self._file_of(graph)

    def _file_of(self, graph: Graph) -> Path:
        if self.copies is None:
            return self.path / graph.file
        copy = self.copies / graph.file
        copy.write_bytes(_read_checked(self.path / graph.file, graph.sha256, self.manifest))
        return copy


def is_kit(folder: Path) -> bool:
    """Whether `folder` means to be a build kit."""
    restore(folder)
    return (folder / KIT_NAME).is_file()


def open_kit(folder: Path, trust: Trust = ANYONE, copies: Path | None = None) -> Kit:
    """The kit in `folder`, checked against its own hashes.

    Args:
        folder: the kit's.
        trust: whose kits are used; of another's nothing is parsed.
        copies: see `Kit`.

    Raises:
        KitError: not a kit, no trusted key has signed it, or a file of it is missing or was changed.
    """
    restore(folder)
    try:
        manifest = KitManifest.model_validate_json(trust.read(folder / KIT_NAME, TEXT_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise KitError(
            f"{folder} is not a build kit: it has no {KIT_NAME} (`trimrt prepare` makes one)"
        ) from None
    except OSError as error:
        raise KitError(f"{folder / KIT_NAME} cannot be read: {error.strerror}") from error
    except SignatureError as error:
        raise KitError(str(error)) from error
    except ValidationError as error:
        raise KitError(f"{folder / KIT_NAME} is not a valid kit manifest: {faults(error)}") from error
    for graph in manifest.graphs:
        path = folder / graph.file
        _check_alone(path, _read_checked(path, graph.sha256, manifest))
    path = folder / VERIFICATION_NAME
    images = _read_verification(path, _read_checked(path, manifest.verification_sha256, manifest), manifest)
    return Kit(folder, manifest, images, copies)


def _read_checked(path: Path, sha256: str, manifest: KitManifest) -> bytes:
    """The content of a kit's file, whose hash is what the kit says."""
    remedy = f"copy the kit again, or make it again: {manifest.command}"
    try:
        content = read_file(path)
    except FileNotFoundError:
        raise KitError(f"{path.parent} has no {path.name}; {remedy}") from None
    except OSError as error:
        raise KitError(f"{path} cannot be read: {error.strerror}; {remedy}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise KitError(f"{path} was damaged or changed; {remedy}")
    return content


def _check_alone(graph: Path, content: bytes) -> None:
    """Weights in a file of their own would have no hash, and could be any file of the machine."""
    try:
        external = has_external_data(content)
    except ValueError as error:
        raise KitError(f"{graph} is not an ONNX model: {error}") from error
    if external:
        raise KitError(f"{graph} keeps weights in other files, which no graph of a kit does")


def write_verification(path: Path, images: VerificationSet) -> None:
    """Write `images` as a `.npz` file."""
    with path.open("wb") as file:
        np.savez_compressed(file, pixels=images.pixels, targets=images.targets, logits=images.logits)


def _read_verification(path: Path, content: bytes, manifest: KitManifest) -> VerificationSet:
    student = manifest.student
    size, classes = (student.preprocessing.height, student.preprocessing.width, 3), len(student.labels)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            pixels = _read_array(archive, "pixels", np.uint8, size)
            targets = _read_array(archive, "targets", np.int64, ())
            logits = _read_array(archive, "logits", np.float32, (classes,))
        if not 0 < len(pixels) == len(targets) == len(logits):
            raise ValueError(f"{len(pixels)} images, {len(targets)} targets and {len(logits)} logits")
        unknown = (targets == UNKNOWN).all()
        if not (unknown or (targets.min() >= 0 and targets.max() < classes)):
            raise ValueError(f"targets that are none of the {classes} classes")
        originals = manifest.verification_originals or len(pixels)
        if not (0 < originals <= len(pixels) and len(pixels) % originals == 0):
            raise ValueError(f"{len(pixels)} images, which are no copies of {originals}")
        if not np.isfinite(logits).all():
            raise ValueError("logits that are not finite")
    except _DAMAGED as error:
        raise KitError(f"{path} is not a verification set: {error}") from error
    return VerificationSet(manifest.verification_images, pixels, targets, logits, originals)


def _read_array(
    archive: zipfile.ZipFile, name: str, dtype: type[_Number], shape: tuple[int, ...]
) -> NDArray[_Number]:
    """An array of any length, of `dtype` and with elements of `shape`; nothing else is read, and no pickle.

    Raises:
        ValueError: it is another one, or larger than a verification set may be.
    """
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name}: an unknown format")
        found, _, found_dtype = np.lib.format.read_array_header_1_0(file)
    if found_dtype != dtype or found[1:] != shape or not found:
        raise ValueError(
            f"{name} is {found_dtype} of shape {found}, not {np.dtype(dtype)} of {('N', *shape)}"
        )
    if not math.prod(found) * found_dtype.itemsize <= min(member.file_size, _MOST_BYTES):
        raise ValueError(f"{name} of shape {found} does not fit its file")
    with archive.open(member) as file:
        array: NDArray[_Number] = np.lib.format.read_array(file, allow_pickle=False)
    return array
