"""Every adapted layer computes W + ΔW: fresh, trained, merged, copied, pickled, in a subclass's own forward."""

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    AdapterMismatchError,
    AdapterStateError,
    ConfigError,
    LoRAConfig,
    LoRAWarning,
    MergePrecisionWarning,
    TargetError,
    adapter_state_dict,
    disable_adapters,
    inject_adapters,
    load_adapter,
    load_adapter_state_dict,
    merge_adapters,
    remove_adapters,
    save_adapter,
    unmerge_adapters,
)
from lightning_lora.functional import update
from lightning_lora.layers import ADAPTERS, LoRALayer, adapter_for
from lightning_lora.model.view import View
from tests.models import TinyLM, is_plain, randomise, same, state, unties


class Scaled(nn.Linear):
    """A linear layer that scales its weight and its output in its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * 2, self.bias) * 3


class Normalised(nn.Linear):
    """A linear layer whose output is not linear in its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


class ScaledEmbedding(nn.Embedding):
    """An embedding that scales its rows, as Gemma's does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 4


class Recursive(nn.Linear):
    """A linear layer whose forward calls itself, and whose own names are those one might give a mixin."""

    merge = features = None

    def start(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, input: Tensor, times: int = 2) -> Tensor:
        return self(input, times - 1) if times else self.start(input)


class PlainSubclass(nn.Linear):
    """A subclass that computes as nn.Linear does."""


class Padding(nn.Conv2d):
    """A convolution that pads in its own forward, as EfficientNets do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (0, 1, 1, 0)))


class Standardised(nn.Conv2d):
    """A convolution that standardises its weight in the method that forward calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, (weight - weight.mean()) / weight.std(), bias)


class Experts(nn.Module):
    """A stack of matrices, and one matrix beside it, as parameters of the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.scale = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(5))
        self.mix = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...o", x * self.scale, self.stack) @ self.mix


FLOATS = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(2, 3, 5)
INDEX = torch.tensor([[0, 3, 1], [4, 4, 2]])
BAGS = (torch.tensor([0, 3, 1, 4, 4]), torch.tensor([0, 2]))
LINE, PLANE, SPACE = (torch.linspace(-1, 1, 2 * 4 * 5**n, dtype=torch.float64).view(2, 4, *(5,) * n) for n in (1, 2, 3))
PACKED = nn.utils.rnn.pack_padded_sequence(FLOATS, torch.tensor([3, 2]), batch_first=True)
PAD = torch.tensor([[False, False, True], [False, False, False]])
SELF = (FLOATS, FLOATS, FLOATS)
ATTENTION: dict[str, Any] = {"embed_dim": 5, "num_heads": 1, "batch_first": True}

Build = Any
LAYERS: dict[str, tuple[Build, Any]] = {
    "linear": (lambda: nn.Linear(5, 4), FLOATS),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), FLOATS),
    "subclass": (lambda: PlainSubclass(5, 4), FLOATS),
    "conv1d": (lambda: Conv1D(4, 5), FLOATS),
    "embedding": (lambda: nn.Embedding(5, 4), INDEX),
    "padded embedding": (lambda: nn.Embedding(5, 4, padding_idx=4), INDEX),
    "recursive": (lambda: Recursive(5, 4), FLOATS),
    "scaled": (lambda: Scaled(5, 4), FLOATS),
    "normalised": (lambda: Normalised(5, 4), FLOATS),
    "scaled embedding": (lambda: ScaledEmbedding(5, 4), INDEX),
    "bag": (lambda: nn.EmbeddingBag(5, 4), BAGS),
    "bag of sums": (lambda: nn.EmbeddingBag(5, 4, mode="sum", padding_idx=4), INDEX),
    "bag of weighted sums": (lambda: nn.EmbeddingBag(5, 4, mode="sum"), (*BAGS, torch.linspace(1, 2, 5).double())),
    "bag of maxima": (lambda: nn.EmbeddingBag(5, 4, mode="max"), INDEX),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), PLANE),
    "convolution in one dimension": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), LINE),
    "convolution in three": (lambda: nn.Conv3d(4, 6, (1, 2, 3), dilation=(1, 2, 1), padding="same"), SPACE),
    "circular convolution": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), PLANE),
    "reflecting convolution": (lambda: nn.Conv1d(4, 6, 3, padding=(2,), padding_mode="reflect"), LINE),
    "grouped convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=(1, 2)), PLANE),
    "depthwise convolution": (lambda: nn.Conv2d(4, 8, (3, 2), groups=4, padding=1), PLANE),
    "unbatched convolution": (lambda: nn.Conv2d(4, 6, 3), PLANE[0]),
    "padding convolution": (lambda: Padding(4, 6, 3), PLANE),
    "standardised convolution": (lambda: Standardised(4, 6, 3), PLANE),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), PLANE),
    "transposed in one dimension": (lambda: nn.ConvTranspose1d(4, 6, 3, dilation=2, bias=False), LINE),
    "transposed in three": (lambda: nn.ConvTranspose3d(4, 6, (1, 2, 3)), SPACE),
    "transposed to a size": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (PLANE, [12, 11])),
    "grouped transposed convolution": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), PLANE),
    "bilinear": (lambda: nn.Bilinear(5, 4, 6), (FLOATS, FLOATS[..., :4])),
    "lstm": (lambda: nn.LSTM(5, 4, num_layers=2, bidirectional=True), FLOATS),
    "lstm with projections": (lambda: nn.LSTM(5, 4, proj_size=3, batch_first=True), FLOATS),
    "packed lstm": (lambda: nn.LSTM(5, 4, batch_first=True), PACKED),
    "gru": (lambda: nn.GRU(5, 4, bias=False, batch_first=True), FLOATS),
    "rnn": (lambda: nn.RNN(5, 4, nonlinearity="relu"), FLOATS),
    "lstm cell": (lambda: nn.LSTMCell(5, 4), FLOATS[0]),
    "gru cell": (lambda: nn.GRUCell(5, 4, bias=False), FLOATS[0]),
    "rnn cell": (lambda: nn.RNNCell(5, 4), FLOATS[0]),
    "attention": (lambda: nn.MultiheadAttention(**ATTENTION), (*SELF, PAD)),
    "attention to others": (
        lambda: nn.MultiheadAttention(**ATTENTION | {"kdim": 4, "vdim": 3}),
        (FLOATS, FLOATS[..., 1:], FLOATS[..., 2:]),
    ),
    "attention with every option": (
        lambda: nn.MultiheadAttention(5, 5, add_bias_kv=True, add_zero_attn=True, bias=False),
        (*SELF, None, True, torch.eye(2, dtype=torch.bool), False),
    ),
    "experts": (Experts, FLOATS),
}
CONFIG = LoRAConfig(r=2, alpha=3, target_modules="all")


