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
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_lora as ll
from lightning_lora.layers import LoRALayer
from tests.support.cases import tensors
from tests.support.compared import assert_same_tensors
from tests.support.models import Around, is_plain, randomise, trainer
from tests.support.parameters import add_to, gradients, trainable, trainable_names

bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt. inputs will be cast:UserWarning", "ignore::FutureWarning"
)

WIDTH = 64
BATCH = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))


def four_bits(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        WIDTH,
        WIDTH,
        linear.bias is not None,
        quant_type="nf4",
        compute_dtype=torch.float32,
    )
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
    first = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    second = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    first.weight.mul_(scale)
    if kind == PLAIN:
        layers: list[nn.Module] = [first, second]
    else:
        layers = [KINDS[kind](first), KINDS[kind](second)]
    head = nn.Linear(WIDTH, 4)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], head)


CONFIG = ll.LoRAConfig(r=4, target_modules=["0", "2"], modules_to_save=["3"])
each_kind = pytest.mark.parametrize("kind", KINDS)


def values_of(tensor: Tensor) -> Tensor:
    """What a tensor stands for, whatever its class."""
    if hasattr(tensor, "__tensor_flatten__"):
        return tensor.dequantize()
    return tensor.clone()


def bits(model: nn.Module) -> dict[str, Tensor]:
    """What a quantised model's state holds of its frozen layers."""
    held = {}
    for name, value in model.state_dict().items():
        if "lora_" not in name and not name.startswith("model.3"):
            held[name] = values_of(value)
    return held


def run_by_hand(model: nn.Sequential, x: Tensor) -> Tensor:
    """What the layers compute, with the product of the factors beside each that is adapted."""
    for layer in model:
        if isinstance(layer, LoRALayer):
            x = without_adapter(layer)(x) + 2 * x @ (layer.lora_B @ layer.lora_A).T
        else:
            x = layer(x)
    return x


def without_adapter(layer: Any) -> nn.Module:
    plain = copy.copy(layer)
    plain.__class__ = layer.overlaid[1]
    return plain


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
        model.train(training)
        torch.testing.assert_close(model(BATCH), run_by_hand(model, BATCH))
    assert list(ll.adapter_state_dict(model)) == [
        "0.lora_A",
        "0.lora_B",
        "2.lora_A",
        "2.lora_B",
        "3.weight",
        "3.bias",
    ]
    # as many as the bits stand for
    assert ll.summarize(model).frozen == 2 * (WIDTH * WIDTH + WIDTH)
    assert str(model).count("r=4, scaling=2") == 2
    ll.remove_adapters(model)
    assert [type(layer) for layer in model] == classes
    assert_same_tensors(bits(model), frozen)


@torch.no_grad()
def evaluate(model: nn.Module) -> Tensor:
    """Run it without gradients, after which bitsandbytes may hold a weight in another layout."""
    return model.eval()(BATCH)


def gradient(model: nn.Sequential) -> Tensor:
    """The gradient of the first adapter."""
    layer: Any = model[0]
    layer.lora_A.grad = None
    model.train()(BATCH).square().sum().backward()
    return layer.lora_A.grad


@each_kind
def test_evaluation_in_between_leaves_gradients_as_they_are(kind: str) -> None:
    """bitsandbytes may lay a weight out for inference, behind which nothing trains any more."""
    model = build(kind)
    evaluate(model)
    ll.inject_adapters(
        model, ll.LoRAConfig(r=4, target_modules=["0"], modules_to_save=["3"])
    )
    randomise(model)
    first = gradient(model)
    evaluate(model)
    second = gradient(model)
    assert first is not None
    assert first.any()
    assert torch.equal(first, second)


class Lit(Around):
    def __init__(self, kind: str) -> None:
        super().__init__(build(kind))

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(BATCH, torch.arange(8) % 4), batch_size=4)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def lora(merge: Any = False) -> ll.LoRACallback:
    return ll.LoRACallback(
        r=4,
        target_modules=["model.0", "model.2"],
        modules_to_save=["model.3"],
        merge=merge,
    )


