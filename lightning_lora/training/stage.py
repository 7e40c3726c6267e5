"""One stage of a Trainer: fit, validate, test or predict."""

from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.base.states import State
from lightning_lora.config import LoRAConfig
from lightning_lora.model.as_merged import refuse_layers_of_another_model
from lightning_lora.model.base_values import tensors_with_originals
from lightning_lora.model.inject import inject, inject_from_file
from lightning_lora.model.merge import merge, unmerge_or_forget
from lightning_lora.model.record import find_record, keep_record, state_of
from lightning_lora.model.remove import remove_adapters
from lightning_lora.model.view import View, view_of
from lightning_lora.storage.same_base.base_forms import note_changed
from lightning_lora.training.before_hooks import BeforeHooks
from lightning_lora.training.chosen_adapter import ChosenAdapter
from lightning_lora.training.compatibility import begin_averages, loads_in_hooks
from lightning_lora.training.phases import Outcome, Phase, outcome_of
from lightning_lora.training.randomness import reseeded
from lightning_lora.training.resumed_data import RandomNumbers
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

    adapter: ChosenAdapter = field(default_factory=ChosenAdapter)
    save: str = "adapters"
    lr_scale: float | dict[str, float] = 1

    # How the module came

    came: Literal["plain", "adapted", "merged"] = "plain"

    undo: ExitStack = field(default_factory=ExitStack)
    """Gives the module back as it came. Only ``_bring_about`` closes it, and not where loaded adapters stay."""

    before: BeforeHooks = field(default_factory=BeforeHooks)

    filled: set[str] = field(default_factory=set)
    """The buffers that the module's own hooks have filled, in this stage or an earlier one."""

    # How far the stage is

    phase: Phase = Phase.SET_UP

    file: object = None
    """The checkpoint that it loads."""

    random_numbers: RandomNumbers = field(default_factory=RandomNumbers)
    """Those of that checkpoint, until training begins."""

    # What looks on, and acts in each training step

    callbacks: list[Callback] = field(default_factory=list)
    """All of the Trainer's."""

    tools: StepTools = field(default_factory=StepTools)
    """Its guards, and what acts in each training step."""

    @property
    def is_fitting(self) -> bool:
        """Whether a fit is running."""
        return False

    # Begin

    def begin(self, pl_module: LightningModule) -> None:
        """Unmerge the module: it needs its adapters to train, or to load a checkpoint."""
        self._unmerge(pl_module)
        if self.wants_another_adapter(pl_module):
            self._activate_adapter(pl_module)
            self.undo.callback(self.adapter.put_back, pl_module)  # which does nothing the second time
        if self.came == "plain":
            self.undo.callback(_remove_all, pl_module)
        self.before = BeforeHooks.of(pl_module)

    def _unmerge(self, pl_module: LightningModule) -> None:
        """Undo a merge. If its weights were replaced since, they are a new base, and its record is forgotten."""
        record = find_record(pl_module)
        if unmerge_or_forget(pl_module):
            self.came = "merged"
            self.undo.callback(merge, pl_module)
            return
        if record is not None and find_record(pl_module) is None:  # it was forgotten
            self.undo.callback(keep_record, pl_module, record)

    def wants_another_adapter(self, pl_module: LightningModule) -> bool:
        """Whether the module shows another adapter than this stage's."""
        return self.adapter.name is not None and not self.adapter.is_shown_by(pl_module)

    def _activate_adapter(self, pl_module: LightningModule) -> None:
        """Make this stage's adapter the active one, which must be there."""
        self.adapter.activate(pl_module, None)

    def runs_merged(self, pl_module: LightningModule) -> bool:
        """Whether a merged module is evaluated as it is. Weights that were written since the merge are an error."""
        view = View(pl_module)
        if not view.is_merged:
            return False
        refuse_layers_of_another_model(view)
        return not (loads_in_hooks(pl_module) or self.wants_another_adapter(pl_module))

    # Take what the module or a file has

    def take_config(self, pl_module: LightningModule, stored: LoRAConfig, source: object) -> bool:
        """Complete the arguments from a file, or from the module's adapters.

        Return whether the adapters were replaced, as these are made otherwise.
        """
        config = self.config.completed(stored, self.given)
        if config == self.config:
            return False
        taken = ", ".join(_changed_arguments(config, self.config))
        rank_zero_info(f"LoRACallback takes {taken} from {source}, instead of the defaults.")
        self.config = config
        return self._take_off_or_begin_again(pl_module)

    def _take_off_or_begin_again(self, pl_module: LightningModule) -> bool:
        """Replace the adapters that this stage has made. Return whether there were any.

        One that is new beside others begins again. Those of a plain module are only taken off: ``adapt`` makes others.
        """
        was_made_here = self.came == "plain" or self.adapter.is_new
        if find_record(pl_module) is None or not was_made_here:
            return False
        self.set_base_from_hooks(view_of(pl_module))  # before: adapters that go put the base's values back
        if self.adapter.is_new:
            self.adapter.put_back(pl_module)
            self._activate_adapter(pl_module)
        else:
            remove_adapters(pl_module)
        return True

    def set_base_from_hooks(self, view: View) -> bool:
        """Make what the module's hooks changed in this stage the base.

        Return whether it is. Once something was trained or loaded, the base stays, and so does its fingerprint.
        """
        if self.phase is not Phase.SET_UP or view.adapter.may_have_learned or not view.is_fresh():
            return False
        changed = self.before.changed_base_tensors(tensors_with_originals(view))
        view.adapter.set_base_values(changed)
        return True

    # Adapt

    def runs_adapted(self, pl_module: LightningModule, *, for_file: bool = False) -> bool:
        """Whether the module runs with adapters, which it has or gets now.

        One that is only evaluated:

        - with adapters on its layers: yes.
        - merged, or showing its base: no, it runs as it is.
        - plain: no, unless the adapters of a file need their layers (``for_file``).
        - plain, but it came with adapted layers: yes. They were adapted in a network inside.
        """
        state = state_of(pl_module)
        if state is State.PLAIN:
            return self.came == "adapted" or for_file
        return state is State.ADAPTED

    def adapt(self, pl_module: LightningModule, *, stored: LoRAConfig | None = None, replaced: bool = False) -> None:
        """Adapt the module after its own hooks have run, or for a file. The weights that they load become the base.

        ``replaced``: these adapters come in place of others of this stage.
        """
        self.filled |= self.before.take_filled_buffers(pl_module)
        if not self.runs_adapted(pl_module, for_file=stored is not None):
            return
        self.add_adapters(pl_module, stored)
        view = view_of(pl_module)
        view.record.base.note_filled(self.filled)
        if self.phase is not Phase.SET_UP:  # the callbacks' averages and the base are those of a checkpoint
            return
        begin_averages(self.callbacks, pl_module, anew=loads_in_hooks(pl_module) or replaced)
        self.set_base_from_hooks(view)

    def add_adapters(self, pl_module: LightningModule, stored: LoRAConfig | None = None) -> None:
        """Add adapters to layers without them. ``stored``, of a file, says which layers it left out."""
        name = self.adapter.name or "default"
        record = find_record(pl_module)
        if record is not None:
            name = record.adapter.name
        with reseeded(pl_module):
            if stored is None:
                inject(pl_module, self.config, name=name)
            else:
                inject_from_file(pl_module, self.config.excluding(stored.exclude_modules), name=name)

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
        """Let the first step have the random numbers of the checkpoint. Later, nothing is set."""
        self.random_numbers.begin_training()
        self.random_numbers = RandomNumbers()

    def end_fit(self) -> bool:
        """End a fit. Return whether it loaded or trained adapters, which stay."""
        if self.phase is Phase.SET_UP:
            return False
        self.phase = Phase.OVER
        return True

    def end(self, pl_module: LightningModule) -> None:
        """End the stage: the module becomes what ``outcome_of`` says."""
        reached = self._close()
        outcome = outcome_of(reached, is_fit=self.is_fit, has_failed=False)
        self._bring_about(outcome, pl_module, has_loaded=reached is Phase.LOADED)

    def end_after_error(self, pl_module: LightningModule, *, others_may_be_missing: bool) -> bool:
        """End a stage that has failed. Return whether the module keeps adapters that may be trained.

        ``others_may_be_missing``: other processes may not be here, so nothing that needs them is done.
        """
        outcome = outcome_of(self._close(), is_fit=self.is_fit, has_failed=True)
        if outcome is Outcome.KEPT and not View(pl_module).is_on_layers:
            outcome = Outcome.GIVEN_BACK
        if outcome is Outcome.GIVEN_BACK and not self._may_give_back(
            pl_module, others_may_be_missing=others_may_be_missing
        ):
            outcome = Outcome.LEFT
        self._bring_about(outcome, pl_module)
        is_kept = outcome is Outcome.KEPT
        if is_kept and not others_may_be_missing:
            note_changed(view_of(pl_module))
        return is_kept

    def _close(self) -> Phase:
        """Set the phase OVER. Return the one before."""
        reached = self.phase
        self.phase = Phase.OVER
        self.tools.close()
        return reached

    def _may_give_back(self, pl_module: LightningModule, *, others_may_be_missing: bool) -> bool:
        """Whether a module can be given back after an error.

        Not one that is merged now: it was evaluated so, or its own code has merged what it trained. And with
        ``others_may_be_missing`` none that came merged, as a merge is collective: its adapters stay.
        """
        if View(pl_module).is_merged:
            return False
        return not (others_may_be_missing and self.came == "merged")

    def _bring_about(self, outcome: Outcome, pl_module: LightningModule, *, has_loaded: bool = False) -> None:
        """Do to the module what an outcome says. ``has_loaded``: it has a file's adapters."""
        if outcome is Outcome.GIVEN_BACK:
            self.undo.close()
        elif outcome is Outcome.SHOWN_AGAIN and find_record(pl_module) is not None:
            self.adapter.put_back(pl_module)
            if self.came == "merged":
                self._merge_again(pl_module, has_loaded=has_loaded)

    def _merge_again(self, pl_module: LightningModule, *, has_loaded: bool) -> None:
        merge(pl_module)
        if has_loaded and self.adapter.is_shown_by(pl_module):
            rank_zero_info(f"LoRA: merged the file's adapters. {type(pl_module).__name__} is plain again.")


