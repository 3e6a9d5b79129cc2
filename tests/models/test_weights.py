"""Weights as trainers save them: found wherever they are in a file, whatever was put before their names."""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from models.networks import NetworkError, build_network, create_network
from models.weights import count_classes, fit, load_pretrained, load_weights, read_weights

NAME = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def source() -> nn.Module:
    torch.manual_seed(1)
    return build_network(NAME, 10)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(2)
    return build_network(NAME, 10)


def prefixed(state: dict[str, Any], *prefixes: str) -> dict[str, Any]:
    return {f"{''.join(prefixes)}{name}": tensor for name, tensor in state.items()}


def older(state: dict[str, Any]) -> dict[str, Any]:
    """Other weights of the same shapes, as those that an average is beside."""
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def trained(state: dict[str, Any]) -> dict[str, Any]:
    """What stands beside the weights in a checkpoint to continue from."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    return {"epoch": 3, "optimizer": optimizer.state_dict(), "best": np.float64(0.5), "loss": [1.0, 0.5]}


FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a state dict": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, **trained(state)},
    "model": lambda state: {"model": state, **trained(state)},
    "model_state_dict": lambda state: {"model_state_dict": state, **trained(state)},
    "net": lambda state: {"net": state, "acc": 91.2, "epoch": 7},
    "DataParallel": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "compiled and parallel": lambda state: {"model": prefixed(state, "module.", "_orig_mod.")},
    "compiled in part": lambda state: {
        name.replace("conv1.", "conv1._orig_mod."): state[name] for name in state
    },
    "a backbone": lambda state: prefixed(state, "model.", "backbone.", "net."),
    "Lightning": lambda state: {
        "state_dict": {**prefixed(state, "model."), "criterion.weight": torch.ones(10)},
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"lr": 1e-3, "model_name": NAME, "root": pathlib.PurePosixPath("data")},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9)}},
        "loops": collections.defaultdict(dict, fit={"epoch": 3}),
    },
    "timm": lambda state: {
        "epoch": 3,
        "arch": NAME,
        "state_dict": older(state),
        "state_dict_ema": state,
        "optimizer": trained(state)["optimizer"],
        "version": 2,
        "args": argparse.Namespace(model=NAME, img_size=160, mean=None, model_kwargs={}),
        "metric": 71.2,
    },
    "model_ema": lambda state: {"model": older(state), "model_ema": state},
    "an averaged model": lambda state: {
        "state_dict": {
            **prefixed(older(state), "model."),
            **prefixed(state, "ema_model.module."),
            "ema_model.n_averaged": torch.tensor(3),
        }
    },
    "half precision": lambda state: {name: tensor.half() for name, tensor in state.items()},
    "auxiliary heads": lambda state: {
        **state,
        "aux1.fc.weight": torch.ones(3),
        "AuxLogits.fc.bias": torch.ones(3),
    },
    "counted": lambda state: {**state, "total_ops": torch.ones(1), "conv1.total_params": torch.ones(1)},
    "without counters": lambda state: {name: state[name] for name in state if "num_batches" not in name},
}


class TestForms:
    @pytest.mark.parametrize("form", FORMS)
    def test_a_file_of_this_form_fills_the_network(
        self, tmp_path: Path, source: nn.Module, network: nn.Module, form: str
    ) -> None:
        state = dict(source.state_dict())
        torch.save(FORMS[form](state), tmp_path / "weights.pth")
        load_weights(network, read_weights(tmp_path / "weights.pth"), NAME)
        for name, tensor in network.state_dict().items():
            if "num_batches" not in name:
                torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=1e-5, msg=name)

    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".pth.tar", ".safetensors"])
    def test_every_suffix_is_read(
        self, tmp_path: Path, source: nn.Module, network: nn.Module, suffix: str
    ) -> None:
        file = tmp_path / f"weights{suffix}"
        save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
        save(source.state_dict(), file)  # type: ignore[operator]
        load_weights(network, read_weights(file), NAME)
        assert torch.equal(network.get_parameter("fc.weight"), source.get_parameter("fc.weight"))

    def test_a_file_from_before_torch_1_6(
        self, tmp_path: Path, source: nn.Module, network: nn.Module
    ) -> None:
        torch.save(source.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        load_weights(network, read_weights(tmp_path / "old.pth"), NAME)
        assert torch.equal(network.get_parameter("fc.weight"), source.get_parameter("fc.weight"))

    def test_what_was_taken_is_told(self, tmp_path: Path, source: nn.Module, network: nn.Module) -> None:
        torch.save(FORMS["an averaged model"](dict(source.state_dict())), tmp_path / "weights.ckpt")
        found = fit(read_weights(tmp_path / "weights.ckpt"), network)
        count = len(source.state_dict())
        assert str(found) == f"{count} tensors of 'state_dict', names without 'ema_model.module.'"


class TestWhatAFileSays:
    @pytest.mark.parametrize("form", ["Lightning", "timm"])
    def test_its_architecture(self, tmp_path: Path, source: nn.Module, form: str) -> None:
        torch.save(FORMS[form](dict(source.state_dict())), tmp_path / "weights.ckpt")
        file = read_weights(tmp_path / "weights.ckpt")
        assert (file.architecture, file.by_timm) == (NAME, form == "timm")

    def test_what_timm_was_told_of_images(self, tmp_path: Path, source: nn.Module) -> None:
        torch.save(FORMS["timm"](dict(source.state_dict())), tmp_path / "weights.pth.tar")
        assert read_weights(tmp_path / "weights.pth.tar").config["img_size"] == 160

    def test_its_number_of_classes(self, tmp_path: Path) -> None:
        for name, classes in (("squeezenet1_1", 7), ("timm:test_resnet", 3)):
            network = create_network(name, classes)
            torch.save({"state_dict": prefixed(network.state_dict(), "model.")}, tmp_path / "weights.pth")
            file = read_weights(tmp_path / "weights.pth")
            assert count_classes(file, lambda count, name=name: create_network(name, count)) == classes  # type: ignore[misc]

    def test_its_labels(self, tmp_path: Path, source: nn.Module) -> None:
        told = {"model_state_dict": source.state_dict(), "class_to_idx": {"cat": 0, "dog": 1}}
        torch.save(told, tmp_path / "weights.pth")
        assert read_weights(tmp_path / "weights.pth").labels == {"cat": 0, "dog": 1}

    def test_a_folder_of_hugging_face(self, tmp_path: Path, source: nn.Module) -> None:
        config = {
            "architecture": "resnet18",
            "num_classes": 10,
            "label_names": ["a", "b"],
            "pretrained_cfg": {"input_size": [3, 160, 160], "mean": [0.5, 0.5, 0.5]},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
        file = read_weights(tmp_path)
        assert (file.architecture, file.by_timm, file.labels) == ("resnet18", True, ["a", "b"])
        assert file.config["input_size"] == [3, 160, 160]

    def test_a_folder_of_transformers(self, tmp_path: Path, source: nn.Module) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViTForImageClassification"]}))
        safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
        assert read_weights(tmp_path).transformers == "ViTForImageClassification"


class Dangerous:
    """Copies a file wherever it is read with all of pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return shutil.copyfile, (__file__, str(self.path))


