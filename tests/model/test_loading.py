"""State dicts that others load are the new base; adapters and frozen norms are the same in every mode."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.cases import held
from tests.support.layers import config
from tests.support.models import LitTiny, as_merged, as_trained, best, data, lora, randomise, same, state, trainer


def test_base_loaded_after_injection_is_the_base() -> None:
    def build(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    pretrained, model, x = build(0), build(1), torch.randn(5, 4)
    pretrained(x)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, modules_to_save=["2"]))
    nn.ModuleDict({"model": model}).load_state_dict({f"model.{k}": v for k, v in pretrained.state_dict().items()})
    randomise(model)
    with torch.no_grad():
        model[2].weight.add_(1)
    pretrained.eval(), model.eval()
    with ll.disable_adapters(model):
        assert torch.equal(model(x), pretrained(x))
    ll.remove_adapters(model)
    assert same(state(model), state(pretrained)) and not model._load_state_dict_pre_hooks


def test_base_loaded_from_a_wider_dtype_is_what_the_model_holds(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    model, base = build(), build()
    wide = {name: value.double() + 1 / 3 for name, value in state(model).items()}
    ll.inject_adapters(model, ll.LoRAConfig(r=2, modules_to_save=["2"]))
    for each in (model, base):
        each.load_state_dict(wide)
    ll.save_adapter(model, tmp_path / "a.safetensors")
    ll.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")
    ll.remove_adapters(model.double())
    assert same(state(model), state(base.double()))


def test_a_trained_part_loaded_by_itself_is_no_base() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    before = state(model)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, modules_to_save=["1"]))
    copied = copy.deepcopy(model)
    for each in (model, copied):
        each.load_state_dict({"1.weight": torch.ones(2, 4), "1.bias": torch.ones(2)}, strict=False)
        ll.remove_adapters(each)
        assert same(state(each), before) and not each._load_state_dict_pre_hooks


REPLACED: dict[str, Callable[[LitTiny], Any]] = {
    "loaded": lambda model: model.load_state_dict(LitTiny().state_dict()),
    "converted there and back": lambda model: model.bfloat16().float(),
    "loaded into one layer": lambda model: model.q_proj.load_state_dict(LitTiny().q_proj.state_dict()),
    "pruned": lambda model: nn.utils.prune.l1_unstructured(model.q_proj, "weight", 0.5),
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_weights_put_into_a_merged_model_are_a_new_base_and_no_way_back(tmp_path: Path, replace: Any) -> None:
    replace(model := as_merged(LitTiny()))
    base, file = state(model), tmp_path / "a.safetensors"
    enter = (lambda m: ll.disable_adapters(m), lambda m: ll.save_adapter(m, file))
    for call in (ll.unmerge_adapters, ll.adapter_state_dict, *enter):
        with pytest.raises(ll.AdapterStateError, match="changed since its adapters were merged"):
            call(model)
        assert same(state(model), base)
    ll.remove_adapters(model)
    assert same(state(model), base)


def test_a_state_of_adapters_is_not_half_loaded_into_the_merged_module(tmp_path: Path) -> None:
    model, checkpoint = LitTiny(), best(tmp_path)
    trainer(tmp_path, [lora(), checkpoint]).fit(model, data(), data())
    before, stored = state(model), held(torch.load(checkpoint.best_model_path, weights_only=True))
    with pytest.raises(ll.AdapterStateError, match="holds only adapters"):
        model.load_state_dict(stored, strict=False)
    assert same(state(model), before)
    ll.unmerge_adapters(model)
    model.load_state_dict(stored, strict=False)
    assert same({name: state(model)[name] for name in stored}, stored)


def test_other_code_loads_the_best_file_of_a_run_into_its_module(tmp_path: Path) -> None:
    model, checkpoint = LitTiny(), best(tmp_path)
    trainer(tmp_path, [lora(), checkpoint], max_epochs=3).fit(model, data(), data())
    stored = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    ll.load_adapter(expected := LitTiny(), checkpoint.best_model_path)
    ll.merge_adapters(expected)
    before = state(model)
    wrong = copy.copy(stored)
    wrong["head.weight"] = torch.ones(3)
    with pytest.raises(ll.AdapterMismatchError, match=r"'head.weight' is \(3,\)"):
        model.load_state_dict(wrong)
    assert same(state(model), before)
    model.load_state_dict(stored)
    assert same(state(model), state(expected))
    for each in (model, expected):
        ll.unmerge_adapters(each)
    assert same(state(model), state(expected))
    randomise(model)
    model.load_state_dict(stored)  # on its layers, too
    assert same(state(model), state(expected))
    other = LitTiny()
    torch.nn.init.ones_(other.embed.weight)
    trainer(tmp_path, [lora()], max_epochs=1).fit(other, data())
    with pytest.raises(ll.BaseMismatchError, match="another base"):
        other.load_state_dict(stored)
    scaled = LitTiny()
    trainer(tmp_path, [lora(alpha=16)], max_epochs=1).fit(scaled, data())
    with pytest.raises(ll.AdapterMismatchError, match="trained with r=2 and a scaling of 4 in"):
        scaled.load_state_dict(stored)
    with torch.no_grad():
        model.embed.weight.mul_(1.5)
    with pytest.raises(ll.BaseMismatchError, match="another base"):
        model.load_state_dict(stored)


class Versioned(nn.Module):
    """A part with a state of its own kind, that it takes only from its own version."""

    def __init__(self) -> None:
        super().__init__()
        self.version = 1
        self.register_buffer("bank", torch.zeros(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x

    def get_extra_state(self) -> Tensor:
        return torch.tensor(1)

    def set_extra_state(self, version: Tensor) -> None:
        if self.version != 1:
            raise ValueError("another version")


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Versioned(), nn.Linear(4, 4)).eval()


def two_states() -> tuple[nn.Sequential, dict[str, Any]]:
    """An adapted model with an update, and adapters that it is to fail to load."""
    other, model = build(), build()
    for seed, each in enumerate((other, model)):
        ll.inject_adapters(each, ll.LoRAConfig(r=2))
        randomise(each, seed)
    model[2].version = 2
    return model, ll.adapter_state_dict(other)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def test_a_buffer_that_a_failed_load_had_reset_is_given_back() -> None:
    model, state_of_other = two_states()
    model[1].running_mean.fill_(3)  # which the other state does not hold
    model[2].bank = torch.ones(3, 4)  # it has grown
    before = tensors(model)
    with pytest.raises(ValueError, match="another version"):
        ll.load_adapter_state_dict(model, state_of_other)
    assert same(tensors(model), before)


# Adapters on their layers, and norms of the frozen base: the same in every mode


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["1.linear1"], ["0.linear2"]])
@pytest.mark.parametrize("padded", [False, True])
def test_encoders_are_adapted_in_eval_and_inference_mode(targets: Any, norm_first: bool, padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).double()
    x = torch.randn(3, 5, 8, dtype=torch.double)
    padding = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]]) if padded else None
    kept = ~padding if padding is not None else slice(None)
    base = model(x, src_key_padding_mask=padding)[kept]
    as_trained(model, target_modules=targets)
    expected = model(x, src_key_padding_mask=padding)[kept]
    assert not torch.allclose(expected, base)
    model.eval()
    torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], expected)
    ll.merge_adapters(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], expected)


def switches(model: nn.TransformerEncoder) -> list[Any]:
    return [*(layer.activation_relu_or_gelu for layer in model.layers), model.use_nested_tensor]


@pytest.mark.parametrize("part_first", [False, True])
def test_an_encoder_that_was_adapted_twice_has_its_own_inference_path_again(part_first: bool) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    own = switches(model)
    ll.inject_adapters(model.layers[0] if part_first else model, ll.LoRAConfig(r=2, target_modules=["linear1"]))
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["linear1", "linear2"]))
    ll.remove_adapters(model)
    assert switches(model) == own == [1, 1, True]


UNDERMINED: dict[str, Any] = {
    "prune": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "old weight norm": lambda layer: nn.utils.weight_norm(layer),
    "spectral norm": lambda layer: nn.utils.parametrizations.spectral_norm(layer),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("undermine", UNDERMINED.values(), ids=UNDERMINED)
def test_weight_that_is_computed_since_injection_is_not_merged_or_given_back(undermine: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    ll.inject_adapters(model, config(model))
    randomise(model)
    undermine(model[0])
    adapted = model.eval()(torch.ones(8))
    for call in (ll.merge_adapters, ll.remove_adapters):
        with pytest.raises(ll.AdapterStateError, match=r"weight of '0' of Sequential is computed"):
            call(model)
    assert torch.equal(model(torch.ones(8)), adapted)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (3, 4)),
        (nn.BatchNorm2d(4, affine=False), (3, 4, 2, 2)),
        (nn.BatchNorm3d(4, momentum=None), (3, 4, 2, 2, 2)),
        (nn.SyncBatchNorm(4), (3, 4, 2)),
        (nn.InstanceNorm1d(4, track_running_stats=True), (3, 4, 5)),
    ],
)
def test_frozen_norm_does_not_drift_and_trains_as_it_evaluates(norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.ModuleDict({"norm": norm, "linear": nn.Linear(4, 4)})
    kind, before, x = type(norm), state(norm), torch.randn(shape)
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    model.train()
    trained = norm(x)
    assert norm.training and same(state(norm), before)
    assert torch.equal(trained, norm.eval()(x))
    again = copy.deepcopy(model)
    assert torch.equal(again["norm"].train()(x), trained) and same(state(again["norm"]), before)
    ll.remove_adapters(model)
    assert type(norm) is kind
    norm.train()(x)
    assert not same(state(norm), before)


def test_norm_that_is_named_trains_whole_and_one_without_statistics_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4)), nn.BatchNorm1d(4))
    model.append(nn.BatchNorm1d(4, track_running_stats=False))
    ll.inject_adapters(model, ll.LoRAConfig(r=2, modules_to_save=["1", "2"]))
    before = state(model)
    model(torch.randn(8, 4))
    after = state(model)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved == {f"{name}.{part}" for name in ("1", "2.0") for part in list(model[1]._buffers)}
    assert type(model[4]) is nn.BatchNorm1d


@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_norm_is_in_its_own_mode_after_a_forward_that_fails(training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm2d(4))
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    model.train(training)
    with pytest.raises(ValueError, match="expected"):
        model[1](torch.ones(2, 4))
    assert model[1].training is training


def test_norms_of_a_base_loaded_with_its_adapters_are_the_bases() -> None:
    model, again = (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))
    for buffer in model[1].buffers():
        buffer.add_(2)
    for each in (model, again):
        ll.inject_adapters(each, ll.LoRAConfig(r=1))
    randomise(model)
    again.load_state_dict(model.state_dict())
    ll.remove_adapters(again)
    ll.remove_adapters(model)
    assert same(state(again), state(model))
