"""The `trimrt` command, and the demonstration that joins models, builder and server."""

from importlib.metadata import version

__version__ = version("trimrt")
