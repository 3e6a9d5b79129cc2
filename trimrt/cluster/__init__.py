"""The server on a Ray cluster: `trimrt.cluster:app` is what a Ray Serve configuration imports."""

# Without `from __future__ import annotations`: Ray validates the arguments by the annotation itself.
from typing import Any

from trimrt.cluster.arguments import Arguments


def app(arguments: Arguments) -> Any:
    """The Ray Serve application.

    Args:
        arguments: `args` of the application in the configuration.
    """
    from trimrt.cluster.application import build  # Ray is imported only where it runs

    return build(arguments)