def run(model: nn.Sequential, x: Any) -> Tensor:
    """All that the layer puts out, as one vector."""
    output = model[0](*x) if type(x) is tuple else model[0](x)
    found: list[Tensor] = []
    inside = [output]
    while inside:
        each = inside.pop()
        if isinstance(each, nn.utils.rnn.PackedSequence):
            each = each.data
        inside += each if isinstance(each, tuple) else []
        found += [each.reshape(-1)] if isinstance(each, Tensor) else []
    return torch.cat(found)


class Model(nn.Sequential):
    def forward(self, x: Any) -> Tensor:
        return run(self, x)


@pytest.fixture(params=LAYERS, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[nn.Sequential, Any]:
    build, x = LAYERS[request.param]
    torch.manual_seed(0)
    return Model(build()).double(), x


def config(model: nn.Sequential, **kwargs: Any) -> LoRAConfig:
    """A configuration that adapts all there is in the one layer of ``model``."""
    if isinstance(model[0], Experts):
        kwargs = {"target_modules": [], "target_parameters": ["stack", "mix"], **kwargs}
    return LoRAConfig(**{"r": 2, "alpha": 3, "target_modules": "all", **kwargs})


Factors = dict[str, Tensor]


def factors(layer: Any) -> Factors:
    return {name: p.detach().clone().requires_grad_() for name, p in layer.lora_parameters().items()}


def reference_weights(layer: Any, lora: Factors) -> dict[str, Tensor]:
    """W + s B A of the paper for each of the layer's matrices, in the layout of the weight that it lies in."""
    scaling = 1.5
    if isinstance(layer, nn.MultiheadAttention):
        update = {part: scaling * lora[f"lora_B_{part}"] @ lora[f"lora_A_{part}"] for part in ("q", "k", "v", "out")}
        out = {"out_proj.weight": layer.out_proj.weight + update["out"]}
        if layer.in_proj_weight is not None:
            return {"in_proj_weight": layer.in_proj_weight + torch.cat([update[part] for part in "qkv"]), **out}
        return {**{f"{p}_proj_weight": getattr(layer, f"{p}_proj_weight") + update[p] for p in "qkv"}, **out}
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase | Experts):
        prefix = "" if isinstance(layer, Experts) else "weight_"
        names = [name.removeprefix("lora_A_") for name in lora if name.startswith("lora_A_")]
        updates = {prefix + name: scaling * lora[f"lora_B_{name}"] @ lora[f"lora_A_{name}"] for name in names}
        return {name: getattr(layer, name) + update for name, update in updates.items()}
    delta, weight = scaling * lora["lora_B"] @ lora["lora_A"], layer.weight
    transposed = isinstance(layer, nn.Embedding | nn.EmbeddingBag | Conv1D | nn.modules.conv._ConvTransposeNd)
    return {"weight": weight + (delta.T if transposed else delta).reshape(weight.shape)}


