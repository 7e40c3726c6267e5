"""What each run of a sweep has of its own, and what all share: the data, which is loaded once, and the base."""

import pickle
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from functools import partial
from itertools import count
from types import MethodType
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_lora.callback import LoRACallback
from lightning_lora.errors import ConfigError, warn
from lightning_lora.model.view import view_of
from lightning_lora.storage.apply import load_adapter_state_dict
from lightning_lora.storage.state import adapter_state_dict
from lightning_lora.sweep.runs import TURN, Run
from lightning_lora.tensors.inplace import InPlace, overlay
from lightning_lora.tensors.values import replace_values, same_bits
from lightning_lora.training.compatibility import loads_in_hooks

_END = object()  # what follows the last batch


def _random() -> bytes:
    """The states of the generators from which data is drawn."""
    states = _collect_rng_states(include_cuda=False)
    return pickle.dumps({**states, "torch": states["torch"].numpy()})


class _Made:
    """What one run has made for all, with the random numbers before and after."""

    def __init__(self, run: Run, make: Callable[[], Any]) -> None:
        self.run = run
        self.before, self.value, self.after = _random(), make(), _random()

    def take(self, run: Run) -> Any:
        """Return it. Random numbers go on as if ``run`` had made it, or a warning says that they cannot."""
        if run is self.run or self.before == self.after:
            return self.value
        if _random() == self.before:
            states = pickle.loads(self.after)
            _set_rng_states({**states, "torch": torch.from_numpy(states["torch"])})
        else:
            warn(
                f"A DataLoader draws random numbers, and dropout has left others to {run.name} than to "
                f"{self.run.name}. {run.name} gets the same data, and does not train exactly as it would alone. Give "
                "every DataLoader its own: DataLoader(..., generator=torch.Generator().manual_seed(0))."
            )
        return self.value


class Loaders:
    """The loaders for training or validation. They are requested once, and each run gets copies."""

    def __init__(self, source: Any) -> None:
        self.source, self.made = source, list[_Made]()
        self.passes = defaultdict[Any, dict[int, _Pass]](dict)  # by loader and place: a request may give it again
        self.begun = defaultdict[Any, Iterator[int]](count)  # the same of each run

    def request(self, run: Run, asked: Iterator[int], hook: Callable[[], Any]) -> Any:
        """Return a run's copies of the loaders. ``hook`` is its module's: setup of the Trainer's has not run."""
        number = next(asked)
        if number == len(self.made):
            is_own = isinstance(self.source.instance, LightningModule)
            self.made.append(_Made(run, hook if is_own else self.source.dataloader))
        found = self.made[number].take(run)
        combined = copy(found) if isinstance(found, CombinedLoader) else CombinedLoader(found, "sequential")
        combined.flattened = list(map(partial(self._own, run), combined.flattened, count()))
        return combined if isinstance(found, CombinedLoader) else combined.iterables

    def _own(self, run: Run, loader: Any, place: int) -> Any:
        if not isinstance(loader, DataLoader):
            raise ConfigError(f"{self.source.name} gave {type(loader).__name__}. LoRASweep expects a DataLoader.")
        own = copy(loader)
        overlay(own, _SharedLoader)
        own.lora_shared = run, self.passes[id(loader), place], self.begun[run, id(loader), place]
        return own


class _SharedLoader(DataLoader[Any], InPlace):
    """A run's copy of a DataLoader: its iterators give the batches that another run has loaded."""

    lora_shared: "tuple[Run, dict[int, _Pass], Iterator[int]]"

    def __iter__(self) -> Any:
        run, passes, begun = self.lora_shared
        number = next(begun)
        if run.trainer.should_stop and run.trainer.fit_loop._can_stop_early:  # it validates a last time, perhaps alone
            return run.ask(super().__iter__)
        if number not in passes:
            passes[number] = _Pass(run, passes[number - 1].begin if number else super().__iter__)
            passes.pop(number - 2, None)
        passes[number].begun.take(run)
        return passes[number].batches(run)


class _Pass:
    """One pass through a loader, and its latest batches, which some runs have yet to take."""

    def __init__(self, run: Run, begin: Callable[[], Any]) -> None:
        self.begin = begin  # of one copy for all passes, as it may keep its workers
        self.begun = _Made(run, partial(run.ask, begin))
        self.made, self.count = deque[_Made](maxlen=TURN), 0

    def batches(self, run: Run) -> Iterator[Any]:
        """Yield copies of the batches for one run: a training step may change them."""
        for number in count():
            run.reach(self, number)
            if number == self.count:
                self.made.append(_Made(run, partial(next, self.begun.value, _END)))
                self.count += 1
            batch = self.made[number - self.count].take(run)
            if batch is _END:
                return
            yield _copied(batch)


def _copied(batch: Any) -> Any:
    """A copy. A tensor is cloned: deepcopy copies all that a view is a part of."""
    memo: dict[int, Any] = {}
    apply_to_collection(batch, Tensor, lambda tensor: memo.setdefault(id(tensor), tensor.clone()))
    return deepcopy(batch, memo)


