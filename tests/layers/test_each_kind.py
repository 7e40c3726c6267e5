"""What convolutions, embeddings, recurrent layers and attention have of their own."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.training.optimizers import train_adapters
from tests.support.layers import FLOATS, LAYERS, PLANE, adapted
from tests.support.models import randomise

SLICES = {"0": {"few": [1, 3], "last": [5, 6]}}


@pytest.mark.parametrize("groups", [1, 2])
def test_slices_of_a_convolution_are_channels_that_it_writes(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups)).double()
    plain = copy.deepcopy(model)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, alpha=2, target_modules=["0"], target_slices=SLICES))
    assert torch.equal(model(PLANE), plain(PLANE))
    randomise(model)
    output = model(PLANE)
    factors = ll.adapter_state_dict(model)
    with torch.no_grad():
        for part, rows in (("few", slice(1, 3)), ("last", slice(5, 6))):
            update = factors[f"0.lora_B_{part}"] @ factors[f"0.lora_A_{part}"]
            plain[0].weight[rows] += update.view_as(plain[0].weight[rows])
    torch.testing.assert_close(output, plain(PLANE))


def test_a_transposed_convolution_has_no_parts() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3))
    with pytest.raises(ll.TargetError, match="'0' is a ConvTranspose2d, which has no parts for target_slices"):
        ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["0"], target_slices=SLICES))


@pytest.mark.parametrize(("change", "kernel"), [({"stride": 2}, 1), ({"padding": 1}, 1), ({"stride": (2,)}, 3)])
def test_a_geometry_that_is_set_later_may_be_one_number(change: dict[str, Any], kernel: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, kernel))
    vars(model[0]).update(change)
    plain, x = copy.deepcopy(model), torch.randn(2, 4, 7, 6).contiguous(memory_format=torch.channels_last)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["0"]))
    torch.testing.assert_close(model(x), plain(x))
    randomise(model)
    output = model(x)
    output.sum().backward()
    ll.merge_adapters(model)
    torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "channels_last", "size"), [(1, True, (5, 4)), (1, False, (1, 1)), (3, True, (1, 1)), (3, False, (5, 4))]
)
def test_the_output_has_the_layers_own_memory_format(kernel: int, channels_last: bool, size: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, kernel, padding=kernel // 2))
    x = torch.randn(3, *size, 4).movedim(-1, 1) if channels_last else torch.randn(3, 4, *size)
    expected = model(x)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules="all"))
    found = model(x)
    assert torch.equal(found, expected) and found.stride() == expected.stride()


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3)])
def test_many_adapters_of_one_convolution_are_computed_by_vmap(layer: nn.Module) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).double()
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules="all"))
    trained = [(name, p.shape) for name, p in model.named_parameters() if p.requires_grad]
    many = {name: torch.randn(3, *shape, dtype=torch.float64) for name, shape in trained}

    def compute(factors: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, factors, (PLANE,))  # type: ignore[no-any-return]

    found = torch.func.vmap(compute)(many)
    one_by_one = torch.stack([compute({name: t[i] for name, t in many.items()}) for i in range(3)])
    torch.testing.assert_close(found, one_by_one)


# Embeddings and bags of them


INDEX = torch.tensor([[3, 3, 3, 1], [0, 1, 2, 4]])


def test_gradients_are_divided_by_how_often_a_token_occurs_if_the_layer_does_so() -> None:
    grads = []
    for divides in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 4, scale_grad_by_freq=divides)).double()
        ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules="all"))
        randomise(model)
        model(INDEX).sum().backward()
        grads.append(model.get_parameter("0.lora_A").grad)
    often = torch.tensor([1.0, 2, 1, 3, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(grads[1], grads[0] / often)


@pytest.mark.parametrize(
    ("arguments", "why"), [({"max_norm": 2.0}, "max_norm=2 rewrites"), ({"sparse": True}, "gradients are sparse")]
)
def test_bags_are_refused_where_embeddings_are(arguments: dict[str, object], why: str) -> None:
    model = nn.Sequential(nn.EmbeddingBag(6, 4, **arguments))  # type: ignore[arg-type]
    with pytest.raises(ll.TargetError, match=why):
        ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["0"]))


def test_slices_of_an_embedding_are_features_that_it_writes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4)).double()
    plain = copy.deepcopy(model)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, alpha=2, target_modules=["0"], target_slices={"0": {"some": [1, 3]}}))
    randomise(model)
    factors = ll.adapter_state_dict(model)
    with torch.no_grad():
        plain[0].weight[:, 1:3] += (factors["0.lora_B_some"] @ factors["0.lora_A_some"]).T
    torch.testing.assert_close(model(INDEX), plain(INDEX))


@pytest.mark.parametrize("padding_idx", [2, -4])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_token_that_pads_gives_no_gradient_to_its_column(kind: Any, padding_idx: int) -> None:
    layer = adapted(kind(6, 4, padding_idx=padding_idx))
    layer(torch.tensor([[1, 2, 5], [2, 1, 1]])).square().sum().backward()
    assert layer.lora_A.grad.any(dim=0).tolist() == [False, True, False, False, False, True]


# Attention: each projection has an update of its own


class Attends(nn.Module):
    """An attention to something else, whose keys and values have few features."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, kdim=2, vdim=3, batch_first=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., :2], x[..., :3])[0]


X = torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 4, 6)


def names(model: nn.Module) -> set[str]:
    """The parts of the attention that are adapted."""
    return {name.rpartition("_")[2] for name in ll.adapter_state_dict(model) if "lora_A_" in name}


