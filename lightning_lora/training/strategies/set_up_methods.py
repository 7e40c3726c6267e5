"""Patches of the methods with which a strategy sets a module up: it is adapted before it is converted and wrapped."""

from functools import partial
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError
from lightning_lora.model.changes.attach import reinitialise_if_base_changed
from lightning_lora.model.records import find_record
from lightning_lora.model.view import View, view_of
from lightning_lora.storage.same_base.compared_tensors import base_tensors, dtypes_of
from lightning_lora.storage.same_base.fingerprint import fingerprint
from lightning_lora.tensors.inplace import class_names
from lightning_lora.training import compatibility
from lightning_lora.training.optimizers.building import build_optimizers
from lightning_lora.training.optimizers.schedulers import hide_scaled_groups
from lightning_lora.training.optimizers.train_adapters import train_adapters
from lightning_lora.training.stages.phases import Phase
from lightning_lora.training.stages.stage import Stage, shows_adapters
from lightning_lora.training.strategies.strategy_patch import (
    StrategyPatch,
    patches_strategy,
)


class SetUpMethods(StrategyPatch):
    """The methods for the set-up, and what those for other moments need too.

    Where the strategy does not shard, Lightning calls in this order:

    1. The callback's ``setup``, then the module's ``configure_model``.
    2. If there is a file, ``load_checkpoint`` and ``load_model_state_dict``. So a
       file's adapters come before the module is converted, moved and wrapped.
    3. ``setup``, which does this, and in a fit calls ``setup_optimizers``.
    """

    shards_before_adapters: ClassVar[bool] = False
    """Whether ``configure_model``, which shards the module, comes before the adapters."""

    stage: Stage
    """The stage that runs, or ran last."""

    def __init__(self, strategy: Any) -> None:
        super().__init__(strategy)
        # the parameters for whose gradients DDP waits in each backward pass
        self.awaited_by_ddp: list[nn.Parameter] = []

    @classmethod
    def check(cls, strategy: Any) -> None:
        """Refuse a strategy that these methods do not fit."""
        if "FSDPStrategy" in class_names(strategy):
            compatibility.refuse_strategy(type(strategy).__name__)
        if strategy.restore_checkpoint_after_setup:
            compatibility.refuse_strategy(
                type(strategy).__name__, "restores checkpoints after its set-up, which"
            )

    @property
    def module(self) -> LightningModule:
        """The LightningModule of the run."""
        module: LightningModule | None = self.strategy.lightning_module
        if module is None:
            raise AdapterStateError(
                "Hooks of LoRACallback act only while the Trainer runs. Call "
                "trainer.fit(model)."
            )
        return module

    @patches_strategy
    def setup(self, trainer: Trainer) -> None:
        """Adapt the module before it is converted, moved and wrapped.

        If no stage has begun, another Trainer uses this strategy object, and has no
        LoRACallback: it gets the strategy as it was.
        """
        if self.stage.phase is Phase.OVER:
            self.unpatch()
            self.original.setup(trainer)
        else:
            self.setup_in_stage(trainer)

    def setup_in_stage(self, trainer: Trainer) -> None:
        """Adapt the module, note its base, and let the strategy set it up.

        The base is noted as it was loaded, and again if the strategy converts it.
        """
        self.adapt()
        if not shows_adapters(self.module):  # the module is only evaluated
            self._tell_of_plain_weights(trainer)
            self.original.setup(trainer)
            return
        # otherwise load_model_state_dict has noted the base, before it loaded adapters. A
        # full model in a file is a new base, and is noted here
        if not self.stage.has_loaded_or_trained:
            self.note_base()
        with compatibility.keeping_adapters(self.strategy.precision_plugin):
            self.original.setup(trainer)
        view = view_of(self.module)
        # some initialisations compute the adapters from the base's values
        reinitialise_if_base_changed(view)
        self._note_converted_base(view)

    def adapt(self, *, file_config: LoRAConfig | None = None) -> None:
        """Adapt the module after its own hooks have run.

        :meth:`.Stage.adapt` has the arguments.
        """
        self.stage.adapt(self.module, file_config=file_config)

    def _tell_of_plain_weights(self, trainer: Trainer) -> None:
        """Say that a plain module is evaluated, unless a file comes."""
        if find_record(self.module) is None and not trainer.ckpt_path:
            title = type(self.module).__name__
            rank_zero_info(
                f"{title} has no adapters, and no ckpt_path was given: its plain "
                "weights are evaluated."
            )

    def note_base(self, *, anew: bool = True) -> None:
        """Note the base's fingerprint as it was loaded: later, a checkpoint or a conversion may change it.

        This is done in the set-up, before a file's adapters are loaded, and at the start
        of a training whose hooks have loaded weights since. Without ``anew``, a weight is
        read again only if a quick look shows a change.
        """
        view = view_of(self.module)
        view.record.note_fingerprint(fingerprint(view, anew=anew))

    def convert_to_float64(self) -> None:
        """Convert the module now if it will be float64: a checkpoint's values would be rounded to another dtype."""
        precision = self.strategy.precision_plugin
        if str(precision.precision) == "64-true":
            precision.convert_module(self.module)
            self._note_converted_base(view_of(self.module))

    def _note_converted_base(self, view: View) -> None:
        """Note the base's fingerprint too in the dtypes that it has now, if none is noted in these."""
        fingerprints = view.record.adapter.fingerprints
        if not fingerprints:  # a base on the meta device is noted when it is loaded
            return
        dtypes = dtypes_of(base_tensors(view))
        if all(each["dtypes"] != dtypes for each in fingerprints):
            fingerprints.append(fingerprint(view))

    @patches_strategy
    def setup_optimizers(self, trainer: Trainer) -> None:
        """Build the user's optimizers, then let them train the adapters.

        DDP has wrapped the module by now, and waits for all that requires a gradient:
        some of it may be frozen here.
        """
        self.awaited_by_ddp = [p for p in self.module.parameters() if p.requires_grad]
        build_optimizers(
            self.strategy, partial(self.original.setup_optimizers, trainer)
        )
        train_adapters(self.module, self.strategy.optimizers, self.stage.lr_scale)
        hide_scaled_groups(
            [config.scheduler for config in self.strategy.lr_scheduler_configs],
            self.module,
        )