def copy_trainer(trainer: Any, run: Run, memo: dict[int, Any], loaders: list[Loaders]) -> None:
    """Give a run its copy of a Trainer and its module. ``memo`` has what takes the place of other objects."""
    run.memo = memo
    module, data = trainer.lightning_module, trainer.datamodule
    shared = [value for value in vars(module).values() if isinstance(value, Dataset | DataLoader)]
    shared += [each.source.instance for each in loaders if not each.source.is_module()]
    memo |= {id(each): each for each in shared}
    for logger in trainer.loggers:
        memo[id(logger)] = named = copy(logger)  # the best run's hyperparameters are logged at the end
        log = partial(_log_named, logger, run.name)
        vars(named).update(log_metrics=log, log_hyperparams=_nothing, finalize=_nothing)
    if not loads_in_hooks(module):  # such hooks would write into the shared memory
        plain = [p for p in module.parameters() if type(p) is nn.Parameter]
        memo |= {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in plain}
    if data is not None:
        memo[id(data)] = copy(data)
        memo[id(data)].__dict__.update(prepare_data=_nothing, setup=_nothing, teardown=_nothing)
    try:
        run.trainer = deepcopy(trainer, memo)
        own = vars(run.trainer.lightning_module)
        if isinstance(build := own.get("configure_optimizers"), MethodType):  # LightningCLI's, which holds an optimizer
            own["configure_optimizers"] = MethodType(deepcopy(build.__func__, memo), build.__self__)
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"LoRASweep needs a Trainer and a module that deepcopy can copy: {error}") from error
    own.update(prepare_data=_nothing, configure_callbacks=_nothing)
    owner = run.trainer.lightning_module if data is None else memo[id(data)]
    for each in loaders:
        vars(owner)[each.source.name] = partial(each.request, run, count(), getattr(owner, each.source.name))


def _nothing(*_: Any, **__: Any) -> None:
    """What the sweep's own Trainer does, once for all runs."""


def _log_named(logger: Any, name: str, metrics: dict[str, Any], step: int | None = None) -> None:
    logger.log_metrics({key if key == "epoch" else f"{name}/{key}": value for key, value in metrics.items()}, step)


def share_base(module: LightningModule, values: dict[str, Tensor]) -> None:
    """Let a run's frozen weights lie in the same memory as ``values``, if they are alike; what it trains in its own."""
    view = view_of(module)
    for name, p in view.frozen.items():
        known = values.setdefault(name, p.data)
        is_shared = known.data_ptr() == p.data_ptr() != 0  # a quantised weight shows no address
        is_form = (known.device, known.dtype) == (p.device, p.dtype)
        if not is_shared and not (is_form and same_bits(known, p.data)):
            values[name] = p.data
        replace_values(p, values[name])
    for p in view.trained.values():
        replace_values(p, p.data.clone())


def adopt(trainer: Any, run: Run) -> None:
    """Bring a Trainer and its module to where a run ended, as if it had been their own."""
    load_adapter_state_dict(trainer.lightning_module, adapter_state_dict(run.trainer.lightning_module))
    for optimizer, other in zip(trainer.optimizers, run.trainer.optimizers, strict=True):
        optimizer.load_state_dict(other.state_dict())
    for config, other in zip(trainer.lr_scheduler_configs, run.trainer.lr_scheduler_configs, strict=True):
        config.scheduler.load_state_dict(other.scheduler.state_dict())
    trainer.fit_loop.load_state_dict(run.trainer.fit_loop.state_dict())
    for kind in ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics"):
        vars(trainer._logger_connector)[kind] = vars(run.trainer._logger_connector)[kind]


def adopt_notes(trainer: Any, run: Run) -> None:
    """Copy what code has noted in callbacks and modules, and buffers that no file holds."""
    module, theirs = trainer.lightning_module, run.trainer.lightning_module
    own = {**dict(module.named_modules()), **dict(module.named_parameters())}
    back = {id(each): own[name] for name, each in [*theirs.named_modules(), *theirs.named_parameters()]}
    back[id(run.trainer)] = trainer
    for callback in trainer.callbacks:
        if not isinstance(callback, LoRACallback):
            _adopt_attributes(callback, run.memo.get(id(callback), callback), back)
    for each in theirs.modules():
        if each is theirs or not isinstance(each, InPlace):
            _adopt_attributes(back[id(each)], each, back)
        for key in each._non_persistent_buffers_set:
            back[id(each)]._buffers[key] = deepcopy(each._buffers[key], back)


def _adopt_attributes(mine: Any, theirs: Any, back: dict[int, Any]) -> None:
    """Copy what an object's code has noted, such as lists of results."""
    left_out = {key for key in vars(LightningModule()) if key.startswith("_") and isinstance(mine, nn.Module)}
    for key, value in vars(theirs).items():
        if callable(value) or key in left_out or key.startswith(("_lora", "lora_", "_flat_weight")):
            continue
        try:
            vars(mine)[key] = deepcopy(value, back)
        except (RuntimeError, TypeError):  # such as a loss with its graph
            vars(mine)[key] = value
