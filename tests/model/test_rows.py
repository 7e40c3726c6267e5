"""One adapter for each row of a batch: as each row alone with that adapter, in one forward pass."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import (
    AdapterStateError,
    ConfigError,
    LoRAConfig,
    adapter_names,
    adapter_state_dict,
    adapters,
    combine_adapters,
    disable_adapters,
    inject_adapters,
    load_adapter,
    load_adapter_state_dict,
    merge_adapters,
    remove_adapters,
    save_adapter,
    set_adapter,
)
from lightning_lora.functional.split_batch import take_rows
from tests.support.compared import assert_all_equal, assert_state
from tests.support.layers import LAYERS, Experts, config
from tests.support.models import TinyLM, state
from tests.support.parameters import chosen, gradients, move_randomly, trainable

Names = list[str | None]
MIXED: Names = ["de", None, "fr"]
ALL = LoRAConfig(r=2, alpha=3, target_modules="all")


def only(*targets: str, **more: Any) -> LoRAConfig:
    return LoRAConfig(**{"r": 2, "target_modules": list(targets), **more})


def with_adapters(model: nn.Module, de: LoRAConfig = ALL, fr: LoRAConfig = ALL) -> Any:
    """The model with the adapters "de" and "fr", which is active, as if trained."""
    inject_adapters(model, de, name="de")
    move(model, seed=0)
    inject_adapters(model, fr, name="fr")
    move(model, seed=1)
    return model


def move(model: nn.Module, seed: int) -> None:
    """Move what trains."""
    torch.manual_seed(seed)
    move_randomly(trainable(model), 0.3)


def linear(*more: nn.Module, **each: LoRAConfig) -> tuple[Any, Tensor]:
    """A linear layer and more, with adapters, and a batch of three rows."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 4), *more)
    model = with_adapters(layers.double(), **each)
    return model, torch.randn(3, 5).double()


def rows_alone(
    run: Callable[[], Any], model: nn.Module, names: Names, later: int = 0
) -> list[list[Tensor]]:
    """The tensors that ``run`` returns for each row, by set_adapter."""
    found = []
    for row, name in enumerate(names):
        with set_adapter(model, name):
            output = run()
        found.append(tensors_of_row(output, row, len(names), later))
    return found


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def tensors_of_row(output: Any, row: int, rows: int, later: int) -> list[Tensor]:
    return tensors(take_rows(output, torch.tensor([row]), rows, later))


def is_wrapped(model: nn.Module) -> bool:
    """Whether a layer of ``model`` has another forward than its class."""
    return any("forward" in vars(module) for module in model.modules())


def check(
    model: nn.Module, run: Callable[[], Any], names: Names, later: int = 0, **close: Any
) -> Any:
    """Expect each row as it is alone with its adapter, or bit for bit as the base is.

    Return the output.
    """
    is_exact = close.pop("is_exact", True)
    expected = rows_alone(run, model, names, later)
    with adapter_names(model, names):
        output = run()
    for row, name in enumerate(names):
        found = tensors_of_row(output, row, len(names), later)
        torch.testing.assert_close(found, expected[row], **close)
        if name is None and is_exact:
            assert_all_equal(found, expected[row])
    assert not is_wrapped(model)
    return output


KINDS = [
    "linear",
    "conv1d",
    "scaled",
    "recursive",
    "padded embedding",
    "bag of sums",
    "convolution",
    "bilinear",
    "transposed to a size",
    "lstm with projections",
    "gru cell",
    "attention",
]
KINDS += ["transposed to a size", "lstm with projections", "gru cell", "attention"]


DORA_KINDS = ["linear", "convolution"]


WITH_AND_WITHOUT_DORA = [
    *itertools.product(KINDS, [False]),
    *itertools.product(DORA_KINDS, [True]),
]


def in_turns(number: int, first: int) -> Names:
    """Names for so many rows, from this one of MIXED on."""
    return [MIXED[(first + row) % 3] for row in range(number)]


@pytest.mark.parametrize(("kind", "dora"), WITH_AND_WITHOUT_DORA)
def test_each_row_is_as_with_its_adapter_alone(kind: str, dora: bool) -> None:
    build, x = LAYERS[kind]
    model: Any = nn.Sequential(build()).double().eval()
    layer = model[0]
    later = int(isinstance(layer, nn.RNNBase))
    inputs = x if isinstance(x, tuple) else (x,)
    rows = len(tensors(x)[0])
    with_adapters(
        model, config(model, r=2, use_dora=dora), config(model, r=3, use_dora=dora)
    )
    for names in (in_turns(rows, 0), in_turns(rows, 1), ["de"] * rows):
        with torch.no_grad():
            check(model, lambda: layer(*inputs), names, later)


