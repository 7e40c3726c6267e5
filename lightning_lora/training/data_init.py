"""Adapters that start from the fit's own data: some batches run through the module before its first step."""

from collections import deque
from collections.abc import Generator
from contextlib import ExitStack, closing
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
from lightning_lora.errors import ConfigError, StrategyError, listed
from lightning_lora.layers import INITIALISATIONS, LoRALayer, Role
from lightning_lora.layers.inits import Observed
from lightning_lora.model.inject import follow_originals
from lightning_lora.model.view import view_of
from lightning_lora.tensors.names import named_parameters, own_parameter
from lightning_lora.training.compatibility import callbacks_of, copy_adapted


def check_data_init(trainer: Trainer, pl_module: LightningModule, config: LoRAConfig) -> None:
    """Refuse a start from data if no batch can go through the module before the first step."""
    if INITIALISATIONS[config.init].observe is None:
        return
    what, title = f"init={config.init!r}", type(pl_module).__name__
    if trainer.strategy.restore_checkpoint_after_setup:
        raise StrategyError(
            f"{what} is not supported with {type(trainer.strategy).__name__}, which shards the fit. Use "
            "strategy='ddp', or an init that needs no data."
        )
    if not pl_module.automatic_optimization:
        raise ConfigError(
            f"{what} runs training_step before training, and that of {title} steps its optimizers itself "
            "(automatic_optimization=False). Use an init that needs no data."
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise ConfigError(
            f"{what} runs training_step on single batches, and that of {title} takes a dataloader_iter. Use an init "
            "that needs no data."
        )


def start_from_data(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let adapters that have not learned start from training data, if their ``init`` does. All else stays as it was."""
    view = view_of(pl_module)
    config, how = view.config, INITIALISATIONS[view.config.init]
    if how.observe is None or not view.is_fresh():
        return
    check_data_init(trainer, pl_module, config)
    layers = {name: layer for name, layer in view.layers.items() if not layer.lora_settings.follows}
    seen = dict[str, Observed]()
    with ExitStack() as undo:
        undo.enter_context(isolate_rng())
        _leave_no_trace(trainer, pl_module, undo)
        pl_module.eval()  # dropout would blur the inputs
        for name, layer in layers.items():
            observed = how.observe(layer)
            if observed is not None:
                seen[name] = undo.enter_context(closing(observed))
        number = _run(trainer, pl_module, config.init_batches)
        started = [name for name, observed in seen.items() if _start(layers[name], observed)]
    _share(trainer, [layers[name] for name in seen])
    follow_originals(view)
    copy_adapted(callbacks_of(trainer), pl_module, anew=True)  # into averages
    others = [name for name in layers if name not in started]
    more = f" These start as with 'kaiming': {listed(others)}." if others else ""
    rank_zero_info(f"init={config.init!r}: {len(started)} layers start from {number} batches of training data.{more}")


def _run(trainer: Trainer, pl_module: LightningModule, most: int) -> int:
    """Run batches through the module's own step, and return their number."""
    step, number, weights = pl_module.training_step, 0, named_parameters(pl_module)
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    versions = {name: p._version for name, p in weights.items() if not p.is_inference()}
    most = int(min(most, trainer.num_training_batches))
    with closing(_batches(trainer, pl_module)) as batches:
        for number, batch in enumerate(islice(batches, most), start=1):
            with trainer.precision_plugin.train_step_context():
                step(batch, number - 1) if takes_index else step(batch)
    if changed := [name for name, version in versions.items() if weights[name]._version != version]:
        raise ConfigError(
            f"training_step of {type(pl_module).__name__} writes to {listed(changed)}, so it cannot run before "
            "training without a trace. Build the module anew, and use an init that needs no data."
        )
    return number


def _start(layer: LoRALayer, observed: Observed) -> bool:
    """Write the factors of a layer's matrices, and return whether there are any."""
    has_started = False
    for matrix in layer.lora_matrices:
        factors = observed.factors(matrix, matrix.rank(layer.lora_settings.r))
        if factors is None:
            continue
        has_started = True
        a, b = (own_parameter(layer, matrix.parameter(role)).detach() for role in (Role.A, Role.B))
        a[..., : factors[0].shape[-2], :].copy_(factors[0])
        b.copy_(factors[1])
        if layer.lora_settings.is_difference:
            own_parameter(layer, matrix.parameter(Role.A0)).copy_(a)
            own_parameter(layer, matrix.parameter(Role.B0)).copy_(b)
    return has_started


def _share(trainer: Trainer, layers: list[LoRALayer]) -> None:
    """Give every process the values of the first one."""
    values = [[p.detach().cpu() for p in layer.lora_parameters().values()] for layer in layers]
    for layer, shared in zip(layers, trainer.strategy.broadcast(values), strict=True):
        for p, value in zip(layer.lora_parameters().values(), shared, strict=True):
            p.detach().copy_(value)


# The data


def _batches(trainer: Trainer, pl_module: Any) -> Generator[Any, None, None]:
    """The fit's first batches, from copies of its loaders: the loaders themselves stay where they are."""
    loop: Any = trainer.fit_loop
    loader = copy(loop._combined_loader)
    loader.flattened = list(map(_begun_anew, loader.flattened))
    try:
        for batch, *_ in loader:
            batch = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
            yield trainer.strategy.batch_to_device(batch)
    finally:
        loader.reset()  # ends its workers


def _begun_anew(loader: Any) -> Any:
    """A copy of a loader that shares its data alone."""
    if hasattr(loader, "__next__") and type(loader).__module__ in ("builtins", "itertools"):
        raise ConfigError(
            f"The training data are a {type(loader).__name__}, which can be read once only, and an init from data "
            "reads them twice. Use a DataLoader, or an init that needs no data."
        )
    again = copy(loader)
    if isinstance(loader, DataLoader):
        own, memo = vars(again), {id(loader.dataset): loader.dataset}
        own["_iterator"] = None  # of workers that stay
        for name in ("generator", "sampler", "batch_sampler"):
            own[name] = deepcopy(own[name], memo)
        if isinstance(loader.dataset, IterableDataset):
            own["dataset"] = copy(loader.dataset)
    return again


# What a step leaves behind


def _leave_no_trace(trainer: Trainer, pl_module: LightningModule, undo: ExitStack) -> None:
    """Give back what steps change: gradients, modes, buffers, metrics, and what modules keep in lists and numbers."""
    for p in pl_module.parameters():
        undo.callback(setattr, p, "grad", p.grad)
        p.grad = None
    undo.callback(setattr, trainer, "loggers", trainer.loggers)
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]
    if hasattr(torch.compiler, "set_stance"):  # or compiled code would keep the hooks
        undo.enter_context(torch.compiler.set_stance("force_eager"))
    undo.enter_context(torch.no_grad())  # to write the values back
    seen = set[int]()
    for module in pl_module.modules():
        _remember(vars(module), undo, seen)
    undo.enter_context(torch.enable_grad())
    for module in pl_module.modules():
        if hasattr(module, "log_dict"):
            vars(module)["log"] = lambda *_, **__: None


def _remember(values: Any, undo: ExitStack, seen: set[int]) -> None:
    """Note what a tensor or a container holds now, to be written back into the same object."""
    if id(values) in seen or isinstance(values, nn.Parameter):
        return
    seen.add(id(values))
    if isinstance(values, Tensor) and not values.is_meta:
        undo.callback(_write_back, values, values.detach().clone())
    elif isinstance(values, dict | set | list | deque):
        fill = values.extend if isinstance(values, list | deque) else values.update
        undo.callback(fill, copy(values))
        undo.callback(values.clear)
        for each in values.values() if isinstance(values, dict) else values:
            _remember(each, undo, seen)


def _write_back(tensor: Tensor, values: Tensor) -> None:
    if not torch.equal(tensor, values):
        tensor.copy_(values)
