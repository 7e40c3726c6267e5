"""A resumed run continues with the same random numbers."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

RANDOM = "lightning_lora_random"
"""The checkpoint entry with the states of torch's generators."""


def random_states(trainer: Trainer) -> dict[str, Tensor]:
    """Return the states of torch's generators in all processes.

    Returns:
        A tensor for each device type, with one row for each process.
    """
    device = trainer.strategy.root_device
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    gathered = {name: _of_all_processes(trainer, state.to(device)) for name, state in states.items()}
    return {name: rows.reshape(-1, len(states[name])).cpu() for name, rows in gathered.items()}


def _of_all_processes(trainer: Trainer, state: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return trainer.strategy.all_gather(state)
    rows = [torch.empty_like(state) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, state)  # Lightning's own all_gather is for gradients too; torch warns about that
    return torch.stack(rows)


def set_random_state(trainer: Trainer, states: object) -> bool:
    """Set this process's generators from stored states.

    Args:
        trainer: The Trainer of the run.
        states: What :func:`random_states` returned. Ignored if the number of processes has changed.

    Returns:
        Whether the data loaders come too early for these states, so that :func:`restart_loaders` must be called. A
        module that reads ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` starts them.
    """
    device = trainer.strategy.root_device
    for name, rows in states.items() if isinstance(states, Mapping) else ():
        if name not in ("cpu", device.type) or not isinstance(rows, Tensor):
            continue
        now = torch.get_rng_state() if name == "cpu" else torch.cuda.get_rng_state(device)
        if rows.dtype == now.dtype and rows.shape == (trainer.world_size, len(now)):
            state = rows[trainer.global_rank].clone()  # torch crashes on a row that is a view
            torch.set_rng_state(state) if name == "cpu" else torch.cuda.set_rng_state(state, device)
    return states is not None and trainer.train_dataloader is not None


def restart_loaders(trainer: Trainer) -> None:
    """Let the data loaders start anew.

    They take their own states and the present random numbers. To be called when a resumed fit begins, after Lightning
    has read the loaders' states from the checkpoint. Lightning itself does not give them to loaders that have started
    before.
    """
    loop = trainer.fit_loop
    loop._load_combined_loader_states()
    iter(loop._data_fetcher)  # type: ignore[arg-type]  # it exists if the loaders do
