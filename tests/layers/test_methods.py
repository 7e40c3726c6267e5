"""What is made of low-rank updates: DoRA, rsLoRA, PiSSA, OLoRA; slices of fused layers; parameters by themselves."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    AdapterMismatchError,
    ConfigError,
    LoRAConfig,
    LoRAWarning,
    TargetError,
    adapter_state_dict,
    disable_adapters,
    inject_adapters,
    load_adapter,
    merge_adapters,
    remove_adapters,
    save_adapter,
    summarize,
    unmerge_adapters,
)
from tests.layers.test_layers import LAYERS, Factors, Model, config, factors, reference_weights
from tests.models import LitTiny, data, lora, randomise, same, state, trainer

EMBEDDINGS = [name for name in LAYERS if "embedding" in name or "bag" in name]
CONVOLUTIONS = [name for name in LAYERS if "convolution" in name and "transposed" not in name]
DORA = ["linear", "linear without bias", "subclass", "conv1d", "scaled", "normalised", "embedding", *CONVOLUTIONS]
METHODS = [("dora", {"use_dora": True}, name) for name in DORA]
METHODS += [(i, {"init": i}, name) for i in ("pissa", "olora") for name in LAYERS if name not in EMBEDDINGS]


@pytest.fixture(params=METHODS, ids=lambda method: f"{method[0]}-{method[2]}")
def adapted(request: pytest.FixtureRequest) -> tuple[Model, Any, LoRAConfig]:
    """A model that is about to be adapted by one method, its input, and the configuration."""
    _, arguments, name = request.param
    build, x = LAYERS[name]
    torch.manual_seed(0)
    model = Model(build()).double()
    return model, x, config(model, **arguments)


def as_rows(layer: Any, weight: Tensor) -> Tensor:
    return weight.T if isinstance(layer, nn.Embedding | Conv1D) else weight.flatten(1)


def weights_of(layer: Any, lora: Factors) -> dict[str, Tensor]:
    """What the papers say of the adapted weights."""
    updated = reference_weights(layer, lora)
    if "lora_magnitude" in lora:
        rows = as_rows(layer, updated["weight"])
        rows = lora["lora_magnitude"][:, None] * rows / rows.norm(dim=1, keepdim=True).detach()
        transposed = isinstance(layer, nn.Embedding | Conv1D)
        return {"weight": (rows.T if transposed else rows).reshape(layer.weight.shape)}
    starts = {name.replace("0", "", 1): p.detach() for name, p in lora.items() if name[5:7] in ("A0", "B0")}
    if not starts:
        return updated
    started = reference_weights(layer, starts)
    return {name: layer.get_parameter(name) + updated[name] - started[name] for name in updated}


def reference(model: Model, lora: Factors, x: Any) -> Tensor:
    plain = copy.deepcopy(model)
    remove_adapters(plain)
    weights = {f"0.{name}": weight for name, weight in weights_of(model[0], lora).items()}
    return torch.func.functional_call(plain, weights, (x,))


def train(model: Model) -> None:
    """Move what trains, and only that."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).mul_(0.1))


def test_fresh_it_changes_nothing(adapted: tuple[Model, Any, LoRAConfig]) -> None:
    model, x, how = adapted
    before, base = model(x), state(model)
    inject_adapters(model, how)
    assert torch.equal(model(x), before)
    remove_adapters(model)
    assert same(state(model), base)


def test_trained_it_computes_what_its_paper_says(adapted: tuple[Model, Any, LoRAConfig]) -> None:
    model, x, how = adapted
    base = state(model)
    inject_adapters(model, how)
    train(model)
    lora = factors(model[0])
    output, expected = model(x), reference(model, lora, x)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    for name, p in model[0].named_parameters():
        assert (p.grad is not None) is p.requires_grad
        if p.requires_grad:
            torch.testing.assert_close(p.grad, lora[name].grad)
    remove_adapters(model)
    assert same(state(model), base)


def test_merged_it_computes_the_same_and_comes_apart_exactly(adapted: tuple[Model, Any, LoRAConfig]) -> None:
    model, x, how = adapted
    inject_adapters(model, how)
    train(model)
    before, output = state(model), model(x)
    merge_adapters(model)
    torch.testing.assert_close(model(x), output)
    unmerge_adapters(model)
    assert same(state(model), before) and torch.equal(model(x), output)


