"""The plugin: one callback that leads any LightningModule through a LoRA fine-tune."""

import sys
import warnings
from contextlib import ExitStack, closing
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from torch.optim import Optimizer

from lightning_lora.config import Bias, Init, LoRAConfig
from lightning_lora.errors import BestCheckpointWarning, ConfigError, LoRAError, TargetError, listed
from lightning_lora.model.attach import fold, quantised_layers, unfold, warn_of_merge
from lightning_lora.model.handover import name_memory
from lightning_lora.model.inject import inject_adapters, remove_adapters
from lightning_lora.model.record import adapted_layers, find_record, follow_base, is_fresh, keep_originals, record_of
from lightning_lora.storage.checkpoint import load_checkpoint_state
from lightning_lora.storage.fingerprint import note_changed
from lightning_lora.storage.state import adapter_state_dict
from lightning_lora.summary import summarize
from lightning_lora.training.averaging import copy_adapted, drop_averages, share_base
from lightning_lora.training.gradients import Reach
from lightning_lora.training.optimizers import check_frozen, train_adapters
from lightning_lora.training.recompute import gradients_pass
from lightning_lora.training.spawned import (
    RANDOM,
    check_untied,
    random_states,
    receive_memory,
    returns_state_only,
    send_memory,
    set_random_state,
)
from lightning_lora.training.strategy import Duties, has_loaded, is_watched, watch

Merge = Literal["last", "best", False]

_LAST = "the last adapters"


