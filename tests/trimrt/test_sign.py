"""`trimrt sign` and `trimrt verify`; `--trusted-key` of the commands that read packages and kits."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from signing import Signer
from small_kit import write_small_kit
from tiny_engine import write_package

from runtime.signatures import SIGNATURE_NAME

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def unsigned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine directory of one package, not to be changed."""
    directory = tmp_path_factory.mktemp("unsigned")
    write_package(directory)
    return directory


@pytest.fixture
def engines(unsigned: Path, tmp_path: Path) -> Path:
    """An engine directory of the test's own."""
    return Path(shutil.copytree(unsigned, tmp_path / "engines"))


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return Signer.new(tmp_path / "keys")


def words(result: Result, code: int = 0) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_a_key_is_made_and_signs_by_name_what_others_then_verify(
    trimrt: Run, engines: Path, tmp_path: Path
) -> None:
    key = tmp_path / "builder.key"
    said = words(trimrt("sign", "--new-key", key))
    name = said.split()[-1]
    signed = words(trimrt("sign", "tiny", "--engine-dir", engines, "--key", key))
    assert signed == f"{engines / 'tiny-v1'}: signed by {name}"
    for named in ("tiny", engines / "tiny-v1"):
        verified = trimrt("verify", named, "--engine-dir", engines, "--trusted-key", f"{key}.pub")
        assert words(verified) == signed


def test_a_kit_is_signed_and_built_from(trimrt: Run, tmp_path: Path) -> None:
    kit, key = write_small_kit(tmp_path / "kit"), tmp_path / "key"
    assert "signed by" in words(trimrt("sign", kit, "--new-key", key))
    build = ("build", kit, "-p", "fp32", "--target", "openvino", "-o", tmp_path / "engines")
    assert "published" in words(trimrt(*build, "--trusted-key", f"{key}.pub"))
    (kit / "fp32.onnx").write_bytes((kit / "fp32.onnx").read_bytes() + b"\n")
    assert "fp32.onnx was damaged or changed" in words(trimrt(*build, "--trusted-key", f"{key}.pub"), 1)


def test_several_are_verified_and_one_refusal_is_enough_for_the_exit_code(
    trimrt: Run, engines: Path, signer: Signer, tmp_path: Path
) -> None:
    kit = write_small_kit(tmp_path / "kit")
    signer.sign(engines / "tiny-v1")
    said = words(trimrt("verify", engines / "tiny-v1", kit, "--trusted-key", signer.public), 1)
    assert f"{engines / 'tiny-v1'}: signed by" in said
    assert f"refused: {kit} is not signed" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sign",), "give --key and what to sign"),
        (("sign", "{tiny}"), "give --key and what to sign"),
        (("sign", "--key", "{key}"), "give --key and what to sign"),
        (("sign", "{tiny}", "--key", "{key}", "--new-key", "other"), "give --key and what to sign"),
        (("sign", "{tiny}", "--key", "{key}.pub"), "holds no private key"),
        (("sign", "{tiny}x", "--key", "{key}"), "did you mean tiny-v1?"),
        (("sign", "--new-key", "{key}"), "exists; keys are not overwritten"),
        (("verify", "{tiny}"), "whose signature?"),
        (("verify", "{tiny}", "--trusted-key", ""), "cannot be read: not a regular file"),
        (("verify", "{tiny}", "--trusted-key", "{key}"), "is a private key, which only signs"),
        (("verify", "{tiny}", "--trusted-key", "{key}.pubs"), "No such file or directory"),
        (("inspect", "{tiny}", "--trusted-key", "{tiny}/manifest.json"), "holds no public key"),
        (("serve", "--engine", "{tiny}", "--trusted-key", "{tiny}/model.onnx"), "holds no public key"),
        (("serve", "--engine", "{tiny}", "--trusted-key", ""), "at least 1 character"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: tuple[str, ...], says: str, trimrt: Run, engines: Path, signer: Signer
) -> None:
    given = [each.format(tiny=engines / "tiny-v1", key=signer.key) for each in arguments]
    result = trimrt(*given)
    assert says in words(result, result.exit_code)
    assert result.exit_code in (1, 2)
    assert not (engines / "tiny-v1" / SIGNATURE_NAME).exists()


def test_inspect_says_who_signed_and_shows_nothing_of_what_is_not_signed(
    trimrt: Run, engines: Path, signer: Signer
) -> None:
    package = engines / "tiny-v1"
    inspect = ("inspect", "tiny", "--engine-dir", engines, "--trusted-key", signer.public)
    assert f"{package} is not signed" in words(trimrt(*inspect[:1], package, *inspect[2:], "--json"), 1)
    signer.sign(package)
    (name,) = signer.trust.keys
    assert f"signed by {name[:50]}" in words(trimrt(*inspect)), "long values are folded"
    (package / "manifest.json").write_text("{}")
    said = words(trimrt(*inspect[:1], package, *inspect[2:]), 1)
    assert said == f"Error: {package / 'manifest.json'} was changed since it was signed"


def test_predict_uses_a_signed_engine_alone(
    trimrt: Run, engines: Path, signer: Signer, encode: Callable[..., bytes], tmp_path: Path
) -> None:
    image, out = tmp_path / "one.png", tmp_path / "labels.csv"
    image.write_bytes(encode(1))
    predict = ("predict", image, "--engine", engines / "tiny-v1", "--out", out)
    refused = words(trimrt(*predict, "--trusted-key", signer.public), 1)
    assert f"{engines / 'tiny-v1'} is not signed" in refused
    assert not out.exists()
    signer.sign(engines / "tiny-v1")
    words(trimrt(*predict, "--trusted-key", signer.public))
    assert [row["path"] for row in csv.DictReader(out.read_text().splitlines())] == [str(image)]
    (engines / "tiny-v1" / "model.onnx").write_bytes(b"")
    refused = words(trimrt(*predict, "--restart", "--trusted-key", signer.public), 1)
    assert "model.onnx was changed since it was signed" in refused


def test_only_kits_are_built_where_a_key_is_trusted(trimrt: Run, signer: Signer, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    result = trimrt("build", tmp_path / "model.onnx", "--trusted-key", signer.public, "-o", tmp_path / "out")
    assert "model.onnx is no build kit, and only kits and engine packages are signed" in words(result, 1)


@pytest.mark.parametrize("by", ["nobody", "someone else"])
def test_a_kit_that_the_trusted_key_has_not_signed_is_not_built(
    by: str, trimrt: Run, signer: Signer, tmp_path: Path
) -> None:
    kit = write_small_kit(tmp_path / "kit")
    if by == "someone else":
        Signer.new(tmp_path, "someone").sign(kit)
    result = trimrt("build", kit, "-p", "fp32", "--trusted-key", signer.public, "-o", tmp_path / "out")
    assert "sign" in words(result, 1)
    assert not list(tmp_path.glob("out/*"))
