"""Combined files are tested against the updates themselves."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.storage.offline.combine_files import combine_files
from tests.support.layers import Experts
from tests.support.models import LitTiny, X, as_trained, randomise, state
from tests.support.storage import fitted


class Several(nn.Module):  # layers of several kinds
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.linear = nn.Linear(8, 8)
        self.fused = nn.Linear(8, 24)
        self.conv = nn.Conv1d(4, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.lstm = nn.LSTM(8, 4)
        self.experts = Experts()


BASE = Several()
LINEAR: dict[str, Any] = {"target_modules": ["linear"]}
EXPERTS: dict[str, Any] = {
    "target_modules": [],
    "target_parameters": ["experts.stack", "experts.mix"],
}
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "all": [
        {"target_modules": "all"},
        {"target_modules": "all", "r": 3, "alpha": 5, "use_rslora": True},
    ],
    "ranks": [
        {"target_modules": ["linear", "conv"], "rank_pattern": {"conv": 1}},
        {"target_modules": ["conv"], "r": 4},
    ],
    "slices": [
        {
            "target_modules": ["fused"],
            "target_slices": {"fused": {"q": (0, 8), "v": (16, 24)}},
        }
    ]
    * 2,
    "own ranks": [
        {
            **EXPERTS,
            "rank_pattern": {"experts.stack": 1},
            "alpha_pattern": {"experts.mix": 7},
        }
    ]
    * 2,
    "pissa": [
        {"target_modules": ["linear"], "init": "pissa"},
        {"target_modules": ["linear"]},
    ],
}


def update(model: nn.Module) -> dict[str, Tensor]:
    """What the adapters add to each weight."""
    ll.merge_adapters(model)
    return {
        name: value - BASE.state_dict()[name] for name, value in state(model).items()
    }


def saved(
    folder: Path, configs: list[dict[str, Any]]
) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """Files, and their updates by the name of the weight."""
    paths = []
    deltas = []
    for seed, config in enumerate(configs):
        model = copy.deepcopy(BASE)
        ll.inject_adapters(model, ll.LoRAConfig(**{"r": 2, "alpha": 3, **config}))
        randomise(model, seed, scale=0.3)
        paths.append(folder / f"{seed}.safetensors")
        ll.save_adapter(model, paths[-1])
        deltas.append(update(model))
    return paths, deltas


@pytest.mark.parametrize("r", [None, 12])
@pytest.mark.parametrize("configs", CONFIGS.values(), ids=CONFIGS)
def test_it_is_the_exact_sum_also_if_cut_where_the_rank_suffices(
    tmp_path: Path, configs: Any, r: Any
) -> None:
    paths, (one, other) = saved(tmp_path, configs)
    out = tmp_path / "sum.safetensors"
    combine_files(paths, out, (0.7, -0.4), r)
    model = copy.deepcopy(BASE)
    ll.load_adapter(model, out)
    found = update(model)
    for name in found:
        torch.testing.assert_close(
            found[name], 0.7 * one[name] - 0.4 * other[name], rtol=1e-4, atol=1e-5
        )


def test_a_cut_below_that_is_the_best_approximation(tmp_path: Path) -> None:
    paths, (one, other) = saved(tmp_path, [LINEAR] * 2)
    out = tmp_path / "sum.safetensors"
    combine_files(paths, out, (0.7, -0.4), 1)
    model = copy.deepcopy(BASE)
    ll.load_adapter(model, out)
    whole = 0.7 * one["linear.weight"] - 0.4 * other["linear.weight"]
    gap = (update(model)["linear.weight"] - whole).norm()
    torch.testing.assert_close(gap, torch.linalg.svdvals(whole)[1:].norm())


@pytest.mark.parametrize(
    ("number", "weights", "says"),
    [(1, (1.0,), "at least two"), (2, (1.0, 1.0, 1.0), "3 weights")],
)
def test_other_numbers_of_files_or_weights_are_refused(
    tmp_path: Path, number: int, weights: Any, says: str
) -> None:
    paths, _ = saved(tmp_path, [LINEAR, LINEAR])
    with pytest.raises(ll.ConfigError, match=says):
        combine_files(paths[:number], tmp_path / "sum.safetensors", weights)


def test_files_that_cannot_be_combined_are_refused(tmp_path: Path) -> None:
    paths, _ = saved(tmp_path, [LINEAR, LINEAR])
    out = tmp_path / "sum.safetensors"
    _, other = paths
    whole = as_trained(copy.deepcopy(BASE), **LINEAR, modules_to_save=["embed"])
    ll.save_adapter(whole, other)
    with pytest.raises(
        ll.AdapterMismatchError, match=r"also holds 'embed.weight', .*trained in full"
    ):
        combine_files(paths, out, (1.0, 1.0))
    model = copy.deepcopy(BASE)
    model.embed.weight.data += 1
    ll.save_adapter(as_trained(model, **LINEAR), other)
    with pytest.raises(ll.BaseMismatchError, match="different bases"):
        combine_files(paths, out, (1.0, 1.0))
    assert not out.exists()


class Filled(LitTiny):
    """A module whose set-up fills a buffer, as from data."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.register_buffer("scale", torch.zeros(4))

    def setup(self, stage: str) -> None:
        self.scale = torch.full((4,), self.value)

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) * self.scale


def fitted_with(value: float, file: Path) -> LitTiny:
    """A module after a fit with this value in its buffer, and its file."""
    return fitted(file, Filled(value), ll.LoRACallback(r=2, merge=False))


def test_buffers_that_set_up_filled_are_in_the_sum(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    both = tmp_path / "both.safetensors"
    model = fitted_with(2.0, file)
    combine_files([file, file], both, (0.25, 0.75))
    again = Filled(3.0)
    ll.load_adapter(again, both)
    torch.testing.assert_close(again(X), model(X))


def loaded_and_saved(file: Path) -> Path:
    """A file of what another one makes of a module that was not set up."""
    model = Filled(1.0)
    ll.load_adapter(model, file)
    ll.save_adapter(model, file.with_suffix(".safetensors"))
    return file.with_suffix(".safetensors")


def test_files_with_other_values_of_these_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "a.ckpt", tmp_path / "b.ckpt"]
    fitted_with(2.0, paths[0])
    fitted_with(5.0, paths[1])
    again = list(map(loaded_and_saved, paths))
    for files in (paths, again):
        with pytest.raises(ll.BaseMismatchError, match="different bases"):
            combine_files(files, tmp_path / "sum.safetensors", (1, 1))
