"""Adapted weights that a step reads outside of their layers: without their updates, so by mistake.

In the first batch of a training, and in the first one of each evaluation, each frozen
weight of an adapted layer is of a class that sees what torch computes with it. Its own
layer gets a plain tensor with the same values instead. So what the class sees is other
code: a penalty, a decay by name, a forward hook, a product by hand.

- In training, it gives that code a tensor with a graph. A backward pass that comes there
  shows that the loss depends on what was read.
- In an evaluation, there is no graph: each read counts that gives more than one number.

No value changes by that, and after the batch, nothing is left of it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

from lightning_lora.errors import listed, warn
from lightning_lora.guards.read_by_hand.compiled_code import is_compiled
from lightning_lora.guards.read_by_hand.watched_weight import (
    WeightInEvaluation,
    WeightInTraining,
)
from lightning_lora.guards.read_by_hand.weight_watch import (
    WeightWatch,
    layers_with_gradients,
)
from lightning_lora.guards.wording import MOST_NAMES, in_full_or_excluded
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.names import names_not_in
from lightning_lora.training.steps.moved_copies import FrozenCopies


class ReadByHand(Guard):
    """Names layers whose weights other code reads in a first batch."""

    def __init__(self) -> None:
        # what watches the first batch of a training, until that is over
        self._in_training: WeightWatch | None = None
        # layers that this guard has named, and dead ones, which DeadAdapters names
        self._named: set[str] = set()

    def first_step_begins(self, view: View, copies: FrozenCopies) -> None:
        """Choose what is watched.

        Adapters that do not train change no loss that training lowers, so their layers
        are left to evaluations.
        """
        if not is_compiled(view.model):
            self._in_training = WeightWatch(
                view, layers_with_gradients(view), WeightInTraining
            )

    def first_batch_runs(self, model: nn.Module) -> AbstractContextManager[None]:
        """Watch the weights meanwhile."""
        if self._in_training is None:
            return nullcontext()
        return self._in_training.running()

    def first_batch_ended(self, model: nn.Module) -> None:
        """Name what was read, but no layer that nothing calls: its adapter is dead, and DeadAdapters says so."""
        if self._in_training is None:
            return
        watch = self._in_training
        self._in_training = None  # lets go of the weights
        self._named.update(watch.layers_without_call())
        names = self._take_new_names(watch)
        if names:
            warn(_about_training(type(model).__name__, names))

    @contextmanager
    def first_evaluation_runs(self, view: View, step: str) -> Iterator[None]:
        """Watch the weights meanwhile, and name what was read."""
        if is_compiled(view.model):
            yield
            return
        watch = WeightWatch(view, view.layers, WeightInEvaluation)
        with watch.running():
            yield
        names = self._take_new_names(watch)
        if names:
            warn(_about_evaluation(step, type(view.model).__name__, names))

    def _take_new_names(self, watch: WeightWatch) -> list[str]:
        """The names of layers that were read, and were not named before. They count as named now."""
        new = names_not_in(watch.layers_read(), self._named)
        self._named.update(new)
        return new


def _about_training(title: str, names: list[str]) -> str:
    return (
        f"A training step reads the weight of {listed(names, MOST_NAMES)} of {title} "
        "itself, without its update: a penalty, a hook, a product by hand. It sees the "
        "frozen weight, and a merge would change what it computes. Train these layers "
        f"in full: {in_full_or_excluded(names)} An output head that shares a weight "
        "can be a tied layer instead: nn.Linear without bias."
    )


def _about_evaluation(step: str, title: str, names: list[str]) -> str:
    return (
        f"A {step} reads the weight of {listed(names, MOST_NAMES)} of {title} itself, "
        "without its update: a product by hand, a shortcut in eval mode. It sees the "
        "frozen weight, so it does not compute what was trained. Call the layer there "
        f"too. Or train these layers in full: {in_full_or_excluded(names)}"
    )