@dataclass
class Fit(Stage):
    """A stage that trains. What it has loaded or trained stays on the module."""

    is_fit: ClassVar[bool] = True

    @property
    def is_fitting(self) -> bool:
        """Whether this fit is running."""
        return self.phase is not Phase.OVER

    def begin(self, pl_module: LightningModule) -> None:
        """Unmerge the module. Refuse to train a sum of adapters."""
        self.adapter.refuse_sum(pl_module)
        super().begin(pl_module)

    def wants_another_adapter(self, pl_module: LightningModule) -> bool:
        """Whether the module shows another adapter than this fit's, or its base."""
        return not self.adapter.is_shown_by(pl_module)

    def _activate_adapter(self, pl_module: LightningModule) -> None:
        """Make this fit's adapter the active one: it may be a new one."""
        self.adapter.activate(pl_module, self.config)

    def runs_adapted(self, pl_module: LightningModule, *, for_file: bool = False) -> bool:
        """Whether the module runs with adapters, which it has or gets now. A plain one gets some in any case."""
        return state_of(pl_module) in (State.PLAIN, State.ADAPTED)


def shows_adapters(pl_module: LightningModule) -> bool:
    """Whether a module computes with adapters on its layers. Otherwise it is only evaluated, or its fit has ended."""
    return state_of(pl_module) is State.ADAPTED


def _changed_arguments(config: LoRAConfig, before: LoRAConfig) -> list[str]:
    """The arguments that are not as before, as they are written in code."""
    texts = []
    for argument in fields(config):
        value = getattr(config, argument.name)
        if value != getattr(before, argument.name):
            texts.append(f"{argument.name}={value!r}")
    return texts


def _remove_all(pl_module: LightningModule) -> None:
    """Remove the adapters of the layers that have some now.

    Code in the fit may have replaced some of the adapted layers. ``remove_adapters`` refuses a record that names these.
    """
    record = find_record(pl_module)
    if record is not None:
        record.adapter.layers = tuple(View(pl_module).layers)
        remove_adapters(pl_module)
