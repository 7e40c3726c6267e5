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
    states, device = _states_here(trainer), trainer.strategy.root_device
    for name, state in states.items():
        states[name] = _of_all_processes(trainer, state.to(device)).reshape(-1, len(state)).cpu()
    return states


def _states_here(trainer: Trainer) -> dict[str, Tensor]:
    device = trainer.strategy.root_device
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _of_all_processes(trainer: Trainer, state: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return trainer.strategy.all_gather(state)
    rows = [torch.empty_like(state) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, state)  # Lightning's own all_gather is for gradients too; torch warns about that
    return torch.stack(rows)


class Resumed:
    """The random numbers of a checkpoint, with which a resumed fit begins its data, once, and then its training.

    Lightning begins the data when the module asks for the number of steps, or before ``on_train_start``. Until training
    starts, other code may draw or seed.
    """

    def __init__(self, trainer: Trainer, stored: Mapping[str, Any]) -> None:
        self._trainer, self._states = trainer, dict[str, Tensor]()
        self._begun: dict[str, Tensor] | None = None  # the states after the data have begun
        for name, now in _states_here(trainer).items():
            rows = stored.get(name)
            if isinstance(rows, Tensor) and (rows.dtype, rows.shape) == (now.dtype, (trainer.world_size, len(now))):
                self._states[name] = rows[trainer.global_rank].clone()  # torch crashes on a row that is a view
        self._loop: Any = trainer.fit_loop
        self._setup_data = self._loop.setup_data
        self._loop.setup_data = self._follow_data  # type: ignore[method-assign]  # until training starts

    def _follow_data(self) -> None:
        before = self._begun
        self._setup_data()
        if self._begun is not before:
            self._begun = _states_here(self._trainer)

    def begin_data(self) -> None:
        """Set the generators for a loader that Lightning begins next."""
        self._begun = dict(self._states)
        self._restore(self._begun)

    def begin_training(self) -> None:
        """Set the generators for the first step. Data that did not begin as in the checkpoint begin again."""
        if self._begun and not (self._loop.restarting and self._loop._combined_loader_states_to_load):
            self._restore(self._begun)
            return
        self.begin_data()
        self._loop._load_combined_loader_states()
        iter(self._loop._data_fetcher)

    def _restore(self, states: Mapping[str, Tensor]) -> None:
        device = self._trainer.strategy.root_device
        for name, state in states.items():
            torch.set_rng_state(state) if name == "cpu" else torch.cuda.set_rng_state(state, device)

    def close(self) -> None:
        """Follow the data no more."""
        vars(self._loop).pop("setup_data", None)
