"""`trimrt verify`: did a trusted key sign these engine packages and build kits as they are?"""

from __future__ import annotations

from pathlib import Path

import click

from models.errors import TrimRTError
from runtime.signatures import Trust
from trimrt.options import HELP, Command, engine_dir_option, trusted_key_option
from trimrt.sign import find_signed


@click.command(
    cls=Command,
    context_settings=HELP,
    examples=[
        "trimrt verify digits-resnet18-int8-openvino --trusted-key builder.key.pub",
        "trimrt verify photos-kit --trusted-key builder.key.pub,other.key.pub",
    ],
)
@click.argument("signed", nargs=-1, required=True, metavar="ENGINE|KIT...")
@engine_dir_option
@trusted_key_option
def verify(signed: tuple[str, ...], engine_dir: Path, trust: Trust) -> None:
    """Check that a trusted key has signed engine packages and build kits as they are.

    ENGINE is a package's folder or name, KIT a kit's folder. The exit code is 0 only if all are signed.
    """
    if not trust.keys:
        raise click.UsageError("whose signature? Name public keys with --trusted-key")
    refused = False
    for name in signed:
        try:
            folder = find_signed(name, engine_dir, trust)
            click.echo(f"{folder}: signed by {trust.check(folder)}")
        except TrimRTError as error:
            click.echo(f"refused: {error}", err=True)
            refused = True
    if refused:
        click.get_current_context().exit(1)
