"""Data that is loaded once, for all runs of a sweep."""

import pickle
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from itertools import count
from typing import Any

from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora.errors import ConfigError, LoRAError, warn
from lightning_lora.sweep.runs import Run, Runs
from lightning_lora.tensors.inplace import InPlace, overlay, uncover

_END = object()  # what follows the last batch


class Made:
    """What one run has made for all, with the random numbers before and after."""

    def __init__(self, run: Run, make: Callable[[], Any]) -> None:
        self.run, self.before = run, _random()
        self.value = make()
        self.after = _random()

    def take(self, run: Run) -> Any:
        """Return it. Random numbers go on as if ``run`` had made it, or a warning says that they cannot."""
        draws = run is not self.run and _seen(self.before) != _seen(self.after)
        if draws and _seen(_random()) == _seen(self.before):
            _set_rng_states(self.after)
        elif draws:
            warn(
                f"A DataLoader draws random numbers, and dropout has left others to {run.name} than to "
                f"{self.run.name}. {run.name} gets the same data, and does not train exactly as it would alone. Give "
                "every DataLoader its own: DataLoader(..., generator=torch.Generator().manual_seed(0))."
            )
        return self.value


def _random() -> dict[str, Any]:
    return _collect_rng_states(include_cuda=False)


def _seen(states: dict[str, Any]) -> bytes:
    return pickle.dumps({**states, "torch": states["torch"].numpy()})


class Loaders:
    """The loaders for training or validation. They are requested once, and each run gets copies."""

    def __init__(self, source: Any, runs: Runs) -> None:
        self.source, self.runs, self.made = source, runs, list[Made]()
        self.passes: dict[int, dict[int, _Pass]] = {}

    def __deepcopy__(self, memo: Any) -> "Loaders":
        return self

    def request(self, run: Run, asked: Iterator[int]) -> Any:
        """Return a run's copies of the loaders."""
        number = next(asked)
        if number == len(self.made):
            self.made.append(Made(run, self.source.dataloader))
        found = self.made[number].take(run)
        combined = copy(found) if isinstance(found, CombinedLoader) else CombinedLoader(found, "sequential")
        combined.flattened = [self._own(run, each) for each in combined.flattened]
        return combined if isinstance(found, CombinedLoader) else combined.iterables

    def _own(self, run: Run, loader: Any) -> Any:
        if not isinstance(loader, DataLoader):
            raise ConfigError(f"{self.source.name} gave {type(loader).__name__}. LoRASweep expects a DataLoader.")
        own, passes = copy(loader), self.passes.setdefault(id(loader), {})
        overlay(own, SharedLoader)
        own.lora_shared = run, self.runs, passes, count()
        return own


class SharedLoader(DataLoader[Any], InPlace):
    """A run's copy of a DataLoader: its iterators give the batches that another run has loaded."""

    lora_shared: "tuple[Run, Runs, dict[int, _Pass], Iterator[int]]"

    def __iter__(self) -> Any:
        """Begin a pass, together with the other runs."""
        run, runs, passes, begun = self.lora_shared
        number = next(begun)
        if number not in passes:
            loader: Any = copy(self)
            uncover(loader)
            if number:
                loader = passes[number - 1].loader  # with its own workers
            passes[number] = _Pass(loader, Made(run, partial(iter, loader)))
            passes.pop(number - 2, None)
        passes[number].opened.take(run)
        return passes[number].batches(runs, run)


class _Pass:
    """One pass through a loader, and the batch at which all runs are."""

    def __init__(self, loader: DataLoader[Any], opened: Made) -> None:
        self.loader, self.opened = loader, opened
        self.batch, self.number = opened, -1

    def batches(self, runs: Runs, run: Run) -> Iterator[Any]:
        """Yield copies of the batches for one run: a training step may change them."""
        for number in count():
            runs.pass_on(run)
            if number == self.number + 1:
                self.batch, self.number = Made(run, partial(next, self.opened.value, _END)), number
            if number != self.number:
                raise LoRAError(f"{run.name} of LoRASweep skipped batches: all adapters must use the same ones.")
            batch = self.batch.take(run)
            if batch is _END:
                return
            yield apply_to_collection(batch, Tensor, Tensor.clone)
