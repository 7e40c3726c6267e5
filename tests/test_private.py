"""Private names of torch, Lightning and DeepSpeed that the package reads are there, and are read in one place."""

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
import torch.distributed as dist
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.flop_counter import FlopCounterMode

from lightning_lora import private
from tests.support.models import LitTiny, data, trainer

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


def sharded() -> bool:
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        tensor = distribute_tensor(torch.arange(4.0), DeviceMesh("cpu", [0]), [Shard(0)])
        return tuple(map(tuple, private.local_offsets(tensor))) == ((4,), (0,))
    finally:
        dist.destroy_process_group()


def forward_mode() -> bool:
    with forward_ad.dual_level():
        return private.is_forward_differentiating()


def modes() -> bool:
    with FlopCounterMode(display=False):
        return private.count_modes() == 1


def autocast() -> bool:
    with torch.autocast("cpu", torch.bfloat16):
        return private.is_any_autocast_enabled()


def versions() -> bool:
    tensor = torch.zeros(2)
    return private.version_of(tensor) < private.version_of(tensor.add_(1))


def notes() -> bool:
    state: Any = nn.Linear(2, 2).state_dict()
    return set(getattr(state, private.STATE_NOTES)) == {""}


def hooks() -> bool:
    module = nn.Linear(2, 2)
    module.register_load_state_dict_pre_hook(lambda *_: None)
    return len(getattr(module, private.LOAD_HOOKS)) == 1


def convolution() -> bool:
    layer, x = nn.Conv1d(2, 2, 1, bias=False), torch.ones(1, 2, 4)
    return torch.equal(private.convolve(layer, x, layer.weight), layer(x)) and hasattr(layer, private.CONVOLVES)


def recurrent() -> bool:
    layer = nn.GRU(2, 2, bias=False)
    names = getattr(layer, private.RECURRENT_NAMES) == ["weight_ih_l0", "weight_hh_l0"]
    return names and all(hasattr(layer, name) for name in private.RECURRENT_LISTS)


def averages() -> bool:
    kinds = [StochasticWeightAveraging(0.1)]
    if hasattr(bundled, "WeightAveraging"):
        kinds.append(bundled.WeightAveraging())
    return all(private.AVERAGE in vars(each) for each in kinds) and callable(getattr(kinds[0], private.AVERAGES_WITH))


class BeginsAgain(L.Callback):
    was: Any = None

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.was = private.loader_states_wait(trainer.fit_loop)
        private.begin_loaders_again(trainer.fit_loop)


def loaders() -> bool:
    t = trainer(Path(), [callback := BeginsAgain()], max_epochs=1, logger=False, enable_checkpointing=False)
    t.fit(LitTiny(), data())
    return callback.was is False and t.global_step == len(data())


class ReadsData(LitTiny):
    right: list[bool]

    def on_train_start(self) -> None:
        loader, batch = private.loader_of(self.trainer.fit_loop), next(iter(data()))
        same = private.before_transfer(self, batch) is batch and self.trainer.train_dataloader in loader.flattened
        self.right = [same, private.LOADER_STATE in vars(self.trainer.train_dataloader)]


def starts_from_data() -> bool:
    module, options = ReadsData(), {"logger": False, "enable_checkpointing": False}
    trainer(Path(), [], max_steps=1, **options).fit(module, data())
    return module.right == [True, True]


def launchers() -> bool:
    found = list(private.multiprocessing_launchers())
    return len(found) > 0 and all(hasattr(each, "update_main_process_results") for each in found)


def deepspeed() -> bool:
    return "_hp_mapping" in inspect.getsource(pytest.importorskip("deepspeed.utils.tensor_fragment"))


CHECKS: dict[str, Callable[[], Any]] = {
    "NormBase": lambda: (
        issubclass(nn.BatchNorm1d, private.NormBase) and issubclass(nn.InstanceNorm1d, private.NormBase)
    ),
    "tree_map tree_leaves": lambda: private.tree_leaves(private.tree_map(str, [1, {"a": 2}])) == ["1", "2"],
    "tree_flatten tree_unflatten": lambda: (
        private.tree_unflatten(*private.tree_flatten([1, {"a": 2}])) == [1, {"a": 2}]
    ),
    "COMPILED": lambda: private.COMPILED in children(torch.compile(Keeps())),
    "CHECKPOINTED": lambda: private.CHECKPOINTED in children(checkpoint_wrapper(Keeps())),
    "FABRIC_WRAPPED FABRIC_OWN": lambda: (
        children(L.Fabric(accelerator="cpu").setup(nn.Linear(2, 2))) >= {private.FABRIC_WRAPPED, private.FABRIC_OWN}
    ),
    "EXTRA_STATE": lambda: private.EXTRA_STATE in Keeps().state_dict(),
    "CLI_CLASS": lambda: private.CLI_CLASS in inspect.getsource(import_module("lightning.pytorch.cli")),
    "tracing": lambda: torch.jit.trace(lambda x: x * int(private.tracing() is not None), torch.ones(1))(
        torch.ones(1)
    ).all(),
    "is_transforming": lambda: torch.func.vmap(lambda x: x * private.is_transforming())(torch.ones(1)).all(),
    "count_modes": modes,
    "is_any_autocast_enabled": autocast,
    "is_forward_differentiating": forward_mode,
    "version_of": versions,
    "local_offsets": sharded,
    "STORAGE_BYTES": lambda: (
        getattr(torch.storage.TypedStorage(2, dtype=torch.int8), private.STORAGE_BYTES).nbytes() == 2
    ),
    "NODE_FUNCTION": lambda: (
        getattr(Doubles.apply(torch.ones(1, requires_grad=True)).grad_fn, private.NODE_FUNCTION) is Doubles
    ),
    "LOAD_HOOKS": hooks,
    "NOT_STORED": lambda: getattr(Keeps(), private.NOT_STORED) == {"left"},
    "STATE_NOTES": notes,
    "CONVOLVES convolve": convolution,
    "RECURRENT_LISTS RECURRENT_NAMES": recurrent,
    "multiprocessing_launchers": launchers,
    "START_METHOD": lambda: getattr(DDPStrategy(start_method="fork"), private.START_METHOD) == "fork",
    "HPARAMS_NAME": lambda: getattr(Named({"a": 1}), private.HPARAMS_NAME) == "kwargs",
    "LOGS_HPARAMS": lambda: [getattr(each, private.LOGS_HPARAMS) for each in (Named({}), LitTiny())] == [False, True],
    "AVERAGE AVERAGES_WITH": averages,
    "loader_states_wait begin_loaders_again": loaders,
    "loader_of LOADER_STATE before_transfer": starts_from_data,
    "own_place": deepspeed,
}


@pytest.mark.parametrize("names", CHECKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_each_private_name_is_there_and_means_what_it_did(names: str) -> None:
    assert CHECKS[names](), names


def test_each_has_such_a_test() -> None:
    tree, defined = ast.parse(ROOM.read_text()), set(private.__all__)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            defined.add(node.name)
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            defined |= {each.id for each in ast.walk(target) if isinstance(each, ast.Name)} if target else set()
    assert defined - {"__all__"} == {name for names in CHECKS for name in names.split()}


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
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
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
