"""Signed packages and kits: what no trusted key has signed as it is, is refused before it is interpreted."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from signing import Signer
from small_kit import write_small_kit
from tiny_engine import write_package

from builder.kit import KIT_NAME, KitError, open_kit
from runtime.engine import Options
from runtime.loading import load_engine
from runtime.manifest import MANIFEST_NAME, EngineError, read_manifest
from runtime.packages import find_packages
from runtime.signatures import SIGNATURE_NAME, SignatureError, Trust, sign
from runtime.tensorrt.layers import LAYERS_NAME, read_layers, write_layers
from runtime.tuning import TUNING_NAME

FILES = ("engine.blob", "manifest.json", "model.onnx", "source.onnx")


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.new(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory, signer: Signer) -> Path:
    """Two packages, both signed; not to be changed."""
    directory = tmp_path_factory.mktemp("signed")
    for seed, name in enumerate(("tiny", "other")):
        signer.sign(write_package(directory, name, seed=seed))
    return directory


@pytest.fixture
def package(packages: Path, tmp_path: Path) -> Path:
    """A signed package of the test's own."""
    return Path(shutil.copytree(packages / "tiny-v1", tmp_path / "tiny-v1"))


def refusal(package: Path, trust: Trust) -> str:
    """What loading a package says, which is refused."""
    with pytest.raises(EngineError) as error:
        load_engine(package, Options(slots=1, threads=1, trust=trust))
    return str(error.value)


def test_what_a_trusted_key_has_signed_is_loaded(package: Path, signer: Signer) -> None:
    with closing(load_engine(package, Options(slots=1, threads=1, trust=signer.trust))) as engine:
        assert engine.manifest.name == "tiny"
    assert {signer.trust.check(package)} == signer.trust.keys


def test_one_of_several_trusted_keys_is_enough(package: Path, signer: Signer, tmp_path: Path) -> None:
    other = Signer.new(tmp_path, "other")
    both = Trust(signer.trust.keys | other.trust.keys)
    assert both.check(package) in signer.trust.keys
    assert both.check(other.sign(package)) in other.trust.keys


def test_the_tests_know_every_file_of_the_package(package: Path) -> None:
    assert {path.name for path in package.iterdir()} == {*FILES, SIGNATURE_NAME}


@pytest.mark.parametrize("name", FILES)
def test_a_package_with_one_changed_file_is_refused(name: str, package: Path, signer: Signer) -> None:
    with (package / name).open("ab") as file:
        file.write(b"\n")
    assert refusal(package, signer.trust) == f"{package / name} was changed since it was signed"


@pytest.mark.parametrize("name", FILES)
def test_a_package_that_lacks_a_signed_file_is_refused(name: str, package: Path, signer: Signer) -> None:
    (package / name).unlink()
    assert str(package) in refusal(package, signer.trust)