def test_shared_layers_take_part() -> None:
    layer = nn.Linear(5, 5)
    x = torch.randn(3, 5).double()
    model = with_adapters(nn.Sequential(layer, nn.Tanh(), layer).double())
    check(model, lambda: model(x), MIXED)


def test_an_attention_whose_adapter_no_row_has_is_the_bases() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double()
    model = with_adapters(layer, only("linear1"), only("self_attn"))
    x = torch.randn(3, 2, 8).double()
    check(model, lambda: model(x), ["de", None, "de"])


class Sums(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sum()


def test_a_layer_that_returns_no_rows_is_refused() -> None:
    model = with_adapters(nn.Sequential(Sums(5, 4)))
    with (
        adapter_names(model, MIXED),
        pytest.raises(ConfigError, match="'0' returns a Tensor without a row for each"),
    ):
        model(torch.randn(3, 5))


class Net(nn.Module):
    """Layers that one of two adapters leaves out, a norm with statistics, a parameter of its own, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(6))
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.shifts = nn.ParameterList([torch.randn(6)])
        self.head = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.second(torch.tanh(self.first(x + self.start))))
        return {"scores": self.head(x + self.shifts[0])}


@pytest.fixture
def net() -> Any:
    de = only("first", modules_to_save=["head", "start", "norm"], bias="lora_only")
    model = with_adapters(
        Net().double(),
        de,
        only("second", "head.0", modules_to_save=["shifts"], bias="all"),
    )
    with set_adapter(model, "de"):
        model.train()(torch.randn(8, 6).double())  # moves the statistics of its norm
    return model.eval()


@pytest.mark.parametrize("names", [["de", "fr", None, "de"], [None] * 4])
@pytest.mark.parametrize("active", ["de", "fr"])
def test_what_was_trained_in_full_follows_its_adapter(
    net: Any, names: Names, active: str
) -> None:
    x = torch.randn(4, 6).double()
    set_adapter(net, active)
    before = state(net)
    check(net, lambda: net(x), names)
    assert_state(net, before)


def test_gradients_are_those_of_the_rows_alone(net: Any) -> None:
    x = torch.randn(3, 6).double()
    names: Names = ["fr", "de", "fr"]
    set_adapter(net, "fr")
    scores = [row for (row,) in rows_alone(lambda: net(x), net, names)]
    torch.cat(scores).square().sum().backward()
    expected = gradients(net)
    net.zero_grad()
    with adapter_names(net, names):
        net(x)["scores"].square().sum().backward()
    assert len(expected) > 4
    found = chosen(gradients(net), expected)
    torch.testing.assert_close(found, expected)


def test_frozen_norms_take_part() -> None:
    model, x = linear(nn.BatchNorm1d(4), de=only("0", bias="all"), fr=only("0"))
    check(model.train(), lambda: model(x), MIXED)


@pytest.mark.parametrize("name", ["de", "fr"])
def test_a_norm_that_an_adapter_trains_needs_eval_mode(name: str) -> None:
    each = {"de": only("0"), "fr": only("0"), name: only("0", modules_to_save=["1"])}
    model, x = linear(nn.BatchNorm1d(4), **each)
    with (
        adapter_names(model.train(), MIXED),
        pytest.raises(ConfigError, match=r"'1' trains in an adapter.*eval\(\)"),
    ):
        model(x)
    check(model.eval(), lambda: model(x), MIXED)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """Train a step, whose loss is what the model computes without gradients."""
    with torch.no_grad():
        seen = model(x)
    loss = model(x).square().sum()
    torch.testing.assert_close(loss.detach(), seen.square().sum())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_what_is_trained_in_the_block_counts_at_once() -> None:
    model, x = linear()
    layer = model[0]
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with adapter_names(model, ["fr", None, None]):
        for _ in range(3):
            step(model, optimizer, x)
        with torch.no_grad():
            row = model(x)[0]
            layer.lora_B.zero_()
            output = model(x)
            base = nn.functional.linear(x, layer.weight, layer.bias)
    assert not torch.equal(output[0], row)
    torch.testing.assert_close(output, base)


def test_dropout_acts_in_training_mode_on_the_rows_of_its_adapter() -> None:
    model = with_adapters(
        nn.Sequential(nn.Linear(50, 4)), only("0", dropout=0.5)
    ).train()
    x = torch.randn(3, 50)
    with adapter_names(model, MIXED):
        assert (model(x) == model(x)).all(dim=1).tolist() == [False, True, True]
        assert torch.equal(model.eval()(x), model(x))


def test_only_a_with_block_acts_on_the_model_as_it_is_then() -> None:
    model, x = linear(nn.Linear(4, 4), de=only("0"), fr=only("1"))
    expected = model(x)
    block = adapter_names(model, MIXED)
    assert torch.equal(model(x), expected)
    set_adapter(model, "de")
    for _ in range(2):
        with block:
            outer = model(x)
            torch.testing.assert_close(outer[2], expected[2])
            with disable_adapters(model):
                base = model(x)
            with set_adapter(model, "fr"):
                assert torch.equal(model(x), outer)
        with disable_adapters(model):
            assert torch.equal(model(x), base)


def test_of_blocks_in_blocks_the_inner_one_counts() -> None:
    model, x = linear(nn.Linear(4, 4), de=only("0"), fr=only("1"))
    expected = model(x)
    with adapter_names(model, MIXED):
        outer = model(x)
        with pytest.raises(KeyError), adapter_names(model, ["fr"] * 3):  # noqa: PT012  # the block is what is tested
            torch.testing.assert_close(model(x), expected)
            raise KeyError
        assert torch.equal(model(x), outer)
    assert torch.equal(model(x), expected)


def test_hooks_see_the_whole_batch_and_copies_run_alone() -> None:
    model = with_adapters(nn.Sequential(nn.LSTM(5, 4, batch_first=True)))
    x = torch.randn(2, 3, 5)
    seen = []
    model[0].register_forward_hook(
        lambda module, args, output: seen.append(output[0].shape)
    )
    with adapter_names(model, ["de", "fr"]):
        model(x)
        alike = copy.deepcopy(model)
    assert seen == [(2, 3, 4)]
    assert torch.equal(alike(x)[0], model(x)[0])


def switches_of(model: Any) -> list[Any]:
    """What turns the inference path of each layer on."""
    return [layer.activation_relu_or_gelu for layer in model.layers]


@pytest.mark.parametrize("targets", ["linear1", "self_attn"])
def test_inference_paths_of_transformers_are_off_in_the_block(targets: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model: Any = nn.TransformerEncoder(layer, 2).eval()
    inject_adapters(model, only("layers.0.linear2"), name="other")
    with_adapters(model, only("linear2"), only(targets))
    set_adapter(model, "other")
    x = torch.randn(3, 4, 8)
    lengths = torch.tensor([[4], [2], [3]])
    pad = torch.arange(4) >= lengths
    switches = switches_of(model)

    def run() -> Tensor:
        return model(x, src_key_padding_mask=pad).masked_fill(pad.unsqueeze(-1), 0)

    with torch.no_grad():  # the base alone takes the path
        check(model, run, MIXED, is_exact=False)
    assert switches_of(model) == switches


def test_a_mask_of_positions_is_for_all_rows() -> None:
    model = with_adapters(nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)))
    x = torch.randn(3, 3, 8)
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    check(model, lambda: model[0](x, x, x, attn_mask=mask)[0], MIXED)
    check(model, lambda: model[0](x, x, x, None, True, mask)[0], MIXED)


@pytest.mark.skipif(
    torch.__version__ < "2.6",
    reason="older compilers take no method for a module's forward",
)
def test_compiled_layers_take_part() -> None:
    model, x = linear(nn.Tanh(), nn.Linear(4, 3))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    check(model, lambda: compiled(x), MIXED)


def test_resting_adapters_follow_a_converted_model_in_half_precision_and_under_autocast() -> (
    None
):
    model, x = linear(nn.Linear(4, 2), de=only("0", modules_to_save=["1"]))

    def check_under_autocast(x: Tensor, enabled: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
            found = check(model, lambda: model(x), MIXED, rtol=0.02, atol=0.02)
        assert found.dtype == torch.bfloat16

    model.float()
    check_under_autocast(x.float(), enabled=True)
    model.bfloat16()
    check_under_autocast(x.bfloat16(), enabled=False)
    set_adapter(model, "de")
    assert model[0].lora_A.dtype == torch.float32
    assert model[1].weight.dtype == torch.bfloat16


def small_llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            eos_token_id=None,
            bos_token_id=1,
        )
    )


def test_a_language_model_writes_with_an_adapter_for_each_prompt() -> None:
    model = small_llama().double().eval()
    with_adapters(model, fr=only("q_proj", r=3, use_dora=True))
    prompts = torch.randint(1, 50, (4, 5))
    names: Names = ["fr", "de", None, "de"]
    how = {"max_new_tokens": 8, "do_sample": False}
    check(model, lambda: model.generate(prompts, **how), names)
    for_each_beam: Names = ["fr", "fr", "de", "de", None, None, "de", "de"]
    with adapter_names(model, for_each_beam):
        model.generate(prompts, num_beams=2, **how)


# What is refused


EXPERTS = LoRAConfig(r=2, target_modules=[], target_parameters=["stack"])
TOKENS = only("q_proj", trainable_token_indices={"embed": [1, 2]})
WITHOUT_ROWS: list[tuple[nn.Module, LoRAConfig, str]] = [
    (nn.Sequential(nn.LSTM(5, 4)), ALL, "'0' of Sequential has batch_first=False"),
    (
        nn.TransformerEncoderLayer(8, 2, 16),
        only("linear1"),
        "'self_attn' of .* has batch_first=False",
    ),
    (nn.Sequential(Experts()), EXPERTS, "'0' of Sequential has an adapter of experts"),
    (TinyLM(), TOKENS, "'embed' of TinyLM has an adapter of .* tokens"),
]


@pytest.mark.parametrize(("model", "targets", "message"), WITHOUT_ROWS)
def test_layers_without_rows_of_their_own_are_refused(
    model: nn.Module, targets: LoRAConfig, message: str
) -> None:
    with_adapters(model, targets, targets)
    with pytest.raises(AdapterStateError, match=message):
        adapter_names(model, ["de", None]).__enter__()


THE_THIRD_IS_EMPTY = torch.tensor([0, 2, 3])


PACKED = nn.utils.rnn.pack_sequence([torch.ones(2, 5)] * 3)


READ: list[tuple[nn.Module, tuple[Any, ...]]] = [
    (nn.Linear(5, 4), (torch.ones(4, 5),)),
    (nn.Linear(5, 4), (torch.ones(6, 5),)),
    (nn.Linear(3, 4), (torch.ones(3),)),  # features
    (nn.EmbeddingBag(3, 4), (torch.tensor([0, 1, 2]), THE_THIRD_IS_EMPTY)),
    (nn.LSTM(5, 4, batch_first=True), (PACKED,)),
]


@pytest.mark.parametrize("names", [MIXED, ["de"] * 3, [None] * 3])
@pytest.mark.parametrize(("layer", "x"), READ)
def test_what_is_not_one_row_for_each_name_is_refused(
    layer: nn.Module, x: Any, names: Names
) -> None:
    model = with_adapters(nn.Sequential(copy.deepcopy(layer)))
    with (
        adapter_names(model, names),
        pytest.raises(ConfigError, match=r"'0' reads a .* of shape .* got 3 names"),
    ):
        model[0](*x)
    model[0](*x)


def test_models_that_show_no_adapters_are_refused() -> None:
    model, _ = linear()
    with pytest.raises(AdapterStateError, match="no adapters"):
        adapter_names(nn.Sequential(nn.Linear(5, 4)), [None])
    block = adapter_names(model, ["de"])
    with (
        disable_adapters(model),
        pytest.raises(AdapterStateError, match="shows its base"),
    ):
        block.__enter__()
    merge_adapters(model)
    with pytest.raises(AdapterStateError, match="is merged"):
        block.__enter__()


CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "inject_adapters": lambda model, file: inject_adapters(
        model, only("1"), name="new"
    ),
    "remove_adapters": lambda model, file: remove_adapters(model, "fr"),
    "merge_adapters": lambda model, file: merge_adapters(model),
    "A sum of adapters": lambda model, file: set_adapter(model, {"de": 1, "fr": 1}),
    "combine_adapters": lambda model, file: combine_adapters(
        model, {"de": 1, "fr": 1}, name="both"
    ),
    "load_adapter": lambda model, file: load_adapter(model, file, name="fr"),
    "load_adapter_state_dict": lambda model, file: load_adapter_state_dict(
        model, adapter_state_dict(model)
    ),
    "load_state_dict": lambda model, file: model.load_state_dict(state(model)),
}


@pytest.mark.parametrize("call", CHANGES)
def test_a_change_of_adapters_in_a_block_is_refused_and_changes_nothing(
    call: str, tmp_path: Path
) -> None:
    model, x = linear(nn.Linear(4, 4))
    save_adapter(model, tmp_path / "fr.safetensors")
    with adapter_names(model, MIXED):
        expected = model(x)
        with pytest.raises(
            AdapterStateError,
            match=f"{call} is not possible in a block of adapter_names",
        ):
            CHANGES[call](model, tmp_path / "fr.safetensors")
        assert torch.equal(model(x), expected)
        assert adapters(model) == ("fr", "de")
    CHANGES[call](model, tmp_path / "fr.safetensors")


def test_a_layer_that_is_added_in_a_block_gets_its_adapter_after_it() -> None:
    model, _ = linear()
    with (
        adapter_names(model, MIXED),
        pytest.raises(AdapterStateError, match="inject_adapters is not possible"),
    ):
        inject_adapters(model.append(nn.Linear(4, 4)), ALL, name="fr")
    assert inject_adapters(model, ALL, name="fr") == ("0", "1")


def test_in_a_block_one_may_switch_and_no_block_is_open_for_a_copy() -> None:
    model, x = linear(nn.Linear(4, 4))
    with adapter_names(model, MIXED):
        expected = model(x)
        set_adapter(model, "de")
        assert torch.equal(model(x), expected)
        assert adapters(model) == ("de", "fr")
        merge_adapters(copy.deepcopy(model))
