"""Training: it learns, the same seed gives the same weights, and an interruption changes nothing."""

from __future__ import annotations

import copy
import signal
from _thread import interrupt_main
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress
from torch import nn

from models.evaluation import evaluate
from models.networks import build_network
from models.preprocessing import Preprocessing
from models.recipe import Augmentation, Training
from models.state import StateSaver
from models.training import Images, TrueLabels, derive_seed, reproducible, supported_precision, train

SETTINGS = Training(epochs=4, learning_rate=2e-3, batch_size=16)


class InterruptedProgress(Progress):
    """Ctrl-C during the step of that number. Real signals, to a run of its own: test_compress.py."""

    def __init__(self, step: int) -> None:
        super().__init__(disable=True)
        self.steps_left = step

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)
        if "advance" in kwargs:
            self.steps_left -= 1
            if self.steps_left == 0:
                interrupt_main()


class Trainer:
    """Trains one small network (with dropout, whose randomness must come back too) on few digits."""

    def __init__(self, train_images: Images, validation_images: Images, spec: Preprocessing) -> None:
        self.images = train_images, validation_images, spec

    def run(
        self,
        state_file: Path,
        *,
        settings: Training = SETTINGS,
        seed: int = 0,
        fingerprint: str = "same",
        progress: Progress | None = None,
        save_interval_s: float = 0,
    ) -> nn.Module:
        torch.manual_seed(derive_seed(seed, "weights"))
        network = build_network("squeezenet1_1", 3, "small")
        train_images, validation_images, spec = self.images
        objective = TrueLabels(torch.from_numpy(train_images.targets), Augmentation(flip=False), seed)
        with reproducible(threads=1):
            train(
                network,
                train_images,
                validation_images,
                spec,
                objective,
                settings,
                name="test",
                seed=seed,
                state_file=state_file,
                fingerprint=fingerprint,
                progress=progress or Progress(disable=True),
                save_interval_s=save_interval_s,
            )
        return network


@pytest.fixture(scope="module")
def trainer(train_images: Images, validation_images: Images, spec: Preprocessing) -> Trainer:
    return Trainer(train_images, validation_images, spec)