class TestCode:
    """Nothing in a file is ever run."""

    def test_objects_beside_the_weights_do_nothing(
        self, tmp_path: Path, source: nn.Module, network: nn.Module
    ) -> None:
        content = {"model": source.state_dict(), "callback": Dangerous(tmp_path / "copied")}
        torch.save(content, tmp_path / "weights.pth")
        load_weights(network, read_weights(tmp_path / "weights.pth"), NAME)
        assert not (tmp_path / "copied").exists()
        torch.load(tmp_path / "weights.pth", weights_only=False)
        assert (tmp_path / "copied").exists()

    def test_no_class_is_known_to_torch_afterwards(self, tmp_path: Path, source: nn.Module) -> None:
        before = set(torch.serialization.get_safe_globals())
        torch.save({"model": source.state_dict(), "x": Dangerous(tmp_path)}, tmp_path / "weights.pth")
        read_weights(tmp_path / "weights.pth")
        assert set(torch.serialization.get_safe_globals()) == before

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_a_whole_model_is_refused_with_what_to_save(
        self, tmp_path: Path, source: nn.Module, wrapped: bool
    ) -> None:
        torch.save({"model": source, "epoch": 3} if wrapped else source, tmp_path / "model.pt")
        with pytest.raises(
            NetworkError, match=r"is a pickled .*ShuffleNetV2, .*torch\.save\(model\.state_dict"
        ):
            read_weights(tmp_path / "model.pt")

    @pytest.mark.filterwarnings("ignore:`torch.jit")
    def test_torchscript_is_refused_with_what_to_save(self, tmp_path: Path) -> None:
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
        with pytest.raises(NetworkError, match=r"is TorchScript\. Save .*torch\.jit\.load\('script\.pt'\)"):
            read_weights(tmp_path / "script.pt")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("nothing.pth", None, "cannot read weights from .*: No such file"),
            (
                "text.pth",
                b"version https://git-lfs",
                "cannot read weights from .*: it is no file of PyTorch's",
            ),
            ("text.safetensors", b"version https://git-lfs", "cannot read weights from .*"),
            ("zip.pth", b"PK\x05\x06" + bytes(18), "cannot read weights from .*: it is no file of PyTorch's"),
        ],
    )
    def test_what_is_no_file_of_weights(
        self, tmp_path: Path, name: str, content: bytes | None, message: str
    ) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(NetworkError, match=message):
            read_weights(tmp_path / name)

    def test_a_checkpoint_without_weights(self, tmp_path: Path) -> None:
        torch.save({"epoch": 3, "optimizer": {"state": {}}}, tmp_path / "state.pth")
        with pytest.raises(NetworkError, match="has no weights: no names with tensors"):
            read_weights(tmp_path / "state.pth")


