"""Does decoding take what the header foretold? `python -m benchmarks.decoding_cost` decodes the worst files.

What a header foretells must be no less than the truth, and near it for ordinary photographs.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import click
from PIL import Image

from benchmarks import hostile_images as hostile
from benchmarks.hostile_images import noise, photograph, saved
from models.preprocessing import FORMATS, ImageError, Preprocessing, plan_loading

_SPEC: Final = Preprocessing(resize=224, height=224, width=224)
_EXACT: Final = _SPEC.model_copy(update={"scaled_decoding": False})


def files(width: int, height: int) -> dict[str, Callable[[], bytes]]:
    """How to make each file, of one size."""

    def photo(form: str, **options: object) -> Callable[[], bytes]:
        return lambda: saved(photograph(width, height), form, **options)

    def noisy(form: str, **options: object) -> Callable[[], bytes]:
        return lambda: saved(noise(width, height), form, **options)

    def flat(form: str, mode: str = "RGB", **options: object) -> Callable[[], bytes]:
        return lambda: saved(Image.new(mode, (width, height)), form, **options)

    def palette() -> Image.Image:
        return photograph(width, height).quantize(255, method=Image.Quantize.FASTOCTREE)

    return {
        "JPEG photograph": photo("JPEG", quality=90),
        "JPEG noise": noisy("JPEG", quality=100, subsampling=0),
        "JPEG flat": flat("JPEG"),
        "JPEG CMYK": lambda: saved(photograph(width, height).convert("CMYK"), "JPEG", quality=90),
        "JPEG progressive": photo("JPEG", quality=90, progressive=True),
        "JPEG progressive noise": noisy("JPEG", quality=100, subsampling=0, progressive=True),
        "JPEG 100 scans": partial(hostile.progressive_jpeg, width, height, 100),
        "JPEG 100 refining scans": partial(hostile.progressive_jpeg, width, height, 100, refining=True),
        "PNG photograph": photo("PNG", compress_level=3),
        "PNG noise": noisy("PNG", compress_level=1),
        "PNG flat": partial(hostile.png, width, height),
        "PNG Paeth": partial(hostile.png, width, height, row_filter=4),
        "PNG 16-bit RGBA": partial(hostile.png, width, height, depth=16, colour=6),
        "PNG interlaced": partial(hostile.png, width, height, depth=16, colour=6, interlaced=True),
        "PNG one bit": partial(hostile.png, width, height, depth=1, colour=0),
        "PNG palette": lambda: saved(palette(), "PNG", compress_level=3),
        "WebP photograph": photo("WEBP", quality=90, method=0),
        "WebP noise": noisy("WEBP", quality=100, method=0),
        "WebP alpha": lambda: saved(photograph(width, height).convert("RGBA"), "WEBP", quality=90, method=0),
        "WebP lossless photograph": photo("WEBP", lossless=True, quality=50, method=3),
        "WebP lossless noise": noisy("WEBP", lossless=True, quality=0, method=0),
        "WebP flat": flat("WEBP", lossless=True, quality=0, method=0),
        "GIF photograph": lambda: saved(palette(), "GIF"),
        "GIF noise": lambda: saved(Image.fromarray(noise(width, height)[:, :, 0]), "GIF"),
        "GIF flat": flat("GIF", "P"),
        "BMP": photo("BMP"),
        "BMP one bit": flat("BMP", "1"),
        "BMP run-length": partial(hostile.run_length_bmp, width, height),
        **{
            f"TIFF {name}": photo("TIFF", compression=name)
            for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma", "jpeg")
        },
        "HEIC photograph": photo("HEIF", quality=60),
        "HEIC noise": noisy("HEIF", quality=100),
        "HEIC flat": flat("HEIF"),
        "HEIC tiles": photo("HEIF", quality=60, tile_size=512),
        "HEIC alpha": lambda: saved(photograph(width, height).convert("RGBA"), "HEIF", quality=60),
        "AVIF photograph": photo("AVIF", quality=80, speed=9),
        "AVIF noise": noisy("AVIF", quality=100, speed=9),
        "AVIF flat": flat("AVIF", speed=9),
        "AVIF alpha": lambda: saved(photograph(width, height).convert("RGBA"), "AVIF", quality=80, speed=9),
        "TIFF LZW flat": flat("TIFF", compression="tiff_lzw"),
        "TIFF facsimile": lambda: saved(
            Image.fromarray(noise(width, height)[:, :, 0]).convert("1"), "TIFF", compression="group4"
        ),
        "TIFF YCbCr": lambda: saved(photograph(width, height).convert("YCbCr"), "TIFF"),
    }


class LockWatch(threading.Thread):
    """Measures how long a thread that wakes up often has to wait for the interpreter's lock.

    Attributes:
        longest: seconds.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest = 0.0
        self._over = threading.Event()

    def run(self) -> None:
        """Wake up until stopped."""
        before = time.perf_counter()
        while not self._over.wait(0.001):
            now = time.perf_counter()
            self.longest = max(self.longest, now - before)
            before = now

    def stop(self) -> float:
        """End it; the longest wait."""
        self._over.set()
        self.join()
        return self.longest


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--width", default=2000, show_default=True)
@click.option("--height", default=1500, show_default=True)
@click.option("--only", default="", help="Files whose names contain this.")
@click.option("--exact", is_flag=True, help="Decode JPEGs in full.")
def main(width: int, height: int, only: str, exact: bool) -> None:
    """Decode every kind of file, and compare what it took with what its header foretold (Linux only)."""
    Image.MAX_IMAGE_PIXELS = None
    spec = _EXACT if exact else _SPEC
    click.echo(f"{width}x{height}; in brackets what the header foretold")
    for form in FORMATS:
        plan_loading(saved(noise(300, 300), form), spec).load()  # what is done once
    for name, make in files(width, height).items():
        if only not in name:
            continue
        data = make()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        idle, watch = _resident("VmRSS"), LockWatch()
        watch.start()
        began = time.process_time()  # HEIC is decoded on a thread of its decoder's own
        plan = plan_loading(data, spec, max_pixels=1 << 40)
        read = time.process_time() - began
        refusal = ""
        try:
            plan.load()
        except ImageError as error:
            refusal = str(error)[:60]
        took = time.process_time() - began
        cost = plan.cost
        click.echo(
            f"{name:26} {len(data) / 1e6:6.2f} MB  header {read * 1e3:5.2f} ms  "
            f"{took * 1e3:6.0f} ms ({cost.seconds * 1e3:6.0f}, x{cost.seconds / took:4.1f})  "
            f"{(_resident('VmHWM') - idle) / 1e6:5.0f} MB ({cost.memory / 1e6:5.0f})  "
            f"lock {watch.stop() * 1e3:4.0f} ms  {refusal}"
        )


if __name__ == "__main__":
    main()
