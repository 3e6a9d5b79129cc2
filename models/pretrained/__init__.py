"""Students that ship with TrimRT, as checkpoint folders."""

from pathlib import Path
from typing import Final

DIGITS_STUDENT: Final = Path(__file__).parent / "digits-resnet18"