def fit(folder: Path, model: Lit, ckpt_path: Path | None = None) -> Lit:
    """Train it, and keep the file of each epoch."""
    frozen = bits(model)
    saves = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer(folder, [lora(), saves], max_epochs=4).fit(model, ckpt_path=ckpt_path)
    assert_same_tensors(bits(model), frozen)
    assert model.get_parameter("model.0.lora_B").any()
    return model


@each_kind
def test_it_trains_and_resumes_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    model = fit(tmp_path / "through", Lit(kind))
    again = fit(
        tmp_path / "again", Lit(kind), ckpt_path=tmp_path / "through" / "epoch=1.ckpt"
    )
    assert_same_tensors(ll.adapter_state_dict(again), ll.adapter_state_dict(model))
    last = tmp_path / "through" / "epoch=3.ckpt"
    for name in tensors(last):
        assert "lora_" in name or name.startswith("model.3.")
    other = Lit(kind)
    ll.load_adapter(other, last)
    assert torch.equal(other(BATCH), model(BATCH))


def with_biases_of(model: nn.Sequential, other: nn.Sequential) -> nn.Sequential:
    """The model, with the other's biases."""
    for place in (0, 2, 3):
        model[place].bias.data = other[place].bias.data
    return model


@each_kind
def test_quantised_weights_and_their_scales_are_the_base(
    tmp_path: Path, kind: str
) -> None:
    model = build(kind)
    file = tmp_path / "a.safetensors"
    evaluate(model)
    ll.inject_adapters(model, CONFIG)
    ll.save_adapter(model, file)
    other = build(kind)
    add_to(other[3].bias, 1)  # which trains whole, and is in the file
    ll.load_adapter(other, file)
    other_weights = with_biases_of(build(kind, seed=1), other)
    with pytest.raises(ll.BaseMismatchError, match=r"'0\."):
        ll.load_adapter(other_weights, file)
    if kind == "nf4":
        return  # its scales may be rounded: they are not compared
    other_scales = build(kind, scale=2.0)
    with pytest.raises(ll.BaseMismatchError, match=r"'0\."):
        ll.load_adapter(other_scales, file)


@each_kind
@pytest.mark.parametrize("quantised_first", [True, False])
def test_a_quantised_base_and_a_plain_one_agree_in_what_is_plain(
    tmp_path: Path, kind: str, quantised_first: bool
) -> None:
    there = build(kind)
    here = build(PLAIN).bfloat16()
    if not quantised_first:
        there, here = here, there
    file = tmp_path / "a.safetensors"
    ll.inject_adapters(there, CONFIG)
    ll.save_adapter(there, file)
    other = copy.deepcopy(here)
    with pytest.warns(
        ll.LoRAWarning, match="the same; 2 quantised weights were not compared"
    ):
        ll.load_adapter(here, file)
    add_to(other[2].bias, 1)
    with pytest.raises(
        ll.BaseMismatchError,
        match=r"1 of 2 .* such as '2.bias', .* 2 quantised weights",
    ):
        ll.load_adapter(other, file)
    with pytest.warns(ll.LoRAWarning, match="1 of 2 frozen tensors"):
        ll.load_adapter(other, file, check_base=False)


def test_where_all_is_quantised_nothing_says_that_it_is_the_same_base(
    tmp_path: Path,
) -> None:
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    there = nn.Sequential(four_bits(linear))
    ll.inject_adapters(there, ll.LoRAConfig(r=2))
    ll.save_adapter(there, tmp_path / "a.safetensors")
    with pytest.raises(ll.BaseMismatchError, match="nothing to compare"):
        ll.load_adapter(nn.Sequential(linear), tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@torch.no_grad()
def test_an_adapter_that_rests_while_its_layer_is_quantised_takes_its_kind(
    kind: str,
) -> None:
    model = build(PLAIN)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["0"]), name="first")
    nn.init.normal_(model[0].lora_B)  # type: ignore[arg-type]
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["2"]), name="second")
    plain: Any = model[0](BATCH)
    model[0] = KINDS[kind](model[0])
    ll.set_adapter(model, "first")
    assert (model[0](BATCH) - plain).abs().max() > 0.1  # its update
    with pytest.raises(ll.AdapterStateError, match="'0' in Sequential are quantised"):
        ll.merge_adapters(model)