def reference(model: nn.Sequential, lora: Factors, x: Any) -> Tensor:
    """What the same layer without adapters computes with these weights."""
    plain = copy.deepcopy(model)
    remove_adapters(plain)
    weights = {f"0.{name}": weight for name, weight in reference_weights(model[0], lora).items()}
    return torch.func.functional_call(plain, weights, (x,))


def test_fresh_adapter_changes_nothing(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    before, layer, cls, weights = model(x), model[0], type(model[0]), list(model.parameters())
    keys = list(model.state_dict())
    inject_adapters(model, config(model))
    assert torch.equal(model(x), before)
    assert model[0] is layer and isinstance(layer, cls) and isinstance(layer, LoRALayer)
    assert [p for name, p in model.named_parameters() if "lora_" not in name] == weights
    assert [key for key in model.state_dict() if "lora_" not in key] == keys


@pytest.mark.parametrize("training", [True, False])
def test_adapted_layer_computes_the_papers_equation(case: tuple[nn.Sequential, Any], training: bool) -> None:
    model, x = case
    inject_adapters(model, config(model))
    randomise(model)
    model.train(training)
    expected = reference(model, factors(model[0]), x)
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)


def test_gradients_are_those_of_the_merged_weight(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    inject_adapters(model, config(model))
    randomise(model)
    layer = model[0]
    if getattr(layer, "padding_idx", None) is not None:
        layer.lora_A.data[:, layer.padding_idx] = 0  # where it starts, and stays: the token's column has no gradient
    model(x).square().sum().backward()
    lora = factors(layer)
    reference(model, lora, x).square().sum().backward()
    for name, p in layer.lora_parameters().items():
        torch.testing.assert_close(p.grad, lora[name].grad)
    assert all(p.grad is None for name, p in layer.named_parameters() if "lora_" not in name)


def test_merged_computes_as_adapted_and_unmerging_is_exact(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    inject_adapters(model, config(model))
    randomise(model)
    before, adapted, weights = state(model), model(x), list(model.parameters())
    base = {id(p) for name, p in model.named_parameters() if "lora_" not in name}
    merge_adapters(model)
    merge_adapters(model)
    torch.testing.assert_close(model(x), adapted)
    assert {id(p) for p in model.parameters()} == base
    unmerge_adapters(model)
    assert same(state(model), before) and all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_is_rounded_once_and_unmerge_exact_in_every_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model, scale=1.0)
    before = state(model)
    wide = {k: v.double() for k, v in before.items()}
    merge_adapters(model)
    exact = wide["0.weight"] + wide["0.lora_B"] @ wide["0.lora_A"]
    ulp = torch.finfo(dtype).eps * exact.abs()
    wide_eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # of the sum before it is rounded
    unrounded = 4 * wide_eps * (exact.abs() + wide["0.lora_B"].abs() @ wide["0.lora_A"].abs())
    assert ((model[0].weight.double() - exact).abs() <= ulp / 2 + unrounded + torch.finfo(dtype).tiny).all()
    unmerge_adapters(model)
    assert same(state(model), before)


@unties
@pytest.mark.parametrize("tied", [False, True])
def test_unmerge_follows_a_model_that_was_converted_in_between(tied: bool) -> None:
    torch.manual_seed(0)
    model = TinyLM(tied=tied)
    inject_adapters(model, LoRAConfig(r=2, target_modules=["lm_head"]))
    randomise(model)
    base = model.lm_head.weight.detach().clone()
    merge_adapters(model)
    model.double()
    unmerge_adapters(model)
    assert model.lm_head.weight.dtype is torch.float64 and torch.equal(model.lm_head.weight, base.double())
    assert (model.lm_head.weight is model.embed.weight) is tied


def test_state_of_a_merged_model_is_that_of_the_plain_one(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    plain = copy.deepcopy(model)
    inject_adapters(model, config(model))
    randomise(model)
    adapted = model(x)
    merge_adapters(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), adapted)


def test_merged_model_trains_as_a_plain_one_and_then_has_no_way_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    merge_adapters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(torch.ones(4)).sum().backward()
    optimizer.step()
    trained = state(model)
    with pytest.raises(AdapterStateError, match="changed since its adapters were merged"):
        unmerge_adapters(model)
    assert same(state(model), trained)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [{}, {"use_dora": True}, {"init": "pissa"}], ids=str)
def test_merged_model_that_was_converted_comes_back_on_its_converted_base(
    dtype: torch.dtype, method: dict[str, Any]
) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    inject_adapters(model, LoRAConfig(r=2, **method))
    randomise(model)
    converted = copy.deepcopy(model).to(dtype)
    merge_adapters(model)
    model.to(dtype)
    unmerge_adapters(model)
    assert same(state(model), state(converted))


