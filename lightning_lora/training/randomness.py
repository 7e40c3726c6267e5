"""The random numbers of a run: a resumed one goes on with the same, and adapters take none from the data."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_lora.model.view import View

RANDOM = "lightning_lora_random"  # the checkpoint entry with the states of torch's generators


@contextmanager
def reseeded(model: nn.Module) -> Iterator[None]:
    """Go on with a seed that is drawn first: however much new adapters draw, the run then sees the same batches."""
    before, adapted = torch.get_rng_state(), View(model).matrices
    seed = int(torch.randint(1 << 62, (), device="cpu"))
    torch.set_rng_state(before)
    yield  # after an error, another injection follows
    if View(model).matrices != adapted:
        torch.manual_seed(seed)


def random_states(trainer: Trainer) -> dict[str, Tensor]:
    """Return the states of torch's generators in all processes."""
    device = trainer.strategy.root_device
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    for name, state in states.items():
        states[name] = _of_all_processes(trainer, state.to(device)).reshape(-1, len(state)).cpu()
    return states


def _of_all_processes(trainer: Trainer, state: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return trainer.strategy.all_gather(state)
    rows = [torch.empty_like(state) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, state)  # Lightning's own all_gather is for gradients too; torch warns about that
    return torch.stack(rows)


def restore_random_state(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Set this process's generators as a checkpoint says, when a resumed fit begins."""
    states, device = checkpoint.get(RANDOM), trainer.strategy.root_device
    if not isinstance(states, Mapping):
        return
    for name, rows in states.items():
        if name not in ("cpu", device.type) or not isinstance(rows, Tensor):
            continue
        now = torch.get_rng_state() if name == "cpu" else torch.cuda.get_rng_state(device)
        if rows.dtype == now.dtype and rows.shape == (trainer.world_size, len(now)):
            state = rows[trainer.global_rank].clone()  # torch crashes on a row that is a view
            torch.set_rng_state(state) if name == "cpu" else torch.cuda.set_rng_state(state, device)
    loop: Any = trainer.fit_loop  # its loaders start anew: Lightning has started them with other random numbers
    loop._combined_loader_states_to_load = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    loop._load_combined_loader_states()
    iter(loop._data_fetcher)
