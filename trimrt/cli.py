"""The `trimrt` command: one name for all subcommands, each imported only when it is called."""

from __future__ import annotations

import importlib
import os
from typing import Any, Final

import click

from models.errors import TrimRTError
from models.naming import did_you_mean
from trimrt.extras import missing_extra

# name: (module:command, one line of help). The help stands here so that `trimrt --help` imports nothing.
COMMANDS: Final = {
    "compress": ("trimrt.compress:compress", "Train a teacher, distil and prune a student."),
    "prepare": ("trimrt.prepare:prepare", "Turn a student into a kit that compiles on another machine."),
    "build": ("trimrt.build:build", "Compile a student into an engine package."),
    "measure-layers": (
        "trimrt.measure_layers:measure_layers",
        "Time a network's layers here, at every width.",
    ),
    "inspect": ("trimrt.inspect:inspect", "Show what an engine package is."),
    "sign": ("trimrt.sign:sign_command", "Sign engine packages and build kits."),
    "verify": ("trimrt.verify:verify", "Check who signed engine packages and build kits."),
    "serve": ("trimrt.serve.command:serve", "Serve an engine package over HTTP."),
    "loadtest": ("trimrt.loadtest.command:loadtest", "Load a running server and measure what it does."),
    "bench": ("trimrt.bench.command:bench", "Time engine packages by themselves, side by side."),
    "export-triton": (
        "trimrt.export_triton.export:export_triton",
        "Write an engine package as a Triton model.",
    ),
    "predict": ("trimrt.predict.command:predict", "Label a folder, files or a Parquet column at once."),
    "watch": ("trimrt.watch.command:watch", "Label live video, or a film."),
    "cluster": ("trimrt.cluster.command:cluster", "Serve engine packages on a Ray cluster."),
    "doctor": ("trimrt.doctor.command:doctor", "Show what this machine has, and what stops the server."),
    "selftest": ("trimrt.selftest.command:selftest", "Test that TrimRT works on this machine."),
    "report": ("trimrt.report.command:report", "Compare checkpoints and engines on one page."),
    "demo": ("trimrt.demo.command:demo", "Build, serve, ask and compare, once, on handwritten digits."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no such command: {args[0]}{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TrimRTError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:  # a full disk, a folder that may not be written
            if error.filename is None or error.errno is None:
                raise
            raise click.ClickException(f"{os.strerror(error.errno)}: {error.filename}") from error
        except ModuleNotFoundError as error:
            if (missing := missing_extra(error)) is None:
                raise
            raise click.ClickException(missing) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="trimrt", prog_name="trimrt")
def main() -> None:
    """Trim an image classifier, compile it for TensorRT or OpenVINO, and serve it."""
