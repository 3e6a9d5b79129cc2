"""Label every image of a folder with an engine package, in batches, and print CSV.

    python examples/label_folder.py engines/digits-resnet18-int8-openvino photos > labels.csv

`trimrt predict` does this with all cores, and continues after an interruption.
"""

from __future__ import annotations

import csv
import sys
from contextlib import closing
from pathlib import Path

from models.preprocessing import ImageError, load_pixels
from runtime import load_engine


def main(package: str, folder: Path) -> None:
    """Print a row for each image."""
    table = csv.writer(sys.stdout)
    table.writerow(["file", "label", "probability"])
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with closing(load_engine(package)) as engine, closing(engine.open_slot()) as slot:
        manifest, size = engine.manifest, engine.best_batch
        for start in range(0, len(files), size):
            batch: list[Path] = []
            for file in files[start : start + size]:
                try:
                    load_pixels(file.read_bytes(), manifest.preprocessing, out=slot.pixels[len(batch)])
                except ImageError as error:
                    print(f"{file}: {error}", file=sys.stderr)
                else:
                    batch.append(file)
            if len(batch) < manifest.batch.min:
                continue  # nothing to run; a fixed batch size would need padding
            for file, row in zip(batch, slot.infer(len(batch)).probabilities, strict=True):
                table.writerow([file, manifest.labels[row.argmax()], f"{row.max():.4f}"])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
