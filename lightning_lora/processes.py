"""What a run is in each of its processes: where its random numbers are, and what it sends home from spawned ones.

Strategies that spawn or fork send back the module's state dict, the best path, and the Trainer's state, and the main
process calls no hook when these arrive. So merged weights come home by themselves, and the memory of the exact base,
which later stages need, is left in a temporary file that the Trainer's state names.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_lora.adapted import Record, adapted_layers, find_record, keep_record
from lightning_lora.errors import ConfigError
from lightning_lora.fold import is_as_folded
from lightning_lora.names import named_parameters

RANDOM = "lightning_lora_random"
"""Where a checkpoint holds the states of torch's generators."""

_MEMORY = "_lora_memory"
"""Where a Trainer's state says in which file a module's memory lies. Its queue holds no more than a pipe does."""


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
    """At the end of a fit in such a process, tell the Trainer's state where to find what the module remembers."""
    if returns_state_only(trainer) and trainer.is_global_zero:
        path = vars(trainer.state).get(_MEMORY) or str(Path(tempfile.mkdtemp(prefix="lightning_lora_")) / "memory.pt")
        torch.save(find_record(pl_module), path)
        vars(trainer.state)[_MEMORY] = path


def receive_memory(trainer: Trainer, pl_module: LightningModule) -> None:
    """Give the module what came home from the last fit, if it is about the weights that came home too."""
    path: str | None = vars(trainer.state).get(_MEMORY)
    if path is None or not Path(path).exists():
        return
    record: Record = torch.load(path, weights_only=False)  # written by our own process, a moment ago
    if record.folded and is_as_folded(pl_module, record):
        keep_record(pl_module, record)


def check_untied(pl_module: LightningModule) -> None:
    """Refuse to adapt one use of a tied weight where the merged model is sent home as a state dict.

    Raises:
        ConfigError: an adapted weight has another use; the main process would load both values into the one weight.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in named_parameters(pl_module, remove_duplicate=False).items():
        owners.setdefault(id(parameter), []).append(name)
    for layer in adapted_layers(pl_module).values():
        tied = owners[id(layer.weight)]
        if len(tied) > 1:
            raise ConfigError(
                f"{' and '.join(map(repr, tied))} are one tied weight, of which a merge changes one use. The processes "
                "of this strategy send back a state that cannot hold both. Use strategy='ddp', or take the layer out "
                "with exclude_modules."
            )
