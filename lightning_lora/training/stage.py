"""One stage of a Trainer: fit, validate, test or predict."""

from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Literal

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError
from lightning_lora.model.base_values import kept_tensors
from lightning_lora.model.inject import inject, remove_adapters
from lightning_lora.model.merge import merge, unmerge_or_forget
from lightning_lora.model.merged import check_own
from lightning_lora.model.record import find_record, keep_record
from lightning_lora.model.switch import activate, adapters
from lightning_lora.model.view import View, view_of
from lightning_lora.moments import Guards
from lightning_lora.storage.fingerprint import note_changed
from lightning_lora.tensors.shards import is_dtensor
from lightning_lora.training.before_hooks import BeforeHooks
from lightning_lora.training.compatibility import copy_adapted, loads_in_hooks
from lightning_lora.training.optimizers.float32_steps import Float32Steps
from lightning_lora.training.randomness import Resumed, reseeded
from lightning_lora.training.steps.first_steps import FirstSteps
from lightning_lora.training.steps.step_dropout import Dropout


class Phase(Enum):
    """How far a stage has come. Until training begins, an error undoes what the stage did to the module.

    The methods of ``Stage`` that change it:

    - ``was_loaded``: SET_UP to LOADED, where a file's adapters are on the module.
    - ``loading_failed``: LOADED to SET_UP, where the optimizers do not fit that file.
    - ``begin_training``: SET_UP or LOADED to TRAINING.
    - ``end_fit``: LOADED or TRAINING to OVER, at the end of a fit. The module keeps them, or is merged.
    - ``end`` and ``give_back_after_error``: to OVER, from each.
    """

    SET_UP = "set up"
    LOADED = "loaded"
    TRAINING = "training"
    OVER = "over"


