"""What a run is in each of its processes: where its random numbers are, and what it sends home from spawned ones.

Strategies that spawn or fork send back the module's state dict, the best path, and the Trainer's state, and the main
process calls no hook when these arrive. So merged weights come home by themselves, and the memory of the exact base,
which later stages need, is left in a temporary folder, where it is found by the weights that it is about.
"""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_lora.adapted import Record, adapted_layers, keep_record, record_of
from lightning_lora.errors import ConfigError
from lightning_lora.fold import shows
from lightning_lora.names import named_parameters, own_parameter

RANDOM = "lightning_lora_random"
"""Where a checkpoint holds the states of torch's generators."""

_MEMORY = "LIGHTNING_LORA_MEMORY"
"""The variable of the environment that tells every process of a program in which folder memories are left."""


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


def name_memory() -> None:
    """Name the folder of memories, before any process starts; it goes when this one ends."""
    if _MEMORY not in os.environ:
        os.environ[_MEMORY] = str(Path(tempfile.gettempdir()) / f"lightning_lora_{uuid4().hex}")
        atexit.register(shutil.rmtree, os.environ[_MEMORY], ignore_errors=True)


def send_memory(trainer: Trainer, pl_module: LightningModule) -> None:
    """At the end of a fit in such a process, leave what the module remembers where the main process looks for it."""
    if returns_state_only(trainer) and trainer.is_global_zero:
        folder, record = Path(os.environ[_MEMORY]), record_of(pl_module)
        folder.mkdir(mode=0o700, exist_ok=True)
        name = uuid4().hex
        torch.save(record, folder / f"{name}.pt")
        (folder / f"{name}.json").write_text(json.dumps(record.folded_digests))


def receive_memory(pl_module: LightningModule) -> None:
    """Give the module what a fit in another process has left, if it is about the very weights that it has."""
    for digests in Path(os.environ[_MEMORY]).glob("*.json"):
        if shows(pl_module, json.loads(digests.read_text())):
            record: Record = torch.load(digests.with_suffix(".pt"), weights_only=False)  # our own program wrote it
            keep_record(pl_module, record)
            return


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
