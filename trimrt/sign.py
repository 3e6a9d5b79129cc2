"""`trimrt sign`: sign engine packages and build kits, or make the key for it."""

from __future__ import annotations

from pathlib import Path

import click

from builder.kit import is_kit
from runtime.keys import new_key, read_private_key
from runtime.packages import resolve_package
from runtime.signatures import ANYONE, Trust, sign
from trimrt.options import FILE, HELP, Command, engine_dir_option


@click.command(
    "sign",
    cls=Command,
    context_settings=HELP,
    examples=[
        "trimrt sign --new-key builder.key",
        "trimrt sign digits-resnet18-int8-openvino --key builder.key",
        "trimrt sign photos-kit --key builder.key",
    ],
)
@click.argument("signed", nargs=-1, metavar="ENGINE|KIT...")
@engine_dir_option
@click.option("--key", "key_file", type=FILE, help="The private key to sign with: Ed25519, in PEM.")
@click.option(
    "--new-key",
    "new_file",
    type=FILE,
    help="Make a key pair: FILE, which its owner alone may read, and FILE.pub, which others are to trust.",
)
def sign_command(
    signed: tuple[str, ...], engine_dir: Path, key_file: Path | None, new_file: Path | None
) -> None:
    """Sign engine packages and build kits with a private key.

    ENGINE is a package's folder or name, KIT a kit's folder. The file `signature` in it covers every other
    file: whoever trusts FILE.pub alone uses the folder as it is now, or not at all. What changes it, as a new
    build or `trimrt bench --tune`, makes it necessary to sign again.
    """
    folders = [find_signed(name, engine_dir) for name in signed]
    if new_file is not None and key_file is None:
        name, public_file = new_key(new_file)
        click.echo(f"wrote {new_file}, to be kept secret, and {public_file}: the key {name}")
        key_file = new_file
    elif new_file is not None or key_file is None or not folders:
        raise click.UsageError("give --key and what to sign with it, or --new-key")
    key = read_private_key(key_file)
    for folder in folders:
        click.echo(f"{folder}: signed by {sign(folder, key)}")


def find_signed(name: str, engine_dir: Path, trust: Trust = ANYONE) -> Path:
    """The folder of the kit or package that a user names.

    Raises:
        EngineError: there is none.
    """
    folder = Path(name)
    return folder if is_kit(folder) else resolve_package(name, engine_dir, trust)