def test_saved_it_loads_onto_the_untouched_base(adapted: tuple[Model, Any, LoRAConfig], tmp_path: Path) -> None:
    model, x, how = adapted
    other = copy.deepcopy(model)
    inject_adapters(model, how)
    train(model)
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(other, tmp_path / "a.safetensors")
    assert same(state(other), state(model)) and torch.equal(other(x), model(x))


@pytest.mark.parametrize("arguments", [{"use_dora": True}, {"init": "pissa"}], ids=str)
def test_base_that_is_loaded_after_injection_is_the_one_it_starts_from(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    pretrained, model, x = nn.Sequential(nn.Linear(6, 5)), nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    inject_adapters(model, LoRAConfig(r=2, **arguments))
    model.load_state_dict(pretrained.state_dict())
    assert torch.equal(model(x), pretrained(x))
    inject_adapters(pretrained, LoRAConfig(r=2, **arguments))
    for name in ("lora_magnitude",) if "use_dora" in arguments else ("lora_A", "lora_B", "lora_A0", "lora_B0"):
        assert torch.equal(getattr(model[0], name), getattr(pretrained[0], name))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(5, 6))
    inject_adapters(model, LoRAConfig(r=2, **arguments))  # as a Trainer does before it trains
    expected = nn.functional.linear(x, model[0].weight, model[0].bias)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("arguments", [{"use_dora": True}, {"init": "pissa"}, {"init": "olora"}], ids=str)
def test_model_without_memory_starts_when_it_has_some(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    pretrained, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    for assign in (True, False):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(6, 5))
        inject_adapters(model, LoRAConfig(r=2, **arguments))
        if not assign:
            model.to_empty(device="cpu")
        model.load_state_dict(pretrained.state_dict(), assign=assign)
        assert torch.equal(model(x), pretrained(x))


def test_pissa_starts_from_the_best_approximation_and_olora_from_an_orthonormal_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 6, dtype=torch.float64)
    for init in ("pissa", "olora"):
        model = nn.Sequential(nn.Linear(6, 7, bias=False)).double()
        model[0].weight.data.copy_(weight)
        inject_adapters(model, LoRAConfig(r=3, alpha=6, init=init))
        a, b = model[0].lora_A, model[0].lora_B
        if init == "pissa":
            tail = torch.linalg.svdvals(weight)[3:]
            torch.testing.assert_close((weight - 2 * b @ a).norm(), tail.norm())
            torch.testing.assert_close(a @ a.T, b.T @ b)  # the roots of the singular values, on both sides
        else:
            torch.testing.assert_close(b.T @ b, torch.eye(3, dtype=torch.float64))
            torch.testing.assert_close((b @ a)[:, 0], weight[:, 0])  # a QR decomposition begins with the first column


def test_magnitudes_are_the_norms_of_the_rows_and_rslora_scales_by_the_root() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5))
    inject_adapters(model, LoRAConfig(r=4, alpha=6, use_dora=True, use_rslora=True))
    torch.testing.assert_close(model[0].lora_magnitude, model[0].weight.norm(dim=1))
    assert model[0].lora_settings.scaling == 6 / math.sqrt(4)


def test_adapting_again_asks_for_the_same_kind_of_start() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    inject_adapters(model, LoRAConfig(r=2))
    inject_adapters(model, LoRAConfig(r=2, init="gaussian"))  # which makes no difference any more
    with pytest.raises(AdapterMismatchError, match="with init=None; this configuration asks for init=pissa"):
        inject_adapters(model, LoRAConfig(r=2, init="pissa"))


@pytest.mark.parametrize("name", ["lstm", "attention", "bilinear", "bag", "transposed convolution", "experts"])
def test_dora_is_refused_where_it_has_no_meaning(name: str) -> None:
    model = Model(LAYERS[name][0]()).double()
    with pytest.raises(TargetError, match=r"use_dora=True is for .* '0' .*exclude_modules"):
        inject_adapters(model, config(model, use_dora=True))


