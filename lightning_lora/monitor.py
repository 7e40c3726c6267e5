"""A callback that logs what adapters have learned, and how their base does on the same data."""

import copy
import gc
import pickle
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.errors import AdapterStateError, ConfigError
from lightning_lora.functional.subspace import effective_rank
from lightning_lora.metrics import measured
from lightning_lora.model.state import find_record
from lightning_lora.model.switch import disable_adapters
from lightning_lora.tensors.digests import digest
from lightning_lora.training.compatibility import join_other_package


class LoRAMonitor(Callback):
    """Log what adapters have learned, and what the base does.

    Use it beside ``LoRACallback``, in any order. EarlyStopping and ModelCheckpoint can monitor its numbers:

    - ``lora/update_norm``: the norm of all updates B A together, in a fit's first step and every ``every_n_steps``,
    - ``lora/effective_rank``: how many directions an update B A has, as a mean over the layers,
    - ``base/val_loss`` and so on: what ``validation_step`` logs for each epoch, for the base,
    - ``base/agreement``: how often it predicts what the model predicts, in torch's ``cross_entropy``, ``nll_loss`` and
      ``binary_cross_entropy_with_logits``: for each target, the class of the largest logit, or the logit's sign.

    The first validation also runs the base, which takes as long again. The next ones log the same numbers. If batches
    change, or ``validation_step`` draws random numbers, each validation runs the base, with the same random
    numbers. A fit has the same bits as without a monitor: all modules have two sets of attributes, so metrics, buffers
    and counters go on by themselves for the base, which writes to no logger.

    Args:
        every_n_steps: Optimizer steps between two measurements. Loggers get them when the Trainer logs a step.
        per_layer: Whether to log each update too, as ``lora/update_norm/encoder.0.query``.
        base: Whether to run the base in validation.

    Raises:
        ConfigError: ``every_n_steps`` is less than 1.
        AdapterStateError: the module has no adapters when a fit starts.

    Example:
        >>> from lightning_lora import LoRACallback
        >>> callbacks = [LoRACallback(r=8), LoRAMonitor(per_layer=True)]
    """

    def __init__(self, every_n_steps: int = 50, *, per_layer: bool = False, base: bool = True) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"every_n_steps={every_n_steps!r} is not valid. Expected at least 1.")
        self.every_n_steps, self.per_layer, self.base = every_n_steps, per_layer, base
        self._watching = ExitStack()
        join_other_package(LoRAMonitor)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what was measured before: the base and the data may be others."""
        # the step, what batches held when the base was measured and what they hold now, and counts of predictions
        self._due, self._known, self._seen, self._agreed = -1, dict[Any, Any](), dict[Any, Any](), dict[Any, Any]()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there are adapters."""
        if find_record(pl_module) is None:
            raise AdapterStateError(f"LoRAMonitor found no adapters in {type(pl_module).__name__}. Add LoRACallback.")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the updates."""
        due = (trainer.global_step > 0) + trainer.global_step // self.every_n_steps
        if due == self._due:
            return
        self._due, norms, ranks = due, dict[str, Tensor](), dict[str, Tensor]()
        for name, update in measured(pl_module).items():
            a, b = update.factors()
            core = (b.mT @ b @ (a @ a.mT)).cpu()  # r x r: its eigenvalues are the update's singular values, squared
            sizes = torch.linalg.eigvals(core.nan_to_num(0, 0, 0)).real.clamp_min(0).sqrt()
            norms[name] = core.diagonal(0, -2, -1).sum().clamp_min(0).sqrt()
            ranks[name] = effective_rank(sizes).mean()
        if not norms:
            return
        log = partial(pl_module.log, on_step=True, on_epoch=False, batch_size=1)
        log("lora/update_norm", torch.stack(list(norms.values())).norm())
        log("lora/effective_rank", torch.stack(list(ranks.values())).mean())
        for name in norms if self.per_layer else ():
            log(f"lora/update_norm/{name}", norms[name])
            log(f"lora/effective_rank/{name}", ranks[name])

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Run the base on the batch, if it must be measured, and watch what the module predicts next."""
        if not self.base or trainer.sanity_checking or find_record(pl_module) is None:
            return
        loop: Any = trainer._active_loop
        self._place, content = (loop._results.dataloader_idx, args[1]), list(_content(args[0]))
        if not self._seen:  # all processes decide the same
            is_new = self._known.get(self._place) != content
            self._measures = trainer.strategy.reduce_boolean_decision(is_new, all=False)
            if self._measures:
                self._values, self._of_base, self._draws = dict[str, Any](), dict[Any, list[Tensor]](), False
                self._logs, self._sets = type(loop._results)(training=False), list[Any]()
        self._seen[self._place] = content
        if self._measures:
            self._run_base(trainer, pl_module, loop, args[0])
        self._predicted = _watch(self._watching)

    def _run_base(self, trainer: Trainer, pl_module: LightningModule, loop: Any, batch: Any) -> None:
        """Take the validation step on the base, in the strategy's way."""
        (index, number), on_cuda = self._place, trainer.strategy.root_device.type == "cuda"
        if index != self._logs.dataloader_idx:  # the last loader is through, and its metrics may go on with this one
            self._note()
        named = loop._build_kwargs(copy.deepcopy(batch), number, index)
        self._logs.batch, self._logs.batch_size, self._logs.dataloader_idx = named["batch"], None, index
        args = loop._build_step_args_from_hook_kwargs(named, "validation_step")
        with isolate_rng(include_cuda=on_cuda), ExitStack() as back:
            _set(loop, "_results", self._logs, back)
            _set(trainer, "_loggers", [DummyLogger()] * len(trainer.loggers), back)
            back.enter_context(disable_adapters(pl_module))
            self._sets = self._sets or _two_sets(pl_module)
            back.callback(_exchange, self._sets)
            _exchange(self._sets)
            _set(pl_module, "_current_fx_name", "validation_step", back)
            self._of_base[self._place], before = _watch(back), _random_state(on_cuda)
            trainer.strategy.validation_step(*args)
            self._draws |= before != _random_state(on_cuda)

    def _note(self) -> None:
        """Keep the base's numbers for callbacks. Those that are in ``log`` are for loggers too."""
        _exchange(self._sets)
        try:
            found = self._logs.metrics(on_step=False)
        finally:
            _exchange(self._sets)
        for name, value in found["callback"].items():
            self._values[name] = value, None if name in found["log"] else False

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count where the module and its base agree."""
        self._watching.close()
        if not self._seen:
            return
        for base, ours in zip(self._of_base.get(self._place, ()), self._predicted, strict=False):
            if base.shape == ours.shape:
                same, total = self._agreed.get(self._place[0], (0, 0))
                self._agreed[self._place[0]] = same + int((base == ours).sum()), total + ours.numel()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the base's numbers, unless later batches turn out not to be those that they were measured on."""
        seen, agreed, self._seen, self._agreed = self._seen, self._agreed, {}, {}
        if not seen:
            return
        if self._measures:
            self._note()
            self._known = {} if self._draws else seen
            del self._sets, self._logs
        elif trainer.strategy.reduce_boolean_decision(seen != self._known, all=False):
            self._known = {}
            return
        log = partial(pl_module.log, add_dataloader_idx=False, sync_dist=True)
        for name, (value, logger) in self._values.items():
            log(f"base/{name}", value, logger=logger, batch_size=1)
        for index, (same, total) in agreed.items():
            name = "base/agreement" if index is None else f"base/agreement/dataloader_idx_{index}"
            log(name, same / total, batch_size=total)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._watching.close()


