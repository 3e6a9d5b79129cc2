"""Base images without a registry: Debian, by debootstrap, as `debian:bookworm-slim` is made.

For arm64 it stands in for NVIDIA's L4T image, without TensorRT, and runs under QEMU.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from tests.images.podman import BUILD, exists, podman

SUITE: Final = "bookworm"
# As Debian's own images: no caches, no manuals, no waiting for the disk.
_APT: Final = """\
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb"; };
"""
_LEFT_OUT: Final = ("usr/share/doc", "usr/share/man", "usr/share/locale")
_DPKG: Final = "force-unsafe-io\n" + "".join(f"path-exclude /{folder}/*\n" for folder in _LEFT_OUT)


def make_base(architecture: str) -> str:
    """The base image for `amd64` or `arm64`, made unless it is there."""
    image = f"localhost/trimrt-base:{architecture}"
    if architecture == "arm64":
        # Installing QEMU registers it with the kernel, but not for the next boot of every machine.
        subprocess.run(["update-binfmts", "--enable", "qemu-aarch64"], check=True)
    archive = BUILD / f"{SUITE}-{architecture}.tar"
    if not archive.is_file():
        _bootstrap(architecture, archive)
    if not exists(image):
        podman("import", "--arch", architecture, str(archive), image)
    return image


def _bootstrap(architecture: str, archive: Path) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as name:
        root = Path(name) / "root"
        # Without a mirror it takes Debian's own.
        options = ["--foreign", "--variant=minbase", f"--arch={architecture}"]
        subprocess.run(["debootstrap", *options, SUITE, str(root)], check=True)
        # Before the second stage, which is dpkg's; it would wait for the disk at every file.
        (root / "etc/dpkg/dpkg.cfg.d/slim").write_text(_DPKG, "utf-8")
        subprocess.run(["chroot", str(root), "/debootstrap/debootstrap", "--second-stage"], check=True)
        slim(root)
        partial = Path(name) / archive.name
        subprocess.run(["tar", "--directory", str(root), "--create", "--file", str(partial), "."], check=True)
        partial.replace(archive)


def slim(root: Path) -> None:
    """Leave out what the official slim image leaves out."""
    for folder in ("var/lib/apt/lists", "var/cache/apt", *_LEFT_OUT):
        for path in (root / folder).iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (root / "etc/apt/apt.conf.d/docker-clean").write_text(_APT, "utf-8")