def test_a_change_that_is_hashed_anew_is_refused_without_being_parsed(package: Path, signer: Signer) -> None:
    (package / "engine.blob").write_bytes(b"code")
    manifest = json.loads((package / MANIFEST_NAME).read_text())
    manifest["provenance"] |= {"artefact_sha256": "of the code", "artefact_bytes": 4}
    (package / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert "manifest.json was changed since it was signed" in refusal(package, signer.trust)


@pytest.mark.parametrize("name", [TUNING_NAME, LAYERS_NAME, "anything"])
def test_a_file_that_came_later_is_refused(name: str, package: Path, signer: Signer) -> None:
    (package / name).write_bytes(b"no JSON")
    assert refusal(package, signer.trust) == f"{package} holds files that are not signed: {name}"
    with pytest.raises(SignatureError, match="not signed"):
        signer.trust.read(package / name)


def test_a_folder_that_came_later_is_refused(package: Path, signer: Signer) -> None:
    (package / "more").mkdir()
    assert "holds files that are not signed: more" in refusal(package, signer.trust)


def test_hidden_files_which_nothing_reads_do_no_harm(package: Path, signer: Signer) -> None:
    (package / ".DS_Store").write_bytes(b"x")
    assert signer.trust.check(package)


def test_layers_and_tuning_are_signed_with_the_rest(package: Path, signer: Signer) -> None:
    write_layers(package, [])
    signer.sign(package)
    assert read_layers(package, signer.trust) == []
    (package / LAYERS_NAME).write_bytes(b"no JSON")
    with pytest.raises(EngineError, match=r"layers\.json was changed since it was signed"):
        read_layers(package, signer.trust)


@pytest.mark.parametrize("content", [b"", b"no JSON", b"[" * 100_000])
def test_an_unsigned_manifest_is_not_parsed(content: bytes, package: Path, signer: Signer) -> None:
    (package / MANIFEST_NAME).write_bytes(content)
    (package / SIGNATURE_NAME).unlink()
    assert f"{package} is not signed" in refusal(package, signer.trust)
    (found,) = find_packages(package.parent, signer.trust).values()
    assert "is not signed" in str(found)


def test_another_key_is_named(package: Path, signer: Signer, tmp_path: Path) -> None:
    other = Signer.new(tmp_path, "other")
    other.sign(package)
    (name,) = other.trust.keys
    assert refusal(package, signer.trust) == f"{package} is signed by the key {name}, which is not trusted"


def test_who_claims_another_key_than_that_of_the_signature_is_refused(
    package: Path, signer: Signer, tmp_path: Path
) -> None:
    other = Signer.new(tmp_path, "other")
    other.sign(package)
    (trusted,), (theirs,) = signer.trust.keys, other.trust.keys
    signature = (package / SIGNATURE_NAME).read_text()
    (package / SIGNATURE_NAME).write_text(signature.replace(theirs, trusted))
    assert "the signature does not hold" in refusal(package, signer.trust)


def test_every_truncated_signature_is_refused(package: Path, signer: Signer) -> None:
    whole = (package / SIGNATURE_NAME).read_bytes()
    for length in range(len(whole)):
        (package / SIGNATURE_NAME).write_bytes(whole[:length])
        with pytest.raises(SignatureError):
            signer.trust.read(package / MANIFEST_NAME)
    (package / SIGNATURE_NAME).write_bytes(whole)
    assert signer.trust.read(package / MANIFEST_NAME)


def test_every_changed_byte_of_a_signature_is_refused(package: Path, signer: Signer) -> None:
    whole = bytearray((package / SIGNATURE_NAME).read_bytes())
    for place in range(len(whole)):
        whole[place] ^= 1
        (package / SIGNATURE_NAME).write_bytes(whole)
        with pytest.raises(SignatureError):
            signer.trust.read(package / MANIFEST_NAME)
        whole[place] ^= 1


def test_bytes_after_a_signature_are_refused(package: Path, signer: Signer) -> None:
    with (package / SIGNATURE_NAME).open("ab") as file:
        file.write(f"{'0' * 64}  {TUNING_NAME}\n".encode())
    assert "the signature does not hold" in refusal(package, signer.trust)


def test_the_signature_of_another_package_is_refused(package: Path, packages: Path, signer: Signer) -> None:
    shutil.copy(packages / "other-v1" / SIGNATURE_NAME, package / SIGNATURE_NAME)
    assert "manifest.json was changed since it was signed" in refusal(package, signer.trust)


def test_the_blob_of_another_signed_package_is_refused(package: Path, packages: Path, signer: Signer) -> None:
    shutil.copy(packages / "other-v1" / "engine.blob", package / "engine.blob")
    assert "engine.blob was changed since it was signed" in refusal(package, signer.trust)


def test_links_are_followed_and_what_they_lead_to_is_judged(
    package: Path, packages: Path, signer: Signer, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(package)
    assert signer.trust.check(tmp_path / "link")
    moved = package / MANIFEST_NAME
    moved.rename(tmp_path / "moved.json")
    moved.symlink_to(tmp_path / "moved.json")
    assert read_manifest(package, signer.trust).name == "tiny"
    moved.unlink()
    moved.symlink_to(packages / "other-v1" / MANIFEST_NAME)
    assert "manifest.json was changed since it was signed" in refusal(package, signer.trust)


@pytest.mark.parametrize("target", ["/dev/zero", "/nowhere", SIGNATURE_NAME])
def test_a_signature_that_leads_nowhere_or_to_no_end_is_refused(
    target: str, package: Path, signer: Signer
) -> None:
    (package / SIGNATURE_NAME).unlink()
    (package / SIGNATURE_NAME).symlink_to(target)
    assert str(package) in refusal(package, signer.trust)


def test_a_pipe_in_the_place_of_a_signed_file_is_refused(package: Path, signer: Signer) -> None:
    (package / "model.onnx").unlink()
    os.mkfifo(package / "model.onnx")
    assert "model.onnx, which is signed, cannot be read: not a regular file" in refusal(package, signer.trust)


def test_what_was_checked_is_what_is_used_while_the_package_is_replaced(
    package: Path, packages: Path, signer: Signer
) -> None:
    """A manifest that claims another name is put in the place of the signed one, and back, all the time."""
    signed = (package / MANIFEST_NAME).read_bytes()
    forged = signed.replace(b'"tiny"', b'"evil"')
    assert json.loads(forged)["name"] == "evil"
    done = threading.Event()

    def replace() -> None:
        other = package / ".new"
        while not done.is_set():
            for content in (forged, signed):
                other.write_bytes(content)
                other.replace(package / MANIFEST_NAME)

    thread = threading.Thread(target=replace)
    thread.start()
    names, refused = set(), 0
    try:
        while not (names and refused > 100):
            try:
                names.add(read_manifest(package, signer.trust).name)
            except EngineError:
                refused += 1
    finally:
        done.set()
        thread.join()
    assert names == {"tiny"}


# --- signing ------------------------------------------------------------------------------------------------


def test_signing_again_covers_what_has_changed(package: Path, signer: Signer) -> None:
    (package / "notes.txt").write_text("new")
    signer.sign(package)
    assert signer.trust.check(package)
    assert not list(package.glob(".signature*"))


@pytest.mark.parametrize("name", ["two words", "line\nend", "ümlaut"])
def test_a_file_with_an_odd_name_is_not_signed(name: str, package: Path, signer: Signer) -> None:
    before = (package / SIGNATURE_NAME).read_bytes()
    (package / name).touch()
    with pytest.raises(SignatureError, match="cannot be signed"):
        signer.sign(package)
    assert (package / SIGNATURE_NAME).read_bytes() == before


def test_what_holds_folders_is_not_signed(package: Path, signer: Signer) -> None:
    (package / "more").mkdir()
    with pytest.raises(SignatureError, match="more cannot be signed: not a regular file"):
        signer.sign(package)


def test_a_signature_is_of_this_use_alone(package: Path, signer: Signer) -> None:
    """Whoever gets the same bytes signed with the same key for another purpose has no package's signature."""
    from runtime.keys import read_private_key

    key = read_private_key(signer.key)
    head, _, statement = (package / SIGNATURE_NAME).read_bytes().partition(b"\n")
    kind, name, _ = head.split()
    forged = b" ".join([kind, name, key.sign(statement).hex().encode()])
    (package / SIGNATURE_NAME).write_bytes(forged + b"\n" + statement)
    assert "the signature does not hold" in refusal(package, signer.trust)
    sign(package, key)
    assert signer.trust.check(package)


# --- kits ---------------------------------------------------------------------------------------------------


@pytest.fixture
def kit(tmp_path: Path, signer: Signer) -> Path:
    return signer.sign(write_small_kit(tmp_path / "kit"))


def test_a_signed_kit_is_opened(kit: Path, signer: Signer) -> None:
    assert open_kit(kit, signer.trust).student.name == "small"


@pytest.mark.parametrize("name", [KIT_NAME, "fp32.onnx", "verification.npz"])
def test_a_kit_with_one_changed_file_is_refused(name: str, kit: Path, signer: Signer) -> None:
    with (kit / name).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(KitError, match=rf"{name} was (changed since it was signed|damaged or changed)"):
        open_kit(kit, signer.trust)


def without_signature(kit: Path) -> None:
    (kit / SIGNATURE_NAME).unlink()


def by_someone_else(kit: Path) -> None:
    Signer.new(kit.parent, "someone").sign(kit)


def with_another_file(kit: Path) -> None:
    (kit / "int8.onnx").touch()


def truncated(kit: Path) -> None:
    os.truncate(kit / SIGNATURE_NAME, 200)


@pytest.mark.parametrize("spoil", [without_signature, by_someone_else, with_another_file, truncated])
def test_of_a_kit_that_is_not_signed_as_it_is_nothing_is_parsed(
    spoil: Callable[[Path], None], kit: Path, signer: Signer
) -> None:
    (kit / KIT_NAME).write_bytes(b"no JSON")
    signer.sign(kit)
    spoil(kit)
    with pytest.raises(KitError) as error:
        open_kit(kit, signer.trust)
    assert "sign" in str(error.value)
    assert "manifest" not in str(error.value)


def test_a_graph_is_compiled_from_a_copy_whose_hash_is_right(
    kit: Path, signer: Signer, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    opened = open_kit(kit, signer.trust, copies)
    graph, path = next(opened.graphs("fp32", "fp32"))
    content = (kit / graph.file).read_bytes()
    assert (path.parent, path.read_bytes()) == (copies, content)
    (kit / graph.file).write_bytes(b"another graph")
    with pytest.raises(KitError, match="was damaged or changed"):
        next(opened.graphs("fp32", "fp32"))
    assert path.read_bytes() == content
