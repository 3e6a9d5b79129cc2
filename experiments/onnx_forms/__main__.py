"""`python -m experiments.onnx_forms`: the table of forms in docs/your-model.md."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from rich.console import Console

from experiments.onnx_forms.forms import FORMS
from experiments.onnx_forms.results import Results, Row, table
from experiments.onnx_forms.trial import try_form
from experiments.results import FOLDER, made_here
from trimrt.options import FILE, HELP

_OUT = FOLDER / "onnx-forms.json"


@click.command(context_settings=HELP)
@click.option("--out", type=FILE, default=_OUT, show_default=f"experiments/results/{_OUT.name}")
def main(out: Path) -> None:
    """Take every form of an ONNX classifier in, and compare its engine's probabilities with PyTorch's."""
    results = Results(**made_here("python -m experiments.onnx_forms"), forms=[])
    for name, form in FORMS.items():
        with tempfile.TemporaryDirectory(prefix="trimrt-") as folder:
            difference = try_form(form, Path(folder)).difference
        row = Row(form=name, told=form.told, activation=form.activation, difference=difference)
        results.forms.append(row)
    results.write(out)
    Console().print(table(results), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
