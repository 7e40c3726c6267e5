"""One stage of a Trainer: fit, validate, test or predict."""

from dataclasses import dataclass, field, fields
from typing import ClassVar

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.base.states import State
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import warn
from lightning_lora.model.base_values import tensors_with_originals
from lightning_lora.model.changed_since_merge import refuse_layers_of_another_model
from lightning_lora.model.inject import inject, inject_from_file
from lightning_lora.model.records import find_record, state_of
from lightning_lora.model.remove import remove_adapters
from lightning_lora.model.view import View, view_of
from lightning_lora.storage.same_base.base_changes import note_changes
from lightning_lora.training.compatibility import begin_averages, loads_in_hooks
from lightning_lora.training.random_numbers.drawing_apart import drawing_apart
from lightning_lora.training.random_numbers.resumed_numbers import RandomNumbers
from lightning_lora.training.stages.before_hooks import BeforeHooks
from lightning_lora.training.stages.chosen_adapter import ChosenAdapter
from lightning_lora.training.stages.phases import Outcome, Phase, end_of
from lightning_lora.training.stages.way_back import WayBack
from lightning_lora.training.steps.step_tools import StepTools


@dataclass
class Stage:
    """A stage that evaluates. A :class:`Fit` differs in what its methods there say."""

    is_fit: ClassVar[bool] = False

    # What the user has asked for

    config: LoRAConfig
    """The arguments of the adapters. A file or the module may complete them."""

    given: frozenset[str] = frozenset()
    """The names of the arguments that were given."""

    gives_all: bool = False
    """Whether all were given, as LightningCLI does.

    Then ``given`` is empty: nobody knows which of them the user has written.
    """

    adapter: ChosenAdapter = field(default_factory=ChosenAdapter)
    save: str = "adapters"
    lr_scale: float | dict[str, float] = 1

    # How the module came, and what its hooks do to it

    way_back: WayBack = field(init=False)
    before_hooks: BeforeHooks = field(default_factory=BeforeHooks)

    filled_buffers: set[str] = field(default_factory=set)
    """The buffers that the module's own hooks have filled, in this stage or an earlier one.

    The callback keeps this very set for the module's later stages.
    """

    # How far the stage is

    phase: Phase = Phase.SET_UP

    file: object = None
    """The checkpoint that it loads."""

    random_numbers: RandomNumbers = field(default_factory=RandomNumbers)
    """The random numbers of that checkpoint, until training begins."""

    # What looks on

    callbacks: list[Callback] = field(default_factory=list)
    """All callbacks of the Trainer."""

    tools: StepTools = field(default_factory=StepTools)
    """Its guards, and what acts in each training step."""

    def __post_init__(self) -> None:
        self.way_back = WayBack(self.adapter)

    @property
    def came_adapted(self) -> bool:
        """Whether the module came with adapters on its layers: its own, or those of networks inside."""
        return self.way_back.came == "adapted"

    @property
    def is_running_fit(self) -> bool:
        """Whether this is a fit that has not ended yet."""
        return self.is_fit and self.phase is not Phase.OVER

    @property
    def is_fit_before_training(self) -> bool:
        """Whether this is a fit whose training has not begun."""
        return self.is_fit and self.phase in (Phase.SET_UP, Phase.LOADED)

    @property
    def has_loaded_or_trained(self) -> bool:
        """Whether a file's adapters are on the module, or its training has begun."""
        return self.phase is not Phase.SET_UP

    # Begin

    def begin(self, pl_module: LightningModule) -> None:
        """Give the module this stage's adapter, to train it or to load a checkpoint.

        1. A merged module is unmerged: only then can another adapter become active.
        2. If the module shows another adapter, this stage's becomes active.
        3. The module is looked at before its own hooks run.
        """
        self.way_back.unmerge(pl_module)
        if self.wants_another_adapter(pl_module):
            self._activate_adapter(pl_module)
        self.before_hooks = BeforeHooks.of(pl_module)

    def wants_another_adapter(self, pl_module: LightningModule) -> bool:
        """Whether the module shows another adapter than this stage's. Without a name, a stage takes what is shown."""
        return self.adapter.name is not None and not self.adapter.is_shown_by(pl_module)

    def _activate_adapter(self, pl_module: LightningModule) -> None:
        """Make this stage's adapter the active one, which must be there."""
        self.adapter.activate(pl_module, None)

    def runs_merged(self, pl_module: LightningModule) -> bool:
        """Whether a merged module is evaluated as it is.

        Merged layers that have the adapters of another model now are an error.
        """
        view = View(pl_module)
        if not view.is_merged:
            return False
        refuse_layers_of_another_model(view)
        return not (loads_in_hooks(pl_module) or self.wants_another_adapter(pl_module))

    # Take what the module or a file has

    def take_config(
        self, pl_module: LightningModule, found: LoRAConfig, source: object
    ) -> bool:
        """Complete the arguments by those ``found`` in a file, or by those of the module's adapters.

        If this changes the arguments, adapters that this stage has made with others are
        replaced. Return whether there were any.
        """
        config = self.config.completed(found, self.given)
        if config == self.config:
            return False
        self._tell_of_taken(config, source)
        self.config = config
        return self._replace_own_adapters(pl_module)

    def _tell_of_taken(self, config: LoRAConfig, source: object) -> None:
        """Say which arguments are taken from a file or a module.

        A fit that continues what other arguments began may not be what its user wanted.
        """
        taken = ", ".join(_changed_arguments(config, self.config))
        message = f"LoRACallback takes {taken} from {source}, instead of the defaults."
        if self.is_fit and self.gives_all:
            defaults = ", ".join(_changed_arguments(self.config, config))
            warn(
                f"{message} LightningCLI gives every argument, so a default that you "
                f"wrote looks like one that you left out: if you wrote {defaults}, it "
                "is not used. Write what the file has, or begin a new run without it."
            )
        else:
            rank_zero_info(message)

    def _replace_own_adapters(self, pl_module: LightningModule) -> bool:
        """Replace the adapters that this stage has made. Return whether there were any.

        A new adapter beside others begins again. The adapters of a module that came
        plain are only taken off: ``adapt`` makes others.
        """
        was_made_here = self.way_back.came == "plain" or self.adapter.is_new
        if find_record(pl_module) is None or not was_made_here:
            return False
        # first, because adapters that are taken off put the base's values back
        self.take_base_from_hooks(view_of(pl_module))
        if self.adapter.is_new:
            self.adapter.switch_back(pl_module)
            self._activate_adapter(pl_module)
        else:
            remove_adapters(pl_module)
        return True

    # Adapt

    def should_be_adapted(
        self, pl_module: LightningModule, *, for_file: bool = False
    ) -> bool:
        """Whether the module shall run with adapters, so that it gets those that it lacks.

        ``for_file``: a file's adapters will be loaded, which need their layers.
        """
        match state_of(pl_module):
            case State.ADAPTED:
                return True
            case State.PLAIN:
                return self._adapts_plain_module(for_file=for_file)
            case _:  # merged, or showing its base: it is evaluated as it is
                return False

    def _adapts_plain_module(self, *, for_file: bool) -> bool:
        """Whether a plain module gets adapters: only for a file, or where networks inside came with theirs."""
        return for_file or self.came_adapted

    def adapt(
        self, pl_module: LightningModule, *, file_config: LoRAConfig | None = None
    ) -> None:
        """Adapt the module after its own hooks have run.

        The weights that they have loaded become the base.

        Args:
            pl_module: The module.
            file_config: The arguments of the adapters in a file, for which the module
                is adapted.
        """
        # in place: the callback keeps this set
        self.filled_buffers.update(self.before_hooks.take_filled_buffers(pl_module))
        if not self.should_be_adapted(pl_module, for_file=file_config is not None):
            return
        self.add_adapters(pl_module, file_config)
        view = view_of(pl_module)
        view.record.base.note_filled(self.filled_buffers)
        # once a checkpoint is loaded, the callbacks' averages are those in it
        if not self.has_loaded_or_trained:
            begin_averages(self.callbacks, pl_module, anew=loads_in_hooks(pl_module))
        self.take_base_from_hooks(view)

    def add_adapters(
        self, pl_module: LightningModule, file_config: LoRAConfig | None = None
    ) -> None:
        """Add adapters to layers without them.

        ``file_config`` says which layers a file left out.
        """
        name = self.adapter.name or "default"
        record = find_record(pl_module)
        if record is not None:
            name = record.adapter.name
        with drawing_apart(pl_module):
            if file_config is None:
                inject(pl_module, self.config, name=name)
            else:
                inject_from_file(
                    pl_module,
                    self.config.excluding(file_config.exclude_modules),
                    name=name,
                )

    def take_base_from_hooks(self, view: View) -> bool:
        """Make what the module's hooks changed in this stage the base, if nothing was trained or loaded yet.

        The record keeps the base's values of what training changes (the originals):
        these are taken again. The weights themselves stay. Return whether that was
        done. If not, the base stays, and so does its fingerprint.
        """
        # in this stage, in an earlier one, or by the user's own code
        was_trained_or_loaded = (
            self.has_loaded_or_trained
            or view.adapter.may_have_learned
            or not view.is_fresh()
        )
        if was_trained_or_loaded:
            return False
        changed = self.before_hooks.changed_base_tensors(tensors_with_originals(view))
        view.adapter.set_originals(changed)
        return True

    # From one phase to the next

    def note_loaded(self) -> None:
        """Note that a file's adapters are on the module: they stay if a fit fails."""
        if self.phase is Phase.SET_UP:
            self.phase = Phase.LOADED

    def note_failed_loading(self) -> None:
        """Note that the optimizers do not fit that file: the module becomes what it was before."""
        if self.phase is Phase.LOADED:
            self.phase = Phase.SET_UP

    def begin_training(self) -> None:
        """From here on, the adapters may be trained: they stay if the fit fails."""
        self.phase = Phase.TRAINING

    def take_random_numbers(self) -> None:
        """Let the first step have the random numbers of the checkpoint.

        Later, nothing is set.
        """
        self.random_numbers.set_for_first_step()
        self.random_numbers = RandomNumbers()

    def note_fit_ended(self) -> None:
        """Note that a fit which has loaded or trained adapters is over: they stay from here on."""
        self.phase = Phase.OVER

    def end(self, pl_module: LightningModule) -> None:
        """End the stage: the module becomes what ``end_of`` says."""
        reached = self._close()
        outcome = end_of(reached, is_fit=self.is_fit).without_error
        self.way_back.bring_about(
            outcome, pl_module, has_loaded=reached is Phase.LOADED
        )

    def end_after_error(
        self, pl_module: LightningModule, *, others_may_be_missing: bool
    ) -> bool:
        """End a stage that has failed.

        Return whether the module keeps adapters that may be trained.
        ``others_may_be_missing``: other processes may not be here, so nothing that
        needs them is done.
        """
        reached = self._close()
        outcomes = end_of(reached, is_fit=self.is_fit).after_error
        possible = self.way_back.possible_after_error(
            pl_module, others_may_be_missing=others_may_be_missing
        )
        # the last of the outcomes is LEFT, which is always possible
        outcome, *_ = [each for each in outcomes if each in possible]
        self.way_back.bring_about(outcome, pl_module)
        is_kept = outcome is Outcome.KEPT
        if is_kept and not others_may_be_missing:
            note_changes(view_of(pl_module))
        return is_kept

    def _close(self) -> Phase:
        """Set the phase OVER. Return the one before."""
        reached = self.phase
        self.phase = Phase.OVER
        self.tools.close()
        return reached


