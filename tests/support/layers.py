"""Layers of every kind, and what they should compute."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, remove_adapters
from tests.support.models import as_trained


class Scaled(nn.Linear):
    """A linear layer that scales its weight and its output in its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * 2, self.bias) * 3


class Normalised(nn.Linear):
    """A linear layer whose output is not linear in its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(
            input, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias
        )


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


class Padding(nn.Conv2d):
    """A convolution that pads in its own forward, as EfficientNets do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (0, 1, 1, 0)))


class Standardised(nn.Conv2d):
    """A convolution that standardises its weight in the method that forward calls."""

    def _conv_forward(
        self, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        return super()._conv_forward(
            input, (weight - weight.mean()) / weight.std(), bias
        )


class Linear(nn.Module):
    """A linear layer that is none of torch's, as that of PyG."""

    def __init__(self, reads: int, writes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(writes, reads))
        self.bias = nn.Parameter(torch.zeros(writes))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Experts(nn.Module):
    """A stack of matrices, and one matrix beside it, as parameters of the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 5))
        self.scale = nn.Parameter(torch.randn(5))
        self.mix = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...o", x * self.scale, self.stack) @ self.mix


FLOATS = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(2, 3, 5)
INDEX = torch.tensor([[0, 3, 1], [4, 4, 2]])
BAGS = (torch.tensor([0, 3, 1, 4, 4]), torch.tensor([0, 2]))
LINE, PLANE, SPACE = (
    torch.linspace(-1, 1, 2 * 4 * 5**n, dtype=torch.float64).view(2, 4, *(5,) * n)
    for n in (1, 2, 3)
)
PACKED = nn.utils.rnn.pack_padded_sequence(
    FLOATS, torch.tensor([3, 2]), batch_first=True
)
PAD = torch.tensor([[False, False, True], [False, False, False]])
SELF = (FLOATS, FLOATS, FLOATS)
ATTENTION: dict[str, Any] = {"embed_dim": 5, "num_heads": 1, "batch_first": True}
LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(5, 4), FLOATS),
    "conv1d": (lambda: Conv1D(4, 5), FLOATS),
    "embedding": (lambda: nn.Embedding(5, 4), INDEX),
    "padded embedding": (lambda: nn.Embedding(5, 4, padding_idx=4), INDEX),
    "recursive": (lambda: Recursive(5, 4), FLOATS),
    "scaled": (lambda: Scaled(5, 4), FLOATS),
    "normalised": (lambda: Normalised(5, 4), FLOATS),
    "scaled embedding": (lambda: ScaledEmbedding(5, 4), INDEX),
    "bag": (lambda: nn.EmbeddingBag(5, 4), BAGS),
    "bag of sums": (lambda: nn.EmbeddingBag(5, 4, mode="sum", padding_idx=4), INDEX),
    "bag of weighted sums": (
        lambda: nn.EmbeddingBag(5, 4, mode="sum"),
        (*BAGS, torch.linspace(1, 2, 5).double()),
    ),
    "bag of maxima": (lambda: nn.EmbeddingBag(5, 4, mode="max"), INDEX),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), PLANE),
    "convolution in one dimension": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False),
        LINE,
    ),
    "convolution in three": (
        lambda: nn.Conv3d(4, 6, (1, 2, 3), dilation=(1, 2, 1), padding="same"),
        SPACE,
    ),
    "circular convolution": (
        lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"),
        PLANE,
    ),
    "grouped convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=(1, 2)), PLANE),
    "depthwise convolution": (
        lambda: nn.Conv2d(4, 8, (3, 2), groups=4, padding=1),
        PLANE,
    ),
    "unbatched convolution": (lambda: nn.Conv2d(4, 6, 3), PLANE[0]),
    "padding convolution": (lambda: Padding(4, 6, 3), PLANE),
    "standardised convolution": (lambda: Standardised(4, 6, 3), PLANE),
    "transposed convolution": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        PLANE,
    ),
    "transposed to a size": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2),
        (PLANE, [12, 11]),
    ),
    "grouped transposed convolution": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2),
        PLANE,
    ),
    "bilinear": (lambda: nn.Bilinear(5, 4, 6), (FLOATS, FLOATS[..., :4])),
    "lstm": (lambda: nn.LSTM(5, 4, num_layers=2, bidirectional=True), FLOATS),
    "lstm with projections": (
        lambda: nn.LSTM(5, 4, proj_size=3, batch_first=True),
        FLOATS,
    ),
    "packed lstm": (lambda: nn.LSTM(5, 4, batch_first=True), PACKED),
    "gru": (lambda: nn.GRU(5, 4, bias=False, batch_first=True), FLOATS),
    "rnn": (lambda: nn.RNN(5, 4, nonlinearity="relu"), FLOATS),
    "lstm cell": (lambda: nn.LSTMCell(5, 4), FLOATS[0]),
    "gru cell": (lambda: nn.GRUCell(5, 4, bias=False), FLOATS[0]),
    "attention": (lambda: nn.MultiheadAttention(**ATTENTION), (*SELF, PAD)),
    "attention to others": (
        lambda: nn.MultiheadAttention(**ATTENTION | {"kdim": 4, "vdim": 3}),
        (FLOATS, FLOATS[..., 1:], FLOATS[..., 2:]),
    ),
    "attention with every option": (
        lambda: nn.MultiheadAttention(
            5, 5, add_bias_kv=True, add_zero_attn=True, bias=False
        ),
        (*SELF, None, True, torch.eye(2, dtype=torch.bool), False),
    ),
    "experts": (Experts, FLOATS),
}


class Model(nn.Sequential):
    """A model of one layer. It returns all that the layer puts out, as one vector."""

    def forward(self, x: Any) -> Tensor:
        output = self[0](*x) if type(x) is tuple else self[0](x)
        return torch.cat(vectors_in(output))


def vectors_in(output: Any) -> list[Tensor]:
    """The tensors that a layer puts out, alone or in tuples, each as a vector: the last one first."""
    if isinstance(output, nn.utils.rnn.PackedSequence):
        output = output.data
    if isinstance(output, Tensor):
        return [output.reshape(-1)]
    vectors: list[Tensor] = []
    if isinstance(output, tuple):
        for part in reversed(output):
            vectors += vectors_in(part)
    return vectors


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def config(model: nn.Sequential, **kwargs: Any) -> LoRAConfig:
    """A configuration that adapts all there is in the one layer of ``model``."""
    if isinstance(model[0], Experts):
        kwargs = {"target_modules": [], "target_parameters": ["stack", "mix"], **kwargs}
    return LoRAConfig(**{"r": 2, "alpha": 3, "target_modules": "all", **kwargs})


Factors = dict[str, Tensor]


def factors(layer: Any) -> Factors:
    return {
        name: p.detach().clone().requires_grad_()
        for name, p in layer.lora_parameters().items()
    }


def updates_by_part(lora: Factors, scaling: float) -> dict[str, Tensor]:
    """s B A for each matrix of a layer that has several."""
    updates = {}
    for name, a in lora.items():
        if name.startswith("lora_A_"):
            part = name.removeprefix("lora_A_")
            updates[part] = scaling * lora[f"lora_B_{part}"] @ a
    return updates


def reference_weights_of_attention(
    layer: nn.MultiheadAttention, updates: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of q, k and v may lie in one, or each in its own."""
    weights = {"out_proj.weight": layer.out_proj.weight + updates["out"]}
    if layer.in_proj_weight is not None:
        update = torch.cat([updates["q"], updates["k"], updates["v"]])
        weights["in_proj_weight"] = layer.in_proj_weight + update
        return weights
    for part in ("q", "k", "v"):
        name = f"{part}_proj_weight"
        weights[name] = layer.get_parameter(name) + updates[part]
    return weights


def reference_weights(layer: Any, lora: Factors) -> dict[str, Tensor]:
    """W + s B A of the paper for each of the layer's matrices, in the layout of the weight that it lies in."""
    scaling = 1.5
    if isinstance(layer, nn.MultiheadAttention):
        return reference_weights_of_attention(layer, updates_by_part(lora, scaling))
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase | Experts):
        prefix = "" if isinstance(layer, Experts) else "weight_"
        weights = {}
        for part, update in updates_by_part(lora, scaling).items():
            weights[prefix + part] = layer.get_parameter(prefix + part) + update
        return weights
    delta = scaling * lora["lora_B"] @ lora["lora_A"]
    weight = layer.weight
    transposed = isinstance(
        layer,
        nn.Embedding | nn.EmbeddingBag | Conv1D | nn.modules.conv._ConvTransposeNd,
    )
    return {"weight": weight + (delta.T if transposed else delta).reshape(weight.shape)}