def _content(batch: Any) -> Iterator[Any]:
    """What tells a batch from another one. An object of unknown kind is never the same."""
    if isinstance(batch, Mapping | list | tuple):
        for each in batch.items() if isinstance(batch, Mapping) else batch:
            yield from _content(each)
    elif isinstance(batch, Tensor) and batch.layout is torch.strided:
        yield batch.shape, digest(batch)
    else:
        yield hash(batch) if isinstance(batch, str | bytes | int | float | None) else object()


def _random_state(on_cuda: bool) -> list[Any]:
    """What tells whether random numbers were drawn from a global source."""
    states = _collect_rng_states(on_cuda)
    states["numpy"] = pickle.dumps(states.get("numpy"))
    return list(_content(states))


def _set(owner: Any, name: str, value: Any, back: ExitStack) -> None:
    """Set an attribute until ``back`` is closed."""
    back.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _watch(back: ExitStack) -> list[Tensor]:
    """Return a list that gets the predictions in torch's losses, until ``back`` is closed."""
    found: list[Tensor] = []
    for name in ("cross_entropy", "nll_loss", "binary_cross_entropy_with_logits"):
        _set(F, name, partial(_noting, getattr(F, name), name.startswith("binary"), found), back)
    return found


def _noting(loss: Any, binary: bool, found: list[Tensor], input: Tensor, target: Tensor, *a: Any, **k: Any) -> Any:
    classes = input > 0 if binary else input.argmax(1 if input.dim() > 1 else 0).to(torch.int32)
    counted = classes if target.is_floating_point() else classes[target != k.get("ignore_index", -100)]
    found.append(counted.cpu())
    return loss(input, target, *a, **k)


