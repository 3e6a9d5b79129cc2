"""What is needed of Podman, whose builder is Buildah: no daemon, and a store of its own in `build/images`."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
BUILD: Final = ROOT / "build/images"
_PODMAN: Final = (
    *("podman", "--root", str(BUILD / "storage"), "--runroot", str(BUILD / "run")),
    *("--runtime", "runc", "--cgroup-manager", "cgroupfs", "--log-level", "fatal"),
)
# As compose.yaml and the Kubernetes manifests run it.
CONFINED: Final = (
    *("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp", "--cap-drop", "ALL"),
    *("--security-opt", "no-new-privileges", "--network", "host"),
    # Podman asks for more than a sandbox may have.
    *("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"),
)


class ContainerError(RuntimeError):
    """Podman, or what it ran, failed; the message has what it said."""


def podman(*arguments: str, stdin: Any = None) -> str:
    """Run Podman and return what it prints.

    Raises:
        ContainerError: it failed.
    """
    done = subprocess.run([*_PODMAN, *arguments], stdin=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ContainerError(f"podman {' '.join(arguments)}:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def _certificates() -> list[str]:
    """What lets pip in a build trust what this machine trusts, as behind a proxy; no image keeps it."""
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    if not bundle.is_file():
        return []
    inside = "/run/certificates.crt"
    settings = BUILD / "pip.conf"
    settings.write_text(f"[global]\ncert = {inside}\n", "utf-8")
    return [f"--volume={bundle}:{inside}:ro", f"--volume={settings}:/etc/pip.conf:ro"]


def build(file: str, target: str, tag: str, architecture: str, arguments: dict[str, str]) -> None:
    """Build `target` of a Dockerfile, showing its steps; layers that are there already are reused.

    Raises:
        ContainerError: a step failed.
    """
    command = [*_PODMAN, "build", "--isolation", "chroot", "--layers", "--format", "docker"]
    command += ["--platform", f"linux/{architecture}", "--file", file, "--target", target, "--tag", tag]
    command += [*_certificates(), *(f"--build-arg={name}={value}" for name, value in arguments.items())]
    if subprocess.run([*command, "."], cwd=ROOT, check=False).returncode:
        raise ContainerError(f"{file}: the target {target} could not be built")


def remove_leftovers() -> None:
    """Remove what interrupted builds and runs left behind: each holds as much disk as its image."""
    left = podman("ps", "--all", "--external", "--quiet").split()
    if left:
        podman("rm", "--force", *left)


def exists(image: str) -> bool:
    """Whether the store has `image`."""
    return subprocess.run([*_PODMAN, "image", "exists", image], check=False).returncode == 0


def size(image: str) -> int:
    """Bytes of all of the image's layers, uncompressed: what `docker images` shows."""
    return int(podman("image", "inspect", "--format", "{{.Size}}", image))


def configuration(image: str) -> dict[str, Any]:
    """User, entrypoint, environment and so on, as the image has them."""
    configured: dict[str, Any] = json.loads(podman("image", "inspect", image))[0]["Config"]
    return configured


def _run(image: str, *options: str) -> list[str]:
    architecture = podman("image", "inspect", "--format", "{{.Architecture}}", image).strip()
    return ["run", "--pull=never", f"--platform=linux/{architecture}", *options, image]


def call(image: str, *command: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run `command` in a container of its own, confined, to its end."""
    full = [*_PODMAN, *_run(image, "--rm", *CONFINED, *options), *command]
    return subprocess.run(full, capture_output=True, text=True, check=False)


class Container:
    """A container that runs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside the container's own."""
        full = [*_PODMAN, "exec", self.name, *command]
        return subprocess.run(full, capture_output=True, text=True, check=False)

    def is_healthy(self) -> bool:
        """Whether the image's HEALTHCHECK succeeds now."""
        full = [*_PODMAN, "healthcheck", "run", self.name]
        return subprocess.run(full, capture_output=True, check=False).returncode == 0

    def terminate(self) -> None:
        """Send SIGTERM to its first process, as `docker stop` does."""
        podman("kill", "--signal", "TERM", self.name)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return int(podman("wait", self.name))

    def logs(self) -> str:
        """What it wrote, to either stream."""
        full = [*_PODMAN, "logs", self.name]
        done = subprocess.run(full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        return done.stdout

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return podman("inspect", "--format", "{{.State.Running}}", self.name).strip() == "true"


@contextmanager
def started(
    image: str, *command: str, options: Sequence[str] = (), confined: bool = True
) -> Iterator[Container]:
    """A container that runs `command`, or the image's own, until the block ends."""
    name = f"trimrt-{uuid.uuid4().hex[:8]}"
    limits = CONFINED if confined else CONFINED[CONFINED.index("--security-opt") :]
    podman(*_run(image, "--detach", "--name", name, *limits, *options), *command)
    try:
        yield Container(name)
    finally:
        podman("rm", "--force", "--time", "0", name)


def wait_for(condition: Callable[[], bool], container: Container, seconds: float) -> None:
    """Ask until `condition()` holds.

    Raises:
        ContainerError: it does not within that time, or the container has ended.
    """
    end = time.monotonic() + seconds
    while not condition():
        if not container.is_running() or time.monotonic() > end:
            raise ContainerError(f"waited in vain for {condition.__name__}:\n{container.logs()[-4000:]}")
        time.sleep(0.2)