def reference(model: Model, lora: Factors, x: Any) -> Tensor:
    """What the same layer without adapters computes with the weights that the papers say."""
    layer: Any = model[0]
    weights = reference_weights(layer, lora)
    if "lora_magnitude" in lora:  # DoRA
        transposed = isinstance(layer, nn.Embedding | Conv1D)
        rows = weights["weight"].T if transposed else weights["weight"].flatten(1)
        rows = (
            lora["lora_magnitude"][:, None]
            * rows
            / rows.norm(dim=1, keepdim=True).detach()
        )
        weights = {
            "weight": (rows.T if transposed else rows).reshape(layer.weight.shape)
        }
    starts = factors_at_the_start(lora)
    if starts:  # PiSSA and OLoRA
        started = reference_weights(layer, starts)
        weights = {
            name: layer.get_parameter(name) + weights[name] - started[name]
            for name in weights
        }
    plain = copy.deepcopy(model)
    remove_adapters(plain)
    weights_of_model = {f"0.{name}": weight for name, weight in weights.items()}
    return torch.func.functional_call(plain, weights_of_model, (x,))


def factors_at_the_start(lora: Factors) -> Factors:
    """The factors that an adapter began with, by the names of those that train now."""
    starts = {}
    for name, p in lora.items():
        if name.startswith(("lora_A0", "lora_B0")):
            starts[name.replace("0", "", 1)] = p.detach()
    return starts


@torch.no_grad()
def train(model: Model) -> None:
    """Move what trains, and only that."""
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(
                torch.randn(p.shape, generator=generator, dtype=torch.float64).mul_(0.1)
            )


def adapted(layer: nn.Module, **arguments: Any) -> Any:
    """A layer with an update that does something."""
    as_trained(
        nn.Sequential(layer).double(), scale=1, **{"target_modules": "all"} | arguments
    )
    return layer
