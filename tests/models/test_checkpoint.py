"""Checkpoints: a pruned network comes back exactly, without pickle, and a damaged one says how."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from models.card import Card, CheckpointError, read_card
from models.checkpoint import copy_checkpoint, load_checkpoint, save_checkpoint
from models.datasets import DataSplit
from models.evaluation import count_parameters
from models.networks import NetworkError, build_network
from models.preprocessing import Preprocessing
from models.pruning import Pruner
from models.recipe import Pruning


@pytest.fixture(scope="module")
def shared_network(split: DataSplit, spec: Preprocessing) -> nn.Module:
    """A pruned network with batch statistics that matter; not to be changed."""
    torch.manual_seed(0)
    network = build_network("resnet18", len(split.labels), "small").eval()
    settings = Pruning(ratio=0.8, round_to=4)
    Pruner(network, spec, settings, settings.ratio).step()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.weight)
    return network


@pytest.fixture
def pruned(shared_network: nn.Module) -> nn.Module:
    return copy.deepcopy(shared_network)


def test_a_pruned_network_comes_back_exactly(tmp_path: Path, pruned: nn.Module, card: Card) -> None:
    written = save_checkpoint(tmp_path / "some" / "student", pruned, card)
    network, read = load_checkpoint(tmp_path / "some" / "student")
    assert read == written
    assert read.channel_plan is not None
    assert read.channel_plan["layer4.1.conv1"] == {"in_channels": 100, "out_channels": 100}
    images = torch.rand(3, 3, 24, 24)
    assert torch.equal(network(images), pruned(images))
    assert not network.training
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in network.parameters())
    assert sorted(path.name for path in (tmp_path / "some").rglob("*")) == [
        "card.json",
        "student",
        "student.safetensors",
    ]


def test_an_unpruned_network_needs_no_plan(tmp_path: Path, card: Card) -> None:
    network = build_network("shufflenet_v2_x0_5", len(card.labels))
    card = card.model_copy(update={"architecture": "shufflenet_v2_x0_5", "stem": "standard"})
    assert save_checkpoint(tmp_path / "student", network, card).channel_plan is None
    loaded, _ = load_checkpoint(tmp_path / "student")
    assert count_parameters(loaded) == count_parameters(network)


def test_saving_again_replaces_all_at_once(tmp_path: Path, pruned: nn.Module, card: Card) -> None:
    folder = tmp_path / "student"
    first = save_checkpoint(folder, pruned, card)
    (folder / "notes.txt").touch()
    nn.init.zeros_(pruned.get_parameter("fc.bias"))
    second = save_checkpoint(folder, pruned, card)
    assert first.weights_sha256 != second.weights_sha256
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "student.safetensors"]
    assert load_checkpoint(folder)[1] == second


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, pruned: nn.Module, card: Card) -> None:
    folder = tmp_path / "student"
    written = save_checkpoint(folder, pruned, card)
    pruned.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(NetworkError, match="cannot be rebuilt"):
        save_checkpoint(folder, pruned, card)
    assert load_checkpoint(folder)[1] == written
    assert list(tmp_path.iterdir()) == [folder]


def test_a_copy_is_the_same(tmp_path: Path, pruned: nn.Module, card: Card) -> None:
    written = save_checkpoint(tmp_path / "one", pruned, card)
    copy_checkpoint(tmp_path / "one", tmp_path / "two")
    assert load_checkpoint(tmp_path / "two")[1] == written


def damage_weights(folder: Path) -> None:
    path = folder / "student.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate_weights(folder: Path) -> None:
    path = folder / "student.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def edit_card(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "card.json").read_text())
        change(content)
        (folder / "card.json").write_text(json.dumps(content))

    return edit


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("a flipped bit", damage_weights, r"student\.safetensors is damaged"),
    ("half a file", truncate_weights, r"student\.safetensors is damaged"),
    ("no weights", lambda folder: (folder / "student.safetensors").unlink(), "cannot read the weights"),
    ("no card", lambda folder: (folder / "card.json").unlink(), "not a checkpoint: it has no card.json"),
    ("not JSON", lambda folder: (folder / "card.json").write_text("{"), "not a valid model card"),
    (
        "not text",
        lambda folder: (folder / "card.json").write_bytes(b"\xff\xfe\xfa"),
        "not a valid model card",
    ),
    ("another format", edit_card(lambda card: card.update(format=2)), "not a valid model card"),
    ("no plan", edit_card(lambda card: card.update(channel_plan=None)), "does not fit the network"),
    (
        "a plan for another network",
        edit_card(lambda card: card["channel_plan"].update({"features.0": {"out_channels": 8}})),
        r"'features\.0', which is not in resnet18",
    ),
    (
        "a plan with other attributes",
        edit_card(lambda card: card["channel_plan"].update({"conv1": {"stride": 8}})),
        "sets stride of 'conv1'",
    ),
    (
        "an unknown architecture",
        edit_card(lambda card: card.update(architecture="resnet19")),
        "torchvision has no classifier 'resnet19'",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_damage_is_told(
    tmp_path: Path, pruned: nn.Module, card: Card, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "student"
    save_checkpoint(folder, pruned, card)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="trimrt compress"):
        load_checkpoint(tmp_path / "nothing")


class Mischief:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_pickled_weights_are_never_unpickled(tmp_path: Path, pruned: nn.Module, card: Card) -> None:
    folder = tmp_path / "student"
    save_checkpoint(folder, pruned, card)
    harm = tmp_path / "harm"
    torch.save(Mischief(harm), folder / "student.safetensors")
    sha256 = hashlib.sha256((folder / "student.safetensors").read_bytes()).hexdigest()
    edit_card(lambda content: content.update(weights_sha256=sha256))(folder)
    with pytest.raises(CheckpointError, match="does not fit the network"):
        load_checkpoint(folder)
    assert not harm.exists()


class TestCard:
    def test_survives_json(self, card: Card) -> None:
        assert Card.model_validate_json(card.model_dump_json()) == card

    def test_reads_back(self, tmp_path: Path, card: Card) -> None:
        (tmp_path / "card.json").write_text(card.model_dump_json())
        assert read_card(tmp_path) == card

    @pytest.mark.parametrize(
        "change",
        [
            {"name": "Bad Name/.."},
            {"role": "champion"},
            {"stem": "tiny"},
            {"labels": ["only one"]},
            {"surprise": 1},
            {"metrics": {"accuracy": 1.5}},
            {"preprocessing": {"resize": 8, "height": 24, "width": 24}},
        ],
    )
    def test_refuses_what_is_not_a_card(self, card: Card, change: dict[str, object]) -> None:
        with pytest.raises(ValidationError):
            Card.model_validate(card.model_dump() | change)

    def test_preprocessing_is_the_shared_one(self, card: Card, spec: Preprocessing) -> None:
        assert card.preprocessing == spec