def test_merged_model_that_was_converted_and_changed_does_not_come_back() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    merge_adapters(model)
    model.bfloat16()
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    now = state(model)
    with pytest.raises(AdapterStateError, match="converted in a way that cannot be repeated"):
        unmerge_adapters(model)
    assert same(state(model), now) and is_plain(model)


def test_remove_gives_back_the_very_class_and_values(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    next(model.parameters()).requires_grad_(False)
    cls, before, output = type(model[0]), state(model), model(x)
    flags = [p.requires_grad for p in model.parameters()]
    inject_adapters(model, config(model))
    randomise(model)
    remove_adapters(model)
    assert type(model[0]) is cls and same(state(model), before) and torch.equal(model(x), output)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not [name for name in vars(model[0]) if "lora" in name] and not [
        name for name in vars(model) if "lora" in name
    ]


def test_remove_after_merge_keeps_the_merged_weights(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    inject_adapters(model, config(model))
    randomise(model)
    adapted = model(x)
    merge_adapters(model)
    remove_adapters(model)
    torch.testing.assert_close(model(x), adapted)
    assert not isinstance(model[0], LoRALayer)


@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_pickles_are_adapted_models_of_their_own(case: tuple[nn.Sequential, Any], merged: bool) -> None:
    model, x = case
    inject_adapters(model, config(model))
    randomise(model)
    if merged:
        merge_adapters(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    expected, kind = model(x), type(model[0])
    randomise(model, seed=9)
    remove_adapters(model)
    for each in copies:
        assert type(each[0]) is kind
        assert torch.equal(each(x), expected)
        unmerge_adapters(each)
        remove_adapters(each)
        assert type(each[0]) is type(model[0])


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"), reason="its compiler refuses some of them, with an error"
)
def test_compiled_layer_computes_the_same_adapted_merged_and_unmerged(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    if isinstance(model[0], Recursive | nn.RNNBase):
        pytest.skip("torch.compile takes neither a forward that calls itself nor torch's recurrent layers")
    torch._dynamo.reset()
    inject_adapters(model, config(model))
    randomise(model)
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for change in (lambda _: None, merge_adapters, unmerge_adapters):
        change(model)
        torch.testing.assert_close(compiled(x), expected)


def test_hooks_and_shared_references_survive(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    elsewhere = [model[0]]
    inject_adapters(model, config(model))
    randomise(model)
    model(x)
    assert set(calls) == {"forward"} and elsewhere[0] is model[0] and isinstance(elsewhere[0], LoRALayer)


def test_disabled_adapters_are_the_base(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    model.requires_grad_(False)  # torch's GRU computes other bits if it needs gradients
    base = model(x)
    inject_adapters(model, config(model))
    randomise(model)
    adapted = model(x)
    for change in (lambda _: None, merge_adapters):
        change(model)
        with disable_adapters(model), disable_adapters(model):
            assert torch.equal(model(x), base)
        torch.testing.assert_close(model(x), adapted)


def test_base_loaded_after_injection_is_the_base() -> None:
    def build(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    pretrained, model, x = build(0), build(1), torch.randn(5, 4)
    pretrained(x)
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=["2"]))
    nn.ModuleDict({"model": model}).load_state_dict({f"model.{k}": v for k, v in pretrained.state_dict().items()})
    randomise(model)
    with torch.no_grad():
        model[2].weight.add_(1)
    pretrained.eval(), model.eval()
    with disable_adapters(model):
        assert torch.equal(model(x), pretrained(x))
    remove_adapters(model)
    assert same(state(model), state(pretrained)) and not model._load_state_dict_pre_hooks


def test_weights_loaded_into_a_merged_model_are_a_new_base_and_no_way_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    base = state(model)
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    merge_adapters(model)
    model.load_state_dict(base)
    for call in (unmerge_adapters, adapter_state_dict, lambda m: disable_adapters(m).__enter__()):
        with pytest.raises(AdapterStateError, match="changed since its adapters were merged"):
            call(model)
        assert same(state(model), base)
    remove_adapters(model)
    assert same(state(model), base)


@unties
def test_weight_loaded_beside_a_merged_one_that_was_tied_to_it_is_noticed(tmp_path: Path) -> None:
    model = TinyLM()
    inject_adapters(model, LoRAConfig(r=2, target_modules=["q_proj", "lm_head"]))
    randomise(model)
    save_adapter(model, tmp_path / "a.safetensors")
    merge_adapters(model)
    model.load_state_dict({"embed.weight": torch.ones(20, 8)}, strict=False)  # the base of the merged head too
    with pytest.raises(AdapterStateError, match="changed since its adapters were merged"):
        unmerge_adapters(model)


def test_base_loaded_from_a_wider_dtype_is_what_the_model_holds(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    model, base = build(), build()
    wide = {name: value.double() + 1 / 3 for name, value in state(model).items()}
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=["2"]))
    for each in (model, base):
        each.load_state_dict(wide)
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")
    remove_adapters(model.double())
    assert same(state(model), state(base.double()))


def test_converted_model_is_of_one_dtype_in_its_files_too(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    model, again = build(), build().double()
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model.double())
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(again, tmp_path / "a.safetensors")
    assert same(state(again), state(model))


@unties
def test_merging_and_unmerging_does_not_change_what_all_linear_means() -> None:
    config = LoRAConfig(r=2, target_modules="all-linear")
    model = TinyLM()
    inject_adapters(model, LoRAConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"]))
    merge_adapters(model)
    unmerge_adapters(model)
    with pytest.raises(AdapterMismatchError, match="'lm_head' of TinyLM is adapted already"):
        inject_adapters(model, config)


def test_a_trained_part_loaded_by_itself_is_no_base() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    before = state(model)
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=["1"]))
    copied = copy.deepcopy(model)
    for each in (model, copied):
        each.load_state_dict({"1.weight": torch.ones(2, 4), "1.bias": torch.ones(2)}, strict=False)
        remove_adapters(each)
        assert same(state(each), before) and not each._load_state_dict_pre_hooks


def test_looking_for_targets_does_not_advance_a_spectral_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))
    before = state(model)
    inject_adapters(model, LoRAConfig(r=2, target_modules="0"))
    remove_adapters(model)
    inject_adapters(model, LoRAConfig(r=2, exclude_modules=["1"]))
    remove_adapters(model)
    assert same(state(model), before)


