"""Combined files are tested against the updates themselves."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.storage.formats.own import read_adapter_file
from lightning_lora.storage.offline.combine_files import combine_files
from tests.support.layers import Experts
from tests.support.models import as_trained, randomise, state


class Several(nn.Module):
    """Layers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.fused = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 24)
        self.conv, self.attention, self.lstm = nn.Conv1d(4, 8, 3), nn.MultiheadAttention(8, 2), nn.LSTM(8, 3)
        self.experts = Experts()


BASE = Several()
LINEAR: dict[str, Any] = {"target_modules": ["linear"]}
EXPERTS: dict[str, Any] = {"target_modules": [], "target_parameters": ["experts.stack", "experts.mix"]}
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "all": [{"target_modules": "all"}, {"target_modules": "all", "r": 3, "alpha": 5, "use_rslora": True}],
    "ranks": [
        {"target_modules": ["linear", "conv"], "rank_pattern": {"conv": 1}},
        {"target_modules": ["conv"], "r": 4},
    ],
    "slices": [{"target_modules": ["fused"], "target_slices": {"fused": {"q": (0, 8), "v": (16, 24)}}}] * 2,
    "experts": [EXPERTS] * 2,
    "own ranks": [{**EXPERTS, "rank_pattern": {"experts.stack": 1}, "alpha_pattern": {"experts.mix": 7}}] * 2,
    "pissa": [{"target_modules": ["linear"], "init": "pissa"}, {"target_modules": ["linear"]}],
}


def adapted(config: dict[str, Any], seed: int) -> nn.Module:
    model = copy.deepcopy(BASE)
    ll.inject_adapters(model, ll.LoRAConfig(**{"r": 2, "alpha": 3, **config}))
    randomise(model, seed, scale=0.3)
    return model


def saved(folder: Path, configs: list[dict[str, Any]]) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """Files, and their updates by the name of the weight."""
    paths, deltas = [], []
    for seed, config in enumerate(configs):
        model = adapted(config, seed)
        paths.append(folder / f"{seed}.safetensors")
        ll.save_adapter(model, paths[-1])
        ll.merge_adapters(model)
        deltas.append({name: value - BASE.state_dict()[name] for name, value in state(model).items()})
    return paths, deltas


def combined(paths: list[Path], weights: Any, r: int | None = None) -> dict[str, Tensor]:
    """The update that the combined file makes of the base."""
    out = paths[0].with_name("sum.safetensors")
    combine_files(paths, out, weights, r)
    assert {layer.scaling for layer in read_adapter_file(out).layers.values()} == {1.0}
    model = copy.deepcopy(BASE)
    ll.load_adapter(model, out)
    ll.merge_adapters(model)
    return {name: value - BASE.state_dict()[name] for name, value in state(model).items()}


@pytest.mark.parametrize("r", [None, 12])
@pytest.mark.parametrize("configs", CONFIGS.values(), ids=CONFIGS)
def test_it_is_the_exact_sum_also_if_cut_where_the_rank_suffices(tmp_path: Path, configs: Any, r: Any) -> None:
    paths, (one, other) = saved(tmp_path, configs)
    found = combined(paths, (0.7, -0.4), r)
    for name in found:
        torch.testing.assert_close(found[name], 0.7 * one[name] - 0.4 * other[name], rtol=1e-4, atol=1e-5)


def test_a_cut_is_the_best_of_its_rank(tmp_path: Path) -> None:
    paths, deltas = saved(tmp_path, [LINEAR] * 2)
    one, other = (delta["linear.weight"] for delta in deltas)
    u, s, v = torch.linalg.svd(one + other)
    found = combined(paths, (1.0, 1.0), 2)["linear.weight"]
    torch.testing.assert_close(found, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-3, atol=1e-3)


def test_files_that_cannot_be_combined_are_refused(tmp_path: Path) -> None:
    paths, _ = saved(tmp_path, [LINEAR] * 2)
    out, other = tmp_path / "sum.safetensors", paths[1]
    for given, weights, says in ((paths[:1], (1.0,), "at least two"), (paths, (1.0,) * 3, "3 weights")):
        with pytest.raises(ll.ConfigError, match=says):
            combine_files(given, out, weights)
    with pytest.raises(ll.AdapterFileError, match=r"end in \.safetensors"):
        combine_files(paths, tmp_path / "sum.ckpt", (1.0, 1.0))
    model = copy.deepcopy(BASE)
    model.embed.weight.data += 1
    ll.save_adapter(as_trained(model, **LINEAR), other)
    with pytest.raises(ll.BaseMismatchError, match="different bases"):
        combine_files(paths, out, (1.0, 1.0))
    assert not out.exists()
