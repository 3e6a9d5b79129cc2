"""Reports written anew from their JSON: `python -m benchmarks.render benchmarks/results/*/*.json`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks import (
    batch_scoring,
    growth,
    live_video,
    local_clients,
    measurements,
    presets,
    ray_serve,
    report,
)

_MARKDOWN: Final[dict[str, Callable[[str], str]]] = {
    "results": lambda json: report.markdown(measurements.Results.model_validate_json(json)),
    "digits": lambda json: report.markdown(measurements.Results.model_validate_json(json)),
    "presets": lambda json: presets.markdown(presets.Speeds.model_validate_json(json)),
    "growth": lambda json: growth.markdown(growth.Growth.model_validate_json(json)),
    "batch_scoring": lambda json: batch_scoring.markdown(batch_scoring.Results.model_validate_json(json)),
    "live_video": lambda json: live_video.markdown(live_video.Results.model_validate_json(json)),
    "local_clients": lambda json: local_clients.markdown(local_clients.Results.model_validate_json(json)),
    "ray_serve": lambda json: ray_serve.markdown(ray_serve.Results.model_validate_json(json)),
}


def render(file: Path) -> str:
    """The Markdown of a report whose JSON is `file`."""
    return _MARKDOWN[file.stem](file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).with_suffix(".md").write_text(render(Path(name)), encoding="utf-8")