def test_running_the_base_in_training_mode_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    inject_adapters(model, LoRAConfig(r=2))
    before = state(model)
    with disable_adapters(model):
        model(torch.randn(5, 4))
    assert same(state(model), before) and set(adapter_state_dict(model)) == {"0.lora_A", "0.lora_B"}


@pytest.mark.parametrize(
    "call",
    [
        adapter_state_dict, merge_adapters, unmerge_adapters, remove_adapters, lambda m: inject_adapters(m, CONFIG),
        lambda m: load_adapter_state_dict(m, {}),
    ],
)  # fmt: skip
def test_no_call_while_adapters_are_disabled(call: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    inject_adapters(model, config(model))
    with disable_adapters(model), pytest.raises(AdapterStateError, match="disable_adapters"):
        call(model)
    with suppress(ZeroDivisionError), disable_adapters(model):
        _ = 1 / 0
    adapter_state_dict(model)


@unties
@pytest.mark.parametrize("head_first", [False, True])
def test_flags_and_stored_names_of_tied_weights_do_not_depend_on_merging(head_first: bool) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("head", "embed")[:: 1 if head_first else -1]:
                setattr(self, name, nn.Linear(4, 6, bias=False) if name == "head" else nn.Embedding(6, 4))
            self.body = nn.Linear(4, 4)
            self.head.weight = self.embed.weight

    for saved in (None, ["embed"]):
        model = Tied()
        inject_adapters(model, LoRAConfig(r=2, target_modules=["head", "body"], modules_to_save=saved))
        randomise(model)
        before = {name: value.clone() for name, value in adapter_state_dict(model).items()}
        merge_adapters(model)
        assert same(adapter_state_dict(model), before)
        remove_adapters(model)
        assert all(p.requires_grad for p in model.parameters())


def test_base_checkpoint_loads_strictly_before_and_after_injection(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    base, plain = {name: value + 1 for name, value in model.state_dict().items()}, copy.deepcopy(model)
    inject_adapters(model, config(model))
    model.load_state_dict(base)
    plain.load_state_dict(base)
    assert torch.equal(model(x), plain(x))
    factor = next(name for name in model.state_dict() if "lora_A" in name)
    with pytest.raises(RuntimeError, match="lora_B"):
        model.load_state_dict({**base, factor: model.state_dict()[factor]})


def test_dropout_acts_in_training_alone_and_takes_nothing_away_on_average(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    plain = copy.deepcopy(model)
    inject_adapters(model, config(model, dropout=0.5))
    inject_adapters(plain, config(plain))
    for each in (model, plain):
        randomise(each, scale=0.01)
    expected = plain.eval()(x)
    torch.testing.assert_close(model.eval()(x), expected)
    if not model[0].lora_drops_input:
        assert torch.equal(model.train()(x), model.eval()(x))
        return
    with torch.no_grad():
        torch.manual_seed(1)
        outputs = torch.stack([model.train()(x) for _ in range(400)])
        torch.manual_seed(1)
        assert torch.equal(model(x), outputs[0]) and not torch.equal(outputs[0], outputs[1])
    deviation = outputs.std(dim=0) / 400**0.5
    assert ((outputs.mean(dim=0) - expected).abs() <= 6 * deviation + 1e-4 * expected.abs().max()).all()


def test_dropout_drops_only_inputs_of_a_and_only_in_training() -> None:
    model = nn.Sequential(nn.Linear(1000, 3))
    x = torch.ones(1, 1000)
    base = model(x)
    inject_adapters(model, LoRAConfig(r=1, dropout=0.25))
    with torch.no_grad():
        model[0].lora_A.fill_(1 / 1000)
        model[0].lora_B.fill_(1)
    torch.testing.assert_close(model.eval()(x), base + 1)
    model.train()
    torch.manual_seed(0)
    kept = torch.stack([model(x) - base for _ in range(200)])
    torch.testing.assert_close(kept.mean(), torch.tensor(1.0), atol=0.01, rtol=0)  # E = 1, deviation 0.018 / sqrt(200)
    torch.manual_seed(0)
    assert torch.equal(model(x) - base, kept[0])  # reproducible from the seed
    assert kept.std() > 0.005


def test_dropout_reaches_a_layer_with_its_own_forward() -> None:
    model = nn.Sequential(Scaled(400, 1))
    inject_adapters(model, LoRAConfig(r=1, dropout=0.5))
    randomise(model)
    x = torch.ones(1, 400)
    assert torch.equal(model.eval()(x), model(x))
    model.train()
    outputs = torch.stack([model(x) for _ in range(2000)])
    spread = outputs.std() / 2000**0.5
    assert spread > 0 and (outputs.mean() - model.eval()(x)).abs() < 5 * spread


def test_unseen_tokens_of_an_embedding_never_change() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(4, 2))
    inject_adapters(model, LoRAConfig(r=2, target_modules="all"))
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    merge_adapters(model)
    changed = (model[0].weight != before).any(dim=1)
    assert changed.tolist() == [index in (1, 2) for index in range(10)]


def test_transformer_encoder_layer_computes_the_same_in_every_mode() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model, scale=0.5)
    expected = model.train()(x, src_key_padding_mask=padding)[~padding]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], expected)
    copied = copy.deepcopy(model)
    with torch.inference_mode():
        torch.testing.assert_close(copied(x, src_key_padding_mask=padding)[~padding], expected)
    remove_adapters(model)
    assert [vars(each)["activation_relu_or_gelu"] for each in model.layers] == [1, 1]
    assert not [name for each in model.layers for name in vars(each) if "lora" in name]


