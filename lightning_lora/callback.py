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
from lightning_lora.model.handover import name_folder
from lightning_lora.model.inject import inject_adapters, remove_adapters
from lightning_lora.model.merge import merge, merge_adapters, quantised_layers, unmerge
from lightning_lora.model.record import find_record
from lightning_lora.model.remember import view_of
from lightning_lora.model.view import View
from lightning_lora.storage.checkpoint import load_checkpoint_state
from lightning_lora.storage.fingerprint import note_changed
from lightning_lora.summary import summarize
from lightning_lora.training.averaging import drop_averages, share_base
from lightning_lora.training.gradients import Gradients, gradients_pass
from lightning_lora.training.optimizers import check_frozen
from lightning_lora.training.randomness import RANDOM, random_states, set_random_state
from lightning_lora.training.spawned import check_untied, receive_record, returns_state_only, send_record
from lightning_lora.training.stage import Stage
from lightning_lora.training.strategy import is_watched, watch

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
        name_folder()
        self._stage = Stage(self.config, is_over=True)
        self._gradients: Gradients | None = None
        self._training = ExitStack()

    # Set up: adapt what is there, and again when the module's own hooks have run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adapt the module, on its exact base if it was merged. The strategy adapts layers that are still to come."""
        callbacks = _callbacks(trainer)
        was_adapted = bool(View(pl_module).layers)
        self._stage = Stage(self.config, was_adapted=was_adapted, states_are_read=_states_are_read(callbacks))
        _check_companions(callbacks, stage)
        if stage != "fit":
            drop_averages(callbacks)
        watch(trainer.strategy, self._stage)
        receive_record(pl_module)
        if stage == "fit":
            self._check_merge(trainer, pl_module)
        self._stage.was_merged = unmerge(pl_module)
        self._stage.base_is_open = View(pl_module).is_fresh()
        try:
            inject_adapters(pl_module, self.config)
        except TargetError:  # setup or configure_model may yet make the layers; the strategy asks again, for good
            return

    def _check_merge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.merge == "best" and not _is_trial(trainer) and _judge(trainer) is None:
            raise ConfigError(
                "merge='best' needs a ModelCheckpoint with a monitor to say which adapters are best, and the Trainer "
                "has none. Add ModelCheckpoint(monitor=...), or set merge='last'."
            )
        if returns_state_only(trainer) and bool(self.merge) == self._stage.was_adapted:
            raise ConfigError(
                f"merge={self.merge!r} would lose the adapters: this strategy trains in processes that send back only "
                "weights, and only for the layers that the model here has. Use strategy='ddp'; or leave the model "
                "plain and set merge='last'; or call inject_adapters on it before fit and set merge=False."
            )

    # Fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what trains, refuse merges that cannot be done, and set a resumed run's random numbers."""
        if self.merge and not _is_trial(trainer) and (quantised := quantised_layers(View(pl_module))):
            raise ConfigError(
                f"merge={self.merge!r} cannot be done: the weights of {listed(quantised)} are quantised. Set "
                "merge=False: the adapters stay on their layers, and every file holds them."
            )
        if self.merge and returns_state_only(trainer):
            check_untied(pl_module)
        if trainer.is_global_zero and _wants_summary(trainer):
            Console().print(summarize(pl_module).table(trained_only=True))
        set_random_state(
            trainer, self._stage.random
        )  # the last hook before the loaders draw the order of their samples
        self._stage.random = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch gradients. From here on, an exception leaves adapters that may be worth keeping."""
        self._stage.has_begun = True
        view_of(pl_module).follow_base()  # hooks may have loaded it late
        share_base(_callbacks(trainer), pl_module)
        self._gradients = self._training.enter_context(closing(Gradients(pl_module, trainer.strategy.model)))
        self._training.enter_context(gradients_pass())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep frozen weights frozen. Under DDP, give unused adapters a zero gradient."""
        if self._gradients is not None:
            self._gradients.end_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Name adapters that no gradient has reached, once for each optimizer; refuse frozen weights in it."""
        check_frozen(pl_module, optimizer)
        if self._gradients is not None:
            self._gradients.check(optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching gradients."""
        self._end_training()

    def _end_training(self) -> None:
        self._training.close()
        self._gradients = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge: the module is plain again, and remembers its base and its adapters."""
        note_changed(pl_module)
        if not self.merge or _is_trial(trainer):
            return
        which = self._load_best(trainer, pl_module) if self.merge == "best" else _LAST
        count = len(View(pl_module).layers)
        layers = "1 layer" if count == 1 else f"{count} layers"
        merge_adapters(pl_module)
        send_record(trainer, pl_module)
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
        """Merge again what was merged before, after a stage that trained nothing, such as a tuner's trial."""
        if self._stage.was_merged and not self._stage.has_begun and find_record(pl_module) is not None:
            merge(pl_module)
        self._stage.is_over = True
        self._end_training()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module back as it came, unless a fit has loaded it or begun to train it: then training can go on."""
        stage, record = self._stage, find_record(pl_module)
        was_over, stage.is_over = stage.is_over, True
        self._end_training()
        if was_over or record is None or record.is_merged:
            return
        if stage.has_begun or (trainer.state.fn == "fit" and stage.has_loaded):
            note_changed(pl_module)
        elif stage.was_merged:
            merge(pl_module)
        elif not stage.was_adapted:
            remove_adapters(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the states of random generators; keep files adapter-only in a main process that had no set-up."""
        checkpoint[RANDOM] = random_states(trainer)
        receive_record(pl_module)
        if find_record(pl_module) is not None and not is_watched(trainer.strategy):
            watch(trainer.strategy, Stage(self.config, states_are_read=_states_are_read(_callbacks(trainer))))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the stored states of random generators until training starts."""
        self._stage.random = checkpoint.get(RANDOM)


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


def _states_are_read(callbacks: list[Callback]) -> bool:
    """Whether another callback reads whole checkpoints, and so perhaps whole states of the model."""
    for callback in callbacks:
        if isinstance(callback, LoRACallback):
            continue
        for cls in type(callback).__mro__:
            if cls.__name__ != "Callback" and "on_load_checkpoint" in vars(cls):
                return True
    return False


def _is_trial(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # likewise


def _wants_summary(trainer: Trainer) -> bool:
    """Whether the Trainer shows model summaries, whichever of Lightning's two packages it is of."""
    return any("ModelSummary" in base.__name__ for callback in _callbacks(trainer) for base in type(callback).__mro__)
