"""Checkpoints: a folder with `student.safetensors` and `card.json`, read without pickle."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from models.card import CARD_NAME, WEIGHTS_NAME, Card, CheckpointError, read_card
from models.files import replace_folder
from models.networks import NetworkError, build_planned_network, channel_plan


def save_checkpoint(folder: Path, network: nn.Module, card: Card) -> Card:
    """Write `network` and its card to `folder`, replacing what stands there in one step.

    Args:
        folder: made with its parents; a reader sees the old checkpoint or the new one, never half.
        network: of the card's architecture and stem; it may have been pruned.
        card: `weights_sha256` and `channel_plan` are filled in here.

    Returns:
        The card as written.

    Raises:
        NetworkError: the network was changed in a way that its card cannot describe.
    """
    state = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in network.state_dict().items()
    }
    plan = channel_plan(network, card.architecture, len(card.labels), card.stem)
    weights = safetensors.torch.save(state)
    card = card.model_copy(
        update={"channel_plan": plan, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    )
    with replace_folder(folder) as new:
        (new / WEIGHTS_NAME).write_bytes(weights)
        (new / CARD_NAME).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return card


def load_checkpoint(folder: Path) -> tuple[nn.Module, Card]:
    """The network of the checkpoint in `folder` (evaluation mode, FP32, contiguous, on the CPU) and its card.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one, or weights that do not fit the card.
    """
    card = read_card(folder)
    path = folder / WEIGHTS_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the weights {path}: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != card.weights_sha256:
        raise CheckpointError(
            f"{path} is damaged or belongs to another card: its SHA-256 is not the one in {CARD_NAME}. "
            "Copy the folder again, or make it again with `trimrt compress`"
        )
    try:
        state = safetensors.torch.load(data)
        network = build_planned_network(card.architecture, len(card.labels), card.stem, card.channel_plan)
        network.load_state_dict(state, assign=True)
    except (safetensors.SafetensorError, NetworkError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not fit the network that {CARD_NAME} describes: {error}"
        ) from error
    return network.to(torch.float32).eval(), card


def copy_checkpoint(source: Path, folder: Path) -> None:
    """Copy the checkpoint in `source` to `folder`, in one step as `save_checkpoint` does.

    The weights are a hard link where the file system has them: they are large, and never written in place.
    """
    with replace_folder(folder) as new:
        shutil.copyfile(source / CARD_NAME, new / CARD_NAME)
        try:
            (new / WEIGHTS_NAME).hardlink_to(source / WEIGHTS_NAME)
        except OSError:
            shutil.copyfile(source / WEIGHTS_NAME, new / WEIGHTS_NAME)
