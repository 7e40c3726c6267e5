"""Quantised bases train adapters as other bases do."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import BitsandbytesPrecision, Precision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_lora as ll
from lightning_lora.layers import LoRALayer
from tests.support.cases import tensors
from tests.support.compared import assert_same_tensors
from tests.support.models import Around, is_plain, randomise, same, trainer

bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning", "ignore::FutureWarning")

WIDTH = 64
BATCH = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))


def four_bits(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear4bit(WIDTH, WIDTH, linear.bias is not None, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # which is when it quantises


def eight_bits(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def by_torchao(linear: nn.Linear) -> nn.Module:
    torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())
    return linear


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": four_bits,
    "int8": eight_bits,
    "torchao int8": by_torchao,
}
PLAIN = "plain"


def build(kind: str, scale: float = 1.0, seed: int = 0) -> nn.Sequential:
    """Two quantised layers, or plain ones, and a head, always the same."""
    torch.manual_seed(seed)
    layers = [nn.Linear(WIDTH, WIDTH).requires_grad_(False) for _ in range(2)]
    layers[0].weight.mul_(scale)
    first, second = layers if kind == PLAIN else map(KINDS[kind], layers)
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(WIDTH, 4))


CONFIG = ll.LoRAConfig(r=4, target_modules=["0", "2"], modules_to_save=["3"])
each_kind = pytest.mark.parametrize("kind", KINDS)


def bits(model: nn.Module) -> dict[str, Any]:
    """What a quantised model's state holds of its frozen layers."""
    held = {name: v for name, v in model.state_dict().items() if "lora_" not in name and not name.startswith("model.3")}
    return {name: v.dequantize() if hasattr(v, "__tensor_flatten__") else v.clone() for name, v in held.items()}


@each_kind
def test_adapter_computes_beside_the_quantised_weight(kind: str) -> None:
    model = build(kind)
    before = model(BATCH)
    classes = [type(layer) for layer in model]
    frozen = bits(model)
    ll.inject_adapters(model, CONFIG)
    assert torch.equal(model(BATCH), before)
    randomise(model)
    for training in (True, False):
        hidden = BATCH
        for layer in model.train(training):
            if isinstance(layer, LoRALayer):
                plain = copy.copy(layer)
                plain.__class__ = layer.overlaid[1]
                hidden = plain(hidden) + 2 * hidden @ (layer.lora_B @ layer.lora_A).T
            else:
                hidden = layer(hidden)
        torch.testing.assert_close(model(BATCH), hidden)
    assert list(ll.adapter_state_dict(model)) == [
        "0.lora_A",
        "0.lora_B",
        "2.lora_A",
        "2.lora_B",
        "3.weight",
        "3.bias",
    ]
    assert ll.summarize(model).frozen == 2 * (WIDTH * WIDTH + WIDTH)  # as many as the bits stand for
    assert str(model).count("r=4, scaling=2") == 2
    ll.remove_adapters(model)
    assert [type(layer) for layer in model] == classes
    assert_same_tensors(bits(model), frozen)


@each_kind
def test_evaluation_in_between_leaves_gradients_as_they_are(kind: str) -> None:
    """bitsandbytes may lay a weight out for inference, behind which nothing trains any more."""
    model = build(kind).eval()
    with torch.no_grad():
        model(BATCH)
    ll.inject_adapters(model, ll.LoRAConfig(r=4, target_modules=["0"], modules_to_save=["3"]))
    randomise(model)
    grads = []
    for _ in range(2):
        model.train()
        model(BATCH).square().sum().backward()
        grads.append(model[0].lora_A.grad)
        model[0].lora_A.grad = None
        model.eval()
        with torch.no_grad():
            model(BATCH)
    assert grads[0] is not None
    assert grads[0].any()
    assert torch.equal(grads[0], grads[1])


class Lit(Around):
    def __init__(self, kind: str) -> None:
        super().__init__(build(kind))

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(BATCH, torch.arange(8) % 4), batch_size=4)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def lora(merge: Any = False) -> ll.LoRACallback:
    return ll.LoRACallback(r=4, target_modules=["model.0", "model.2"], modules_to_save=["model.3"], merge=merge)