def test_starts_from_the_base_are_refused_for_embeddings() -> None:
    with pytest.raises(TargetError, match=r"init='pissa' is for .* '0' \(Embedding\)"):
        inject_adapters(nn.Sequential(nn.Embedding(5, 5)), LoRAConfig(r=2, init="pissa", target_modules="all"))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_fresh_it_changes_nothing_of_a_base_that_a_trainer_converts(tmp_path: Path, precision: Any) -> None:
    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            with disable_adapters(pl_module), torch.no_grad():
                base = pl_module(torch.arange(20))
            assert torch.equal(pl_module(torch.arange(20)), base)
            seen.append(base.dtype)

    seen: list[torch.dtype] = []
    trainer(tmp_path, [lora(use_dora=True), Look()], precision=precision).fit(LitTiny(), data())
    assert seen == [torch.bfloat16 if precision == "bf16-true" else torch.float64]


def test_rows_and_directions_of_zeros_train_as_without_the_method() -> None:
    """A projection that starts at zero, as some do, has neither a direction nor anything that is strongest in it."""
    for arguments in ({"use_dora": True}, {"init": "pissa"}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5, bias=False))
        nn.init.zeros_(model[0].weight)
        inject_adapters(model, LoRAConfig(r=3, **arguments))
        x = torch.randn(4, 6)
        assert torch.equal(model(x), nn.functional.linear(x, model[0].weight))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            (model(x) - 1).square().sum().backward()
            optimizer.step()
        assert (model(x) - nn.functional.linear(x, model[0].weight)).abs().gt(1e-3).all()


def test_magnitudes_of_a_half_precision_base_are_not_rounded() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)).bfloat16(), torch.randn(3, 64).bfloat16()
    before = model(x)
    inject_adapters(model, LoRAConfig(r=2, use_dora=True, autocast_adapter_dtype=False))
    assert torch.equal(model(x), before) and model[0].lora_magnitude.dtype is torch.float32
    assert torch.equal(model.to(torch.bfloat16)(x), before)


def test_magnitude_that_trained_is_an_update() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    inject_adapters(model, LoRAConfig(r=2, use_dora=True))
    with torch.no_grad():
        model[0].lora_magnitude.mul_(2)
    trained = model[0].lora_magnitude.detach().clone()
    with pytest.warns(LoRAWarning, match="stay as they are, trained"):
        model.load_state_dict({"0.weight": torch.randn(5, 6), "0.bias": torch.zeros(5)})
    assert torch.equal(model[0].lora_magnitude, trained)


def test_base_that_a_hook_writes_is_the_one_it_starts_from(tmp_path: Path) -> None:
    class Loads(LitTiny):
        def on_fit_start(self) -> None:
            with torch.no_grad():
                self.q_proj.weight.copy_(torch.randn(8, 8, generator=torch.Generator().manual_seed(7)))

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 0:
                with disable_adapters(self):
                    base = self(torch.arange(20))
                assert torch.equal(self(torch.arange(20)), base)

    trainer(tmp_path, [lora(use_dora=True)], max_epochs=1).fit(Loads(), data())


def test_small_updates_from_a_start_keep_their_precision_in_half_precision() -> None:
    """The update is a small difference of two large products, which half precision would round away."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    inject_adapters(model, LoRAConfig(r=8, init="pissa"))
    layer: Any = model[0]
    with torch.no_grad():
        for p in (layer.lora_A, layer.lora_B):
            p.add_(p.abs().mean() * 1e-3 * torch.randn_like(p))
        layer.weight.zero_()  # to see the update alone
        x = torch.randn(16, 64)
        exact = (
            x.double()
            @ (layer.lora_B.double() @ layer.lora_A.double() - layer.lora_B0.double() @ layer.lora_A0.double()).T
        )
        with torch.autocast("cpu", torch.bfloat16):
            update = model(x)
    assert (update.double() - exact).norm() < 0.02 * exact.norm()


def test_outputs_under_autocast_have_the_dtype_that_the_layer_gives() -> None:
    for name in ("linear", "convolution"):
        build, x = LAYERS[name]
        model = Model(build())
        inject_adapters(model, config(model, use_dora=True))
        randomise(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x.float()).dtype is torch.bfloat16


def test_adapters_that_are_made_in_inference_mode_train() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.inference_mode():
        inject_adapters(model, LoRAConfig(r=2))
    model(torch.ones(2, 4)).sum().backward()
    assert model[0].lora_B.grad is not None


# Slices


class Fused(nn.Module):
    """An attention's projection as GPT-2 has it, and one that shares keys and values as Phi-3's does."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.qkv_proj, self.other = Conv1D(24, 8), nn.Linear(8, 16), nn.Linear(8, 6)
        self.config: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.c_attn(x), self.qkv_proj(x), self.other(x)], dim=-1)


