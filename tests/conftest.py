"""What holds for every test."""

from __future__ import annotations

import signal

# A script's background jobs are born deaf to Ctrl-C, and so are their children: `make test &` would be too.
signal.signal(signal.SIGINT, signal.default_int_handler)
