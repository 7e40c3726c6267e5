"""Private names of torch and Lightning are there, and they are read in one place."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_lora import private
from tests.support.models import LitTiny

ROOM = Path(private.__file__)


# Each is there


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@pytest.mark.parametrize("name", private.RECURRENT_LISTS)
def test_each_private_name_of_recurrent_layers_is_there(name: str) -> None:
    assert hasattr(nn.GRU(2, 2), name)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_each_private_name_that_no_other_test_would_miss_is_there() -> None:
    storage = torch.storage.TypedStorage(2, dtype=torch.int8)
    assert getattr(storage, private.STORAGE_BYTES).nbytes() == 2
    doubled = Doubles.apply(torch.ones(1, requires_grad=True))
    assert getattr(doubled.grad_fn, private.NODE_FUNCTION) is Doubles
    assert getattr(DDPStrategy(start_method="fork"), private.START_METHOD) == "fork"
    assert getattr(LitTiny(), private.HPARAMS_NAME) == "kwargs"
    assert getattr(ModelSummary(0), private.SUMMARY_DEPTH) == 0


@pytest.mark.parametrize(
    "register", ["register_hook", "register_post_accumulate_grad_hook"]
)
def test_a_hook_on_a_gradient_is_seen_until_it_is_removed(register: str) -> None:
    weight = nn.Parameter(torch.ones(2))
    assert not private.has_gradient_hooks(weight)
    hook = getattr(weight, register)(lambda _: None)
    assert private.has_gradient_hooks(weight)
    hook.remove()
    assert not private.has_gradient_hooks(weight)


# They are read in one place


# of nn.Module, which every release has
OF_MODULES = {"_parameters", "_modules", "_buffers"}
OTHERS = {  # of other packages, each in the one place that deals with it
    # torchmetrics
    "metrics.py": {"_plot", "_error_on_missing_matplotlib", "_get_col_row_split"},
    "storage/stored_modules.py": {"_name_or_path"},  # transformers
    "storage/formats/peft/naming/when_loaded.py": {"_check_lora_target_modules_mamba"},
}  # fmt: skip
# entries that this package writes
OURS = {"_lora", "_lora_edited", "_lora_switched", "_whole"}


PRIVATE = re.compile(r"_[^\W_]\w*")


def defined_in(tree: ast.Module) -> Iterator[str]:
    """The names that a file gives to something of its own; one that it overrides is torch's or Lightning's to call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            owner = ast.unparse(node.value)
            if owner == "self":
                yield node.attr


def read_in(tree: ast.Module) -> Iterator[str]:
    """The names of attributes, and of what is imported from elsewhere, and texts that may be such names."""
    in_texts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            in_texts.update(node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from [each.name for each in node.names]
            yield from (node.module or "").split(".")
        elif isinstance(node, ast.Constant) and node not in in_texts:
            yield str(node.value)


def test_no_other_file_reads_a_private_name() -> None:
    files = {
        path: ast.parse(path.read_text())
        for path in ROOM.parent.rglob("*.py")
        if path != ROOM
    }
    ours = OURS | OF_MODULES
    for tree in files.values():
        ours |= set(defined_in(tree))
    found = {}
    for path, tree in files.items():
        names = {name for name in read_in(tree) if PRIVATE.fullmatch(name)} - ours
        if names:
            found[path.relative_to(ROOM.parent).as_posix()] = names
    assert found == OTHERS
