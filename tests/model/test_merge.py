"""A merge computes the same, and is undone exactly."""

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.functional import update
from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from tests.benchmarks.measure import peak_growth
from tests.support.compared import assert_same_state, assert_state
from tests.support.faults import unchanged
from tests.support.models import TinyLM, as_trained, is_plain, randomise, state, unties
from tests.support.parameters import flags_of, nan_at, trainable_names


@unties
@pytest.mark.parametrize(
    ("dtype", "targets", "method"),
    [
        (torch.float64, ["q_proj", "lm_head"], {}),
        # where a tied weight's base would be rounded too
        (torch.bfloat16, ["q_proj"], {"use_dora": True}),
        (torch.bfloat16, ["q_proj"], {"init": "pissa"}),
    ],
)
def test_converted_merged_model_comes_back_on_its_converted_base(
    tmp_path: Path, dtype: torch.dtype, targets: list[str], method: dict[str, Any]
) -> None:
    base = TinyLM()
    model = as_trained(copy.deepcopy(base), target_modules=targets, **method)
    converted = copy.deepcopy(model).to(dtype)
    ll.merge_adapters(model)
    model.to(dtype)
    parameters = list(model.parameters())
    with unchanged(model), ll.disable_adapters(model):
        assert is_plain(model)
    for found, expected in zip(model.parameters(), parameters, strict=True):
        assert found is expected
    ll.save_adapter(model, tmp_path / "a.safetensors")
    ll.load_adapter(base.to(dtype), tmp_path / "a.safetensors")
    ll.unmerge_adapters(model)
    assert_same_state(model, converted)
    assert model.lm_head.weight is model.embed.weight
    assert_same_state(base, converted)


def test_merge_that_unties_says_so() -> None:
    model = TinyLM()
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["lm_head"]))
    with pytest.warns(ll.LoRAWarning, match="'lm_head' in TinyLM was tied"):
        ll.merge_adapters(model)


def test_merge_that_overflows_says_so() -> None:
    half = nn.Sequential(nn.Linear(4, 4)).half()
    ll.inject_adapters(half, ll.LoRAConfig(r=1))
    randomise(half, scale=1e3)
    message = "'0' in Sequential cannot hold: the weights are infinite"
    with pytest.warns(ll.MergePrecisionWarning, match=message):
        ll.merge_adapters(half)
    ll.unmerge_adapters(half)


def test_merged_model_remembers_its_base_in_the_hosts_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = as_trained(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    moved = list[Tensor]()
    cpu = Tensor.cpu

    def host(tensor: Tensor) -> Tensor:
        moved.append(cpu(tensor).clone())
        return moved[-1]

    monkeypatch.setattr(Tensor, "cpu", host)
    ll.merge_adapters(model)
    kept = {id(weight.base_value) for weight in View(model).merged_weights}
    assert kept == set(map(id, moved))
    assert len(moved) == 2


def test_merge_inside_autocast_is_the_merge() -> None:
    model = as_trained(nn.Sequential(nn.Linear(6, 6)))
    alike = copy.deepcopy(model)
    ll.merge_adapters(alike)
    with torch.autocast("cpu", torch.bfloat16):
        ll.merge_adapters(model)
        ll.disable_adapters(model).__exit__(None, None, None)
    assert_same_state(model, alike)


def test_layers_hear_of_their_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_trained(nn.Sequential(nn.Linear(4, 4)))
    seen = list[Tensor]()
    monkeypatch.setattr(
        LoRALayer,
        "lora_weights_changed",
        lambda layer: seen.append(layer.weight.clone()),
    )
    ll.merge_adapters(model)
    (merged,) = seen
    assert torch.equal(merged, model[0].weight)


def test_a_merge_of_what_has_no_values_is_refused_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 4))
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    randomise(model[1])
    weight = model[1].weight.detach().clone()
    with pytest.raises(
        ll.AdapterStateError, match="'0' in Sequential have no values yet"
    ):
        ll.merge_adapters(model)
    assert torch.equal(model[1].weight, weight)


@unties
@pytest.mark.parametrize("merged_before", [False, True])
def test_a_merge_that_keeps_nothing_is_a_merge_and_a_removal(
    merged_before: bool,
) -> None:
    model = as_trained(
        TinyLM(), target_modules=["q_proj", "lm_head"], modules_to_save=["norm"]
    )
    expected = copy.deepcopy(model)
    ll.merge_adapters(expected)
    ll.remove_adapters(expected)
    if merged_before:
        ll.merge_adapters(model)
    weight = model.q_proj.weight
    ll.merge_adapters(model, keep_base=False)
    assert_same_state(model, expected)
    assert is_plain(model)
    assert model.q_proj.weight is weight
    assert trainable_names(model) == trainable_names(expected)
    assert not model._load_state_dict_pre_hooks
    with pytest.raises(ll.AdapterStateError, match="has no adapters"):
        ll.unmerge_adapters(model)


def layers(number: int, width: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(width, width, **options) for _ in range(number)])


