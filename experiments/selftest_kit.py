"""The build kit of `trimrt selftest`: `python -m experiments.selftest_kit` makes it.

A ResNet18 with a tenth of the channels, for handwritten digits of 24x24 pixels. It takes seconds; what comes
out is committed, so that a device needs neither torch nor ModelOpt for the test of itself.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from builder import PrepareOptions, make_kit
from builder.kit import KIT_NAME, VERIFICATION_NAME, KitManifest, open_kit, write_verification
from experiments.small_student import pruned_resnet18, save
from models.datasets import open_dataset
from models.files import replace_folder
from runtime.manifest import sha256_of
from trimrt.selftest.checks import KIT

_IMAGES: Final = 256  # of the validation images, unshifted
_COMMAND: Final = "python -m experiments.selftest_kit"


def main() -> None:
    """Write the kit where `trimrt selftest` finds it."""
    torch.set_num_threads(1)  # so small a network is slower on several, and another one
    data = open_dataset("digits")
    with tempfile.TemporaryDirectory() as name, replace_folder(KIT) as folder:
        network = pruned_resnet18(data, ratio=0.9, epochs=12)
        checkpoint = save(Path(name) / "selftest", network, data, name="selftest", command=_COMMAND)
        options = PrepareOptions(
            calibration="entropy", correction=False, rounding=False, sensitivity=False, name="selftest"
        )
        make_kit(checkpoint, Path(name) / "kit", options, precisions=("fp16", "int8"))
        kit = open_kit(Path(name) / "kit")
        for graph in kit.manifest.graphs:
            (folder / graph.file).write_bytes((kit.path / graph.file).read_bytes())
        images = kit.verification
        few = min(_IMAGES, images.originals)
        parts = {array: getattr(images, array)[:few] for array in ("pixels", "targets", "logits")}
        write_verification(folder / VERIFICATION_NAME, replace(images, originals=few, **parts))
        _write_manifest(folder, kit.manifest, few)
    print(f"{KIT}: {sum(file.stat().st_size for file in KIT.iterdir()):,} bytes")


def _write_manifest(folder: Path, manifest: KitManifest, originals: int) -> None:
    """The kit's own, of fewer images."""
    changed = {
        "verification_sha256": sha256_of(folder / VERIFICATION_NAME),
        "verification_originals": originals,
        "command": _COMMAND,
        "student": manifest.student.model_copy(update={"source": None}),
    }
    text = json.dumps(manifest.model_copy(update=changed).model_dump(mode="json"), indent=2)
    (folder / KIT_NAME).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
