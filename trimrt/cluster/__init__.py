"""The server on a Ray cluster: `server.cluster:app` is what a Ray Serve configuration imports."""

# Without `from __future__ import annotations`: Ray validates the arguments by the annotation itself.
from typing import Any

from server.cluster.arguments import Arguments


def app(arguments: Arguments) -> Any:
    """The Ray Serve application.

    Args:
        arguments: `args` of the application in the configuration.
    """
    from server.cluster.application import build  # Ray is imported only where it runs

    return build(arguments)
