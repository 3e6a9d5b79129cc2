"""Debian's nginx as a proxy in front of a test's server."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from running import wait_until

from benchmarks.serving import free_port

# Debian puts it where only root's PATH leads.
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")

_SCRATCH = "".join(
    f"{name}_temp_path {name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
)


@contextmanager
def nginx(configuration: str, upstream: str, folder: Path) -> Iterator[int]:
    """Runs nginx until the block ends; the port it listens on.

    Args:
        configuration: what stands in `http`; its `listen` and `127.0.0.1:8000` are replaced.
        upstream: the server's URL.
        folder: for nginx's files.
    """
    port = free_port()
    configuration = re.sub(r"listen \d+", f"listen 127.0.0.1:{port}", configuration)
    configuration = configuration.replace("127.0.0.1:8000", upstream.removeprefix("http://"))
    (folder / "nginx.conf").write_text(
        "daemon off;\nmaster_process off;\npid nginx.pid;\nerror_log error.log;\nevents {}\n"
        f"http {{\naccess_log off;\n{_SCRATCH}{configuration}\n}}\n"
    )
    assert NGINX is not None
    process = subprocess.Popen(
        [NGINX, "-p", str(folder), "-c", "nginx.conf", "-e", "error.log"], stderr=subprocess.DEVNULL
    )

    def listens() -> bool:
        assert process.poll() is None, (folder / "error.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listens)
        yield port
    finally:
        process.terminate()
        process.wait()
