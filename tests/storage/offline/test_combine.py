"""Combined files are tested against the updates themselves."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    ConfigError,
    LoRAConfig,
    inject_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from lightning_lora.functional.combine import ties
from lightning_lora.storage.formats.own import read_adapter_file, write_adapter_file
from lightning_lora.storage.offline.combine import How, combine_files
from tests.support.models import randomise, state


class Several(nn.Module):
    """Layers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.fused = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 24)
        self.conv, self.attention, self.lstm = nn.Conv1d(4, 8, 3), nn.MultiheadAttention(8, 2), nn.LSTM(8, 3)
        self.experts = Experts()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.up @ self.down


BASE = Several()
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "all": [{"target_modules": "all"}, {"target_modules": "all", "r": 3, "alpha": 5, "use_rslora": True}],
    "ranks": [
        {"target_modules": ["linear", "conv"], "rank_pattern": {"conv": 1}},
        {"target_modules": ["conv"], "r": 4},
    ],
    "slices": [{"target_modules": ["fused"], "target_slices": {"fused": {"q": (0, 8), "v": (16, 24)}}}] * 2,
    "experts": [{"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}] * 2,
    "pissa": [{"target_modules": ["linear"], "init": "pissa"}, {"target_modules": ["linear"]}],
}


def adapted(config: dict[str, Any], seed: int) -> nn.Module:
    model = copy.deepcopy(BASE)
    inject_adapters(model, LoRAConfig(**{"r": 2, "alpha": 3, **config}))
    randomise(model, seed, scale=0.3)
    return model


def saved(folder: Path, configs: list[dict[str, Any]]) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """Files, and their updates by the name of the weight."""
    paths, deltas = [], []
    for seed, config in enumerate(configs):
        model = adapted(config, seed)
        paths.append(folder / f"{seed}.safetensors")
        save_adapter(model, paths[-1])
        merge_adapters(model)
        deltas.append({name: value - BASE.state_dict()[name] for name, value in state(model).items()})
    return paths, deltas


def loaded(path: Path) -> dict[str, Tensor]:
    """The update that a file makes of the base."""
    model = copy.deepcopy(BASE)
    load_adapter(model, path)
    merge_adapters(model)
    return {name: value - BASE.state_dict()[name] for name, value in state(model).items()}


@pytest.mark.parametrize("configs", CONFIGS.values(), ids=CONFIGS)
def test_cat_is_the_exact_sum(tmp_path: Path, configs: list[dict[str, Any]]) -> None:
    paths, (one, other) = saved(tmp_path, configs)
    combine_files(paths, tmp_path / "sum.safetensors", How("cat", (0.7, -0.4)))
    found = loaded(tmp_path / "sum.safetensors")
    for name in found:
        torch.testing.assert_close(found[name], 0.7 * one[name] - 0.4 * other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("configs", CONFIGS.values(), ids=CONFIGS)
def test_svd_is_exact_where_the_rank_suffices(tmp_path: Path, configs: list[dict[str, Any]]) -> None:
    paths, (one, other) = saved(tmp_path, configs)
    combine_files(paths, tmp_path / "sum.safetensors", How("svd", (1.0, 2.0), r=12))
    found = loaded(tmp_path / "sum.safetensors")
    for name in found:
        torch.testing.assert_close(found[name], one[name] + 2 * other[name], rtol=1e-3, atol=1e-4)


def test_svd_is_the_best_of_its_rank(tmp_path: Path) -> None:
    paths, (one, other) = saved(tmp_path, [{"target_modules": ["linear"]}] * 2)
    combine_files(paths, tmp_path / "sum.safetensors", How("svd", (1.0, 1.0)))
    u, s, v = torch.linalg.svd(one["linear.weight"] + other["linear.weight"])
    best = (u[:, :2] * s[:2]) @ v[:2]
    torch.testing.assert_close(loaded(tmp_path / "sum.safetensors")["linear.weight"], best, rtol=1e-3, atol=1e-4)


def test_ties_and_dare_are_those_of_the_updates(tmp_path: Path) -> None:
    paths, (one, other) = saved(tmp_path, [{"target_modules": ["linear"]}] * 2)
    combine_files(paths, tmp_path / "ties.safetensors", How("ties", (1.0, 0.5), r=8, density=0.5))
    expected = ties([one["linear.weight"], other["linear.weight"]], [1.0, 0.5], 0.5)
    torch.testing.assert_close(loaded(tmp_path / "ties.safetensors")["linear.weight"], expected, rtol=1e-3, atol=1e-3)
    combine_files(paths, tmp_path / "dare.safetensors", How("dare", (1.0, 0.5), r=8, density=1.0))
    total = one["linear.weight"] + 0.5 * other["linear.weight"]
    torch.testing.assert_close(loaded(tmp_path / "dare.safetensors")["linear.weight"], total, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_added_is_refused(tmp_path: Path) -> None:
    def refused(configs: list[dict[str, Any]], error: type[Exception], says: str, how: How | None = None) -> None:
        paths, _ = saved(tmp_path, configs)
        with pytest.raises(error, match=says):
            combine_files(paths, tmp_path / "sum.safetensors", how or How("cat", (1.0,) * len(configs)))
        assert not (tmp_path / "sum.safetensors").exists()

    linear: dict[str, Any] = {"target_modules": ["linear"]}
    refused([linear, {**linear, "use_dora": True}], AdapterMismatchError, "DoRA")
    refused([linear, {**linear, "bias": "all"}], AdapterMismatchError, "trained in full")
    refused([linear, {**linear, "target_slices": {"linear": {"a": (0, 4)}}}], AdapterMismatchError, "in other parts")
    refused([linear], ConfigError, "at least two")
    refused([linear] * 2, ConfigError, "3 weights", How("cat", (1.0,) * 3))
    paths, _ = saved(tmp_path, [linear] * 2)
    with pytest.raises(AdapterFileError, match=r"end in \.safetensors"):
        combine_files(paths, tmp_path / "sum.ckpt", How("cat", (1.0, 1.0)))
    for wrong in (
        {"r": 2},
        {"method": "svd", "r": 0},
        {"method": "ties", "density": 0.0},
        {"density": 1.5},
        {"weights": (1.0, float("nan"))},
    ):
        with pytest.raises(ConfigError, match="not valid"):
            How(**{"method": "cat", "weights": (1.0, 1.0), **wrong})  # type: ignore[arg-type]


def test_files_of_two_bases_are_refused(tmp_path: Path) -> None:
    paths, _ = saved(tmp_path, [{"target_modules": ["linear"]}] * 2)
    other = Several()
    inject_adapters(other, LoRAConfig(r=2, target_modules=["linear"]))
    save_adapter(other, tmp_path / "other.safetensors")
    with pytest.raises(BaseMismatchError, match="different bases"):
        combine_files([paths[0], tmp_path / "other.safetensors"], tmp_path / "sum.safetensors", How("cat", (1.0, 1.0)))


def test_diverged_files_are_refused(tmp_path: Path) -> None:
    (one, other), _ = saved(tmp_path, [{"target_modules": ["linear"]}] * 2)
    stored = read_adapter_file(other)
    stored.state["linear.lora_B"].fill_(torch.nan)
    write_adapter_file(other, stored)
    with pytest.raises(AdapterFileError, match=r"'linear.lora_B' in .* hold NaN"):
        combine_files([one, other], tmp_path / "sum.safetensors", How("cat", (1.0, 1.0)))