@pytest.mark.parametrize("double", [False, True])
@torch.no_grad()
def test_a_weight_that_was_packed_for_inference_is_unpacked_as_it_was(
    double: bool,
) -> None:
    layer = bnb.nn.Linear4bit(
        128, 256, bias=False, compute_dtype=torch.float32, compress_statistics=double
    )
    model = nn.Sequential(layer).to("cpu")
    x = torch.randn(4, 128)
    before = model.train()(x)
    model.eval()(x)  # on some processors, this packs it
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["0"]))
    assert (model.train()(x) - before).abs().max() < 0.01 * before.abs().max()


@pytest.mark.parametrize(
    ("kind", "trial"), [("nf4", False), ("int8", True), ("torchao int8", False)]
)
def test_merging_is_refused_before_anything_is_trained(
    tmp_path: Path, kind: str, trial: bool
) -> None:
    model = build(kind)
    lit = Lit(kind)
    ll.inject_adapters(model, CONFIG)
    with pytest.raises(
        ll.AdapterStateError,
        match=r"'0', '2' in Sequential are quantised.*full precision",
    ):
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
def test_methods_read_what_the_weight_stands_for(
    kind: str, arguments: dict[str, Any]
) -> None:
    model = build(kind).eval()
    ll.inject_adapters(
        model, ll.LoRAConfig(r=4, target_modules=["0", "2"], **arguments)
    )
    with ll.disable_adapters(model):
        before = model(BATCH)
    torch.testing.assert_close(model(BATCH), before)
    model.train()(BATCH).sum().backward()
    assert list(gradients(model)) == trainable_names(model)
    assert "0.lora_A" in trainable_names(model)


class Lightnings(Precision):
    """Lightning's own conversion; a Trainer takes its plugin on a GPU alone."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return BitsandbytesPrecision(
            "nf4", torch.float32, ignore_modules={"model.3"}
        ).convert_module(module)


class LooksAtOptimizer(L.Callback):
    """Expect the optimizer to hold what trains, and nothing else."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        held = set()
        for group in trainer.optimizers[0].param_groups:
            held.update(group["params"])
        assert held == set(trainable(pl_module))


def test_adapters_survive_a_precision_that_replaces_their_layers(
    tmp_path: Path,
) -> None:
    model = Lit(PLAIN)
    model.requires_grad_(True)
    callbacks = [lora(), LooksAtOptimizer()]
    trainer(tmp_path, callbacks, max_epochs=2, plugins=[Lightnings()]).fit(model)
    layer = model.get_submodule("model.0")
    assert isinstance(layer, LoRALayer)
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert layer.weight.dtype == torch.uint8
    assert layer.get_parameter("lora_B").any()


def four_bits_for(dtype: torch.dtype | None) -> nn.Module:
    return bnb.nn.Linear4bit(WIDTH, WIDTH, compute_dtype=dtype)


PRODUCTS: list[tuple[Callable[[], nn.Module], torch.dtype]] = [
    (lambda: four_bits_for(None).to(torch.bfloat16), torch.bfloat16),
    (lambda: four_bits_for(torch.float16), torch.float16),
    (lambda: bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False), torch.float16),
]


def adapter_dtypes(layer: nn.Module, *, autocast: bool) -> set[torch.dtype]:
    """The dtypes of the factors beside this layer, after it is quantised."""
    model = nn.Sequential(layer).to("cpu")  # which is when it is quantised
    ll.inject_adapters(model, ll.LoRAConfig(r=2, autocast_adapter_dtype=autocast))
    factors = ll.adapter_state_dict(model)
    return {factors["0.lora_A"].dtype, factors["0.lora_B"].dtype}


@pytest.mark.parametrize(("layer", "dtype"), PRODUCTS)
def test_adapters_have_the_dtype_of_their_layers_products_or_are_kept_in_full(
    layer: Any, dtype: torch.dtype
) -> None:
    assert adapter_dtypes(layer(), autocast=False) == {dtype}
    assert adapter_dtypes(layer(), autocast=True) == {torch.float32}
