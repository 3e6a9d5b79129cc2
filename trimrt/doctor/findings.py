"""What was found, and whether it stops the server."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

State = Literal["ok", "note", "stop"]


class Finding(BaseModel):
    """One thing that was looked at."""

    subject: str
    state: State = Field(description="note: worth knowing; stop: `trimrt serve` would not serve")
    found: str = Field(description="in words; of what is wrong also what to do")


class Diagnosis(BaseModel):
    """`trimrt doctor --json`."""

    findings: list[Finding] = []

    @property
    def healthy(self) -> bool:
        """Whether nothing that was found stops the server."""
        return all(finding.state != "stop" for finding in self.findings)