def grown_layers(*, keep_base: bool) -> float:
    """How many layers' memory a merge takes."""
    # Above 32 MiB, glibc gives a tensor pages of its own, so that memory freed by
    # earlier tests does not count.
    model = as_trained(layers(8, 3072, bias=False))
    bytes_of_a_layer = 4 * 3072**2
    return (
        peak_growth(lambda: ll.merge_adapters(model, keep_base=keep_base))
        / bytes_of_a_layer
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_merge_that_keeps_nothing_takes_the_memory_of_one_layer() -> None:
    assert grown_layers(keep_base=False) < 2
    assert grown_layers(keep_base=True) > 7


def test_a_merge_that_keeps_nothing_and_fails_midway_leaves_what_computes_the_same(
    monkeypatch: Any,
) -> None:
    model = as_trained(layers(4, 8))
    x = torch.randn(2, 8)
    output = model(x)
    calls = []
    merge_one = update.merged

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return merge_one(*args)

    monkeypatch.setattr("lightning_lora.layers.weights.merged", fails)
    with pytest.raises(KeyboardInterrupt):
        ll.merge_adapters(model, keep_base=False)
    torch.testing.assert_close(model(x), output)
    assert [type(layer) is nn.Linear for layer in model] == [True, True, False, False]
    ll.merge_adapters(model, keep_base=False)  # again, which ends it
    torch.testing.assert_close(model(x), output)
    assert is_plain(model)
    assert all(flags_of(model).values())


@pytest.mark.parametrize("keep_base", [True, False])
def test_adapters_of_a_diverged_training_are_named_when_merged_or_saved(
    tmp_path: Path, keep_base: bool
) -> None:
    model = as_trained(layers(2, 8))
    nan_at(model[1].lora_B, 0, 0)
    with pytest.raises(
        ll.AdapterStateError, match=r"'1\.lora_B' of Sequential hold NaN"
    ):
        ll.save_adapter(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match=r"'1\.lora_B' of Sequential hold NaN"):
        ll.merge_adapters(model, keep_base=keep_base)


@pytest.mark.filterwarnings("ignore::lightning_lora.MergePrecisionWarning")
def test_diverged_adapters_in_half_precision_are_told_to_train_in_float32() -> None:
    model = as_trained(layers(2, 8).half(), autocast_adapter_dtype=False)
    nan_at(model[1].lora_B, 0, 0)
    with pytest.warns(UserWarning, match="train without autocast_adapter_dtype=False"):
        ll.merge_adapters(model)


# A copy of a merged model is un-merged exactly, or refused if it changed


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


class Model(nn.Module):
    """Layers of many kinds, with weights larger than a quick look."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 50)
        self.head = nn.Linear(50, 60, bias=False)
        self.head.weight = self.embed.weight
        self.q = nn.Linear(50, 50)
        self.rnn = nn.LSTM(50, 50)
        self.other = nn.Linear(50, 60)
        self.again = self.q


def merged() -> tuple[Model, dict[str, Tensor]]:
    """A merged model, and its state before."""
    model = as_trained(
        Model(), target_modules=["head", "q", "rnn"], modules_to_save=["other"]
    )
    before = state(model)
    ll.merge_adapters(model)
    return model, before


@torch.no_grad()
def write(model: nn.Module, name: str, amount: float = 1.0) -> None:
    # between the samples of a quick look
    model.get_parameter(name).view(-1)[1] += amount


def replace(model: nn.Module, name: str) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, copy.deepcopy(model.get_parameter(name)))
    write(model, name)


NAMES = (
    "q.weight",
    "head.weight",
    "embed.weight",
    "rnn.weight_hh_l0",
    "q.bias",
    "other.weight",
)


@unties
@pytest.mark.parametrize("before_the_copy", [True, False])
@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("change", [write, replace])
@pytest.mark.parametrize("name", NAMES)
def test_a_change_before_or_after_a_copy_is_refused(
    name: str, change: Callable[..., None], kind: str, before_the_copy: bool
) -> None:
    model, _ = merged()
    if before_the_copy:
        change(model, name)
    model = COPIES[kind](model)
    if not before_the_copy:
        change(model, name)
    with (
        unchanged(model),
        pytest.raises(
            ll.AdapterStateError, match="changed since its adapters were merged"
        ),
    ):
        ll.unmerge_adapters(model)


def loads_its_own_state(model: Model) -> Model:
    model.load_state_dict(state(model))
    return model


def in_other_memory(tensor: Tensor) -> Tensor:
    """The same values; a matrix lies transposed."""
    if tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    return tensor.clone()


def lays_out_otherwise(model: Model) -> Model:
    for p in model.parameters():
        p.data = in_other_memory(p.data)
    return model


STEPS = [*COPIES.values(), loads_its_own_state, lays_out_otherwise]


@unties
@pytest.mark.parametrize("first", STEPS)
@pytest.mark.parametrize("second", STEPS)
def test_copies_of_copies_are_unmerged_exactly_with_the_same_values_in_other_memory(
    first: Callable[..., Any], second: Callable[..., Any]
) -> None:
    model, before = merged()
    model = second(first(model))
    ll.unmerge_adapters(model)
    assert_state(model, before)
    assert model.head.weight is model.embed.weight
    assert model.again is model.q