def test_meta_layers_are_adapted_and_start_right_once_they_have_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(model, LoRAConfig(r=2))
    assert model[0].lora_A.is_meta
    model.to_empty(device="cpu")
    model[0].reset_parameters()
    assert model[0].lora_A.abs().sum() > 0 and not model[0].lora_B.any()


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_inits_have_their_spread(init: Any) -> None:
    model = nn.Sequential(nn.Linear(4000, 4000))
    inject_adapters(model, LoRAConfig(r=4, init=init))
    # uniform on ±sqrt(6 / ((1 + 5) * 4000)): deviation sqrt(1/4000/3); gaussian: 1 / r
    expected = (1 / 4000 / 3) ** 0.5 if init == "kaiming" else 0.25
    torch.testing.assert_close(model[0].lora_A.std().item(), expected, rtol=0.05, atol=0)
    assert not model[0].lora_B.any()


def test_autocast_keeps_factors_and_computes_in_its_dtype() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(2, 8))
    output.sum().backward()
    assert output.dtype is torch.bfloat16 and model[0].lora_A.grad.dtype is torch.float32


def test_conv1d_is_found_without_importing_transformers_and_every_type_is_one_entry() -> None:
    assert adapter_for(Conv1D(2, 3)) is ADAPTERS["transformers.pytorch_utils.Conv1D"]
    assert adapter_for(nn.Linear(2, 2)) is ADAPTERS[nn.Linear]
    assert adapter_for(nn.ReLU()) is None


CANNOT = {
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "max_norm": lambda: nn.Embedding(4, 4, max_norm=1.0),
    "unsupported type": lambda: nn.LayerNorm(4),
    "integer weight": lambda: _with_integer_weight(),
    "replaced forward": lambda: _with_replaced_forward(),
    "replaced method": lambda: _with_replaced_method(),
    "sparse": lambda: nn.Embedding(4, 4, sparse=True),
    "another library's": lambda: _with_lora_of_another(),
}


def _with_integer_weight() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def _with_replaced_method() -> nn.Conv2d:
    layer = nn.Conv2d(4, 4, 1)
    layer._conv_forward = lambda *args: nn.Conv2d._conv_forward(layer, *args)  # type: ignore[method-assign]
    return layer


def _with_replaced_forward() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def _with_lora_of_another() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.lora_A = nn.Parameter(torch.zeros(1, 4))  # type: ignore[assignment]
    return layer


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("build", CANNOT.values(), ids=CANNOT)
def test_layer_that_cannot_be_adapted_is_refused_by_name(build: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), build())
    cls, keys = type(model[1]), list(model.state_dict())
    with pytest.raises(TargetError, match=r"\('1': .*Name other layers"):
        inject_adapters(model, LoRAConfig(r=1, target_modules=["1"]))
    assert type(model[0]) is nn.Linear and type(model[1]) is cls and list(model.state_dict()) == keys


