"""Files that are given for an ONNX model and are something else: what they are, and what to do."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Final

_TF2ONNX: Final = "make ONNX of it: python -m tf2onnx.convert"
_KERAS: Final = 'make ONNX of it in Keras: model.export("model.onnx", format="onnx")'
_ORIGIN: Final = "give the network that it was made from, as ONNX"
_AGAIN: Final = "download the file itself"

# Where a file begins so, what it is and what to do.
_BEGINNINGS: Final = (
    (0, b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself: git lfs pull"),
    (0, b"<!doctype html", "a web page", _AGAIN),
    (0, b"<html", "a web page", _AGAIN),
    (4, b"TFL3", "a TensorFlow Lite model", f"{_TF2ONNX} --tflite FILE --output model.onnx"),
    (0, b"\x89HDF\r\n", "a file of Keras, or other HDF5", _KERAS),
    (0, b"<?xml", "XML, as of OpenVINO's models", _ORIGIN),
)
_SUFFIXES: Final = {
    **dict.fromkeys((".pb", ".pbtxt"), ("a TensorFlow graph", f"{_TF2ONNX} --saved-model FOLDER")),
    **dict.fromkeys((".pdmodel", ".pdiparams"), ("a Paddle model", "make ONNX of it with paddle2onnx")),
    **dict.fromkeys((".mlmodel", ".mlpackage"), ("a Core ML model", _ORIGIN)),
    **dict.fromkeys((".caffemodel", ".prototxt"), ("a Caffe model", "make ONNX of it, as with caffe2onnx")),
    **dict.fromkeys((".engine", ".plan", ".trt"), ("a TensorRT engine, which fits one GPU alone", _ORIGIN)),
}


def told_instead(path: Path) -> str | None:
    """What a file or folder is instead of an ONNX model, and what to do; None: nothing known."""
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            return f"is a SavedModel of TensorFlow; {_TF2ONNX} --saved-model {path} --output model.onnx"
        return None
    with path.open("rb") as file:
        beginning = file.read(64)
    for start, mark, what, remedy in _BEGINNINGS:
        if beginning[start : start + len(mark)].lower() == mark.lower():
            return f"is {what}; {remedy.replace('FILE', str(path))}"
    if beginning.startswith(b"PK\x03\x04"):
        return _of_archive(path)
    if path.suffix.lower() in _SUFFIXES:
        what, remedy = _SUFFIXES[path.suffix.lower()]
        return f"is {what}; {remedy}"
    return None


def _of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "is a damaged archive; download it again"
    if any(name.endswith("data.pkl") for name in names):
        return "is a file of PyTorch; name it .pt if it holds weights, or export the network to ONNX"
    if "model.weights.h5" in names:
        return f"is a model of Keras; {_KERAS}"
    if inner := [name for name in names if name.endswith(".onnx")]:
        return f"is an archive; unpack it and name {inner[0]}"
    return "is an archive without an ONNX model"
