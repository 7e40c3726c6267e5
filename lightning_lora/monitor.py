"""A callback that logs what adapters have learned, and how their base does on the same data."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection

from lightning_lora.errors import AdapterStateError, ConfigError
from lightning_lora.functional.subspace import core_sizes, effective_rank
from lightning_lora.metrics import measured
from lightning_lora.model.disable import disable_adapters
from lightning_lora.model.state import find_record
from lightning_lora.tensors.digests import digest
from lightning_lora.training.compatibility import join_other_package
from lightning_lora.training.strategy import LoRAStrategy


class LoRAMonitor(Callback):
    """Log what adapters have learned, and what the base does.

    Use it beside ``LoRACallback``, in any order. EarlyStopping and ModelCheckpoint can monitor its numbers. In a fit's
    first step and every ``every_n_steps``, it logs

    - ``lora/update_norm``: the norm of all updates together, and
    - ``lora/effective_rank``: how many directions an update has, as a mean over the layers (DoRA's scales left out).

    With ``base=True``, a validation also logs

    - ``base/val_loss`` and so on: each epoch's number that ``validation_step`` logs, for the base, and
    - ``base/agreement``: the share of predictions that the base has in common with the model. They are known where
      ``validation_step`` calls torch's ``cross_entropy``, ``nll_loss`` or ``binary_cross_entropy_with_logits``: for
      each target, the class of the largest logit, or the logit's sign.

    The first validation runs each batch once more, on the base, and takes twice as long. The next ones log the same
    numbers again, if the batches are the same. If they are not, or if ``validation_step`` draws random numbers, each
    validation runs the base, with the random numbers that the model gets. The fit has the same bits as without a
    monitor. The base runs in a copy of the module with metrics, buffers, lists and dicts of its own, and logs nothing.

    Args:
        every_n_steps: The optimizer steps between two measurements. Loggers get each at the next step that the Trainer
            logs (``log_every_n_steps``).
        per_layer: Whether to log each update too, as ``lora/update_norm/encoder.0.query``.
        base: Whether to run the base in validation.

    Raises:
        ConfigError: ``every_n_steps`` is less than 1.
        AdapterStateError: when a fit or validation starts, the module has no adapters, and there is no LoRACallback.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lora import LoRACallback
        >>> trainer = Trainer(callbacks=[LoRACallback(r=8), LoRAMonitor(every_n_steps=100)], accelerator="cpu")
    """

    def __init__(self, every_n_steps: int = 50, *, per_layer: bool = False, base: bool = True) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"every_n_steps={every_n_steps!r} is not valid. Expected at least 1.")
        self.every_n_steps, self.per_layer, self.base = every_n_steps, per_layer, base
        self._watching = ExitStack()
        join_other_package(LoRAMonitor)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what was measured before: the base and the data may be others."""
        self._logged = -1
        self._known: dict[Any, list[Any]] = {}  # what the batches held when the base was measured

    # What the adapters have learned

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there are adapters."""
        _check(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the updates."""
        due = (trainer.global_step > 0) + trainer.global_step // self.every_n_steps
        if due == self._logged:
            return
        self._logged = due
        norms, ranks = dict[str, Tensor](), dict[str, Tensor]()
        for name, update in measured(pl_module).items():
            sizes = core_sizes(update.factors())
            norms[name], ranks[name] = sizes.norm(), effective_rank(sizes).mean()
        log = partial(pl_module.log, on_step=True, on_epoch=False, batch_size=1)
        log("lora/update_norm", torch.stack(list(norms.values())).norm())
        log("lora/effective_rank", torch.stack(list(ranks.values())).mean())
        for name in norms if self.per_layer else ():
            log(f"lora/update_norm/{name}", norms[name])
            log(f"lora/effective_rank/{name}", ranks[name])

    # What the base does

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide whether there is a base to run."""
        _check(trainer, pl_module)
        self._runs = self.base and not trainer.sanity_checking and find_record(pl_module) is not None
        self._seen, self._agreed = dict[Any, list[Any]](), dict[int | None, Any]()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Run the base on the batch, if it must be measured, and watch what the module predicts next."""
        if not self._runs:
            return
        loop: Any = trainer._active_loop
        self._place, content = (loop._results.dataloader_idx, batch_idx), list(_content(batch))
        if not self._seen:  # all processes decide the same
            is_new = self._known.get(self._place) != content
            self._measures = trainer.strategy.reduce_boolean_decision(is_new, all=False)
            if self._measures:
                self._begin(loop, pl_module)
        self._seen[self._place] = content
        if self._measures:
            self._run_base(trainer, pl_module, batch)
        self._predicted = _watch(self._watching)

    def _begin(self, loop: Any, pl_module: LightningModule) -> None:
        self._values, self._of_base, self._draws = dict[str, Tensor](), dict[Any, list[Tensor]](), False
        self._logs = type(loop._results)(training=False)
        with disable_adapters(pl_module):
            self._copy = _copy(pl_module, {})
        self._copy._current_fx_name, self._copy._metric_attributes = "validation_step", None

    def _run_base(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Let the copy take the validation step on the base, as the strategy does it."""
        loop: Any = trainer._active_loop
        on_cuda, (index, number) = trainer.strategy.root_device.type == "cuda", self._place
        takes_number = is_param_in_hook_signature(pl_module.validation_step, "batch_idx", min_args=2)
        args = [copy.deepcopy(batch), *([number] if takes_number else []), *([] if index is None else [index])]
        if index != self._logs.dataloader_idx:
            self._collect()
        self._logs.batch, self._logs.batch_size, self._logs.dataloader_idx = args[0], None, index
        with isolate_rng(include_cuda=on_cuda), ExitStack() as back:
            _set(loop, "_results", self._logs, back)
            _set(trainer._logger_connector, "_current_fx", "validation_step", back)
            _set(trainer, "_loggers", [DummyLogger()] * len(trainer.loggers), back)
            _set(pl_module, "validation_step", self._copy.validation_step, back)
            back.enter_context(disable_adapters(pl_module))
            self._of_base[self._place], before = _watch(back), _random_state(on_cuda)
            trainer.strategy.validation_step(*args)
            self._draws |= not torch.equal(before, _random_state(on_cuda))

    def _collect(self) -> None:
        """Take the numbers of a loader that is through: a metric may go on with the next loader's batches."""
        for name, value in self._logs.metrics(on_step=False)["log"].items():
            self._values[f"base/{name}"] = value

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count where the module and its base agree."""
        self._watching.close()
        if not self._runs:
            return
        for base, ours in zip(self._of_base.get(self._place, ()), self._predicted, strict=False):
            if base.shape == ours.shape:
                counts = torch.tensor([int((base == ours).sum()), ours.numel()])
                self._agreed[self._place[0]] = self._agreed.get(self._place[0], 0) + counts

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the base's numbers, unless later batches turn out not to be those that they were measured on."""
        if not self._runs:
            return
        if self._measures:
            self._collect()
            self._known = {} if self._draws else self._seen
            del self._copy, self._logs
        elif trainer.strategy.reduce_boolean_decision(self._seen != self._known, all=False):
            self._known = {}
            return
        log = partial(pl_module.log, add_dataloader_idx=False, sync_dist=True)
        for name, value in self._values.items():
            log(name, value, batch_size=1)
        for index, (same, total) in self._agreed.items():
            suffix = "" if index is None else f"/dataloader_idx_{index}"
            log(f"base/agreement{suffix}", float(same / total), batch_size=int(total))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._watching.close()


def _check(trainer: Trainer, pl_module: LightningModule) -> None:
    if find_record(pl_module) is None and not isinstance(trainer.strategy, LoRAStrategy):
        raise AdapterStateError(
            f"LoRAMonitor found no adapters in {type(pl_module).__name__}, and no LoRACallback. Add LoRACallback(r=8) "
            "to the Trainer's callbacks, or call inject_adapters(model, config) first."
        )


def _random_state(on_cuda: bool) -> Tensor:
    return torch.cat([torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_cuda else [])])


def _content(batch: Any) -> Iterator[Any]:
    """What tells a batch from another one. An object of unknown kind is never the same."""
    if isinstance(batch, Tensor) and batch.layout is torch.strided:
        yield batch.shape, batch.dtype, digest(batch)
    elif isinstance(batch, Mapping):
        yield from _content(list(batch.items()))
    elif isinstance(batch, list | tuple):
        for each in batch:
            yield from _content(each)
    else:
        yield hash(batch) if isinstance(batch, str | bytes | int | float | None) else object()


def _set(owner: Any, name: str, value: Any, back: ExitStack) -> None:
    """Set an attribute until ``back`` is closed."""
    own = vars(owner)
    back.callback(own.update, {name: own[name]}) if name in own else back.callback(own.pop, name)
    own[name] = value


def _watch(back: ExitStack) -> list[Tensor]:
    """Return a list that gets the predictions in torch's losses, until ``back`` is closed."""
    found: list[Tensor] = []
    for name in ("cross_entropy", "nll_loss", "binary_cross_entropy_with_logits"):
        _set(F, name, partial(_noting, getattr(F, name), name.startswith("binary"), found), back)
    return found


def _noting(
    loss: Any, binary: bool, found: list[Tensor], input: Tensor, target: Tensor, *args: Any, **named: Any
) -> Any:
    classes = input > 0 if binary else input.argmax(1 if input.dim() > 1 else 0).to(torch.int32)
    counted = classes if target.is_floating_point() else classes[target != named.get("ignore_index", -100)]
    found.append(counted.cpu())
    return loss(input, target, *args, **named)


def _copy(module: nn.Module, metrics: dict[int, Any]) -> Any:
    """Return a copy with metrics, buffers and collections of its own. It shares parameters and layers."""
    copied: Any = object.__new__(type(module))
    for name, value in vars(module).items():
        if name not in _BOUND:
            vars(copied)[name] = value if name == "_parameters" else _own(value)
    for name, child in module._modules.items():
        if isinstance(child, Metric | MetricCollection):
            copied._modules[name] = copy.deepcopy(child, metrics)
            copied._modules[name].reset()
        elif child is not None and any(isinstance(each, Metric) for each in child.modules()):
            copied._modules[name] = _copy(child, metrics)
    return copied


_BOUND = ("forward", "training_step", "validation_step", "test_step", "predict_step")  # methods that Lightning replaces


def _own(value: Any) -> Any:
    """Copy tensors and collections, but not what else these hold."""
    if type(value) is Tensor:
        return value.clone()
    if type(value) in (list, set):
        return type(value)(map(_own, value))
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update(zip(value, map(_own, value.values()), strict=True))
        return copied
    return value