def fused() -> Fused:
    torch.manual_seed(0)
    return Fused()


def changed_columns(model: nn.Module, base: nn.Module, x: Tensor) -> list[int]:
    return (model(x) != base(x)).any(dim=0).nonzero().flatten().tolist()


def test_slices_of_fused_projections_are_adapted_alone(tmp_path: Path) -> None:
    base, model, x = fused(), fused(), torch.randn(3, 8)
    slices = {"c_attn": ["v", "q"], "other": {"first": [1, 3]}}
    how = LoRAConfig(r=2, target_modules=["c_attn", "other"], target_slices=slices)
    inject_adapters(model, how)
    assert torch.equal(model(x), base(x))
    assert [n for n in model.state_dict() if "lora_B" in n] == [
        "c_attn.lora_B_q", "c_attn.lora_B_v", "other.lora_B_first",
    ]  # fmt: skip
    randomise(model)
    output = model(x)
    assert changed_columns(model, base, x) == [*range(8), *range(16, 24), 41, 42]
    update = model.c_attn.lora_B_v @ model.c_attn.lora_A_v
    torch.testing.assert_close(output[:, 16:24], base(x)[:, 16:24] + x @ update.T)
    merge_adapters(model)
    torch.testing.assert_close(model(x), output)
    rest = torch.ones(24, dtype=torch.bool)
    rest[:8], rest[16:] = False, False
    assert torch.equal(model.c_attn.weight[:, rest], base.c_attn.weight[:, rest])
    unmerge_adapters(model)
    output.sum().backward()
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(base, tmp_path / "a.safetensors")
    assert torch.equal(base(x), output)


def test_slices_know_queries_that_share_keys_and_values() -> None:
    base, model, x = fused(), fused(), torch.randn(3, 8)
    model.config = type("Config", (), {"num_attention_heads": 4, "num_key_value_heads": 2})()
    how = LoRAConfig(r=2, target_modules=["qkv_proj"], target_slices={"qkv_proj": ["k"]})
    inject_adapters(model, how)
    randomise(model)
    assert changed_columns(model, base, x) == list(range(24 + 8, 24 + 12))


def test_slices_choose_among_the_parts_of_a_layer_and_drop_the_rest() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    names = inject_adapters(
        model, LoRAConfig(r=2, target_modules=["self_attn"], target_slices={"self_attn": ["q", "v"]})
    )
    assert names == ("self_attn",)
    assert list(adapter_state_dict(model)) == [f"self_attn.lora_{f}_{p}" for p in "qv" for f in "AB"]
    with pytest.raises(AdapterMismatchError, match="parts="):
        inject_adapters(model, LoRAConfig(r=2, target_modules=["self_attn"]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target_slices": {"c_attn": ["z"]}}, "'c_attn' has no parts 'z'. It has 'q', 'k', 'v'"),
        ({"target_slices": {"other": ["q"]}}, r"The rows of 'q' in 'other', .* are not known.*\[first, end\]"),
        ({"target_slices": {"qkv_proj": ["q"]}}, "The rows of 'q' in 'qkv_proj'"),
        ({"target_slices": {"other": {"a": [2, 9]}}}, "end beyond its 6 rows: 'a'"),
        ({"target_slices": {"attn": ["q"]}}, r"target_slices \['attn'\] match no module.*c_attn"),
        ({"target_slices": {"c_attn": ["q"]}, "use_dora": True}, "without target_slices"),
        ({"target_slices": {"c_attn": ["q"], "net.c_attn": ["v"]}}, "match no module"),
        ({"target_slices": {"c_att.": ["q"], "c_attn": ["v"]}}, "'c_attn' has no effect on.*Put it first"),
    ],
    ids=str,
)
def test_slices_that_mean_nothing_are_refused(arguments: dict[str, Any], words: str) -> None:
    model = fused()
    before = state(model)
    with pytest.raises(TargetError, match=words):
        inject_adapters(model, LoRAConfig(r=2, target_modules=["c_attn", "qkv_proj", "other"], **arguments))
    assert same(state(model), before)