@dataclass
class Fit(Stage):
    """A stage that trains. What it has loaded or trained stays on the module."""

    is_fit: ClassVar[bool] = True

    def begin(self, pl_module: LightningModule) -> None:
        """Begin as each stage does. Refuse to train a sum of adapters."""
        self.adapter.refuse_sum(pl_module)
        super().begin(pl_module)

    def wants_another_adapter(self, pl_module: LightningModule) -> bool:
        """Whether the module shows another adapter than this fit's, or its base."""
        return not self.adapter.is_shown_by(pl_module)

    def _activate_adapter(self, pl_module: LightningModule) -> None:
        """Make this fit's adapter the active one: it may be a new one."""
        self.adapter.activate(pl_module, self.config)

    def _adapts_plain_module(self, *, for_file: bool) -> bool:
        """Whether a plain module gets adapters: always, to train them."""
        return True


def shows_adapters(pl_module: LightningModule) -> bool:
    """Whether a module computes with adapters on its layers.

    Otherwise it is only evaluated, or its fit has ended.
    """
    return state_of(pl_module) is State.ADAPTED


def _changed_arguments(config: LoRAConfig, before: LoRAConfig) -> list[str]:
    """The arguments that are not as before, as they are written in code."""
    texts = []
    for argument in fields(config):
        value = getattr(config, argument.name)
        if value != getattr(before, argument.name):
            texts.append(f"{argument.name}={value!r}")
    return texts