# The attributes of the base

_FRAMEWORKS = {"torch", "lightning", "pytorch_lightning", "lightning_lora", "bitsandbytes", "torchao", "deepspeed"}
_OF_TORCH = vars(nn.Module()).keys() - {"training"}  # parameters, hooks and the like
_HOOKS = [name for name in _OF_TORCH if name.startswith("_forward")]


@torch.inference_mode(False)  # where copies would be inference tensors, for which a compiled layer is compiled anew
def _two_sets(root: nn.Module) -> list[list[dict[str, Any]]]:
    """Return the dicts in which modules hold attributes, buffers, children and hooks, each with the base's copy."""
    modules = list(root.modules())
    sets, memo = list[list[dict[str, Any]]](), _shared(modules)
    for module in modules:
        for held in (vars(module), module._buffers, module._modules):
            sets.append([held, {name: _copied(value, memo) for name, value in _own(held).items()}])
        sets += [[getattr(module, name), getattr(module, name).copy()] for name in _HOOKS]
    return sets


def _exchange(sets: list[list[dict[str, Any]]]) -> None:
    """Let modules hold the other set."""
    for pair in sets:
        held, coming = pair
        pair[1] = _own(held)
        for name in pair[1]:
            del held[name]
        held.update(coming)


def _own(held: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in held.items() if k not in _OF_TORCH and not str(k).startswith(("lora_", "_lora"))}


def _shared(modules: list[nn.Module]) -> dict[int, Any]:
    """What is never copied, as a memo for deepcopy: the modules, and what stays of all that their attributes hold."""
    inside, looked = list[Any](map(vars, modules)), set[int]()
    for each in inside:  # it grows
        if id(each) not in looked and not _stays(each):
            looked.add(id(each))
            inside += filter(gc.is_tracked, gc.get_referents(each))  # no numbers or texts
    return {id(each): each for each in [*modules, *filter(_stays, inside)]}


def _stays(value: Any) -> bool:
    """Whether it is code, or of torch, Lightning and so on. Tensors without a gradient and metrics do not stay."""
    kind = type(value)
    origins = [str(each.__module__).partition(".")[0] for each in kind.__mro__]
    if kind is Tensor or (issubclass(kind, Tensor) and origins[0] not in _FRAMEWORKS):
        return bool(value.requires_grad) or isinstance(value, nn.Parameter)
    if issubclass(kind, type | FunctionType | ModuleType):
        return True
    return not _FRAMEWORKS.isdisjoint(origins) and "torchmetrics" not in origins


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copy a value, or return it if it cannot be copied."""
    known = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # such as of a lock or a file
        while len(memo) > known:  # half of a copy
            memo.popitem()
        return value.clone() if isinstance(value, Tensor) else value  # a subclass of it may be beyond deepcopy
