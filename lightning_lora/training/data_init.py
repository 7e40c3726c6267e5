"""Adapters that start from the fit's own data: some batches run through the module before its first step."""

from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from copy import copy, deepcopy
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, LoRAError, StrategyError, listed
from lightning_lora.layers import INITIALISATIONS, LoRALayer
from lightning_lora.layers.init import keep_start
from lightning_lora.layers.inits.table import FromData, Initialisation
from lightning_lora.layers.matrices import Role
from lightning_lora.model.settle import follow_originals
from lightning_lora.model.view import view_of
from lightning_lora.private import LOADER_STATE, before_transfer, loader_of, version_of
from lightning_lora.tensors.names import named_parameters
from lightning_lora.training.compatibility import callbacks_of, copy_adapted
from lightning_lora.training.no_trace import leave_no_trace


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
    config = view.config
    if INITIALISATIONS[config.init].observe is None or not view.is_fresh():
        return
    check_data_init(trainer, pl_module, config)  # again: the module's own hooks have run
    layers = {name: layer for name, layer in view.layers.items() if not layer.lora_settings.follows}
    _check_quantised(config, layers)
    number, started = _start(trainer, pl_module, config, layers)
    for parameter in view.adapters.values():  # the first process has seen its own data
        values = trainer.strategy.broadcast(parameter.detach().cpu())
        parameter.detach().copy_(values)
    follow_originals(view)
    copy_adapted(callbacks_of(trainer), pl_module, anew=True)  # into averages
    _tell(config, layers, started, number)


def _check_quantised(config: LoRAConfig, layers: Mapping[str, LoRALayer]) -> None:
    """Refuse quantised layers where gradients of weights are needed."""
    if not INITIALISATIONS[config.init].needs_gradients:
        return
    packed = [name for name, layer in layers.items() if layer.lora_is_quantised(layer)]
    if packed:
        raise _refusal(config, f"it needs gradients of weights, and {listed(packed)} are quantised ('eva' needs none)")


def _start(
    trainer: Trainer, pl_module: LightningModule, config: LoRAConfig, layers: Mapping[str, LoRALayer]
) -> tuple[int, set[str]]:
    """Run batches and write what they give. Return their number, and the layers that have started from them."""
    initialisation = INITIALISATIONS[config.init]
    started: set[str] = set()
    with ExitStack() as undo:
        leave_no_trace(trainer, pl_module, undo)
        if not initialisation.needs_gradients:
            pl_module.eval()  # dropout would blur the inputs
        assert initialisation.observe is not None
        observed = {name: initialisation.observe(layer, undo) for name, layer in layers.items()}
        number = _run(trainer, pl_module, config)
        for name, factors_of in observed.items():
            if factors_of is not None and _write_factors(layers[name], factors_of, initialisation):
                started.add(name)
    return number, started


def _write_factors(layer: LoRALayer, factors_of: FromData, initialisation: Initialisation) -> bool:
    """Write the factors of each matrix of a layer. Return whether there were any."""
    parameters = {key: parameter.detach() for key, parameter in layer.lora_parameters().items()}
    has_started = False
    for matrix in layer.lora_matrices:
        factors = factors_of(matrix, matrix.rank(layer.lora_settings.r))
        if not factors:
            continue
        lora_A, lora_B = factors
        parameters[matrix.parameter(Role.A)][..., : lora_A.shape[-2], :].copy_(lora_A)
        parameters[matrix.parameter(Role.B)].copy_(lora_B)
        if initialisation.is_difference:
            keep_start(matrix, parameters)
        has_started = True
    return has_started


def _tell(config: LoRAConfig, layers: Mapping[str, LoRALayer], started: Collection[str], number: int) -> None:
    """Say how many layers have started from data, and which have not."""
    others = [name for name in layers if name not in started]
    more = f" These start as with 'kaiming': {listed(others)}." if others else ""
    rank_zero_info(
        f"init={config.init!r}: {len(layers) - len(others)} layers start from {number} batches of training data.{more}"
    )


def _run(trainer: Trainer, pl_module: LightningModule, config: LoRAConfig) -> int:
    """Run batches through the module's own step, and backward if that is needed. Return their number."""
    title = type(pl_module).__name__
    versions = {}
    for name, parameter in named_parameters(pl_module).items():
        if not parameter.is_inference():
            versions[name] = (parameter, version_of(parameter))
    most = int(min(config.init_batches, trainer.num_training_batches))
    number = 0
    with _explained(config, title), closing(_batches(trainer, pl_module, config)) as batches:
        for batch in islice(batches, most):
            _run_step(trainer, pl_module, config, batch, number)
            number += 1
    changed = [name for name, (parameter, version) in versions.items() if version_of(parameter) != version]
    if changed:
        raise _refusal(config, f"that of {title} has written to {listed(changed)}, so build the module anew")
    return number


def _run_step(trainer: Trainer, pl_module: LightningModule, config: LoRAConfig, batch: Any, number: int) -> None:
    """Run a training step, and its backward pass if gradients are needed."""
    step = pl_module.training_step
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    with trainer.precision_plugin.train_step_context():
        output = step(batch, number) if takes_index else step(batch)
    if output is None or not INITIALISATIONS[config.init].needs_gradients:
        return
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise _refusal(config, f"that of {type(pl_module).__name__} returns no loss with a gradient")
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    nn.Module.zero_grad(pl_module)


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
    if not isinstance(loader, DataLoader):
        return again
    attributes = vars(again)
    attributes[LOADER_STATE] = None
    shared = {id(loader.dataset): loader.dataset}
    for name in ("generator", "sampler", "batch_sampler"):
        attributes[name] = deepcopy(attributes[name], shared)
    if isinstance(loader.dataset, IterableDataset):
        attributes["dataset"] = copy(loader.dataset)
        kind = type(loader.dataset).__name__
        rank_zero_info(f"init={config.init!r}: a {kind} that is read only once goes on after these batches.")
    return again