def test_projection_inside_an_attention_is_named_by_its_attention() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(TargetError, match=r"name 'self_attn', with target_slices={'self_attn': \['out'\]}"):
        inject_adapters(model, LoRAConfig(r=1, target_modules=["out_proj"]))
    assert inject_adapters(model, LoRAConfig(r=1)) == ("self_attn", "linear1", "linear2")


@settings(max_examples=40, deadline=None)
@given(
    r=st.integers(1, 3),
    alpha=st.floats(0.1, 32),
    calls=st.lists(st.sampled_from(["merge", "unmerge", "disable", "reload", "copy"]), max_size=8),
    seed=st.integers(0, 99),
)
def test_any_order_of_calls_computes_one_function(r: int, alpha: float, calls: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    base = state(model)
    inject_adapters(model, LoRAConfig(r=r, alpha=alpha))
    randomise(model, seed)
    factors = adapter_state_dict(model)
    w = [base[f"{i}.weight"] + alpha / r * factors[f"{i}.lora_B"] @ factors[f"{i}.lora_A"] for i in (0, 2)]
    expected = torch.tanh(x @ w[0].T + base["0.bias"]) @ w[1].T + base["2.bias"]
    for call in calls:
        if call == "merge":
            merge_adapters(model)
        elif call == "unmerge":
            unmerge_adapters(model)
        elif call == "copy":
            model = copy.deepcopy(model)
        elif call == "disable":
            with disable_adapters(model):
                torch.testing.assert_close(
                    model(x), torch.tanh(x @ base["0.weight"].T + base["0.bias"]) @ base["2.weight"].T + base["2.bias"]
                )
        else:
            load_adapter_state_dict(model, adapter_state_dict(model))
        torch.testing.assert_close(model(x), expected)
    unmerge_adapters(model)
    remove_adapters(model)
    assert same(state(model), base)


def test_other_threads_and_replicas_compute_a_layer_with_its_own_forward_rightly() -> None:
    model = nn.Sequential(Scaled(8, 8))
    inject_adapters(model, config(model))
    randomise(model)
    x = torch.randn(4, 8)
    with torch.no_grad():
        expected = model(x)
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(y, expected) for y in pool.map(model, [x] * 400))
        replica: Any = copy.copy(model[0])  # as DataParallel makes one: its parameters are plain attributes
        replica._parameters = {}
        replica.__dict__.update({name: p.detach() for name, p in model[0].named_parameters()})
        assert torch.equal(replica(x), expected)


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
    inject_adapters(model, config(model))
    randomise(model)
    undermine(model[0])
    adapted = model.eval()(torch.ones(8))
    for call in (merge_adapters, remove_adapters):
        with pytest.raises(AdapterStateError, match=r"weight of '0' of Sequential is computed"):
            call(model)
    assert torch.equal(model(torch.ones(8)), adapted)