@dataclass
class Stage:
    """One stage: how the module came, how far the stage is, and what gives the module back as it came (``undo``).

    ``name`` is the adapter's, or None for the active one; ``unswitch`` shows the one from before again. ``before`` is
    what the module had before its own hooks ran. ``filled`` are the buffers that these filled, in this stage or an
    earlier one. ``file`` is the checkpoint that it loads.
    """

    config: LoRAConfig
    name: str | None = None
    given: frozenset[str] = frozenset()
    save: str = "adapters"
    is_fit: bool = False
    callbacks: list[Callback] = field(default_factory=list)
    came: Literal["plain", "adapted", "merged"] = "plain"
    unswitch: ExitStack = field(default_factory=ExitStack)
    is_new: bool = False
    phase: Phase = Phase.SET_UP
    undo: ExitStack = field(default_factory=ExitStack)
    before: BeforeHooks | None = None
    hooks_have_run: bool = False
    filled: set[str] = field(default_factory=set)
    dropout: Dropout = field(default_factory=Dropout)
    guards: Guards = field(default_factory=Guards)
    first_steps: FirstSteps = field(init=False)
    float32: Float32Steps | None = None
    resumed: Resumed | None = None
    lr_scale: float | dict[str, float] = 1
    file: object = None

    def __post_init__(self) -> None:
        self.first_steps = FirstSteps(self.guards)

    @property
    def is_fitting(self) -> bool:
        """Whether a fit is running."""
        return self.is_fit and self.phase is not Phase.OVER

    # Begin

    def begin(self, pl_module: LightningModule) -> None:
        """Unmerge the module: it needs its adapters to train, or to load a checkpoint."""
        self._refuse_sum(pl_module)
        record = find_record(pl_module)
        if unmerge_or_forget(pl_module):
            self.came = "merged"
            self.undo.callback(merge, pl_module)
        if self.wants_another(pl_module):
            self._switch(pl_module)
            self.undo.callback(self._switch_back, pl_module)
        self.before = BeforeHooks(View(pl_module))
        self.hooks_have_run = False
        if self.came == "merged":
            return
        if record is not None and find_record(pl_module) is None:  # its weights were changed: they are a new base
            self.undo.callback(keep_record, pl_module, record)
        if self.came == "plain":
            self.undo.callback(_remove_all, pl_module)

    def _refuse_sum(self, pl_module: LightningModule) -> None:
        """Refuse to train a sum of adapters."""
        record = find_record(pl_module)
        if record is None or not self.is_fit:
            return
        adapter = record.adapters.get(self.name or record.adapter.name)
        if adapter is not None and adapter.sum_of:
            raise AdapterStateError(
                f"{type(pl_module).__name__} shows a sum of adapters, {adapter.name!r}, which is not trained. "
                "Train one of them, LoRACallback(name=...), or make one of the sum with combine_adapters."
            )

    def wants_another(self, pl_module: LightningModule) -> bool:
        """Whether the module shows another adapter than this stage's. In a fit, its base is another too."""
        record = find_record(pl_module)
        if record is None or (self.name is None and not self.is_fit):
            return False
        return record.is_disabled or self.name not in (None, record.adapter.name)

    def runs_merged(self, pl_module: LightningModule) -> bool:
        """Whether this evaluation runs a merged module as it is."""
        if not _is_merged(pl_module) or loads_in_hooks(pl_module):
            return False
        return not self.wants_another(pl_module)

    def _switch(self, pl_module: LightningModule) -> None:
        """Make this stage's adapter the active one: a fit may begin a new one."""
        names = adapters(pl_module)
        name = self.name or names[0]
        self.is_new = name not in names
        self.unswitch = activate(pl_module, name, self.config if self.is_fit else None)

    def _switch_back(self, pl_module: LightningModule) -> None:
        if not any(map(is_dtensor, pl_module.parameters())):  # shards cannot be switched
            self.unswitch.close()

    # Take what the module or a file has

    def take_config(self, pl_module: LightningModule, stored: LoRAConfig, source: object) -> bool:
        """Take arguments that were not given from a file, or from the module's adapters.

        Return whether the adapters were replaced, as these are made otherwise.
        """
        config = self.config.completed(stored, self.given)
        taken = _differences(config, self.config)
        if not taken:
            return False
        rank_zero_info(f"LoRACallback takes {', '.join(taken)} from {source}, instead of the defaults.")
        self.config = config
        was_made_here = self.came == "plain" or self.is_new
        if find_record(pl_module) is None or not was_made_here:
            return False
        self.take_base(pl_module)
        if self.is_new:
            self._switch_back(pl_module)
            self._switch(pl_module)
        else:
            remove_adapters(pl_module)
        return True

    def take_base(self, pl_module: LightningModule) -> bool:
        """Take as the base what the module's hooks changed in this stage. False: something was trained or loaded."""
        view = view_of(pl_module)
        if self.phase is not Phase.SET_UP or view.adapter.is_trained or not view.is_fresh():
            return False
        for name, tensor in kept_tensors(view).items():
            if self.before is None or self.before.has_changed(name, tensor):
                view.adapter.set_base_values({name: tensor})
        return True

    # Adapt

    def adapts(self, pl_module: LightningModule, *, for_file: bool = False) -> bool:
        """Whether the module gets or has adapters. An evaluation adds none to a plain module, unless for a file."""
        if find_record(pl_module) is not None:
            return shows_adapters(pl_module)
        return self.is_fit or self.came == "adapted" or for_file

    def adapt(self, pl_module: LightningModule, *, stored: LoRAConfig | None = None, replaced: bool = False) -> None:
        """Adapt the module after its own hooks have run, or for a file. The weights that they load become the base."""
        self._note_filled_buffers(pl_module)
        if not self.adapts(pl_module, for_file=stored is not None):
            return
        self.inject(pl_module, stored)
        view_of(pl_module).record.base.buffers_were_filled(self.filled)
        if self.phase is not Phase.SET_UP:  # the callbacks' averages and the base are those of a checkpoint
            return
        copy_adapted(self.callbacks, pl_module, anew=loads_in_hooks(pl_module) or replaced)
        self.take_base(pl_module)

    def _note_filled_buffers(self, pl_module: LightningModule) -> None:
        """Note what the module's own hooks have filled, once: later changes are others'."""
        if self.before is not None and not self.hooks_have_run:
            self.filled |= self.before.filled_buffers(View(pl_module))
            self.hooks_have_run = True

    def inject(self, pl_module: LightningModule, stored: LoRAConfig | None = None) -> None:
        """Adapt the module, under the name of this stage's adapter. A file knows what was left out."""
        config = self.config
        if stored is not None:
            config = config.excluding(stored.exclude_modules)
        record = find_record(pl_module)
        name = self.name or "default"
        if record is not None:
            name = record.adapter.name
        with reseeded(pl_module):
            inject(pl_module, config, name=name, is_from_file=stored is not None)

    # What guards look at

    def check_backward(self, pl_module: LightningModule) -> None:
        """Let guards look at a backward pass that begins while adapters are disabled."""
        record = find_record(pl_module)
        if record is not None and record.is_disabled:
            self.guards.backward_begins_without_adapters(View(pl_module))

    def say_what_was_written(self, pl_module: LightningModule, *, is_aloud: bool) -> None:
        """Let guards look at the base, which the record has just compared. ``is_aloud``: one process warns for all."""
        if is_aloud:
            self.guards.base_compared(View(pl_module))

    # From one phase to the next

    def was_loaded(self) -> None:
        """A file's adapters are on the module, and stay if a fit fails."""
        if self.phase is Phase.SET_UP:
            self.phase = Phase.LOADED

    def loading_failed(self) -> None:
        """The optimizers do not fit that file: so the module becomes what it was before."""
        if self.phase is Phase.LOADED:
            self.phase = Phase.SET_UP

    def begin_training(self) -> None:
        """From here on, the adapters may be trained: they stay if the fit fails."""
        self.phase = Phase.TRAINING

    def end_fit(self) -> bool:
        """End a fit. Return whether it loaded or trained adapters, which stay."""
        if self.phase is Phase.SET_UP:
            return False
        self.phase = Phase.OVER
        return True

    def end(self, pl_module: LightningModule) -> None:
        """Switch back and merge again, if the stage trained nothing. A fit that did not even load undoes all."""
        reached = self._close()
        if self.is_fit and reached is Phase.SET_UP:
            self.undo.close()
        elif reached in (Phase.SET_UP, Phase.LOADED) and find_record(pl_module) is not None:
            self._switch_back(pl_module)
            if self.came == "merged":
                self._merge_again(pl_module, was_loaded=reached is Phase.LOADED)

    def _merge_again(self, pl_module: LightningModule, *, was_loaded: bool) -> None:
        merge(pl_module)
        is_of_file = was_loaded and self.name in (None, view_of(pl_module).adapter.name)
        if is_of_file:
            rank_zero_info(f"LoRA: merged the file's adapters. {type(pl_module).__name__} is plain again.")

    def give_back_after_error(self, pl_module: LightningModule, *, is_alone: bool) -> bool:
        """Give the module back as it came, or keep adapters that may be trained. Return whether they are kept.

        ``is_alone``: other processes may not be here, so nothing that needs them is done.
        """
        reached = self._close()
        record = find_record(pl_module)
        if reached is Phase.OVER or View(pl_module).is_merged:
            return False
        may_be_trained = reached is Phase.TRAINING or (self.is_fit and reached is Phase.LOADED)
        if record is not None and may_be_trained:
            if not is_alone:
                note_changed(pl_module)
            return True
        would_merge = self.came == "merged"
        if not (is_alone and would_merge):  # where a merge is collective, the adapters stay
            self.undo.close()
        return False

    def _close(self) -> Phase:
        """End the stage. Return how far it had come."""
        reached = self.phase
        self.phase = Phase.OVER
        self.first_steps.close()
        return reached


def shows_adapters(pl_module: LightningModule) -> bool:
    """Whether a module computes with adapters on its layers. Otherwise it is only evaluated, or its fit has ended."""
    record = find_record(pl_module)
    return record is not None and not (record.is_merged or record.is_disabled)


def _differences(config: LoRAConfig, before: LoRAConfig) -> list[str]:
    """The arguments that are not as before, as they are written in code."""
    texts = []
    for argument in fields(config):
        value = getattr(config, argument.name)
        if value != getattr(before, argument.name):
            texts.append(f"{argument.name}={value!r}")
    return texts


def _remove_all(pl_module: LightningModule) -> None:
    record = find_record(pl_module)
    if record is not None:
        record.adapter.layers = tuple(View(pl_module).layers)  # code in the fit may have replaced the others
        remove_adapters(pl_module)


def _is_merged(pl_module: LightningModule) -> bool:
    """Whether the module is merged. Its weights are then as the merge left them, or that is an error."""
    view = View(pl_module)
    if view.is_merged:
        check_own(view)
    return view.is_merged
