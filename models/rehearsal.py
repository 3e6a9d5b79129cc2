"""What a run is going to do, tried in small beforehand, to tell how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from rich.progress import Progress
from torch import Tensor, nn

from models.card import Role
from models.checkpoint import load_checkpoint
from models.datasets import DataSplit
from models.distillation import VIEWS_TASK, label_views
from models.estimate import Estimate, Part
from models.evaluation import images_at_once
from models.networks import build_network
from models.preprocessing import Preprocessing
from models.recipe import Training
from models.setup import Setup
from models.training import steps_of_epoch, time_step

# Prunes a student as far as the run does, or to a share of the way to its budget.
Narrow = Callable[[nn.Module, float], None]

# The seconds of what follows a run, given a network like its last one, in no state to be used, and its data.
Afterwards = Callable[[nn.Module, Preprocessing, DataSplit], float]

_INFERENCE_SHARE: Final = 0.5  # of the time of a training step: a third of its work, but always in FP32


def estimate(
    setup: Setup,
    roles: Sequence[Role],
    narrow: Narrow,
    afterwards: Afterwards | None = None,
) -> Estimate:
    """How long these stages will take, from a few steps of each, and what follows them.

    Their networks can be built and pruned.

    Args:
        setup: of the run.
        roles: the stages.
        narrow: prunes a student; each network on the way is timed by itself.
        afterwards: foretells what follows; None: nothing does.
    """
    recipe, parts = setup.recipe, list[Part]()
    if "teacher" in roles:
        teacher = _untrained(setup, "teacher", narrow)
        seconds = _step_seconds(setup, teacher, recipe.teacher)
        parts.append(_training(setup, "teacher", "teacher", recipe.teacher, seconds))
        if "student" in roles:
            parts.append(_labelling(setup, teacher.eval(), setup.spec))
        del teacher  # the memory of its gradients is needed
    elif setup.teacher is not None:
        parts.append(_labelling(setup, setup.teacher.logits, setup.teacher.preprocessing))
    elif "student" in roles:
        teacher = load_checkpoint(setup.out / "teacher")[0].to(setup.device)
        parts.append(_labelling(setup, teacher, setup.spec))
    if "student" in roles:
        seconds = _step_seconds(setup, _untrained(setup, "student", narrow), recipe.student)
        parts.append(_training(setup, "student", "student", recipe.student, seconds))
    if "pruned" in roles:
        for number in range(recipe.front):
            network = _untrained(setup, "pruned", narrow, (number + 1) / recipe.front)
            seconds = _step_seconds(setup, network, recipe.pruning)
            first = number * recipe.pruning.steps + 1
            parts += [
                _training(setup, f"pruned-{step}", "pruned", recipe.pruning, seconds)
                for step in range(first, first + recipe.pruning.steps)
            ]
    if afterwards is not None:
        last = _untrained(setup, roles[-1], narrow)
        seconds = afterwards(last.eval(), setup.spec, setup.data)
        parts.append(Part("engine", "engine", steps=0, seconds=0, seconds_after=seconds))
    return Estimate(parts)


def _untrained(setup: Setup, role: Role, narrow: Narrow, share: float = 1.0) -> nn.Module:
    """The network that a stage trains, of random weights; a pruned one at that share of the way."""
    section = setup.recipe.teacher if role == "teacher" else setup.recipe.student
    network = build_network(section.architecture, len(setup.data.labels), setup.inputs[1])
    if role == "pruned":
        narrow(network.eval(), share)
    return network


def _step_seconds(setup: Setup, network: nn.Module, settings: Training) -> float:
    if settings.epochs == 0:
        return 0.0
    return time_step(
        network.to(setup.device), setup.train_images, setup.spec, setup.limits, settings, setup.precision
    )


def _training(setup: Setup, task: str, label: str, settings: Training, step_seconds: float) -> Part:
    images, validation = len(setup.data.train), len(setup.data.validation)
    image_seconds = step_seconds / min(settings.batch_size, images)
    judged = validation if settings.patience is not None else 0
    return Part(
        task=task,
        label=label,
        steps=settings.epochs * steps_of_epoch(images, settings),
        seconds=settings.epochs * (images + _INFERENCE_SHARE * judged) * image_seconds,
        seconds_after=_INFERENCE_SHARE * (validation + len(setup.data.test)) * image_seconds,
    )


def _labelling(setup: Setup, teacher: Callable[[Tensor], Tensor], spec: Preprocessing) -> Part:
    images = setup.data.train
    count = min(len(images), images_at_once(spec, setup.device))
    few = images.subset(np.arange(count), f"{images.name}-timed")
    pixels = few.load_pixels(spec, progress=False)
    seconds = 0.0
    for _ in range(2):  # the first one also sets everything up
        began = time.perf_counter()
        label_views(
            teacher,
            pixels,
            spec,
            setup.limits,
            views=1,
            seed=0,
            progress=Progress(disable=True),
            device=setup.device,
            precision=setup.precision,
        )
        seconds = time.perf_counter() - began
    steps = setup.recipe.distillation.views * len(images)
    return Part(VIEWS_TASK, "its labels", steps, seconds / count * steps)
