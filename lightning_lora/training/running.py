"""How layers begin to train, and what watches the training until its end, in the order of Lightning's hooks."""

from contextlib import ExitStack, closing

from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.errors import AdapterStateError
from lightning_lora.model.changes.attach import reinitialise_if_base_changed
from lightning_lora.model.records import find_record
from lightning_lora.model.still.follow import follow_new_copies
from lightning_lora.model.view import View, view_of
from lightning_lora.moments import Guard
from lightning_lora.storage.same_base.fingerprint import base_digests
from lightning_lora.training.compatibility import (
    average_what_trains,
    callbacks_of,
    late_callback_error,
)
from lightning_lora.training.optimizers.group_checks import check_added
from lightning_lora.training.optimizers.scaled_groups import update_scaled_rates
from lightning_lora.training.stages.stage import Stage
from lightning_lora.training.steps.backbones import Backbones
from lightning_lora.training.strategies.strategy import StrategyMethods
from lightning_lora.training.untrained_at_start import tell_of_new_base


def let_layers_train(trainer: Trainer, stage: Stage, methods: StrategyMethods) -> None:
    """Let all adapted layers train from here on, those too that came since the set-up."""
    view = view_of(trainer.lightning_module)
    # hooks may have loaded the base since the set-up
    reinitialise_if_base_changed(view)
    # hooks may have copied networks too: the record does not know the copies' layers
    new_layers = view.layers.keys() - view.recorded_layers
    follow_new_copies(view, new_layers)
    view.look_again()  # layers that follow another network do not train now
    view.adapter.layers = tuple(view.layers)
    # an adapter counts as trained as soon as its training begins
    view.adapter.may_have_learned = True
    stage.tools.guards.tell(Guard.adapters_ready, view)
    average_what_trains(callbacks_of(trainer), view)
    stage.tools.begin_training(methods.float32_steps(view))


class NoTraining:
    """What the callback's hooks call while no training runs: a user's code may take steps before and after one.

    It has the methods of :class:`TrainingWatch` that hooks call. Two of them act: a
    step gives scaled groups the module's rates, and a batch that ends is an error.
    """

    def begin_batch(self) -> None:
        """Do nothing."""

    def begin_backward(self, loss: Tensor) -> None:
        """Do nothing."""

    def end_backward(self) -> None:
        """Do nothing."""

    def begin_optimizer_step(self, optimizer: Optimizer) -> bool:
        """Let adapters follow the module's rates.

        As many parameters train as before.
        """
        update_scaled_rates(optimizer)
        return False

    def check_adapter(self) -> None:
        """Do nothing."""

    def end_batch(self) -> None:
        """Refuse a batch whose training had begun when the callback came."""
        raise late_callback_error()


class TrainingWatch:
    """Watches one training, from its start until ``close``.

    The callback's hooks call it only in training steps, not in evaluations between
    them.
    """

    def __init__(
        self,
        trainer: Trainer,
        stage: Stage,
        methods: StrategyMethods,
        *,
        is_new_fit: bool,
        digests: dict[str, int],
    ) -> None:
        """Begin to watch the training of ``trainer.lightning_module``.

        Args:
            trainer: The Trainer.
            stage: Its fit.
            methods: Our methods on its strategy.
            is_new_fit: Whether no checkpoint was loaded: then networks that copy others
                begin with the adapters of these.
            digests: Those of the base, before adapters started from data.
        """
        self.module = trainer.lightning_module
        self.stage = stage
        self.methods = methods
        # None: the first batch has begun
        self._digests_before_first_batch: dict[str, int] | None = digests
        view = view_of(self.module)
        self._trained_adapter = view.adapter.name
        # parameters in optimizers that earlier steps have accepted
        self._accepted: set[nn.Parameter] = set()
        # an error in this block closes what was begun before it
        with ExitStack() as begun:
            self.gradients = begun.enter_context(
                closing(methods.gradients(is_new_fit=is_new_fit))
            )
            self.backbones = begun.enter_context(closing(Backbones(trainer, view)))
            self._at_the_end = begun.pop_all()

    def begin_batch(self) -> None:
        """Before the first batch, tell of weights that hooks have made new since the training began."""
        before = self._digests_before_first_batch
        if before is None:
            return
        self._digests_before_first_batch = None
        now = base_digests(view_of(self.module))
        changed = dict(now.items() - before.items())
        if changed:
            tell_of_new_base(self.module, self.stage.tools.guards, changed)

    def begin_backward(self, loss: Tensor) -> None:
        """Let activation checkpoints in the module send gradients through frozen weights."""
        self.gradients.begin_backward(loss)

    def end_backward(self) -> None:
        """Keep frozen weights frozen.

        Under DDP, give unused adapters a zero gradient.
        """
        self.gradients.end_backward()

    def begin_optimizer_step(self, optimizer: Optimizer) -> bool:
        """Check that the optimizer trains adapters, and nothing that no file holds.

        The first step shows which frozen networks are no backbones: nothing that trains
        is computed from their outputs. They lose their adapters first, so that guards
        do not hear of these as adapters without a gradient. Return whether fewer
        parameters train from now on.
        """
        self.check_adapter()
        train_fewer = False
        # networks are unjudged until their first step
        if self.backbones.unjudged:
            train_fewer = self.methods.strip_non_backbones(optimizer, self.backbones)
        check_added(self.module, optimizer, self._accepted)
        update_scaled_rates(optimizer)
        unreached = self.gradients.begin_optimizer_step(optimizer)
        if unreached:
            self.stage.tools.guards.tell(
                Guard.optimizer_begins, View(self.module), unreached
            )
        self.stage.tools.float32.begin_optimizer_step(optimizer)
        return train_fewer

    def check_adapter(self) -> None:
        """Refuse another active adapter than the one whose training has begun."""
        record = find_record(self.module)
        trained = self._trained_adapter
        if record is not None and record.adapter.name != trained:
            active = record.adapter.name
            raise AdapterStateError(
                f"{active!r} became the active adapter of "
                f"{type(self.module).__name__} in a fit that trains {trained!r}: "
                f"{trained!r} would get no step, and {active!r} would be merged. If a "
                f"hook calls set_adapter, call set_adapter(model, {trained!r}) before "
                "the next training step."
            )

    def end_batch(self) -> None:
        """Let dropout do nothing until the next step.

        After the first batch, guards name the weights that other code has read.
        """
        self.stage.tools.end_batch(self.module)

    def close(self) -> None:
        """Stop watching."""
        self._at_the_end.close()
