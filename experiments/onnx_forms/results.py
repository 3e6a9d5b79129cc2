"""What the trials of the forms gave, and their table."""

from __future__ import annotations

from pydantic import BaseModel, Field

from experiments.markdown import table as markdown_table
from experiments.results import Made
from runtime.manifest import Activation


class Row(BaseModel):
    """One form."""

    form: str
    told: str = Field(description="who writes so, or what it is")
    activation: Activation
    difference: float = Field(description="largest of a probability, between the engine and PyTorch")


class Results(Made):
    """All forms."""

    forms: list[Row]


def table(results: Results) -> str:
    """Markdown."""
    rows = [[row.form, row.told, row.activation, f"{row.difference:.0e}"] for row in results.forms]
    return markdown_table(["form", "as written by, or what it is", "activation", "difference"], rows, left=3)
