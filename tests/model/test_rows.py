"""One adapter for each row of a batch: as each row alone with that adapter, in one forward pass."""

import copy
from collections.abc import Callable
from itertools import product
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
    adapters,
    disable_adapters,
    inject_adapters,
    load_adapter,
    merge_adapters,
    remove_adapters,
    save_adapter,
    set_adapter,
)
from lightning_lora.functional.batch_rows import taken
from lightning_lora.layers import ADAPTERS, LoRALayer, adapter_for
from tests.support.layers import LAYERS, Experts, config
from tests.support.models import TinyLM

NAMES = ("de", "fr")
NOT_FIRST = {"lstm", "rnn", "attention with every option"}  # batch_first=False
NO_ROWS = {"bag", "bag of weighted sums", "packed lstm", "unbatched convolution", "unbatched transposed convolution"}


def with_adapters(model: nn.Module, **each: Any) -> nn.Module:
    """The model with the adapters "de" and "fr", which is active, as if trained. ``each``: their configurations."""
    for seed, name in enumerate(NAMES):
        inject_adapters(model, each.get(name) or LoRAConfig(r=2 + seed, alpha=3, target_modules="all"), name=name)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p), alpha=0.3)
    return model


def mixed(n: int) -> list[list[str | None]]:
    """Names for n rows, so that each row has each name once, and once all have the same."""
    turns = ["de", None, "fr"]
    return [[turns[(i + k) % 3] for i in range(n)] for k in range(3)] + [["de"] * n]


def call(model: nn.Module, x: Any) -> Any:
    return model[0](*x) if type(x) is tuple else model[0](x)


def rows_alone(model: nn.Module, x: Any, n: int, later: int) -> dict[tuple[str | None, int], list[Tensor]]:
    """What each name gives for each row, by set_adapter."""
    found = {}
    for name in (*NAMES, None):
        with set_adapter(model, name), torch.no_grad():
            output = call(model, x)
        for row in range(n):
            found[name, row] = tensors(taken(output, torch.tensor([row]), n, later))
    return found


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


KINDS = sorted(LAYERS.keys() - NOT_FIRST - NO_ROWS - {"experts"})
FIT_DORA = [kind for kind in KINDS if getattr(adapter_for(LAYERS[kind][0]()), "lora_fits_dora", False)]


@pytest.mark.parametrize(("kind", "use_dora"), [*product(KINDS, [False]), *product(FIT_DORA, [True])])
def test_each_row_is_as_with_its_adapter_alone(kind: str, use_dora: bool) -> None:
    build, x = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(build()).double().eval()
    later, n = int(isinstance(model[0], nn.RNNBase)), len(tensors(x)[0])
    with_adapters(model, **{name: config(model, r=2 + i, use_dora=use_dora) for i, name in enumerate(NAMES)})
    expected = rows_alone(model, x, n, later)
    for names in mixed(n):
        with adapter_names(model, names), torch.no_grad():
            output = call(model, x)
        for row, name in enumerate(names):
            found = tensors(taken(output, torch.tensor([row]), n, later))
            for one, other in zip(found, expected[name, row], strict=True):
                torch.testing.assert_close(one, other)
            assert name or all(map(torch.equal, found, expected[None, row]))  # the base's bits
        assert "forward" not in vars(model[0])


@pytest.mark.parametrize("kind", sorted(NO_ROWS))
def test_what_is_not_rows_is_refused_by_the_name_of_the_layer(kind: str) -> None:
    build, x = LAYERS[kind]
    model = with_adapters(nn.Sequential(build()).double())
    with adapter_names(model, ["de", "fr"]), pytest.raises(ConfigError, match=r"'0' reads .* got 2 names"):
        call(model, x)
    call(model, x)


@pytest.mark.parametrize("kind", sorted(NOT_FIRST))
def test_layers_whose_rows_are_second_are_refused(kind: str) -> None:
    model = with_adapters(nn.Sequential(LAYERS[kind][0]()))
    with pytest.raises(AdapterStateError, match="'0' of Sequential has batch_first=False"):
        adapter_names(model, ["de", None]).__enter__()


def test_experts_are_refused() -> None:
    model = nn.Sequential(Experts())
    with_adapters(model, **{name: config(model) for name in NAMES})
    with pytest.raises(AdapterStateError, match="'0' of Sequential has an adapter of experts"):
        adapter_names(model, ["de"]).__enter__()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.weight.T)


class LoRABlock(LoRALayer):
    lora_layer_types = (Block,)


