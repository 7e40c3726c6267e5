"""Opacus finds the gradient that each sample gives the adapters, and a Trainer makes its private steps."""

import runpy
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRACallback, LoRAConfig, inject_adapters
from tests.support.models import randomise, trainer
from tests.test_docs import blocks, program

opacus = pytest.importorskip("opacus", minversion="1.6")

from opacus.grad_sample import GradSampleModule  # noqa: E402
from opacus.grad_sample.utils import prepare_module  # noqa: E402

pytestmark = [
    # of torch: what comes before is frozen
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),  # of opacus
    # of opacus: tokens
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype"),
]

BATCH = 5
X = torch.randint(10, (BATCH, 4), generator=torch.Generator().manual_seed(0))
Y = torch.arange(BATCH) % 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.inner = nn.Linear(8, 8)
        self.outer = Conv1D(6, 8)
        self.head = nn.Linear(6, 3)

    def forward(self, index: Tensor) -> Tensor:
        x = torch.tanh(self.inner(self.embed(index)))
        x = torch.tanh(self.outer(x))
        return self.head(x).mean(1)


def adapted(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    arguments = {"r": 2, "alpha": 6, "modules_to_save": ["head"], **arguments}
    inject_adapters(model, LoRAConfig(**arguments))
    randomise(model, scale=0.5)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def one_by_one(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of each sample, in a batch of its own."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for x, y in zip(X, Y, strict=True):
        model.zero_grad()
        loss = F.cross_entropy(model(x[None]), y[None])
        loss.backward()
        for name, p in trained(model).items():
            assert p.grad is not None
            found[name].append(p.grad)
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def found_by_opacus(model: nn.Module, mode: str) -> dict[str, Tensor]:
    """What opacus finds in one batch of all: a gradient of each sample, or its norm in the mode "ghost"."""
    output = prepare_module(model, mode)(X)
    F.cross_entropy(output, Y).backward()
    attribute = "_norm_sample" if mode == "ghost" else "grad_sample"
    return {name: getattr(p, attribute) for name, p in trained(model).items()}


def norms(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.flatten(1).norm(dim=1) for name, value in gradients.items()}


def tell_opacus() -> None:
    """Run the block of the page that tells Opacus of adapted layers."""
    first, _, told, *_ = blocks("privacy")
    exec(first + told.partition("\n\n\nlora = ")[0], {"__name__": "page"})


@pytest.fixture(autouse=True)
def samplers() -> Iterator[None]:
    """Forget the classes that opacus is told."""
    before = dict(GradSampleModule.GRAD_SAMPLERS)
    yield
    GradSampleModule.GRAD_SAMPLERS.clear()
    GradSampleModule.GRAD_SAMPLERS.update(before)


@pytest.mark.parametrize(
    ("mode", "arguments", "is_told"),
    [
        ("hooks", {}, True),
        ("functorch", {"use_dora": True}, False),
        ("ghost", {}, True),
        ("ghost", {"bias": "all", "init": "pissa"}, False),
        ("hooks", {"target_modules": "all", "modules_to_save": None}, False),
    ],
    ids=str,
)
def test_gradients_are_those_of_batches_with_one_sample(
    mode: str, arguments: dict[str, Any], is_told: bool
) -> None:
    if is_told:
        tell_opacus()
    expected = one_by_one(adapted(**arguments))
    if mode == "ghost":
        expected = norms(expected)
    model = adapted(**arguments)
    found = found_by_opacus(model, mode)
    torch.testing.assert_close(found, expected)
    uses_functorch = mode == "functorch" or not is_told
    assert hasattr(model.inner, "ft_compute_sample_grad") is uses_functorch


def test_code_of_the_page_runs_and_what_was_spent_is_in_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = runpy.run_path(str(program(tmp_path, "privacy")))
    path = known["trainer"].checkpoint_callback.best_model_path
    assert known["privacy"].engine.accountant.history == [(1.0, 0.125, 8)]
    assert 0 < known["trainer"].callback_metrics["epsilon"] < 10
    again = known["Privacy"](1.0, 1.0, 1e-5)
    module = known["MyModule"]()
    resumed = trainer(tmp_path, [LoRACallback(), again], max_epochs=2)
    resumed.fit(module, known["loader"], ckpt_path=path)
    assert again.engine.accountant.history == [(1.0, 0.125, 16)]
    drawn_otherwise = trainer(tmp_path, [known["lora"], again])
    with pytest.raises(TypeError, match="needs a DPDataLoader"):
        drawn_otherwise.fit(module)
