"""Models of layers that PEFT adapts, and PEFT's own adapters of them."""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Mixed(nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.conv1d = nn.Conv1d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 8)
        self.c_proj = Conv1D(12, 8)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 3)
        nn.init.normal_(self.c_proj.weight, std=0.3)

    def forward(self, index: Tensor) -> Tensor:
        x = self.conv1d(self.embed(index).transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(self.c_proj(torch.tanh(self.linear(x)))))


class Images(nn.Sequential):
    """Convolutions of two and three dimensions, and a norm with statistics."""

    def __init__(self) -> None:
        in_two = {
            "conv2d": nn.Conv2d(3, 6, 3, stride=2),
            "bn": nn.BatchNorm2d(6),
            "depth": nn.Unflatten(1, (6, 1)),
        }
        in_three = {"conv3d": nn.Conv3d(6, 4, (1, 2, 2)), "flat": nn.Flatten(1, 2)}
        super().__init__(
            OrderedDict(in_two | in_three | {"grouped": nn.Conv2d(4, 4, 1, groups=2)})
        )


class Attending(nn.Module):
    """An attention, and a layer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)
        nn.init.normal_(self.attn.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attn(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """Matrices, and stacks of them, that a module reads itself, and a layer inside."""

    def __init__(self, *, is_transposed: bool = False, experts: int = 3) -> None:
        super().__init__()
        up, down = (6, 8), (8, 6)
        self.up = nn.Parameter(
            0.3 * torch.randn(experts, *(up[::-1] if is_transposed else up))
        )
        self.down = nn.Parameter(
            0.3 * torch.randn(experts, *(down[::-1] if is_transposed else down))
        )
        self.gate = nn.Parameter(torch.randn(experts, 8))
        self.fc = nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.ones(8))
        self.is_transposed = is_transposed

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x) + self.bias
        up, down = (
            w.transpose(1, 2) if self.is_transposed else w for w in (self.up, self.down)
        )
        each = torch.einsum(
            "eoh,...eh->...eo", down, torch.tanh(torch.einsum("ehi,...i->...eh", up, x))
        )
        return torch.einsum("...e,...eo->...o", (x @ self.gate.T).softmax(-1), each)


class Expert(nn.Module):
    """A model with experts and a recurrent layer."""

    def __init__(self, *, is_transposed: bool = False) -> None:
        super().__init__()
        self.experts = Experts(is_transposed=is_transposed)
        self.rnn = nn.GRU(8, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.experts(x))[0]


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """Always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return make().eval()


def write_peft(
    folder: Path,
    base: nn.Module,
    change: Callable[[Any], object] | None = None,
    **arguments: Any,
) -> Any:
    """Save PEFT's adapters of ``base``, with random values, and return the adapted model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(base, LoraConfig(**{"r": 2, **arguments})).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in peft.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn(p.shape, generator=generator))
        if change:
            change(peft)
        peft.save_pretrained(folder)
    return peft


def gap(a: Any, b: Any) -> float:
    """The largest difference, as a share of the largest value."""
    a, b = (getattr(x, "last_hidden_state", getattr(x, "logits", x)) for x in (a, b))
    return float(((a - b).abs().max() / b.abs().max()).detach())
