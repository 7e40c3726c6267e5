"""What a Trainer calls in one fine-tune: the hooks of the callback, in their order.

``view_of(module)`` refuses a module without adapters. ``View(module)`` takes any.
"""

from contextlib import ExitStack, closing, suppress
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.argument_checks import Merge, Save
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import LoRAError
from lightning_lora.model.changed_since_adapted import refuse_computed_weights
from lightning_lora.model.inject import refuse_targets_without_adapters
from lightning_lora.model.records import find_record
from lightning_lora.model.view import View, view_of
from lightning_lora.moments import Guard
from lightning_lora.storage.same_base.base_changes import note_changes
from lightning_lora.storage.same_base.fingerprint import base_digests
from lightning_lora.tensors.shards import reshard
from lightning_lora.training import compatibility, merging
from lightning_lora.training.data_init.data_start import (
    check_data_init,
    start_from_data,
)
from lightning_lora.training.optimizers.added_groups import trimming_added_groups
from lightning_lora.training.optimizers.scaled_groups import update_scaled_rates
from lightning_lora.training.random_numbers.generator_states import (
    RANDOM,
    random_states,
)
from lightning_lora.training.random_numbers.resumed_numbers import resumed_numbers
from lightning_lora.training.returned_records import extend_launchers
from lightning_lora.training.running import NoTraining, TrainingWatch, let_layers_train
from lightning_lora.training.stages.chosen_adapter import ChosenAdapter
from lightning_lora.training.stages.phases import Phase
from lightning_lora.training.stages.stage import Fit, Stage
from lightning_lora.training.steps.step_tools import StepTools
from lightning_lora.training.strategies.for_strategy import methods_of, patch_strategy
from lightning_lora.training.strategies.strategy import StrategyMethods
from lightning_lora.training.untrained_at_start import tell_of_start
from lightning_lora.what_trains import (
    log_what_trains,
    show_what_trains,
    tell_that_fewer_train,
    tell_where_it_begins,
)