CHANGES: dict[str, Callable[[nn.Parameter], Any]] = {
    "in place": lambda weight: weight.mul_(2),
    "its data in place": lambda weight: weight.data.mul_(2),
    "its data": lambda weight: setattr(weight, "data", weight.data * 2),
    "one element": lambda weight: weight[0, 0].mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_to_merged_weights_are_not_lost(change: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(model, config(model))
    randomise(model)
    merge_adapters(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        CHANGES[change](model[0].weight)
    before = model(torch.ones(8))
    with pytest.raises(AdapterStateError, match="changed since its adapters were merged"):
        unmerge_adapters(model)
    remove_adapters(model)
    assert torch.equal(model(torch.ones(8)), before)
    unmerge_adapters(copied)


def test_merge_that_unties_or_overflows_says_so() -> None:
    model = TinyLM()
    inject_adapters(model, LoRAConfig(r=2, target_modules=["lm_head"]))
    with pytest.warns(LoRAWarning, match="'lm_head' in TinyLM was tied to another layer's"):
        merge_adapters(model)
    half = nn.Sequential(nn.Linear(4, 4)).half()
    inject_adapters(half, LoRAConfig(r=1))
    randomise(half, scale=1e3)
    with pytest.warns(MergePrecisionWarning, match="'0' in Sequential cannot hold: the weights are infinite"):
        merge_adapters(half)
    unmerge_adapters(half)


@pytest.mark.parametrize("assign", [True, False])
def test_adapters_made_on_meta_start_right_however_the_base_gets_its_values(assign: bool) -> None:
    base = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    inject_adapters(model, config(model))
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(base.state_dict(), assign=assign)
    x = torch.randn(3, 64)
    assert torch.equal(model(x), base(x))
    assert all(layer.lora_A.abs().max() < 1 and layer.lora_A.any() for layer in model)


def test_buffers_are_the_bases_as_they_are_while_something_is_new() -> None:
    model = nn.Sequential(nn.Linear(4, 4))

    def kept_when_added(name: str) -> bool:
        model[0].register_buffer(name, torch.ones(2))
        inject_adapters(model, LoRAConfig(r=2))
        return f"0.{name}" in View(model).record.originals

    assert kept_when_added("at_first") and kept_when_added("before_training")
    randomise(model)
    assert not kept_when_added("in_training")
    model.append(nn.Linear(4, 4))
    assert kept_when_added("beside_a_new_layer")


@pytest.mark.parametrize("lazy", ["weight", "running_mean", "table"])
def test_what_is_lazy_is_named_and_nothing_is_changed(lazy: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4) if lazy == "weight" else nn.Identity())
    if lazy == "running_mean":
        model[1] = nn.LazyBatchNorm1d(affine=False)
    if lazy == "table":
        model.register_buffer("table", nn.parameter.UninitializedBuffer())
    name = lazy if lazy == "table" else f"1.{lazy}"
    with pytest.raises(ConfigError, match=rf"'{name}'.*lazy.*Run one batch"):
        inject_adapters(model, LoRAConfig(r=1, target_modules=["0"]))
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_integer_parameters_of_a_module_that_trains_whole_stay(tmp_path: Path) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    model["head"].codes = nn.Parameter(torch.arange(4), requires_grad=False)
    inject_adapters(model, LoRAConfig(r=1, modules_to_save=["head"]))
    assert model["head"].weight.requires_grad and not model["head"].codes.requires_grad


def test_failed_injection_leaves_the_model_as_it_was(monkeypatch: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4)))
    model[0].requires_grad_(False)
    inject_adapters(model[2], LoRAConfig(r=1))
    kinds, flags, keys = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()], state(model)
    monkeypatch.setattr("lightning_lora.model.inject.keep_originals", lambda *_: [][0])
    with pytest.raises(IndexError):
        inject_adapters(model, LoRAConfig(r=1))
    assert kinds == [type(m) for m in model.modules()] and flags == [p.requires_grad for p in model.parameters()]
    assert same(state(model), keys) and adapter_state_dict(model[2])


def test_out_of_memory_while_the_base_is_shown_costs_no_trained_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject_adapters(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    with torch.no_grad():
        model[1].weight.fill_(9), model[1].bias.fill_(9)
    before, to, calls = state(model), Tensor.to, iter(range(100))

    def fails(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("no memory is left")
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", fails)
    with pytest.raises(torch.OutOfMemoryError), disable_adapters(model):
        pass
    monkeypatch.undo()
    assert same(state(model), before) and same(
        adapter_state_dict(model), {k: v for k, v in before.items() if k[0] == "1" or "lora" in k}
    )


def test_device_without_room_for_merged_weights_keeps_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).bfloat16()
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    before, calls = state(model), iter(range(100))

    def fills(*args: Any) -> Any:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("no memory is left")
        return update.merged(*args)

    monkeypatch.setattr("lightning_lora.layers.base.merged", fills)
    with pytest.raises(torch.OutOfMemoryError):
        merge_adapters(model)
    assert same(state(model), before) and not is_plain(model)


def test_merged_model_remembers_its_base_in_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    before, moved, cpu = state(model), list[Tensor](), Tensor.cpu

    def host(tensor: Tensor) -> Tensor:
        moved.append(cpu(tensor).clone())
        return moved[-1]

    monkeypatch.setattr(Tensor, "cpu", host)
    merge_adapters(model)
    held = [weight.base for weight in View(model).merged]
    assert len(held) == len(moved) == 2 and all(base is there for base, there in zip(held, moved, strict=True))
    unmerge_adapters(model)
    assert same(state(model), before)


def test_layer_that_keeps_its_own_methods_or_counts_is_run_with_its_update() -> None:
    class Bound(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.run, self.calls = self.own, 0

        def own(self, x: Tensor) -> Tensor:
            self.calls += 1
            return nn.functional.linear(x, self.weight, self.bias)

        def forward(self, input: Tensor) -> Tensor:
            return self.run(input)

    model, x = nn.Sequential(Bound()), torch.randn(2, 4)
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    output = model(x)
    assert model[0].calls == 1 and model[0].run.__self__ is model[0]
    merge_adapters(model)
    torch.testing.assert_close(model(x), output)


@pytest.mark.parametrize("build", [lambda: ScaledEmbedding(6, 4), lambda: nn.EmbeddingBag(6, 4, mode="max")])
def test_embeddings_of_any_kind_drop_nothing(build: Any) -> None:
    model = nn.Sequential(build())
    inject_adapters(model, LoRAConfig(r=2, target_modules="all", dropout=0.5))
    randomise(model)
    index = torch.arange(6).view(6, 1)
    assert torch.equal(model.train()(index), model.eval()(index))