@each_kind
def test_it_trains_and_resumes_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    models = Lit(kind), Lit(kind)
    frozen = bits(models[0])
    file = tmp_path / "through" / "epoch=1.ckpt"
    for model, name, path in zip(models, ("through", "again"), (None, file), strict=True):
        saves = ModelCheckpoint(tmp_path / name, "{epoch}", save_top_k=-1)
        trainer(tmp_path, [lora(), saves], max_epochs=4).fit(model, ckpt_path=path)
        assert_same_tensors(bits(model), frozen)
        assert model.get_parameter("model.0.lora_B").any()
    assert same(*map(ll.adapter_state_dict, models))
    last = tmp_path / "through" / "epoch=3.ckpt"
    assert all("lora_" in name or name.startswith("model.3.") for name in tensors(last))
    other = Lit(kind)
    ll.load_adapter(other, last)
    assert torch.equal(other(BATCH), models[0](BATCH))


@each_kind
def test_quantised_weights_and_their_scales_are_the_base(tmp_path: Path, kind: str) -> None:
    model = build(kind).eval()
    with torch.no_grad():
        model(BATCH)  # after which bitsandbytes may hold it in another layout
    ll.inject_adapters(model, CONFIG)
    ll.save_adapter(model, tmp_path / "a.safetensors")
    other = build(kind)
    with torch.no_grad():
        other[3].bias.add_(1)  # which trains whole, and is in the file
    ll.load_adapter(other, tmp_path / "a.safetensors")
    weights = build(kind, seed=1)
    scales = build(kind, scale=2.0)
    for mine, theirs in zip(weights, other, strict=True):
        if hasattr(mine, "bias"):
            mine.bias.data = theirs.bias.data
    for base in (weights, scales)[: 1 if kind == "nf4" else 2]:  # its scales may be rounded: they are not compared
        with pytest.raises(ll.BaseMismatchError, match=r"'0\."):
            ll.load_adapter(base, tmp_path / "a.safetensors")


@each_kind
def test_a_quantised_base_and_a_plain_one_agree_in_what_is_plain(tmp_path: Path, kind: str) -> None:
    models = build(kind), build(PLAIN).bfloat16()
    for there, here in (copy.deepcopy(models), models[::-1]):
        ll.inject_adapters(there, CONFIG)
        ll.save_adapter(there, tmp_path / "a.safetensors")
        other = copy.deepcopy(here)
        with pytest.warns(ll.LoRAWarning, match="the same; 2 quantised weights were not compared"):
            ll.load_adapter(here, tmp_path / "a.safetensors")
        with torch.no_grad():
            other[2].bias[0] += 1
        with pytest.raises(
            ll.BaseMismatchError,
            match=r"1 of 2 .* such as '2.bias', .* 2 quantised weights",
        ):
            ll.load_adapter(other, tmp_path / "a.safetensors")
        with pytest.warns(ll.LoRAWarning, match="1 of 2 frozen tensors"):
            ll.load_adapter(other, tmp_path / "a.safetensors", check_base=False)


def test_where_all_is_quantised_nothing_says_that_it_is_the_same_base(tmp_path: Path) -> None:
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    there = nn.Sequential(four_bits(linear))
    ll.inject_adapters(there, ll.LoRAConfig(r=2))
    ll.save_adapter(there, tmp_path / "a.safetensors")
    with pytest.raises(ll.BaseMismatchError, match="nothing to compare"):
        ll.load_adapter(nn.Sequential(linear), tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_that_rests_while_its_layer_is_quantised_takes_its_kind(kind: str) -> None:
    model = build(PLAIN)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["0"]), name="first")
    nn.init.normal_(model[0].lora_B)  # type: ignore[arg-type]
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["2"]), name="second")
    with torch.no_grad():
        plain: Any = model[0](BATCH)
    model[0] = KINDS[kind](model[0])
    ll.set_adapter(model, "first")
    assert (model[0](BATCH) - plain).abs().max() > 0.1  # its update
    with pytest.raises(ll.AdapterStateError, match="'0' in Sequential are quantised"):
        ll.merge_adapters(model)