class LoRAHooks(Callback):
    """The hooks of :class:`~lightning_lora.LoRACallback`, which adds the arguments."""

    # The arguments

    config: LoRAConfig
    given: frozenset[str]
    """The names of arguments that the user gave. From a command line, it is empty.

    One that is not at its default counts as given too, whether it is in here or not.
    """
    gives_all: bool
    """Whether all arguments were given, as a command line does."""
    merge: Merge
    save: Save
    lr_scale: float | dict[str, float]
    name: str

    # What it has besides, which is in no pickle

    _filled_buffers: WeakKeyDictionary[LightningModule, set[str]]
    """Those buffers of each module that its hooks have filled."""

    # Of one stage of a Trainer: `_leave_stage` drops them

    _stage: Stage
    """Between two stages of a Trainer, it is one that is over: a file may be written then."""
    _strategy_methods: StrategyMethods | None
    """Our methods on the Trainer's strategy: None before the set-up."""
    _watch: NoTraining | TrainingWatch
    """NoTraining until the training begins."""
    _until_training_ends: ExitStack
    """Closes what training uses."""

    def _prepare(self) -> None:
        """Make what a new object needs besides its arguments, and one that was unpickled in another process."""
        extend_launchers()  # a new process has Lightning's own
        self._filled_buffers = WeakKeyDictionary()
        self._leave_stage()

    def _leave_stage(self) -> None:
        """Keep nothing of the module and the Trainer: a notebook may keep this callback in a variable."""
        self._stage = Stage(self.config, save=self.save, phase=Phase.OVER)
        self._strategy_methods = None
        self._watch = NoTraining()
        self._until_training_ends = ExitStack()
        compatibility.forget_module(self)

    # Set-up

    @compatibility.refuse_if_given_as_class("LoRACallback")
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add adapters to the module's layers. A merged module gets its own back.

        A module that is only evaluated stays plain or merged until a checkpoint is
        loaded. The strategy adapts layers that the module's own hooks create later.
        """
        self._stage = self._new_stage(trainer, pl_module, is_fit=stage == "fit")
        methods = patch_strategy(trainer.strategy, self._stage)
        self._strategy_methods = methods
        compatibility.refuse_second_callback(self._stage.callbacks)
        # the checks of a fit ask how the module came
        self._stage.way_back.note_adapters(pl_module)
        if self._stage.is_fit:
            self._check_fit(trainer, pl_module, methods)
            self._begin_stage(pl_module, methods)
            return
        # a callback would put the average of an earlier fit into the module
        compatibility.drop_averages(self._stage.callbacks)
        if not self._stage.runs_merged(pl_module):
            self._begin_stage(pl_module, methods)

    def _new_stage(
        self, trainer: Trainer, pl_module: LightningModule, *, is_fit: bool
    ) -> Stage:
        # without a name, the callback means the module's active adapter
        is_named = self.name != "default" or "name" in self.given
        kind = Fit if is_fit else Stage
        return kind(
            self.config,
            given=self.given,
            gives_all=self.gives_all,
            adapter=ChosenAdapter(self.name if is_named else None),
            save=self.save,
            lr_scale=self.lr_scale,
            filled_buffers=self._filled_buffers.setdefault(pl_module, set()),
            callbacks=compatibility.callbacks_of(trainer),
            tools=StepTools(is_first_process=trainer.is_global_zero),
        )

    def _check_fit(
        self, trainer: Trainer, pl_module: LightningModule, methods: StrategyMethods
    ) -> None:
        """Refuse callbacks beside which no fit can adapt, and arguments that this fit cannot serve."""
        compatibility.check_callbacks(
            self._stage.callbacks, is_sharded=methods.shards_before_adapters
        )
        switches = self._stage.wants_another_adapter(pl_module)
        merging.check_merge_arguments(
            trainer, self.merge, was_adapted=self._stage.came_adapted, switches=switches
        )
        check_data_init(trainer, pl_module, self.config)

    def _begin_stage(
        self, pl_module: LightningModule, methods: StrategyMethods
    ) -> None:
        """Change the module: all checks are made. Its layers are adapted before other callbacks copy it."""
        self._stage.begin(pl_module)
        record = find_record(pl_module)
        if record is not None:
            # arguments that were not given are those of its adapters
            source = f"the adapters of {type(pl_module).__name__}"
            self._stage.take_config(pl_module, record.adapter.config, source)
        # if configure_model shards the module, the strategy adds adapters after it: they
        # stay whole
        if methods.shards_before_adapters:
            return
        # a plain module that is only evaluated gets no adapters
        if not self._stage.should_be_adapted(pl_module):
            return
        # targets may name layers that the module creates in a later hook: the strategy
        # adapts them then, or repeats the error
        with suppress(LoRAError):
            self._stage.add_adapters(pl_module)

    # Fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the end of the fit can merge, and show what trains."""
        self._check_set_up()
        # a tuner may have evaluated, after which FSDP2 still shows full weights
        reshard(pl_module)
        merging.check_merge_weights(trainer, pl_module, self.merge, self.save)
        # code may add groups to an optimizer until training ends: what it holds already,
        # and what is frozen, is taken out of them
        self._until_training_ends.enter_context(trimming_added_groups(pl_module))
        update_scaled_rates(*trainer.optimizers)  # a tuner may have set other rates
        show_what_trains(trainer, pl_module)
        # some strategies load the checkpoint after this hook: on_train_start reports then
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._report(trainer, pl_module)

    def _check_set_up(self) -> StrategyMethods:
        """Refuse a fit that had begun when this callback came. Return our methods on its strategy."""
        if self._strategy_methods is None:
            raise compatibility.late_callback_error()
        return self._strategy_methods

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say and log how the adapters train. The checkpoint is loaded now, if there is one."""
        view = view_of(pl_module)
        tell_where_it_begins(
            view,
            is_new_beside_others=self._stage.adapter.is_new,
            loaded_checkpoint=self._stage.has_loaded_or_trained,
        )
        is_scaled = "lr_scale" in self.given or self.lr_scale != 1
        self._stage.tools.guards.tell(
            Guard.optimizers_built, view, trainer.optimizers, is_scaled=is_scaled
        )
        log_what_trains(
            trainer, pl_module, merge=self.merge, save=self.save, lr_scale=self.lr_scale
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the module, after its own hooks and the checkpoint, and watch its training from here on."""
        methods = self._check_set_up()
        # a weight that is computed now has lost its adapter, and view_of would only say
        # that the adapter is missing
        refuse_computed_weights(View(pl_module))
        refuse_targets_without_adapters(view_of(pl_module))
        if trainer.strategy.restore_checkpoint_after_setup:
            self._report(trainer, pl_module)
        # the checkpoint may have been written with another lr_scale
        update_scaled_rates(*trainer.optimizers)
        self._begin_training(trainer, pl_module, methods)

    def _begin_training(
        self, trainer: Trainer, pl_module: LightningModule, methods: StrategyMethods
    ) -> None:
        """Warn of what looks wrong, let new adapters start from data, and watch the steps.

        In this order:

        1. If the module's own hooks have loaded weights since the set-up, these are the
           base.
        2. Guards look at it.
        3. The base is read. Then adapters start from data: that runs the user's code,
           which may change the base, and the watch compares it with what was read.
        4. The phase changes, which has said until now whether a checkpoint was loaded.
           From here on, the module keeps its adapters if the fit fails.
        5. All layers begin to train, and the watch begins.
        6. The first step gets the random numbers of the checkpoint: all before may have
           drawn some.
        """
        view = view_of(pl_module)
        if self._stage.take_base_from_hooks(view):
            # the fingerprint of the base is taken again: only changed tensors are read
            methods.note_base(anew=False)
            # tensors may have been exchanged
            view = view_of(pl_module)
        tell_of_start(view, self._stage.tools.guards)
        digests = base_digests(view)
        is_new_fit = not self._stage.has_loaded_or_trained
        if is_new_fit:
            start_from_data(trainer, pl_module)
        self._stage.begin_training()
        let_layers_train(trainer, self._stage, methods)
        watch = TrainingWatch(
            trainer, self._stage, methods, is_new_fit=is_new_fit, digests=digests
        )
        self._watch = self._until_training_ends.enter_context(closing(watch))
        self._stage.take_random_numbers()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Before the first batch, warn of weights that hooks have made new."""
        self._watch.begin_batch()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Let activation checkpoints in the module send gradients through frozen weights."""
        self._watch_in(trainer).begin_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep frozen weights frozen.

        Under DDP, give unused adapters a zero gradient.
        """
        self._watch_in(trainer).end_backward()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Check that the optimizer trains adapters, and nothing frozen."""
        self._check_set_up()
        fewer_train = self._watch_in(trainer).begin_optimizer_step(optimizer)
        if fewer_train:
            tell_that_fewer_train(trainer, pl_module)

    def _watch_in(self, trainer: Trainer) -> NoTraining | TrainingWatch:
        """What looks at a backward pass or a step: not at those in an evaluation, where code may run some by hand."""
        return self._watch if trainer.training else NoTraining()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """End a batch. After the first one, guards name weights that code has read by hand."""
        self._watch.end_batch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching the training."""
        self._check_set_up()
        self._watch.check_adapter()
        self._stage.tools.guards.tell(Guard.training_ended, view_of(pl_module))
        self._end_training()

    def _end_training(self) -> None:
        self._until_training_ends.close()
        self._watch = NoTraining()
        self._stage.tools.end_training()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the updates: the module is a plain one again.

        It keeps a copy of its base and its adapters. A fit that neither loaded nor
        trained any has nothing to merge.
        """
        self._check_set_up()
        if not self._stage.has_loaded_or_trained:
            rank_zero_info(
                f"This fit trained nothing: {type(pl_module).__name__} stays as it was "
                "before."
            )
            return
        self._stage.note_fit_ended()  # from here on, an error leaves the module as it is
        # not view_of: it would refuse layers that have lost their adapters, of which
        # check_layers_stayed says more
        view = View(pl_module)
        merging.check_layers_stayed(view)
        # the last gradients take memory, and a later step by hand would use them
        pl_module.zero_grad()
        guards = self._stage.tools.guards
        guards.tell(Guard.fit_ended, view, trainer.optimizers, trainer.global_step)
        self._compare_base(pl_module)
        if self.merge:
            merging.merge_trained(trainer, pl_module, self.merge)

    def _compare_base(self, pl_module: LightningModule) -> None:
        """Compare the base with its fingerprint, for the guards and for later files."""
        view = view_of(pl_module)
        note_changes(view)
        self._stage.tools.guards.tell(Guard.base_compared, view)

    def teardown(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Give the module back as it came, if nothing was trained."""
        self._stage.end(pl_module)
        self._end_training()
        self._leave_stage()

    @compatibility.refuse_if_given_as_class("LoRACallback")
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Undo the set-up, unless adapters were loaded or trained."""
        self._end_training()
        methods = self._strategy_methods
        # a sharded module is spread over processes, of which some may be gone
        is_sharded = methods is not None and methods.shards_before_adapters
        is_kept = self._stage.end_after_error(
            pl_module, others_may_be_missing=is_sharded
        )
        self._leave_stage()
        if is_kept and isinstance(exception, KeyboardInterrupt):
            compatibility.tell_of_interrupt(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the states of the random number generators, and see that the strategy stores adapters."""
        # a module without adapters gets a file as Lightning writes it
        if find_record(pl_module) is None:
            return
        checkpoint[RANDOM] = random_states(trainer)
        # the main process may save after a run in spawned ones: it had no set-up
        if methods_of(trainer.strategy) is None:
            self._stage.callbacks = compatibility.callbacks_of(trainer)
            patch_strategy(trainer.strategy, self._stage)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the stored random states until training starts."""
        if self._stage.is_fit and isinstance(checkpoint.get(RANDOM), dict):
            resumed = resumed_numbers(trainer, checkpoint)
            self._stage.random_numbers = self._until_training_ends.enter_context(
                closing(resumed)
            )