def test_layers_inside_a_layer_of_another_adapter_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAPTERS, Block, LoRABlock)
    outer, inner = (LoRAConfig(r=2, target_modules=[name]) for name in ("0", "0.inner"))
    model, x = with_adapters(nn.Sequential(Block()).double(), de=outer, fr=inner), torch.randn(3, 5).double()
    expected = rows_alone(model, x, 3, 0)
    with adapter_names(model, ["de", None, "fr"]):
        found = model(x)
    for row, name in enumerate(["de", None, "fr"]):
        torch.testing.assert_close(found[row : row + 1], expected[name, row][0])


def test_trained_tokens_are_refused() -> None:
    model = TinyLM()
    with_adapters(model, fr=LoRAConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed": [1, 2]}))
    with pytest.raises(AdapterStateError, match=r"'embed' of TinyLM has an adapter of .* tokens"):
        adapter_names(model, ["de"]).__enter__()  # "fr" is active: the layer that is tied to its tokens is changed
    with set_adapter(model, "de"), adapter_names(model, ["de", None]):
        model(torch.ones(2, 3, dtype=torch.int64))


def test_a_shared_module_takes_part_once() -> None:
    layer = nn.Linear(5, 5)
    config = LoRAConfig(r=2, target_modules="all", bias="lora_only")
    model, x = with_adapters(nn.Sequential(layer, nn.Tanh(), layer).double(), de=config), torch.randn(2, 5).double()
    with set_adapter(model, "de"):
        expected = model(x)[0]
    with adapter_names(model, ["de", "fr"]):
        torch.testing.assert_close(model(x)[0], expected)


def test_a_row_is_the_product_of_the_plain_matrices() -> None:
    model, x = with_adapters(nn.Sequential(nn.Linear(5, 4)).double()), torch.randn(3, 7, 5).double()
    expected = nn.functional.linear(x, model[0].weight, model[0].bias)
    for row, name in ((0, "de"), (2, "fr")):
        with set_adapter(model, name):
            expected[row] += 3 / model[0].lora_settings.r * x[row] @ model[0].lora_A.T @ model[0].lora_B.T
    with adapter_names(model, ["de", None, "fr"]):
        torch.testing.assert_close(model(x), expected)


class Net(nn.Module):
    """Layers that one of two adapters leaves out, a norm with statistics, a parameter of its own, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(6))
        self.first, self.second, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.shifts = nn.ParameterList([torch.randn(6)])
        self.head = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.second(torch.tanh(self.first(x + self.start))))
        return {"scores": self.head(x + self.shifts[0])}


CONFIGS = {
    "de": LoRAConfig(r=2, target_modules=["first"], modules_to_save=["head", "start", "norm"], bias="lora_only"),
    "fr": LoRAConfig(r=3, target_modules=["second", "head.0"], modules_to_save=["shifts"], bias="all"),
}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    model = with_adapters(Net().double(), **CONFIGS).eval()
    with set_adapter(model, "de"):
        model.train()(torch.randn(8, 6).double())  # moves the statistics of its norm
    return model.eval()


def rows_of(model: nn.Module, x: Tensor, names: list[str | None]) -> Any:
    """Each row of a batch, by set_adapter."""
    rows = []
    for i, name in enumerate(names):
        with set_adapter(model, name):
            output = model(x)
            rows.append((output["scores"] if isinstance(output, dict) else output)[i])
    return torch.stack(rows)


@pytest.mark.parametrize("active", NAMES)
def test_norms_that_one_adapter_trains_need_eval_mode(active: str) -> None:
    saved = LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    norm = nn.BatchNorm1d(4)
    model = with_adapters(nn.Sequential(nn.Linear(5, 4), norm).double(), de=saved)  # frozen in "fr"
    set_adapter(model, active)
    before, x = {name: b.clone() for name, b in norm.named_buffers()}, torch.randn(3, 5).double()
    with adapter_names(model.train(), ["de", None, "fr"]), pytest.raises(ConfigError, match=r"'1' .* model\.eval\(\)"):
        model(x)
    assert all(torch.equal(b, before[name]) for name, b in norm.named_buffers())
    expected = rows_of(model.eval(), x, ["de", None, "fr"])
    with adapter_names(model, ["de", None, "fr"]):
        torch.testing.assert_close(model(x), expected)


def test_norms_that_are_frozen_in_all_adapters_take_part_in_train_mode() -> None:
    targets = LoRAConfig(r=2, target_modules=["0"], bias="all")
    layers = nn.Linear(5, 4), nn.BatchNorm1d(4)
    model, x = with_adapters(nn.Sequential(*layers).double(), de=targets).train(), torch.randn(3, 5).double()
    expected = rows_of(model, x, ["de", None, "fr"])
    with adapter_names(model, ["de", None, "fr"]):
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("names", [["de", "fr", None, "de"], [None, "fr", "fr", None], ["de"] * 4, [None] * 4])
@pytest.mark.parametrize("active", NAMES)
def test_what_was_trained_in_full_follows_its_adapter(net: nn.Module, names: Any, active: str) -> None:
    x = torch.randn(4, 6).double()
    expected = rows_of(net, x, names)
    set_adapter(net, active)
    before = {name: (p, p._version) for name, p in net.named_parameters()}
    with adapter_names(net, names):
        torch.testing.assert_close(net(x)["scores"], expected)
        assert {name: (p, p._version) for name, p in net.named_parameters()} == before  # nothing is written
    torch.testing.assert_close(net(x)["scores"], rows_of(net, x, [active] * 4))
    assert not any("forward" in vars(module) for module in net.modules())


def test_gradients_are_those_of_the_rows_alone(net: nn.Module) -> None:
    x, names = torch.randn(3, 6).double(), ["fr", "de", "fr"]
    found = []
    for run in (lambda: rows_of(net, x, names), lambda: net(x)["scores"]):
        set_adapter(net, "fr")
        net.zero_grad()
        with adapter_names(net, names) if found else set_adapter(net, "fr"):
            run().square().sum().backward()
        found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 4
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_what_is_trained_in_the_block_counts_at_once() -> None:
    model, x = with_adapters(nn.Sequential(nn.Linear(5, 4)).double()), torch.randn(2, 5).double()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with adapter_names(model, ["fr", None]):
        for _ in range(3):
            with torch.no_grad():
                seen = model(x)
            loss = model(x).square().sum()
            torch.testing.assert_close(loss.detach(), seen.square().sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            row, base = model(x)
            model[0].lora_B.zero_()
            assert not torch.equal(model(x)[0], row) and torch.equal(model(x)[1], base)
            torch.testing.assert_close(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))


def test_dropout_acts_in_training_mode_on_the_rows_of_its_adapter() -> None:
    dropping = LoRAConfig(r=2, dropout=0.5, target_modules="all")
    model, x = with_adapters(nn.Sequential(nn.Linear(50, 4)), de=dropping).train(), torch.randn(3, 50)
    with adapter_names(model, ["de", None, "fr"]):
        one, other = model(x), model(x)
        same = (one == other).all(dim=1).tolist()
        assert same == [False, True, True]
        assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("unknown", ["dee", ""])
def test_names_are_checked_at_the_call(unknown: str) -> None:
    model = with_adapters(nn.Sequential(nn.Linear(5, 4)))
    with pytest.raises(AdapterStateError, match=rf"no adapter '{unknown}'.*'de'"):
        adapter_names(model, ["de", unknown])
    with pytest.raises(AdapterStateError, match="no adapters"):
        adapter_names(nn.Sequential(nn.Linear(5, 4)), [None])


def test_only_a_with_block_acts_and_on_the_model_as_it_is_then() -> None:
    model, x = with_adapters(nn.Sequential(nn.Linear(5, 4))), torch.randn(2, 5)
    expected = model(x)
    block = adapter_names(model, ["fr", None])
    assert "with" in repr(block) and torch.equal(model(x), expected)
    set_adapter(model, "de")
    for _ in range(2):
        with block:
            torch.testing.assert_close(model(x)[0], expected[0])
        assert "forward" not in vars(model[0])


def test_a_model_without_adapters_to_choose_from_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    with pytest.raises(AdapterStateError, match="no adapters"):
        adapter_names(model, [None]).__enter__()
    with_adapters(model)
    with disable_adapters(model), pytest.raises(AdapterStateError):
        adapter_names(model, ["de"]).__enter__()
    merge_adapters(model)
    with pytest.raises(AdapterStateError, match="is merged"):
        adapter_names(model, ["de"]).__enter__()


@pytest.mark.parametrize("names", [["de", None, "fr"], ["de"] * 3, [None] * 3])
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (6, 5), (5,)])
def test_another_number_of_rows_is_refused(shape: tuple[int, ...], names: list[str | None]) -> None:
    model = with_adapters(nn.Sequential(nn.Linear(5, 4)))
    with adapter_names(model, names):
        with pytest.raises(ConfigError, match=r"'0' reads a Tensor of shape .* got 3 names"):
            model(torch.ones(shape))
        assert model(torch.ones(3, 5)).shape == (3, 4)  # and the block goes on
    assert model(torch.ones(shape)).shape == (*shape[:-1], 4)


def test_features_or_bags_in_one_dimension_are_no_rows() -> None:
    flat, bags = torch.ones(2), (torch.tensor([0, 1]), torch.tensor([0, 2]))  # the second bag is empty
    for layer, x in ((nn.Linear(2, 4), flat), (nn.EmbeddingBag(3, 4), bags)):
        model = with_adapters(nn.Sequential(layer))
        with adapter_names(model, ["de", "fr"]), pytest.raises(ConfigError, match=r"'0' reads .* of shape \(2,\)"):
            call(model, x)


def test_blocks_nest_and_end_after_errors() -> None:
    model, x = with_adapters(nn.Sequential(nn.Linear(5, 4))), torch.randn(2, 5)
    with adapter_names(model, ["de", "fr"]):
        outer = model(x)
        with pytest.raises(KeyError), adapter_names(model, ["fr", "de"]):  # noqa: PT012  # the block is what is tested
            assert not torch.allclose(model(x), outer)
            raise KeyError
        assert torch.equal(model(x), outer)
        with disable_adapters(model):
            base = model(x)
        with set_adapter(model, "de"):
            assert torch.equal(model(x), outer)
    assert torch.allclose(model(x)[1], outer[1])  # some processors add in another order beside another row
    with disable_adapters(model):
        assert torch.equal(model(x), base)


def test_what_would_change_the_layers_is_refused_by_name_in_a_block(tmp_path: Path) -> None:
    model, x = with_adapters(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4)).double()), torch.randn(3, 5).double()
    save_adapter(model, tmp_path / "a.safetensors")
    calls: dict[str, Callable[[], object]] = {
        "inject_adapters": lambda: inject_adapters(model, LoRAConfig(r=1, target_modules=["1"]), name="new"),
        "load_adapter": lambda: load_adapter(model, tmp_path / "a.safetensors", name="file"),
        "merge_adapters": lambda: merge_adapters(model),
        "remove_adapters": lambda: remove_adapters(model, "fr"),
    }
    with adapter_names(model, ["de", None, "fr"]):
        expected = model(x)
        for name, call in calls.items():
            with pytest.raises(AdapterStateError, match=rf"{name} is not possible in a block of adapter_names"):
                call()
            assert torch.equal(model(x), expected)
        set_adapter(model, "de")  # an adapter is another object than its layer: each row has its own
        assert torch.equal(model(x), expected) and adapters(model) == ("de", "fr")
        with pytest.raises(AdapterStateError, match="remove_adapters"):
            remove_adapters(model)
        merge_adapters(copy.deepcopy(model))  # no block is open for a copy
    for name in ("inject_adapters", "load_adapter", "merge_adapters"):
        calls[name]()


def test_an_empty_batch_has_an_empty_output() -> None:
    dropping = LoRAConfig(r=2, target_modules="all", dropout=0.5, modules_to_save=["2"])
    layers = nn.Linear(5, 4), nn.Conv1d(4, 3, 1), nn.Linear(3, 2)
    model = with_adapters(nn.Sequential(*layers), de=dropping)
    with adapter_names(model, []):
        assert model[0](torch.ones(0, 5)).shape == (0, 4)
        assert model[1](torch.ones(0, 4, 7)).shape == (0, 3, 7)
        assert model[2](torch.ones(0, 3)).shape == (0, 2)
        with pytest.raises(ConfigError, match="got 0 names"):
            model[0](torch.ones(1, 5))


def test_a_block_inside_another_undoes_layers_that_only_the_outer_one_names() -> None:
    targets = {name: LoRAConfig(r=2, target_modules=[str(i)]) for i, name in enumerate(NAMES)}
    model, x = with_adapters(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), **targets), torch.randn(2, 5)
    set_adapter(model, "de")
    expected = model(x)
    with adapter_names(model, ["fr", None]):
        outer = model(x)
        with adapter_names(model, ["de", "de"]):
            torch.testing.assert_close(model(x), expected)
        assert torch.equal(model(x), outer)


def test_hooks_see_the_whole_batch_and_copies_run_alone() -> None:
    model, x, seen = with_adapters(nn.Sequential(nn.LSTM(5, 4, batch_first=True))), torch.randn(2, 3, 5), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    with adapter_names(model, ["de", "fr"]):
        model(x)
        alike = copy.deepcopy(model)
    assert seen == [(2, 3, 4)] and torch.equal(alike(x)[0], model(x)[0])


@pytest.mark.parametrize("targets", ["linear1", "self_attn"])
def test_inference_paths_of_transformers_are_off_in_the_block(targets: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    inject_adapters(model, LoRAConfig(r=2, target_modules=["layers.0.linear2"]), name="other")
    with_adapters(model, de=LoRAConfig(r=2, target_modules=["linear2"]), fr=LoRAConfig(r=2, target_modules=[targets]))
    set_adapter(model, "other")
    x, names = torch.randn(3, 4, 8), ["de", "fr", None]
    pad = torch.tensor([[False] * 4, [False] * 2 + [True] * 2, [False] * 3 + [True]])
    expected = []
    for row, name in enumerate(names):
        with set_adapter(model, name), torch.no_grad():
            expected.append(model(x, src_key_padding_mask=pad)[row])
    switches = [each.activation_relu_or_gelu for each in model.layers]
    with adapter_names(model, names), torch.no_grad():
        found = model(x, src_key_padding_mask=pad)
    for row in range(3):
        keep = ~pad[row]
        torch.testing.assert_close(found[row][keep], expected[row][: len(keep)][keep])
    assert [each.activation_relu_or_gelu for each in model.layers] == switches


def test_a_mask_of_positions_is_for_all_rows() -> None:
    torch.manual_seed(0)
    model, x = with_adapters(nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))), torch.randn(3, 3, 8)
    rows: list[Tensor] = []
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    for name in ("de", "fr", None):
        with set_adapter(model, name):
            rows.append(model[0](x, x, x, attn_mask=mask)[0][len(rows)])
    with adapter_names(model, ["de", "fr", None]):
        torch.testing.assert_close(model[0](x, x, x, attn_mask=mask)[0], torch.stack(rows))
        torch.testing.assert_close(model[0](x, x, x, None, True, mask)[0], torch.stack(rows))


def test_a_seq_first_transformer_is_refused_also_where_linear_layers_read_it() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False)
    with_adapters(model, **{name: LoRAConfig(r=2, target_modules=["linear1"]) for name in NAMES})
    with pytest.raises(AdapterStateError, match=r"'layers.0.self_attn' of TransformerEncoder has batch_first=False"):
        adapter_names(model, ["de"]).__enter__()


@pytest.mark.skipif(torch.__version__ < "2.6", reason="older compilers take no method for a module's forward")
def test_compiled_layers_take_part() -> None:
    model, x = with_adapters(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))), torch.randn(3, 5)
    names = ["de", None, "fr"]
    with adapter_names(model, names):
        expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = compiled(x)
    with adapter_names(model, names):
        torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x), plain)


def test_resting_adapters_follow_a_converted_model() -> None:
    model, names = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)), ["de", None, "fr"]
    with_adapters(model, de=LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    x = torch.randn(3, 5)
    with adapter_names(model, names):
        expected = model(x)
    model.double()
    with adapter_names(model, names):
        torch.testing.assert_close(model(x.double()), expected.double(), rtol=1e-5, atol=1e-5)


def test_half_precision_and_autocast_compute_as_one_adapter_does() -> None:
    model, names, x = with_adapters(nn.Sequential(nn.Linear(5, 4))), ["de", None, "fr"], torch.randn(3, 7, 5)
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        model.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            found, expected = [], []
            for row, name in enumerate(names):
                with set_adapter(model, name):
                    expected.append(model(x.to(dtype))[row])
            with adapter_names(model, names):
                found = model(x.to(dtype))
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, torch.stack(expected), rtol=0.02, atol=0.02)
        assert torch.equal(found[1], expected[1])


def test_a_language_model_writes_with_an_adapter_for_each_prompt() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape, pad_token_id=0, eos_token_id=None, bos_token_id=1))
    de, fr = LoRAConfig(r=2, target_modules="all"), LoRAConfig(r=3, target_modules=["q_proj"], use_dora=True)
    with_adapters(model.double().eval(), de=de, fr=fr)
    prompts, names = torch.randint(1, 50, (4, 5)), ["fr", "de", None, "de"]
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = []
    for row, name in enumerate(names):
        with set_adapter(model, name):
            expected.append(model.generate(prompts[row : row + 1], **options)[0])
    with adapter_names(model, names):
        assert torch.equal(model.generate(prompts, **options), torch.stack(expected))
    with adapter_names(model, [name for name in names for _ in range(2)]):  # each beam
        model.generate(prompts, num_beams=2, **options)


def test_4_bit_layers_take_part() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32))
    model[0].weight = bitsandbytes.nn.Params4bit(torch.randn(64, 64), requires_grad=False)
    with_adapters(model.to("cpu").eval())
    x, names = torch.randn(3, 64), ["de", None, "fr"]
    expected = []
    for row, name in enumerate(names):
        with set_adapter(model, name), torch.no_grad():
            expected.append(model(x)[row])
    with adapter_names(model, names), torch.no_grad():
        torch.testing.assert_close(model(x), torch.stack(expected))