@pytest.mark.parametrize(
    "bad",
    ["q", {"a": "q"}, {"a": []}, {"a": ["q.v"]}, {"a": {"q": [3, 1]}}, {"a": {"q": [0, 4], "k": [2, 6]}}],
    ids=str,
)
def test_slices_are_checked_where_they_are_written(bad: Any) -> None:
    with pytest.raises(ConfigError, match="target_slices"):
        LoRAConfig(target_slices=bad)


# Parameters


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(5, 3), LAYERS["experts"][0]()
        self.own, self.attention = nn.Parameter(torch.randn(5, 5)), nn.MultiheadAttention(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x @ self.own) * self.router(x).softmax(-1).sum(-1, keepdim=True)


def test_parameters_are_adapted_beside_layers_or_alone() -> None:
    model = Mixture()
    how = LoRAConfig(r=2, target_modules=["router"], target_parameters=["experts.stack"])
    assert inject_adapters(model, how) == ("router", "experts")
    assert model.experts.lora_A_stack.shape == (3, 2, 5) and model.experts.lora_B_stack.shape == (3, 4, 2)
    assert "Experts" in str(summarize(model))
    remove_adapters(model)
    assert inject_adapters(model, LoRAConfig(r=2, target_modules=[], target_parameters=["stack", "mix"])) == (
        "experts",
    )
    train(model)
    output = model(x := torch.randn(2, 5))
    merge_adapters(model)
    torch.testing.assert_close(model(x), output)


class Reader(nn.Module):
    """A module that calls one layer, and reads the weight of the other, as torchvision's Swin and Mamba do."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x) @ self.read.weight + self.read(x)


def test_weight_that_its_holder_reads_is_adapted_there() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Reader()), torch.randn(2, 5)
    how = LoRAConfig(r=2, target_parameters=["read.weight"])
    base = state(model)
    assert inject_adapters(model, how) == ("0", "0.called")
    train(model)
    output = model(x)
    update = model[0].lora_B_read_weight @ model[0].lora_A_read_weight
    plain = nn.Sequential(Reader())
    plain.load_state_dict(base)
    with torch.no_grad():
        plain[0].read.weight += update
        plain[0].called.weight += model[0].called.lora_B @ model[0].called.lora_A
    torch.testing.assert_close(output, plain(x))
    output.sum().backward()
    assert model[0].lora_A_read_weight.grad is not None
    merge_adapters(model)
    torch.testing.assert_close(model(x), output)
    assert list(state(model)) == list(base)
    remove_adapters(model)
    torch.testing.assert_close(model(x), output)


def test_parameters_are_left_out_kept_whole_or_refused_as_layers_are() -> None:
    how: dict[str, Any] = {"r": 2, "target_modules": ["called"], "target_parameters": ["read.weight"]}
    for more in ({"exclude_modules": ["read"]}, {"modules_to_save": ["read"]}):
        model = nn.Sequential(Reader())
        assert inject_adapters(model, LoRAConfig(**how, **more)) == ("0.called",)
    with pytest.raises(TargetError, match="target_slices"):
        inject_adapters(nn.Sequential(Reader()), LoRAConfig(**how, target_slices={"0": ["q"]}))
    twice = nn.Sequential(Reader())
    twice[0].read_weight = nn.Parameter(torch.ones(5, 5))
    with pytest.raises(TargetError, match=r"'read_weight', 'read\.weight' of '0'.*the same name"):
        inject_adapters(twice, LoRAConfig(**how | {"target_parameters": ["read.weight", "read_weight"]}))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own", "belongs to the model itself"),
        ("scale", r"it is \(5,\)"),
        ("router.weight", "belongs to the model itself"),
        ("attention.in_proj_weight", "name 'attention' in target_modules"),
        ("stakc", r"\['stakc'\] match no .*stack"),
    ],
)
def test_parameters_that_cannot_be_adapted_are_refused(name: str, words: str) -> None:
    model = Mixture()
    with pytest.raises(TargetError, match=words):
        inject_adapters(model, LoRAConfig(r=2, target_parameters=[name]))
    assert not [n for n in model.state_dict() if "lora" in n]
