"""Private names of torch and Lightning that stand in texts are there, and all private names are read in one place."""

import ast
import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as bundled
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader

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


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(1))
        self.register_buffer("left", torch.zeros(1), persistent=False)

    def get_extra_state(self) -> int:
        return 1


class Named(L.LightningModule):
    def __init__(self, options: dict[str, int]) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)


def children(wrapped: nn.Module) -> set[str]:
    return set(wrapped._modules)


def notes() -> bool:
    state: Any = nn.Linear(2, 2).state_dict()
    return set(getattr(state, private.STATE_NOTES)) == {""}


def hooks() -> bool:
    module = nn.Linear(2, 2)
    module.register_load_state_dict_pre_hook(lambda *_: None)
    return len(getattr(module, private.LOAD_HOOKS)) == 1


def recurrent() -> bool:
    layer = nn.GRU(2, 2, bias=False)
    names = getattr(layer, private.RECURRENT_NAMES) == ["weight_ih_l0", "weight_hh_l0"]
    return names and all(hasattr(layer, name) for name in private.RECURRENT_LISTS)


def averages() -> bool:
    kinds = [StochasticWeightAveraging(0.1)]
    if hasattr(bundled, "WeightAveraging"):
        kinds.append(bundled.WeightAveraging())
    return all(private.AVERAGE in vars(each) for each in kinds) and callable(getattr(kinds[0], private.AVERAGES_WITH))


CHECKS: dict[str, Callable[[], Any]] = {
    "COMPILED": lambda: private.COMPILED in children(torch.compile(Keeps())),
    "CHECKPOINTED": lambda: private.CHECKPOINTED in children(checkpoint_wrapper(Keeps())),
    "FABRIC_WRAPPED FABRIC_OWN": lambda: (
        children(L.Fabric(accelerator="cpu").setup(nn.Linear(2, 2))) >= {private.FABRIC_WRAPPED, private.FABRIC_OWN}
    ),
    "EXTRA_STATE": lambda: private.EXTRA_STATE in Keeps().state_dict(),
    "CLI_CLASS": lambda: private.CLI_CLASS in inspect.getsource(import_module("lightning.pytorch.cli")),
    "STORAGE_BYTES": lambda: (
        getattr(torch.storage.TypedStorage(2, dtype=torch.int8), private.STORAGE_BYTES).nbytes() == 2
    ),
    "NODE_FUNCTION": lambda: (
        getattr(Doubles.apply(torch.ones(1, requires_grad=True)).grad_fn, private.NODE_FUNCTION) is Doubles
    ),
    "LOAD_HOOKS": hooks,
    "NOT_STORED": lambda: getattr(Keeps(), private.NOT_STORED) == {"left"},
    "STATE_NOTES": notes,
    "CONVOLVES": lambda: hasattr(nn.Conv1d, private.CONVOLVES),
    "RECURRENT_LISTS RECURRENT_NAMES": recurrent,
    "START_METHOD": lambda: getattr(DDPStrategy(start_method="fork"), private.START_METHOD) == "fork",
    "HPARAMS_NAME": lambda: getattr(Named({"a": 1}), private.HPARAMS_NAME) == "kwargs",
    "LOGS_HPARAMS": lambda: [getattr(each, private.LOGS_HPARAMS) for each in (Named({}), LitTiny())] == [False, True],
    "AVERAGE AVERAGES_WITH": averages,
    "LOADER_STATE": lambda: hasattr(DataLoader([1]), private.LOADER_STATE),
}


@pytest.mark.parametrize("names", CHECKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_each_private_name_is_there_and_means_what_it_did(names: str) -> None:
    assert CHECKS[names](), names


def test_each_text_has_such_a_test() -> None:
    """A function or class of a name that is gone is an error anywhere. A text might find nothing, without a word."""
    assert {name for name in vars(private) if name.isupper()} == {name for names in CHECKS for name in names.split()}


# They are read in one place


OF_MODULES = {"_parameters", "_modules", "_buffers"}  # of nn.Module, which every release has
OTHERS = {  # of other packages, each in the one place that deals with it
    "metrics.py": {"_plot", "_error_on_missing_matplotlib", "_get_col_row_split"},  # torchmetrics
    "storage/formats/peft_write.py": {"_name_or_path"},  # transformers
    "storage/formats/peft_layers.py": {
        "_check_lora_target_modules_mamba", "_MODEL_TO_CONVERSION_PATTERN", "_MOE_TARGET_MODULE_MAPPING"
    },
}  # fmt: skip
OURS = {"_lora", "_lora_switched", "_whole"}  # entries that this package writes


def is_private(name: str) -> bool:
    return name.isidentifier() and name.startswith("_") and not name.startswith("__") and name != "_"


def defined_in(tree: ast.Module) -> Iterator[str]:
    """The names that a file gives to something of its own; one that it overrides is torch's or Lightning's to call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and vars(node.value).get("id") == "self"
        ):
            yield node.attr


def read_in(tree: ast.Module) -> Iterator[str]:
    """The names of attributes, and of what is imported from elsewhere, and texts that may be such names."""
    in_texts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (each.name for each in node.names)
            yield from (node.module or "").split(".")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in in_texts:
            yield node.value


def test_no_other_file_reads_a_private_name() -> None:
    files = {path: ast.parse(path.read_text()) for path in ROOM.parent.rglob("*.py") if path != ROOM}
    ours = OURS | OF_MODULES | {name for tree in files.values() for name in defined_in(tree)}
    found = {}
    for path, tree in files.items():
        place = path.relative_to(ROOM.parent).as_posix()
        if names := set(filter(is_private, read_in(tree))) - ours:
            found[place] = names
    assert found == OTHERS