@pytest.mark.parametrize("double", [False, True])
def test_a_weight_that_was_packed_for_inference_is_unpacked_as_it_was(double: bool) -> None:
    layer = bnb.nn.Linear4bit(128, 256, bias=False, compute_dtype=torch.float32, compress_statistics=double)
    model = nn.Sequential(layer).to("cpu")
    x = torch.randn(4, 128)
    with torch.no_grad():
        before = model.train()(x)
        model.eval()(x)  # on some processors, this packs it
        ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["0"]))
        assert (model.train()(x) - before).abs().max() < 0.01 * before.abs().max()


@pytest.mark.parametrize(("kind", "trial"), [("nf4", False), ("int8", True), ("torchao int8", False)])
def test_merging_is_refused_before_anything_is_trained(tmp_path: Path, kind: str, trial: bool) -> None:
    model = build(kind)
    lit = Lit(kind)
    ll.inject_adapters(model, CONFIG)
    with pytest.raises(ll.AdapterStateError, match=r"'0', '2' in Sequential are quantised.*full precision"):
        ll.merge_adapters(model)
    with pytest.raises(ll.ConfigError, match=r"are quantised.*Or set merge=False"):
        trainer(tmp_path, [lora(merge="last")], fast_dev_run=trial).fit(lit)
    assert is_plain(lit)
    trainer(tmp_path, [lora()], fast_dev_run=trial, max_epochs=1).fit(lit)
    assert lit.get_parameter("model.0.lora_B").any()


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("nf4", {"init": "pissa"}),
        ("int8", {"use_dora": True}),
        ("torchao int8", {"use_dora": True, "dropout": 0.5}),
    ],
)
def test_methods_read_what_the_weight_stands_for(kind: str, arguments: dict[str, Any]) -> None:
    model = build(kind).eval()
    ll.inject_adapters(model, ll.LoRAConfig(r=4, target_modules=["0", "2"], **arguments))
    with ll.disable_adapters(model):
        before = model(BATCH)
    torch.testing.assert_close(model(BATCH), before)
    model.train()(BATCH).sum().backward()
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(model.get_parameter(name).grad is not None for name in trains)
    assert "0.lora_A" in trains


class Lightnings(Precision):
    """Lightning's own conversion; a Trainer takes its plugin on a GPU alone."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return BitsandbytesPrecision("nf4", torch.float32, ignore_modules={"model.3"}).convert_module(module)


def test_adapters_survive_a_precision_that_replaces_their_layers(tmp_path: Path) -> None:
    model = Lit(PLAIN)
    model.requires_grad_(True)

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            assert held == {id(p) for p in pl_module.parameters() if p.requires_grad}

    trainer(tmp_path, [lora(), Look()], max_epochs=2, plugins=[Lightnings()]).fit(model)
    layer = model.get_submodule("model.0")
    assert isinstance(layer, LoRALayer)
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert layer.weight.dtype == torch.uint8
    assert layer.get_parameter("lora_B").any()


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (
            lambda: bnb.nn.Linear4bit(64, 64, compute_dtype=None).to(torch.bfloat16),
            torch.bfloat16,
        ),
        (lambda: bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float16), torch.float16),
        (lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False), torch.float16),
    ],
)
def test_adapters_have_the_dtype_of_their_layers_products_or_are_kept_in_full(layer: Any, dtype: torch.dtype) -> None:
    for autocast, expected in ((False, dtype), (True, torch.float32)):
        model = nn.Sequential(layer()).to("cpu")  # which is when it is quantised
        ll.inject_adapters(model, ll.LoRAConfig(r=2, autocast_adapter_dtype=autocast))
        assert {model[0].lora_A.dtype, model[0].lora_B.dtype} == {expected}
