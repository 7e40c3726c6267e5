"""Other callbacks, the Trainer and its module."""

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_lora.errors import ConfigError


def check_companions(callbacks: list[Callback], kind: type[Callback], stage: str, *, is_sharded: bool) -> None:
    """Refuse callbacks that do not work with adapters.

    Args:
        callbacks: All callbacks of the Trainer.
        kind: The class of ours.
        stage: The stage that begins.
        is_sharded: Whether the strategy shards the module.

    Raises:
        ConfigError: there is one, or there are two of ours.
    """
    ours = [callback for callback in callbacks if isinstance(callback, kind)]
    if len(ours) > 1:
        raise ConfigError(
            f"The Trainer has {len(ours)} LoRACallbacks. Expected one. Put all target_modules into one callback, and "
            "use rank_pattern and alpha_pattern for different ranks and scalings."
        )
    for callback in callbacks if stage == "fit" else ():
        kinds = {base.__name__ for base in type(callback).__mro__}  # names, as two Lightning packages exist
        if "BaseFinetuning" in kinds:
            raise ConfigError(
                f"{type(callback).__name__} unfreezes base weights in training, but LoRACallback keeps them frozen. "
                "Use only one of the two. To train modules in full beside the adapters, list them in modules_to_save."
            )
        if is_sharded and kinds & {"WeightAveraging", "StochasticWeightAveraging"}:
            raise ConfigError(
                f"{type(callback).__name__} copies the module, which FSDP2 does not allow. Remove it, or train with "
                "strategy='ddp'."
            )
        if "ModelPruning" in kinds:
            raise ConfigError(
                f"{type(callback).__name__} masks base weights in training, but LoRACallback does not change them. "
                "Use only one of the two. Prune the model before fit, or after it, when the updates are merged."
            )


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer."""
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]  # Lightning sets it outside the class


def judge_of(trainer: Trainer) -> Callback | None:
    """Return the first ModelCheckpoint with a monitor.

    It decides which file is best.
    """
    judges = (each for each in callbacks_of(trainer) if hasattr(each, "best_model_path") and vars(each).get("monitor"))
    return next(judges, None)


def states_are_read(callbacks: list[Callback], kind: type[Callback]) -> bool:
    """Whether other callbacks read checkpoints.

    They may need the model's full state.

    Args:
        callbacks: All callbacks of the Trainer.
        kind: The class of ours.
    """
    for callback in callbacks:
        if isinstance(callback, kind):
            continue
        for cls in type(callback).__mro__:
            if cls.__name__ != "Callback" and "on_load_checkpoint" in vars(cls):
                return True
    return False


def is_trial(trainer: Trainer) -> bool:
    """Whether the run is only a trial."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # Lightning sets it outside the class


def wants_summary(trainer: Trainer) -> bool:
    """Whether the Trainer shows model summaries."""
    return any("ModelSummary" in base.__name__ for callback in callbacks_of(trainer) for base in type(callback).__mro__)


def loads_late(trainer: Trainer) -> bool:
    """Whether a checkpoint is loaded after ``on_fit_start``."""
    return bool(trainer.strategy.restore_checkpoint_after_setup)


def loads_in_hooks(pl_module: LightningModule) -> bool:
    """Whether the module has hooks that may load weights.

    They would load the base's weights over merged ones.
    """
    for hook in ("setup", "configure_model"):
        owner = next(cls for cls in type(pl_module).__mro__ if hook in vars(cls))
        if not owner.__module__.startswith(("lightning.", "pytorch_lightning.")):
            return True
    return False