class LoRACallback(Callback):
    """Fine-tune any LightningModule by low-rank adapters.

    The base is frozen and adapted when a stage is set up, the optimizers train the adapters alone, every file the
    Trainer writes holds the adapters alone, and at the end of ``fit`` the updates are merged: the module is a plain
    model again. (A stage that only evaluates leaves it adapted.) Norms with running statistics stand still, unless
    ``modules_to_save`` names them. EMA and SWA average the adapters; ``BaseFinetuning`` and ``ModelPruning``, which
    change the base, are refused.

    Args:
        r: Rank of the update, from 1 to the smaller side of every adapted weight.
        alpha: The update is scaled by ``alpha / r``. ``None`` means ``alpha = r``, a scaling of one.
        dropout: Probability of dropping an input of ``lora_A`` in training, in [0, 1).
        target_modules: ``"all-linear"`` (every linear layer but a language model's output head), ``"all"`` (every
            supported layer), a regular expression that must match a whole dotted name, or a list of names or of their
            last parts.
        target_slices: Parts of fused layers to adapt: ``{"c_attn": ["q", "v"]}``, also of nn.MultiheadAttention; or by
            the features that a layer writes, ``{"proj": {"a": [0, 64]}}``. See :class:`LoRAConfig`.
        target_parameters: Matrices, or stacks of them, that a module holds by itself, such as the weights of experts.
        exclude_modules: Modules to leave alone, with everything below them: an expression or a list, as above.
        modules_to_save: Names of modules, or of single parameters, to train whole; they win over ``target_modules``.
            Name every new layer here: a frozen layer of random weights is in no file, and could not be built again.
        rank_pattern: Rank by layer: names, last parts or expressions to an ``r`` other than the default.
        alpha_pattern: Likewise for ``alpha``.
        bias: Which biases train too: ``"none"``, ``"all"``, or ``"lora_only"`` (those of adapted layers).
        init: How ``lora_A`` starts: ``"kaiming"`` (uniform) or ``"gaussian"``; or both factors ``"pissa"`` or
            ``"olora"``, from what is strongest in the weight.
        use_rslora: Scale by ``alpha / sqrt(r)`` instead.
        use_dora: Train a magnitude for each feature that a layer writes, beside the direction (DoRA).
        autocast_adapter_dtype: Keep adapters in float32 where the base is in half precision.
        loraplus_lr_ratio: Reserved: a learning rate of its own for ``lora_B`` is not available yet.
        merge: What becomes of the adapters at the end of ``fit``: ``"last"`` merges them as they are, ``"best"`` merges
            those of ModelCheckpoint's best file, ``False`` leaves them on the model. A ``fast_dev_run`` merges nothing.

    Raises:
        ConfigError: an argument is outside what it may be.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> model = BoringModel()  # its layer is nn.Linear(32, 2)
        >>> trainer = Trainer(
        ...     callbacks=[LoRACallback(r=2)], max_steps=1, logger=False, enable_checkpointing=False,
        ...     enable_model_summary=False, enable_progress_bar=False, accelerator="cpu",
        ... )
        >>> trainer.fit(model)
        >>> model.layer
        Linear(in_features=32, out_features=2, bias=True)
    """

    def __init__(
        self,
        r: int = 8,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        target_slices: dict[str, Any] | None = None,
        target_parameters: list[str] | None = None,
        exclude_modules: str | list[str] | None = None,
        modules_to_save: list[str] | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        bias: Bias = "none",
        init: Init = "kaiming",
        use_rslora: bool = False,
        use_dora: bool = False,
        autocast_adapter_dtype: bool = True,
        loraplus_lr_ratio: float | None = None,
        merge: Merge = "last",
    ) -> None:
        if merge is not False and merge not in ("last", "best"):
            raise ConfigError(f"merge={merge!r} is unknown. Expected 'last', 'best' or False.")
        if loraplus_lr_ratio is not None:
            raise ConfigError(
                f"loraplus_lr_ratio={loraplus_lr_ratio!r} is not available in this version. Leave it None, and give "
                "lora_B a parameter group of its own in configure_optimizers if you need one."
            )
        self.config = LoRAConfig(
            r=r,
            alpha=alpha,
            dropout=dropout,
            target_modules=target_modules,
            target_slices=target_slices,
            target_parameters=target_parameters,
            exclude_modules=exclude_modules,
            modules_to_save=modules_to_save,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            bias=bias,
            init=init,
            use_rslora=use_rslora,
            use_dora=use_dora,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        self.merge: Merge = merge
        _join_other_package()
        name_memory()
        self._base_is_open = False
        self._reach: Reach | None = None
        self._training = ExitStack()
        self._entered = False
        self._began = False
        self._was_adapted = False
        self._was_folded = False
        self._random: Any = None

    # Set up: adapt what is there, and again when the model's own hooks have run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adapt the module, on its exact base if an earlier fit merged it; the strategy adapts layers still to come."""
        self._entered, self._began, self._random = True, False, None
        self._was_adapted, self._was_folded = bool(adapted_layers(pl_module)), False
        _check_companions(_callbacks(trainer), stage)
        if stage != "fit":
            drop_averages(_callbacks(trainer))
        watch(trainer.strategy, Duties(self._adapt, train_adapters, _states_are_read))
        receive_memory(pl_module)
        if stage == "fit":
            self._check_merge(trainer, pl_module)
        self._was_folded = unfold(pl_module)
        self._base_is_open = is_fresh(pl_module)
        try:
            inject_adapters(pl_module, self.config)
        except TargetError:  # setup or configure_model may yet make the layers; the strategy asks again, for good
            return
        if stage == "fit":
            for layer in adapted_layers(pl_module).values():
                layer.lora_unmerge()  # merged by hand: its adapters could not train

    def _adapt(self, pl_module: LightningModule) -> None:
        """Adapt what the module's own hooks have made; what they loaded until now is the base."""
        inject_adapters(pl_module, self.config)
        copy_adapted(_callbacks(pl_module.trainer), pl_module)
        if self._base_is_open:
            record = record_of(pl_module)
            record.originals = {}
            keep_originals(pl_module, record)
            self._base_is_open = False

    def _check_merge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.merge == "best" and not _is_trial(trainer) and _judge(trainer) is None:
            raise ConfigError(
                "merge='best' needs a ModelCheckpoint with a monitor to say which adapters are best, and the Trainer "
                "has none. Add ModelCheckpoint(monitor=...), or set merge='last'."
            )
        if returns_state_only(trainer) and bool(self.merge) == bool(adapted_layers(pl_module)):
            raise ConfigError(
                f"merge={self.merge!r} would lose the adapters: this strategy trains in processes that send only "
                "weights back, and only for the layers that the model here has. Use strategy='ddp'; or leave the model "
                "plain and set merge='last'; or call inject_adapters on it before fit and set merge=False."
            )

    # Fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what trains, refuse a merge that could not come back, and go on with a resumed run's random numbers."""
        if self.merge and not _is_trial(trainer) and (quantised := quantised_layers(pl_module)):
            raise ConfigError(
                f"merge={self.merge!r} cannot be done: the weights of {listed(quantised)} are quantised. Set "
                "merge=False: the adapters stay live, and every file holds them."
            )
        if self.merge and returns_state_only(trainer):
            check_untied(pl_module)
        if trainer.is_global_zero and _wants_summary(trainer):
            Console().print(summarize(pl_module).table(trained_only=True))
        set_random_state(trainer, self._random)  # the last hook before the loaders draw the order of their samples
        self._random = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on an exception finds adapters that may be worth keeping; watch what gradients reach."""
        self._began = True
        follow_base(pl_module)  # hooks may have loaded it late
        share_base(_callbacks(trainer), pl_module)
        self._reach = self._training.enter_context(closing(Reach(pl_module, trainer.strategy.model)))
        self._training.enter_context(gradients_pass())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep frozen what a step may have thawed, and let no other process wait for a gradient that is not given."""
        if self._reach is not None:
            self._reach.end_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Name, once for each optimizer, the adapters in it that no gradient has reached; refuse frozen weights."""
        check_frozen(pl_module, optimizer)
        if self._reach is not None:
            self._reach.check(optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching."""
        self._end_training()

    def _end_training(self) -> None:
        self._training.close()
        self._reach = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge, and make the module plain again; it remembers its base and its adapters."""
        note_changed(pl_module)
        if not self.merge or _is_trial(trainer):
            return
        which = self._load_best(trainer, pl_module) if self.merge == "best" else _LAST
        count = len(adapted_layers(pl_module))
        layers = "1 layer" if count == 1 else f"{count} layers"
        warn_of_merge(pl_module, fold(pl_module))
        send_memory(trainer, pl_module)
        rank_zero_info(f"LoRACallback merged {which} into {layers}: {type(pl_module).__name__} is a plain model again.")

    def _load_best(self, trainer: Trainer, pl_module: LightningModule) -> str:
        path = getattr(_judge(trainer), "best_model_path", "")
        try:
            if not path:
                raise FileNotFoundError("ModelCheckpoint wrote none")
            load_checkpoint_state(pl_module, trainer.strategy.load_checkpoint(path))
        except (OSError, LoRAError) as error:
            warnings.warn(
                f"merge='best' found no best checkpoint ({error}). The last adapters are merged.",
                BestCheckpointWarning,
                stacklevel=1,
            )
            return _LAST
        return f"the best adapters ({path})"

    # Afterwards

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Merge again what an earlier fit had merged, after a stage that trained nothing: a tuner's trial is one."""
        if self._was_folded and not self._began and find_record(pl_module) is not None:
            fold(pl_module)
        self._entered = False
        self._end_training()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give back the module as it came, unless a fit had loaded or begun to train it: then training can go on."""
        record, entered = find_record(pl_module), self._entered
        self._entered = False
        self._end_training()
        if not entered or record is None or record.folded:
            return
        if self._began or (trainer.state.fn == "fit" and has_loaded(trainer.strategy)):
            note_changed(pl_module)
        elif self._was_folded:
            fold(pl_module)
        elif not self._was_adapted:
            remove_adapters(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store where the random numbers are; and keep the file adapter-only in a main process that had no set-up."""
        checkpoint[RANDOM] = random_states(trainer)
        receive_memory(pl_module)
        if find_record(pl_module) is not None and not is_watched(trainer.strategy):
            watch(trainer.strategy, Duties(self._adapt, train_adapters, _states_are_read))
            checkpoint["state_dict"] = adapter_state_dict(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the stored random states for the moment when training starts."""
        self._random = checkpoint.get(RANDOM)


def _join_other_package() -> None:
    """Make ``LoRACallback`` a ``pytorch_lightning.Callback`` too, if that package is in use: it asks for its own."""
    other = sys.modules.get("pytorch_lightning")
    if other is not None and not issubclass(LoRACallback, other.Callback):
        LoRACallback.__bases__ = (*LoRACallback.__bases__, other.Callback)


_join_other_package()


def _check_companions(callbacks: list[Callback], stage: str) -> None:
    ours = [callback for callback in callbacks if isinstance(callback, LoRACallback)]
    if len(ours) > 1:
        raise ConfigError(
            f"The Trainer has {len(ours)} LoRACallbacks; expected one. Join their target_modules in a single "
            "callback, with rank_pattern and alpha_pattern for what differs."
        )
    for callback in callbacks if stage == "fit" else ():
        kinds = {base.__name__ for base in type(callback).__mro__}  # of either package
        if "BaseFinetuning" in kinds:
            raise ConfigError(
                f"{type(callback).__name__} unfreezes base weights in training, and LoRACallback keeps them frozen. "
                "Use one of the two; to train whole modules beside adapters, name them in modules_to_save."
            )
        if "ModelPruning" in kinds:
            raise ConfigError(
                f"{type(callback).__name__} masks base weights in training, and LoRACallback keeps them as they are. "
                "Use one of the two; prune the model before fit, or after it, when the update is merged."
            )


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]  # Lightning sets it outside the class


def _judge(trainer: Trainer) -> Callback | None:
    """The callback that says which file is best: the first ModelCheckpoint that compares any."""
    judges = (each for each in _callbacks(trainer) if hasattr(each, "best_model_path") and vars(each).get("monitor"))
    return next(judges, None)


def _states_are_read(pl_module: LightningModule) -> bool:
    """Whether another callback looks at whole checkpoints, and so perhaps for whole states."""
    others = [callback for callback in _callbacks(pl_module.trainer) if not isinstance(callback, LoRACallback)]
    classes = {cls for callback in others for cls in type(callback).__mro__ if cls.__name__ != "Callback"}
    return any("on_load_checkpoint" in vars(cls) for cls in classes)


def _is_trial(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # likewise


def _wants_summary(trainer: Trainer) -> bool:
    """Whether the Trainer shows model summaries, whichever of Lightning's two packages it is of."""
    return any("ModelSummary" in base.__name__ for callback in _callbacks(trainer) for base in type(callback).__mro__)