@pytest.fixture(scope="module")
def uninterrupted(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return trainer.run(tmp_path_factory.mktemp("training") / "state.pt")


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_it_learns(
    train_images: Images, validation_images: Images, spec: Preprocessing, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = build_network("resnet18", 3, "small")
    objective = TrueLabels(torch.from_numpy(train_images.targets), Augmentation(flip=False), 0)
    before = evaluate(network, train_images.pixels, train_images.targets, spec)
    with reproducible(threads=1):
        train(
            network,
            train_images,
            validation_images,
            spec,
            objective,
            Training(epochs=12, learning_rate=2e-3, batch_size=16),
            name="test",
            seed=0,
            state_file=tmp_path / "state.pt",
            fingerprint="",
            progress=Progress(disable=True),
        )
    after = evaluate(network, train_images.pixels, train_images.targets, spec)
    assert after.accuracy > 0.9 > 0.6 > before.accuracy
    assert not network.training


def test_the_same_seed_gives_the_same_weights(
    trainer: Trainer, uninterrupted: nn.Module, tmp_path: Path
) -> None:
    torch.manual_seed(1234)  # what went before in the process does not matter
    assert same_weights(trainer.run(tmp_path / "state.pt"), uninterrupted)


def test_another_seed_gives_other_weights(trainer: Trainer, uninterrupted: nn.Module, tmp_path: Path) -> None:
    assert not same_weights(trainer.run(tmp_path / "state.pt", seed=1), uninterrupted)


# 43 images in batches of 16 are three steps an epoch.
@pytest.mark.parametrize("step", [2, 3, 11])
def test_ctrl_c_keeps_what_was_done_and_changes_nothing(
    trainer: Trainer, uninterrupted: nn.Module, tmp_path: Path, step: int
) -> None:
    state = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        trainer.run(state, progress=InterruptedProgress(step), save_interval_s=1e9)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    counted = InterruptedProgress(10**6)
    assert same_weights(trainer.run(state, progress=counted), uninterrupted)
    assert 10**6 - counted.steps_left == 12 - step


@pytest.mark.parametrize("length", [0.5, 7, 12, 29])
def test_no_two_savings_are_further_apart_than_the_interval(length: float) -> None:
    now, saved = 0.0, [0.0]
    with StateSaver(lambda: saved.append(now), 30, clock=lambda: now) as saver:
        for _ in range(200):
            now += length
            saver.step_done()
    gaps = np.diff(saved)
    assert gaps.max() <= 30
    assert gaps.min() > 30 - 2 * length  # and it saves no more often than that needs


def test_a_second_ctrl_c_does_not_wait() -> None:
    def interrupt_twice() -> None:
        for _ in range(2):
            interrupt_main()
        pytest.fail("it waited")

    with pytest.raises(KeyboardInterrupt), StateSaver(lambda: None):
        interrupt_twice()


def test_a_programs_own_handler_of_ctrl_c_stays() -> None:
    came: list[int] = []
    old = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        with StateSaver(lambda: None) as saver:
            interrupt_main()
            saver.step_done()
    finally:
        signal.signal(signal.SIGINT, old)
    assert came == [signal.SIGINT]


def test_a_finished_training_is_not_repeated(
    trainer: Trainer, uninterrupted: nn.Module, tmp_path: Path
) -> None:
    trainer.run(tmp_path / "state.pt")
    again = trainer.run(tmp_path / "state.pt", progress=InterruptedProgress(1))
    assert same_weights(again, uninterrupted)


def test_another_recipes_state_is_not_used(
    trainer: Trainer, uninterrupted: nn.Module, tmp_path: Path
) -> None:
    trainer.run(tmp_path / "state.pt", seed=1, fingerprint="other")
    assert same_weights(trainer.run(tmp_path / "state.pt"), uninterrupted)


def test_a_damaged_state_is_not_used(trainer: Trainer, uninterrupted: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"half of a")
    assert same_weights(trainer.run(tmp_path / "state.pt"), uninterrupted)


def test_early_stopping_keeps_the_best_and_survives_an_interruption(
    trainer: Trainer, validation_images: Images, spec: Preprocessing, tmp_path: Path
) -> None:
    # So high a rate that the loss goes up again.
    settings = Training(epochs=12, learning_rate=0.03, batch_size=16, patience=2)
    stopped = trainer.run(tmp_path / "one.pt", settings=settings)
    steps = InterruptedProgress(10**6)
    assert same_weights(trainer.run(tmp_path / "counted.pt", settings=settings, progress=steps), stopped)
    assert 10**6 - steps.steps_left < 12 * 3

    last = copy.deepcopy(stopped)
    last.load_state_dict(torch.load(tmp_path / "one.pt", weights_only=True)["network"])
    pixels, targets = validation_images.pixels, validation_images.targets
    assert evaluate(stopped, pixels, targets, spec).loss < evaluate(last, pixels, targets, spec).loss

    with pytest.raises(KeyboardInterrupt):
        trainer.run(tmp_path / "two.pt", settings=settings, progress=InterruptedProgress(4))
    assert same_weights(trainer.run(tmp_path / "two.pt", settings=settings), stopped)


def test_process_settings_come_back() -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with reproducible(threads=3):
        assert torch.get_num_threads() == 3
        assert torch.are_deterministic_algorithms_enabled()
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


@pytest.mark.parametrize("epochs", [1, 2, 4, 5, 6])
def test_it_may_have_very_few_steps(
    epochs: int, train_images: Images, validation_images: Images, spec: Preprocessing, tmp_path: Path
) -> None:
    """One for each epoch: the schedule's warm-up is a fifth of them, of five just one."""
    settings = Training(epochs=epochs, learning_rate=2e-3, batch_size=64)
    trainer = Trainer(train_images, validation_images, spec)
    network = trainer.run(tmp_path / "state.pt", settings=settings)
    assert all(torch.isfinite(weights).all() for weights in network.parameters())


@pytest.mark.parametrize("limit", ["SSE41", "avx2", "AVX512_CORE_VNNI"])
def test_bf16_is_not_chosen_where_onednn_is_kept_from_it(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """It would be emulated, which takes three times as long as FP32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert supported_precision(torch.device("cpu")) == "bf16"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert supported_precision(torch.device("cpu")) == "fp32"
