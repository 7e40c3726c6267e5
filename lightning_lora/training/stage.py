"""One stage of a Trainer: fit, validate, test or predict."""

from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Literal

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError
from lightning_lora.model.inject import inject, remove_adapters
from lightning_lora.model.merge import merge, unmerge_or_forget
from lightning_lora.model.merged import check_own
from lightning_lora.model.record import find_record, keep_record, records_in
from lightning_lora.model.switch import activate, adapters
from lightning_lora.model.view import View, view_of
from lightning_lora.private import NormBase
from lightning_lora.storage.fingerprint import note_changed
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import join, owner_of
from lightning_lora.tensors.shards import is_dtensor
from lightning_lora.tensors.values import Seen
from lightning_lora.training.compatibility import copy_adapted, loads_in_hooks
from lightning_lora.training.gradients import Dropout
from lightning_lora.training.guards.moments import Guards
from lightning_lora.training.optimizers.float32_steps import Float32Steps
from lightning_lora.training.randomness import Resumed, reseeded


class Phase(Enum):
    """How far a stage has come. Until training begins, an error undoes what the stage did to the module."""

    SET_UP = "set up"
    LOADED = "loaded"
    TRAINING = "training"
    OVER = "over"


@dataclass
class Stage:
    """One stage: how the module came, how far the stage is, and what gives the module back as it came (``undo``).

    ``name`` is the adapter's, or None for the active one; ``unswitch`` shows the one from before again. ``seen`` holds
    the tensors that have a base value, as they came, ``buffers`` the digests of buffers, and ``modules_before`` the
    names of all modules, until the module's own hooks have run. ``filled`` are the buffers that these filled, in this
    stage or an earlier one. ``file`` is the checkpoint that it loads.
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
    seen: dict[str, Seen] = field(default_factory=dict)
    phase: Phase = Phase.SET_UP
    undo: ExitStack = field(default_factory=ExitStack)
    filled: set[str] = field(default_factory=set)
    buffers: dict[str, int] = field(default_factory=dict)
    modules_before: set[str] = field(default_factory=set)
    dropout: Dropout = field(default_factory=Dropout)
    guards: Guards = field(default_factory=Guards)
    float32: Float32Steps | None = None
    resumed: Resumed | None = None
    lr_scale: float | dict[str, float] = 1
    file: object = None

    @property
    def is_fitting(self) -> bool:
        """Whether a fit is running."""
        return self.is_fit and self.phase is not Phase.OVER

    def begin(self, pl_module: LightningModule) -> None:
        """Unmerge the module: it needs its adapters to train, or to load a checkpoint."""
        record = find_record(pl_module)
        own = record.adapters.get(self.name or record.adapter.name) if record and self.is_fit else None
        if own and own.sum_of:
            raise AdapterStateError(
                f"{type(pl_module).__name__} shows a sum of adapters, {own.name!r}, which is not trained. "
                "Train one of them, LoRACallback(name=...), or make one of the sum with combine_adapters."
            )
        if unmerge_or_forget(pl_module):
            self.came = "merged"
            self.undo.callback(merge, pl_module)
        if self.wants_another(pl_module):
            self._switch(pl_module)
            self.undo.callback(self._switch_back, pl_module)
        view = View(pl_module)
        self.buffers, self.modules_before = _own_buffers(view), set(view.modules)
        present = {**view.parameters, **view.buffers}
        for prefix, inner in records_in(view.modules).items():
            for name, original in inner.adapter.originals.items():
                if not original.is_meta and (whole := join(prefix, name)) in present:
                    self.seen[whole] = Seen(present[whole])
        if self.came == "merged":
            return
        if record is not None and find_record(pl_module) is None:  # its weights were changed: they are a new base
            self.undo.callback(keep_record, pl_module, record)
        if self.came == "plain":
            self.undo.callback(_remove_all, pl_module)

    def wants_another(self, pl_module: LightningModule) -> bool:
        """Whether the module shows another adapter than this stage's. In a fit, its base is another too."""
        record = find_record(pl_module)
        if record is None or (self.name is None and not self.is_fit):
            return False
        return record.is_disabled or self.name not in (None, record.adapter.name)

    def runs_merged(self, pl_module: LightningModule) -> bool:
        """Whether this evaluation runs a merged module as it is."""
        if not is_merged(pl_module) or loads_in_hooks(pl_module):
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

    def take_config(self, pl_module: LightningModule, stored: LoRAConfig, source: object) -> bool:
        """Take arguments that were not given from a file, or from the module's adapters."""
        config = self.config.completed(stored, self.given)
        values = [(field.name, getattr(config, field.name)) for field in fields(config)]
        taken = [f"{name}={value!r}" for name, value in values if value != getattr(self.config, name)]
        if not taken:
            return False
        rank_zero_info(f"LoRACallback takes {', '.join(taken)} from {source}, instead of the defaults.")
        self.config = config
        if find_record(pl_module) is None or not (self.came == "plain" or self.is_new):
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
        for name, tensor in view.kept.items():
            if name not in self.seen or not self.seen[name].is_still(tensor):
                view.adapter.set_base_values({name: tensor})
        return True

    def adapts(self, pl_module: LightningModule, *, for_file: bool = False) -> bool:
        """Whether the module gets or has adapters. An evaluation adds none to a plain module, unless for a file."""
        record = find_record(pl_module)
        if record is not None:
            return not (record.is_merged or record.is_disabled)  # it is only evaluated, or its fit has ended
        return self.is_fit or self.came == "adapted" or for_file

    def adapt(self, pl_module: LightningModule, *, stored: LoRAConfig | None = None, replaced: bool = False) -> None:
        """Adapt the module after its own hooks have run, or for a file. The weights that they load become the base."""
        for name, now in _own_buffers(View(pl_module)).items() if self.modules_before else ():
            if now != self.buffers.get(name) and owner_of(name) in self.modules_before:
                self.filled.add(name)
        self.modules_before = set()  # later changes are others'
        if not self.adapts(pl_module, for_file=stored is not None):
            return
        self.inject(pl_module, stored)
        view_of(pl_module).record.buffers_were_filled(self.filled)
        if self.phase is not Phase.SET_UP:  # the callbacks' averages and the base are those of a checkpoint
            return
        copy_adapted(self.callbacks, pl_module, anew=loads_in_hooks(pl_module) or replaced)
        self.take_base(pl_module)

    def inject(self, pl_module: LightningModule, stored: LoRAConfig | None = None) -> None:
        """Adapt the module, under the name of this stage's adapter. A file knows what was left out."""
        record = find_record(pl_module)
        config = self.config.excluding(stored.exclude_modules) if stored else self.config
        name = record.adapter.name if record else self.name
        with reseeded(pl_module):
            inject(pl_module, config, name=name or "default", networks_are_known=stored is not None)

    def end(self, pl_module: LightningModule) -> None:
        """Switch back and merge again, if the stage trained nothing. A fit that did not even load undoes all."""
        was, self.phase = self.phase, Phase.OVER
        self.guards.close()
        if self.is_fit and was is Phase.SET_UP:
            self.undo.close()
        elif was in (Phase.SET_UP, Phase.LOADED) and find_record(pl_module) is not None:
            self._switch_back(pl_module)
            if self.came == "merged":
                merge(pl_module)
                if was is Phase.LOADED and self.name in (None, view_of(pl_module).adapter.name):
                    rank_zero_info(f"LoRA: merged the file's adapters. {type(pl_module).__name__} is plain again.")

    def give_back_after_error(self, pl_module: LightningModule, *, is_alone: bool) -> bool:
        """Give the module back as it came, or keep adapters that may be trained. Return whether they are kept."""
        was, self.phase = self.phase, Phase.OVER
        self.guards.close()
        record = find_record(pl_module)
        if was is Phase.OVER or (record is not None and record.is_merged):
            return False
        is_kept = record is not None and (was is Phase.TRAINING or (self.is_fit and was is Phase.LOADED))
        if is_kept and not is_alone:
            note_changed(pl_module)
        if not is_kept and not (is_alone and self.came == "merged"):  # where a merge is collective, the adapters stay
            self.undo.close()
        return is_kept


def _own_buffers(view: View) -> dict[str, int]:
    """The digests of all buffers but the statistics of norms, which are the base's."""
    norms = {name for name, module in view.modules.items() if isinstance(module, NormBase)}
    return {name: digest(each) for name, each in view.buffers.items() if not (each.is_meta or owner_of(name) in norms)}


def _remove_all(pl_module: LightningModule) -> None:
    record = find_record(pl_module)
    if record is not None:
        record.adapter.layers = tuple(View(pl_module).layers)  # code in the fit may have replaced the others
        remove_adapters(pl_module)


def is_merged(pl_module: LightningModule) -> bool:
    """Whether the module is merged."""
    view = View(pl_module)
    if view.is_merged:
        check_own(view)
    return view.is_merged