def test_each_projection_has_the_rank_asked_for_or_the_most_it_can_have() -> None:
    torch.manual_seed(0)
    model = Attends().double()
    before = model(X)
    ll.inject_adapters(model, ll.LoRAConfig(r=4, alpha=4, init="pissa"))
    shapes = {name.removeprefix("attention."): tuple(p.shape) for name, p in ll.adapter_state_dict(model).items()}
    assert {name: shape for name, shape in shapes.items() if "0" not in name} == {
        "lora_A_q": (4, 6), "lora_B_q": (6, 4),
        "lora_A_k": (2, 2), "lora_B_k": (6, 2),
        "lora_A_v": (3, 3), "lora_B_v": (6, 3),
        "lora_A_out": (4, 6), "lora_B_out": (6, 4),
    }  # fmt: skip
    torch.testing.assert_close(model(X), before)


def test_a_rank_that_none_of_its_projections_can_have_is_refused() -> None:
    ll.inject_adapters(Attends(), ll.LoRAConfig(r=1, rank_pattern={"attention": 6}))
    with pytest.raises(ll.ConfigError, match=r"'attention' \(r=7, at most 6\)"):
        ll.inject_adapters(Attends(), ll.LoRAConfig(r=1, rank_pattern={"attention": 7}))


def test_an_output_projection_that_is_excluded_leaves_the_other_three() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["self_attn"], exclude_modules=["self_attn.out_proj"]))
    assert names(model) == {"q", "k", "v"}


def test_each_adapter_is_in_the_group_of_its_own_weight() -> None:
    attention = nn.MultiheadAttention(8, 2)
    model = nn.ModuleDict({"attention": attention})
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    weights = (attention.in_proj_weight, attention.out_proj.weight)
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=0.1)
    train_adapters(model, [optimizer])
    names = {id(p): name for name, p in attention.named_parameters()}
    held = [[names[id(p)][5:] for p in group["params"]] for group in optimizer.param_groups]
    assert held == [["A_q", "B_q", "A_k", "B_k", "A_v", "B_v"], ["A_out", "B_out"]]


def test_weights_that_train_whole_are_not_adapted_too() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    how: dict[str, Any] = {"r": 2, "target_modules": ["self_attn"]}
    ll.inject_adapters(model, ll.LoRAConfig(**how, modules_to_save=["self_attn.in_proj_weight"]))
    assert names(model) == {"out"} and model.self_attn.in_proj_weight.requires_grad
    every = ["self_attn.in_proj_weight", "self_attn.out_proj"]
    with pytest.raises(ll.TargetError, match="select no layer of TransformerEncoderLayer"):
        ll.inject_adapters(nn.TransformerEncoderLayer(8, 2, 16), ll.LoRAConfig(**how, modules_to_save=every))


def test_rows_are_refused_where_the_parts_have_names() -> None:
    how = ll.LoRAConfig(r=2, target_modules=["self_attn"], target_slices={"self_attn": {"q": [0, 8]}})
    with pytest.raises(ll.TargetError, match=r"'self_attn', whose parts have names: 'q', 'k', 'v', 'out'\. Give"):
        ll.inject_adapters(nn.TransformerEncoderLayer(8, 2, 16), how)


def test_an_output_projection_that_cannot_be_adapted_is_named() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    weight = model.self_attn.out_proj.weight
    model.self_attn.out_proj.weight = nn.Parameter(weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ll.TargetError, match=r"its out_proj.weight is torch.int8, .*not floating point"):
        ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["self_attn"]))


def test_each_projection_starts_from_what_is_strongest_in_its_own_rows() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2)}).double()
    ll.inject_adapters(model, ll.LoRAConfig(r=2, alpha=2, init="pissa"))
    factors, rows = ll.adapter_state_dict(model), model["attention"].in_proj_weight.detach().chunk(3)
    for part, matrix in zip("qkv", rows, strict=True):
        start = factors[f"attention.lora_B_{part}"] @ factors[f"attention.lora_A_{part}"]
        torch.testing.assert_close((matrix - start).norm(), torch.linalg.svdvals(matrix)[2:].norm())


# Recurrent layers


EVERY = ll.LoRAConfig(r=2, target_modules="all")


@pytest.mark.parametrize("name", ["lstm", "lstm with projections", "gru cell"])
def test_every_weight_of_every_layer_and_direction_has_an_update_of_its_own(name: str) -> None:
    model = nn.Sequential(LAYERS[name][0]())
    weights = {name[7:]: p for name, p in model[0].named_parameters() if name.startswith("weight_")}
    ll.inject_adapters(model, EVERY)
    shapes = {name: factor.shape for name, factor in ll.adapter_state_dict(model).items()}
    assert shapes == {f"0.lora_A_{part}": (2, weight.shape[1]) for part, weight in weights.items()} | {
        f"0.lora_B_{part}": (weight.shape[0], 2) for part, weight in weights.items()
    }


def test_running_a_layer_keeps_no_updated_weights_in_memory() -> None:
    model = nn.Sequential(nn.LSTM(5, 23))  # a size that nothing else has

    def held() -> int:
        gc.collect()
        return sum(type(each) in (Tensor, nn.Parameter) and each.shape == (92, 5) for each in gc.get_objects())

    ll.inject_adapters(model, EVERY)
    randomise(model)
    before = held()
    model(FLOATS.float())
    assert held() == before


class Counting(nn.LSTM):
    """An LSTM that counts how often its weights are laid out as cuDNN reads them, in one piece of memory."""

    times = 0

    def flatten_parameters(self) -> None:
        self.times += 1
        super().flatten_parameters()


def test_weights_are_laid_out_for_cudnn_again_whenever_others_are_shown() -> None:
    model = nn.Sequential(Counting(5, 4))
    ll.inject_adapters(model, EVERY)
    randomise(model)
    before = model[0].times
    ll.merge_adapters(model)
    merged = model[0].times
    ll.unmerge_adapters(model)
    assert before < merged < model[0].times
