"""Adapters that start from the fit's own data: some batches run through the module before its first step."""

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from copy import copy, deepcopy
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, LoRAError, StrategyError, listed
from lightning_lora.layers import INITIALISATIONS
from lightning_lora.layers.init import keep_start
from lightning_lora.layers.matrices import Role
from lightning_lora.model.inject import follow_originals
from lightning_lora.model.view import view_of
from lightning_lora.private import LOADER_STATE, before_transfer, loader_of, version_of
from lightning_lora.tensors.names import named_parameters
from lightning_lora.training.compatibility import callbacks_of, copy_adapted
from lightning_lora.training.gradients import gradients_pass


def _refusal(config: LoRAConfig, why: str, kind: type[LoRAError] = ConfigError) -> LoRAError:
    what = f"init={config.init!r} runs training_step on some batches before training"
    return kind(f"{what}. That is not possible here: {why}. Use an init that needs no data.")


def check_data_init(trainer: Trainer, pl_module: LightningModule, config: LoRAConfig) -> None:
    """Refuse a start from data where no batch can run before the first step."""
    if INITIALISATIONS[config.init].observe is None:
        return
    if trainer.strategy.restore_checkpoint_after_setup:
        raise _refusal(config, f"{type(trainer.strategy).__name__} shards the fit (ddp does not)", StrategyError)
    if not pl_module.automatic_optimization:
        raise _refusal(config, f"{type(pl_module).__name__} steps optimizers there (automatic_optimization=False)")
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise _refusal(config, f"that of {type(pl_module).__name__} takes a dataloader_iter")


def start_from_data(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let adapters that have not learned start from training data, if their ``init`` does. All else stays as it was."""
    view = view_of(pl_module)
    config, how = view.config, INITIALISATIONS[view.config.init]
    if how.observe is None or not view.is_fresh():
        return
    check_data_init(trainer, pl_module, config)  # again: the module's own hooks have run
    layers = {name: layer for name, layer in view.layers.items() if not layer.lora_settings.follows}
    packed = [name for name, layer in layers.items() if layer.lora_is_quantised(layer)]
    if packed and how.needs_gradients:
        raise _refusal(config, f"it needs gradients of weights, and {listed(packed)} are quantised ('eva' needs none)")
    started = list[str]()
    with ExitStack() as undo:
        _leave_no_trace(trainer, pl_module, undo)
        if not how.needs_gradients:
            pl_module.eval()  # dropout would blur the inputs
        observed = [(name, layer, how.observe(layer, undo)) for name, layer in layers.items()]
        number = _run(trainer, pl_module, config)
        for name, layer, factors_of in observed:
            own = {key: p.detach() for key, p in layer.lora_parameters().items()}
            for matrix in layer.lora_matrices:
                factors = factors_of and factors_of(matrix, matrix.rank(layer.lora_settings.r))
                if factors:
                    started.append(name)
                    own[matrix.parameter(Role.A)][..., : factors[0].shape[-2], :].copy_(factors[0])
                    own[matrix.parameter(Role.B)].copy_(factors[1])
                    if how.is_difference:
                        keep_start(matrix, own)
    for p in view.adapters.values():  # the first process has seen its own data
        p.detach().copy_(trainer.strategy.broadcast(p.detach().cpu()))
    follow_originals(view)
    copy_adapted(callbacks_of(trainer), pl_module, anew=True)  # into averages
    others = [name for name in layers if name not in started]
    more = f" These start as with 'kaiming': {listed(others)}." if others else ""
    rank_zero_info(
        f"init={config.init!r}: {len(layers) - len(others)} layers start from {number} batches of training data.{more}"
    )


def _run(trainer: Trainer, pl_module: LightningModule, config: LoRAConfig) -> int:
    """Run batches through the module's own step, and backward if that is needed. Return their number."""
    step, title, number = pl_module.training_step, type(pl_module).__name__, 0
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    weights = [(name, p, version_of(p)) for name, p in named_parameters(pl_module).items() if not p.is_inference()]
    most = int(min(config.init_batches, trainer.num_training_batches))
    with _explained(config, title), closing(_batches(trainer, pl_module, config)) as batches:
        for number, batch in enumerate(islice(batches, most), start=1):
            with trainer.precision_plugin.train_step_context():
                output = step(batch, number - 1) if takes_index else step(batch)
            if output is None or not INITIALISATIONS[config.init].needs_gradients:
                continue
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if not (isinstance(loss, Tensor) and loss.requires_grad):
                raise _refusal(config, f"that of {title} returns no loss with a gradient")
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            nn.Module.zero_grad(pl_module)
    if changed := [name for name, p, version in weights if version_of(p) != version]:
        raise _refusal(config, f"that of {title} has written to {listed(changed)}, so build the module anew")
    return number


@contextmanager
def _explained(config: LoRAConfig, title: str) -> Iterator[None]:
    """Say that the step ran before the fit's own hooks."""
    try:
        yield
    except LoRAError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}. (Hooks such as on_train_epoch_start run later)"
        raise _refusal(config, f"that of {title} ended in {why}") from error


