"""The moments of a fine-tune at which guards look.

What the rest of the package knows of them is in this file.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from torch import nn
from torch.optim import Optimizer

# what guards look at is above this file, which imports none of it when it runs
if TYPE_CHECKING:
    from lightning_lora.model.untrained.find_untrained import Untrained
    from lightning_lora.model.view import View
    from lightning_lora.training.steps.moved_copies import FrozenCopies

_Arguments = ParamSpec("_Arguments")
_Moment = TypeVar("_Moment", bound=Callable[..., object])

_IN_FIRST_PROCESS: set[str] = set()
"""The names of the moments that are marked so."""


def in_first_process(moment: _Moment) -> _Moment:
    """Mark a moment that all processes of a fit see alike.

    The first one alone is told, so that what guards say is said once.
    """
    _IN_FIRST_PROCESS.add(moment.__name__)
    return moment


class Guard:
    """A hazard that is only said: a guard changes nothing that lasts.

    Each method is a moment, in the order in which they come, and does nothing here. A
    guard has those that it needs. Each fit, and each call, has guards of its own, which
    may note what they see.

    Where a fit runs in several processes, each of them is told of a moment: one may see
    it alone, or all must look at it together, as at shards. Of a moment that is marked
    ``@in_first_process``, the first one alone is told.
    """

    def layers_chosen(self, view: "View", new: Collection[str]) -> None:
        """These layers will get new adapters. Nothing is changed yet."""

    def injected_by_call(self, view: "View") -> None:
        """Adapters were added by a call, outside of a Trainer."""

    def networks_settled(
        self, view: "View", paused: Collection[str], frozen_since: Set[str]
    ) -> None:
        """The optimizers say which networks train.

        ``paused`` are layers that do not, though their adapters have learned.
        ``frozen_since`` are weights that the user has frozen since adapters learned.
        """

    @in_first_process
    def optimizers_built(
        self, view: "View", optimizers: Sequence[Optimizer], *, is_scaled: bool
    ) -> None:
        """A fit has its optimizers, and a checkpoint is loaded.

        ``is_scaled``: the user has set ``lr_scale``.
        """

    @in_first_process
    def training_begins(self, view: "View") -> None:
        """The module's own ``on_fit_start`` has run."""

    @in_first_process
    def new_adapters_begin(self, view: "View", untrained: "Untrained") -> None:
        """New adapters begin to train, so what is said can still be changed.

        The module's own ``on_fit_start`` has run. ``untrained``: what looks untrained.
        """

    @in_first_process
    def adapters_ready(self, view: "View") -> None:
        """Adapters have the values with which they begin to train."""

    @in_first_process
    def base_made_new(self, view: "View", untrained: "Untrained") -> None:
        """The first batch comes, and hooks have changed weights since, of which these look untrained now."""

    @in_first_process
    def first_step_begins(self, view: "View", copies: "FrozenCopies") -> None:
        """The first training step begins.

        ``copies``: frozen copies without adapters of networks that have some.
        """

    @in_first_process
    def first_batch_runs(self, model: nn.Module) -> AbstractContextManager[None]:
        """A part of the first batch runs: a training step, or a backward pass."""
        return nullcontext()

    def backward_begins_without_adapters(self, view: "View") -> None:
        """A backward pass begins in a block of ``disable_adapters``."""

    def optimizer_begins(self, view: "View", unreached: Sequence[str]) -> None:
        """An optimizer makes its first step, and adapters in it have no gradient: those of these layers."""

    @in_first_process
    def first_batch_ended(self, model: nn.Module) -> None:
        """The first batch is over."""

    @in_first_process
    def first_evaluation_runs(
        self, view: "View", step: str
    ) -> AbstractContextManager[None]:
        """The first batch of an evaluation runs.

        ``step``: what runs it, such as ``"validation step"``.
        """
        return nullcontext()

    @in_first_process
    def base_compared(self, view: "View") -> None:
        """A file is written in training, or the fit ends: the record has just compared the base."""

    def training_ended(self, view: "View") -> None:
        """The last step is over."""

    def fit_ended(
        self, view: "View", optimizers: Sequence[Optimizer], steps: int
    ) -> None:
        """A fit of so many steps is over. Nothing is merged yet."""

    def merge_begins(self, view: "View") -> None:
        """The updates will be merged into the weights."""

    def merged(
        self, title: str, lost: Mapping[str, float], untied: Sequence[str]
    ) -> None:
        """The updates of a model are merged.

        ``lost`` is the share of each layer's update that rounding took away: infinite
        or NaN, where the sum has overflowed. ``untied`` names the layers with a weight
        that was tied to another layer's.
        """

    def merged_in_checkpoint(self, title: str, lost: Mapping[str, float]) -> None:
        """A Trainer's file gets merged weights (``save="model"``), in the process that writes it."""

    def merged_offline(self, base: str, lost: Mapping[str, float]) -> None:
        """The files of a base are merged, without a model."""


GUARDS: list[type[Guard]] = []
"""All guards.

``guards/__init__.py`` has the list. Where several speak at one moment, this is their
order.
"""


class Guards:
    """All guards of one fit, or of one call: they look at a moment in turn."""

    def __init__(
        self,
        kinds: Collection[type[Guard]] | None = None,
        *,
        is_first_process: bool = True,
    ) -> None:
        """Make a guard of each kind: None means all."""
        kinds = GUARDS if kinds is None else kinds
        self.guards = [kind() for kind in kinds]
        self._is_first_process = is_first_process

    def tell(
        self,
        moment: Callable[Concatenate[Any, _Arguments], None],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> None:
        """Let guards look at a moment: ``guards.tell(Guard.merge_begins, view)``."""
        for guard in self._looking_at(moment):
            getattr(guard, moment.__name__)(*args, **kwargs)

    @contextmanager
    def watching(
        self,
        moment: Callable[Concatenate[Any, _Arguments], AbstractContextManager[None]],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> Iterator[None]:
        """Let guards look while something runs: ``guards.watching(Guard.first_batch_runs, model)``."""
        with ExitStack() as running:
            for guard in self._looking_at(moment):
                running.enter_context(getattr(guard, moment.__name__)(*args, **kwargs))
            yield

    def _looking_at(self, moment: Callable[..., object]) -> list[Guard]:
        """The guards that have a method of their own for a moment: none if another process is told of it."""
        if moment.__name__ in _IN_FIRST_PROCESS and not self._is_first_process:
            return []
        return [
            guard
            for guard in self.guards
            if getattr(type(guard), moment.__name__) is not moment
        ]

    def close(self) -> None:
        """End the fit: let go of what guards have noted of the model."""
        self.guards = []


NO_GUARDS = Guards([])
"""For a call in which nothing is said."""
