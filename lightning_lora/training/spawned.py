"""What a run is in each of its processes: where its random numbers are, and what it sends home from spawned ones.

Strategies that spawn or fork send back the module's state dict, the best path, and the Trainer's state.
"""

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_lora.errors import ConfigError
from lightning_lora.model.handover import leave_memory, shows
from lightning_lora.model.record import adapted_layers, find_record, recall_record, record_of
from lightning_lora.tensors.names import named_parameters, own_parameter

RANDOM = "lightning_lora_random"
"""Where a checkpoint holds the states of torch's generators."""


def random_states(trainer: Trainer) -> dict[str, Tensor]:
    """Return the states of torch's generators, a row for each process, by the type of their device."""
    device = trainer.strategy.root_device
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    gathered = {name: trainer.strategy.all_gather(state.to(device)) for name, state in states.items()}
    return {name: rows.reshape(-1, len(states[name])).cpu() for name, rows in gathered.items()}


def set_random_state(trainer: Trainer, states: object) -> None:
    """Set this process's generators to what :func:`random_states` returned in as many processes, if it was so."""
    device = trainer.strategy.root_device
    for name, rows in states.items() if isinstance(states, Mapping) else ():
        if name not in ("cpu", device.type) or not isinstance(rows, Tensor):
            continue
        now = torch.get_rng_state() if name == "cpu" else torch.cuda.get_rng_state(device)
        if rows.dtype == now.dtype and rows.shape == (trainer.world_size, len(now)):
            state = rows[trainer.global_rank].clone()  # torch would crash on a row of a tensor
            torch.set_rng_state(state) if name == "cpu" else torch.cuda.set_rng_state(state, device)


def returns_state_only(trainer: Trainer) -> bool:
    """Whether the Trainer's strategy runs in processes that send only a state dict home."""
    return getattr(trainer.strategy, "_start_method", "popen") != "popen"


def send_memory(trainer: Trainer, pl_module: LightningModule) -> None:
    """At the end of a fit in such a process, leave what the module remembers for the main process to find."""
    if returns_state_only(trainer) and trainer.is_global_zero:
        record = record_of(pl_module)
        leave_memory(record, record.folded_digests)


def receive_memory(pl_module: LightningModule) -> None:
    """Give the module what a fit in another process has left, if it is about the very weights that it has."""
    record = find_record(pl_module)
    known = record is not None and (not record.folded or shows(pl_module, record.folded_digests))
    if not known and recall_record(pl_module):
        rank_zero_info(
            f"The weights of {type(pl_module).__name__} are those that a fit in other processes merged: it gets its "
            "base and its adapters back. (If they are to be a new base, call remove_adapters on it first.)"
        )


def check_untied(pl_module: LightningModule) -> None:
    """Refuse to adapt one use of a tied weight where the merged model is sent home as a state dict.

    Raises:
        ConfigError: an adapted weight has another use; the main process would load both values into the one weight.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in named_parameters(pl_module, remove_duplicate=False).items():
        owners.setdefault(id(parameter), []).append(name)
    weights = [own_parameter(layer, w) for layer in adapted_layers(pl_module).values() for w in layer.lora_weights()]
    for tied in (owners[id(weight)] for weight in weights):
        if len(tied) > 1:
            raise ConfigError(
                f"{' and '.join(map(repr, tied))} are one tied weight, of which a merge changes one use. The processes "
                "of this strategy send back a state that cannot hold both. Use strategy='ddp', or take the layer out "
                "with exclude_modules."
            )