class TestMisfits:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("fc.bias"), r"1 missing \(fc\.bias\)"),
            (lambda state: state.update(neck=torch.ones(1)), r"1 that it has not \(neck\)"),
            (
                lambda state: state.update({"conv1.0.weight": torch.ones(24, 3, 7, 7)}),
                r"1 of another shape \(conv1\.0\.weight is 24x3x7x7, not 24x3x3x3\)",
            ),
        ],
    )
    def test_are_named(
        self,
        tmp_path: Path,
        source: nn.Module,
        network: nn.Module,
        change: Callable[[dict[str, Any]], Any],
        message: str,
    ) -> None:
        state = dict(source.state_dict())
        change(state)
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(NetworkError, match=message):
            load_weights(network, read_weights(tmp_path / "weights.pth"), NAME)

    def test_a_deeper_network_of_the_same_family_is_another(self, tmp_path: Path) -> None:
        """ResNet34 has all that ResNet18 has, in the same shapes."""
        torch.save(create_network("resnet34", 10).state_dict(), tmp_path / "weights.pth")
        with pytest.raises(NetworkError, match=r"that it has not \(layer1\.2\.conv1\.weight"):
            load_weights(create_network("resnet18", 10), read_weights(tmp_path / "weights.pth"), "resnet18")


class TestPretrained:
    @pytest.fixture
    def network(self) -> nn.Module:
        torch.manual_seed(2)
        return build_network(NAME, 7, "small")

    def test_all_that_fits_is_taken_and_the_rest_named(
        self, tmp_path: Path, source: nn.Module, network: nn.Module
    ) -> None:
        torch.save({"state_dict": prefixed(source.state_dict(), "module.")}, tmp_path / "weights.pth")
        assert load_pretrained(network, tmp_path / "weights.pth") == ["fc.weight", "fc.bias"]
        for name, tensor in network.state_dict().items():
            if name not in ("fc.weight", "fc.bias"):
                assert torch.equal(tensor, source.state_dict()[name]), name

    def test_a_first_convolution_of_another_shape_stays_random(self, tmp_path: Path) -> None:
        torch.save(build_network("resnet18", 7).state_dict(), tmp_path / "weights.pth")
        network = build_network("resnet18", 7, "small")
        assert load_pretrained(network, tmp_path / "weights.pth") == ["conv1.weight"]

    def test_another_architecture_is_refused(self, tmp_path: Path, source: nn.Module) -> None:
        torch.save(source.state_dict(), tmp_path / "weights.pth")
        with pytest.raises(NetworkError, match="does not fit this architecture"):
            load_pretrained(build_network("squeezenet1_1", 10), tmp_path / "weights.pth")