# The data


def _batches(trainer: Trainer, pl_module: Any, config: LoRAConfig) -> Generator[Any, None, None]:
    """The fit's first batches, from copies of its loaders: the loaders themselves stay where they are."""
    loader = copy(loader_of(trainer.fit_loop))
    loader.flattened = [_begun_anew(each, config) for each in loader.flattened]
    try:
        for batch, *_ in loader:
            batch = before_transfer(pl_module, trainer.precision_plugin.convert_input(batch))
            yield trainer.strategy.batch_to_device(batch)
    finally:
        loader.reset()  # ends its workers


# Iterators whose copies have a place of their own
_STARTS_ANEW: tuple[type, ...] = (type(iter([])), type(iter(())), type(iter(range(0))))


def _begun_anew(loader: Any, config: LoRAConfig) -> Any:
    """A copy of a loader that shares its data alone."""
    kind = type(loader).__name__
    if hasattr(loader, "__next__") and not isinstance(loader, _STARTS_ANEW):
        if type(loader).__module__ in ("builtins", "itertools"):  # a copy of it would take its batches
            raise _refusal(config, f"the data are a {kind}, which can be read once (a DataLoader: twice)")
        rank_zero_info(f"init={config.init!r}: a {kind} that is read only once goes on after these batches.")
    again = copy(loader)
    if isinstance(loader, DataLoader):
        own, memo = vars(again), {id(loader.dataset): loader.dataset}
        own[LOADER_STATE] = None
        for name in ("generator", "sampler", "batch_sampler"):
            own[name] = deepcopy(own[name], memo)
        if isinstance(loader.dataset, IterableDataset):
            own["dataset"] = copy(loader.dataset)
            kind = type(loader.dataset).__name__
            rank_zero_info(f"init={config.init!r}: a {kind} that is read only once goes on after these batches.")
    return again


# What a step leaves behind


def _leave_no_trace(trainer: Trainer, pl_module: LightningModule, undo: ExitStack) -> None:
    """Give back what steps change: gradients, modes, buffers, metrics, and what modules keep in lists and numbers."""
    undo.enter_context(isolate_rng())
    undo.enter_context(gradients_pass(pl_module))
    for p in pl_module.parameters():
        undo.callback(setattr, p, "grad", p.grad)
        undo.callback(_put_back, p, p.data)
        p.grad = None
    undo.callback(setattr, trainer, "should_stop", trainer.should_stop)
    undo.callback(setattr, trainer, "loggers", trainer.loggers)
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]
    if hasattr(torch.compiler, "set_stance"):  # or compiled code would keep the hooks
        undo.enter_context(torch.compiler.set_stance("force_eager"))
    undo.enter_context(torch.no_grad())  # to write the values back
    _remember([pl_module, *(group for each in trainer.optimizers for group in each.param_groups)], undo, set())
    undo.enter_context(torch.enable_grad())
    for module in pl_module.modules():
        if hasattr(module, "log_dict"):
            vars(module)["log"] = lambda *_, **__: None


_MANY = 10_000  # a container with more holds data, which are not looked into


def _remember(values: Any, undo: ExitStack, seen: set[int]) -> None:
    """Note what a tensor or a container holds now. ``undo`` writes it back into the same object."""
    if id(values) in seen or isinstance(values, nn.Parameter):
        return
    seen.add(id(values))
    if isinstance(values, Tensor) and not values.is_meta:
        undo.callback(_write_back, values, values.detach().clone())
    elif isinstance(values, nn.Module):
        _remember(vars(values), undo, seen)
    elif isinstance(values, dict | set | list | deque):
        undo.callback(values.extend if isinstance(values, list | deque) else values.update, copy(values))
        undo.callback(values.clear)
    if isinstance(values, dict | set | list | deque | tuple) and len(values) < _MANY:
        for each in values.values() if isinstance(values, dict) else values:
            _remember(each, undo, seen)


def _put_back(parameter: nn.Parameter, values: Tensor) -> None:
    if parameter.data_ptr() != values.data_ptr():
        parameter.data = values


def _write_back(tensor: Tensor, values: Tensor) -> None:
    if not torch.equal(tensor, values):
        tensor.copy_(values)
