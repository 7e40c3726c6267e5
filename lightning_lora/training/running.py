"""What watches a training while it runs: from its start to its end, in the order of Lightning's hooks."""

from contextlib import ExitStack, closing

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.errors import AdapterStateError
from lightning_lora.model.changes.attach import reinitialise_if_base_changed
from lightning_lora.model.records import find_record
from lightning_lora.model.still.follow import follow_new_copies
from lightning_lora.model.view import View, view_of
from lightning_lora.storage.same_base.fingerprint import base_digests
from lightning_lora.training.compatibility import (
    average_what_trains,
    callbacks_of,
    late_callback_error,
)
from lightning_lora.training.optimizers.group_checks import check_frozen
from lightning_lora.training.optimizers.scaled_groups import update_scaled_rates
from lightning_lora.training.stages.stage import Stage
from lightning_lora.training.steps.backbones import Backbones
from lightning_lora.training.steps.gradients import Gradients
from lightning_lora.training.strategies.strategy import StrategyMethods
from lightning_lora.training.untrained_at_start import tell_of_new_base


class NoTraining:
    """What the callback's hooks call while no training runs: a user's code may take steps before and after one.

    A step gives scaled groups the module's rates, a batch that ends is an error, and
    all else does nothing.
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
    """Watches one training.

    The callback's hooks call it only in training steps, not in evaluations between
    them.
    """

    methods: StrategyMethods
    gradients: Gradients
    backbones: Backbones

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage
    ) -> None:
        self.trainer = trainer
        self.module = pl_module
        self.stage = stage
        self._at_the_end = ExitStack()
        # digests, until the first step
        self._base_at_the_start: dict[str, int] | None = None
        self._adapter_name = ""  # of the adapter that trains

    def begin(
        self, methods: StrategyMethods, *, is_new: bool, base: dict[str, int]
    ) -> None:
        """Begin to watch.

        ``is_new``: no checkpoint was loaded. ``base``: the digests of the base.
        ``methods`` are ours for the Trainer's strategy.
        """
        view = view_of(self.module)
        self._prepare_layers(view)
        average_what_trains(callbacks_of(self.trainer), view)
        self._base_at_the_start = base
        self._adapter_name = view.adapter.name
        self.methods = methods
        self.gradients = self._at_the_end.enter_context(
            closing(methods.gradients(is_new_fit=is_new))
        )
        self.backbones = self._at_the_end.enter_context(
            closing(Backbones(self.trainer, view))
        )
        self.stage.tools.float32 = self._at_the_end.enter_context(
            closing(methods.float32_steps(view))
        )

    def _prepare_layers(self, view: View) -> None:
        """Let all layers begin to train, those too that came since the set-up."""
        # hooks may have loaded the base since the set-up
        reinitialise_if_base_changed(view)
        # hooks may have copied networks too: their layers are not recorded yet
        new_layers = view.layers.keys() - view.recorded
        follow_new_copies(view, new_layers)
        view.look_again()  # layers that follow another network do not train now
        view.adapter.layers = tuple(view.layers)
        # an adapter counts as trained as soon as its training begins
        view.adapter.may_have_learned = True
        self.stage.tools.guards_in_first_process.adapters_ready(view)

    def begin_batch(self) -> None:
        """Before the first step, warn of weights that hooks have made new since."""
        if self._base_at_the_start is None:
            return
        before = self._base_at_the_start
        self._base_at_the_start = None
        now = base_digests(view_of(self.module))
        changed = dict(now.items() - before.items())
        if changed:
            tell_of_new_base(
                self.module, self.stage.tools.guards_in_first_process, changed
            )

    def begin_backward(self, loss: Tensor) -> None:
        """Let activation checkpoints in the module send gradients through frozen weights."""
        self.gradients.begin_backward(loss)

    def end_backward(self) -> None:
        """Keep frozen weights frozen.

        Under DDP, give unused adapters a zero gradient.
        """
        self.gradients.end_backward()

    def begin_optimizer_step(self, optimizer: Optimizer) -> bool:
        """Check that the optimizer trains adapters, and nothing frozen.

        Return whether fewer train from now on.
        """
        self.check_adapter()
        train_fewer = False
        if self.backbones.unjudged:  # only until all networks are judged
            train_fewer = self.methods.strip_non_backbones(optimizer, self.backbones)
        check_frozen(self.module, optimizer, self.gradients.frozen)
        update_scaled_rates(optimizer)
        unreached = self.gradients.begin_step(optimizer)
        if unreached:
            self.stage.tools.guards_in_each_process.optimizer_begins(
                View(self.module), unreached
            )
        self.stage.tools.float32.begin_step(optimizer)
        return train_fewer

    def check_adapter(self) -> None:
        """Refuse another active adapter than the one whose training has begun."""
        record = find_record(self.module)
        trained = self._adapter_name
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
        """End dropout until the next step.

        After the first, name weights that other code reads.
        """
        self.stage.tools.end_batch(self.module)

    def close(self) -> None:
        """Stop watching."""
        self._at_the_end.close()
