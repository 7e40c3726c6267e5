"""State dicts that others load are the new base; adapters and frozen norms are the same in every mode."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.compared import (
    assert_all_refused,
    assert_same_state,
    assert_same_tensors,
    assert_state,
)
from tests.support.faults import unchanged
from tests.support.layers import config
from tests.support.models import (
    LitTiny,
    as_merged,
    as_trained,
    best,
    data,
    lora,
    randomise,
    same,
    state,
    trainer,
)
from tests.support.parameters import cloned


def build(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


CONFIG = ll.LoRAConfig(r=2, target_modules=["0"], modules_to_save=["2"])


def test_base_loaded_from_a_wider_dtype_is_what_the_model_holds(tmp_path: Path) -> None:
    model = build()
    base = build()
    wide = {name: value.double() + 1 / 3 for name, value in state(model).items()}
    ll.inject_adapters(model, CONFIG)
    model.load_state_dict(wide)
    base.load_state_dict(wide)
    ll.save_adapter(model, tmp_path / "a.safetensors")
    ll.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")
    ll.remove_adapters(model.double())
    assert_same_state(model, base.double())


def test_a_trained_part_loaded_by_itself_is_no_base() -> None:
    model = build()
    before = state(model)
    ll.inject_adapters(model, CONFIG)
    copied = copy.deepcopy(model)
    for each in (model, copied):
        each.load_state_dict(
            {"2.weight": torch.ones(2, 4), "2.bias": torch.ones(2)}, strict=False
        )
        ll.remove_adapters(each)
        assert_state(each, before)
        assert not each._load_state_dict_pre_hooks


@pytest.mark.filterwarnings(
    "ignore:A state of the base was loaded below trained "
    "adapters:lightning_lora.LoRAWarning"
)
def test_the_same_base_loaded_again_leaves_the_adapters() -> None:
    model = as_trained(LitTiny())
    before = state(model)
    model.load_state_dict(LitTiny().state_dict(), strict=False)
    assert_state(model, before)


REPLACED: dict[str, Callable[[LitTiny], Any]] = {
    "loaded": lambda model: model.load_state_dict(LitTiny().state_dict()),
    "converted there and back": lambda model: model.bfloat16().float(),
    "loaded into one layer": lambda model: model.q_proj.load_state_dict(
        LitTiny().q_proj.state_dict()
    ),
    "pruned": lambda model: nn.utils.prune.l1_unstructured(model.q_proj, "weight", 0.5),
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_weights_put_into_a_merged_model_are_a_new_base_and_no_way_back(
    tmp_path: Path, replace: Any
) -> None:
    model = as_merged(LitTiny())
    stored = copy.deepcopy(ll.adapter_state_dict(model))
    replace(model)
    calls: list[Callable[[Any], Any]] = [
        ll.unmerge_adapters,
        ll.adapter_state_dict,
        lambda model: ll.load_adapter_state_dict(model, stored),
        lambda model: ll.disable_adapters(model),
        lambda model: ll.save_adapter(model, tmp_path / "a.safetensors"),
    ]
    assert_all_refused(
        model, calls, ll.AdapterStateError, "changed since its adapters were merged"
    )
    with unchanged(model):
        ll.remove_adapters(model)


def test_a_state_of_adapters_is_not_half_loaded_into_the_merged_module() -> None:
    model = as_trained(LitTiny(), modules_to_save=["head"])
    stored = cloned(ll.adapter_state_dict(model))
    ll.merge_adapters(model)
    with unchanged(model), pytest.raises(ll.AdapterStateError, match="holds adapters"):
        model.load_state_dict(stored, strict=False)
    ll.unmerge_adapters(model)
    model.load_state_dict(stored, strict=False)
    assert_same_tensors(ll.adapter_state_dict(model), stored)


def fit_and_read(folder: Path, model: LitTiny, **config: Any) -> dict[str, Any]:
    """Fit a module, and return its best checkpoint."""
    checkpoint = best(folder)
    t = trainer(folder, [lora(**config), checkpoint], max_epochs=2)
    t.fit(model, data(), data())
    return torch.load(checkpoint.best_model_path, weights_only=True)


def test_other_code_loads_the_best_file_of_a_run_into_its_module(
    tmp_path: Path,
) -> None:
    model = LitTiny()
    checkpoint = fit_and_read(tmp_path, model)
    stored = checkpoint["state_dict"]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    expected = LitTiny()
    ll.load_adapter(expected, tmp_path / "a.ckpt")
    ll.merge_adapters(expected)
    model.load_state_dict(stored)
    assert_same_state(model, expected)
    ll.unmerge_adapters(model)
    ll.unmerge_adapters(expected)
    assert_same_state(model, expected)
    randomise(model)
    model.load_state_dict(stored)  # on its layers, too
    assert_same_state(model, expected)


# Adapters on their layers, and norms of the frozen base: the same in every mode


@pytest.mark.parametrize(
    ("targets", "norm_first", "padded"),
    [
        ("all-linear", False, True),
        ("all-linear", True, False),
        (["1.linear1"], False, True),
        (["0.linear2"], True, True),
    ],
)
def test_encoders_are_adapted_in_eval_and_inference_mode(
    targets: Any, norm_first: bool, padded: bool
) -> None:
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0, batch_first=True, norm_first=norm_first
    )
    model = nn.TransformerEncoder(
        layer, 2, enable_nested_tensor=not norm_first
    ).double()
    x = torch.randn(3, 5, 8).double()
    padding = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])

    def run() -> Tensor:
        return model(x, src_key_padding_mask=padding)[~padding] if padded else model(x)

    base = run()
    as_trained(model, target_modules=targets)
    expected = run()
    assert not torch.allclose(expected, base)
    model.eval()
    torch.testing.assert_close(run(), expected)
    with torch.inference_mode():
        torch.testing.assert_close(run(), expected)
    ll.merge_adapters(model)
    with torch.no_grad():
        torch.testing.assert_close(run(), expected)


UNDERMINED: dict[str, Any] = {
    "prune": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
}


def test_a_file_of_another_run_is_not_loaded_by_other_code(tmp_path: Path) -> None:
    model = LitTiny()
    stored = fit_and_read(tmp_path, model)["state_dict"]
    wrong = copy.copy(stored)
    wrong["head.weight"] = torch.ones(3)
    with (
        unchanged(model),
        pytest.raises(ll.AdapterMismatchError, match=r"'head.weight' is \(3,\)"),
    ):
        model.load_state_dict(wrong)
    other = LitTiny()
    nn.init.ones_(other.embed.weight)
    fit_and_read(tmp_path, other)
    with pytest.raises(ll.BaseMismatchError, match="another base"):
        other.load_state_dict(stored)
    scaled = LitTiny()
    fit_and_read(tmp_path, scaled, alpha=16)
    with pytest.raises(
        ll.AdapterMismatchError, match="trained with r=2 and a scaling of 4 in"
    ):
        scaled.load_state_dict(stored)


@pytest.mark.parametrize("call", [ll.merge_adapters, ll.remove_adapters])
@pytest.mark.parametrize("undermine", UNDERMINED.values(), ids=UNDERMINED)
def test_weight_that_is_computed_since_injection_is_not_merged_or_given_back(
    undermine: Any, call: Any
) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    ll.inject_adapters(model, config(model))
    randomise(model)
    undermine(model[0])
    adapted = model.eval()(torch.ones(8))
    with pytest.raises(
        ll.AdapterStateError, match=r"weight of '0' of Sequential is computed"
    ):
        call(model)
    assert torch.equal(model(torch.ones(8)), adapted)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (3, 4)),
        (nn.BatchNorm2d(4, affine=False), (3, 4, 2, 2)),
        (nn.SyncBatchNorm(4), (3, 4, 2)),
        (nn.InstanceNorm1d(4, track_running_stats=True), (3, 4, 5)),
    ],
)
def test_frozen_norm_does_not_drift_and_trains_as_it_evaluates(
    norm: nn.Module, shape: tuple[int, ...]
) -> None:
    model = nn.ModuleDict({"norm": norm, "linear": nn.Linear(4, 4)})
    kind = type(norm)
    before = state(norm)
    x = torch.randn(shape)
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    model.train()
    trained = norm(x)
    assert norm.training
    assert_state(norm, before)
    assert torch.equal(trained, norm.eval()(x))
    with pytest.raises(ValueError, match="expected"):
        norm.train()(torch.ones(1))
    assert norm.training  # after a forward that fails, too
    again = copy.deepcopy(model)
    assert torch.equal(again["norm"].train()(x), trained)
    assert_state(again["norm"], before)
    ll.remove_adapters(model)
    assert type(norm) is kind
    norm.train()(x)
    assert not same(state(norm), before)


def test_norms_of_a_base_loaded_with_its_adapters_are_the_bases() -> None:
    model = build()
    again = build()
    for buffer in model[1].buffers():
        buffer.add_(2)
    ll.inject_adapters(model, ll.LoRAConfig(r=1))
    ll.inject_adapters(again, ll.LoRAConfig(r=1))
    randomise(model)
    again.load_state_dict(model.state_dict())
    ll.remove_adapters(again)
    ll.remove_adapters(model)
    assert_same_state(again, model)
