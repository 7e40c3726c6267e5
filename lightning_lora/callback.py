"""The plugin: a callback that fine-tunes any LightningModule with LoRA."""

from dataclasses import fields
from typing import Any

from lightning_lora.argument_checks import (
    Bias,
    Init,
    Merge,
    Save,
    check_adapter_name,
    check_merge,
    check_save,
)
from lightning_lora.argument_names import documents_arguments_of, explains_arguments
from lightning_lora.config import LoRAConfig
from lightning_lora.given_arguments import defaults_of, notes_given_arguments
from lightning_lora.hooks import LoRAHooks
from lightning_lora.tensors.dicts import without
from lightning_lora.training import compatibility
from lightning_lora.training.optimizers.scales import scale_of_each_factor

_OF_ONE_PROCESS = {
    *(name for name in LoRAHooks.__annotations__ if name.startswith("_")),
    *compatibility.SET_BY_LIGHTNING,
}
"""The attributes that are in no pickle: ``_prepare`` makes them again, or Lightning sets them."""


@documents_arguments_of(LoRAConfig)
@explains_arguments
@notes_given_arguments
class LoRACallback(LoRAHooks):
    """Fine-tune any LightningModule with low-rank adapters.

    At set-up, the callback freezes the base model and adds adapters to its layers. Only
    these are trained, and stored in the Trainer's files. At the end of ``fit``, the
    updates are merged into the weights, and the module is a plain model again. A stage
    that only evaluates adds nothing to a plain module. If it loads adapters from a
    file, they stay on the module. A merged module ends merged.

    Arguments that are not given are taken from the checkpoint that a Trainer loads
    (``ckpt_path``), or from adapters that the module has. So ``LoRACallback()`` is
    enough to evaluate one. From a command line, which gives all, those at their
    defaults are taken.

    A network that you froze, or gave to no optimizer, stays as it is where others
    train, unless what trains is only a head over it. A frozen copy of a network that
    trains follows it. ``target_modules`` adapts whatever it names.

    The running statistics of norms are frozen too, unless ``modules_to_save`` names the
    norms. EMA and SWA average only the adapters and other weights that train.
    ``BaseFinetuning`` and ``ModelPruning`` change the base, so they raise an error.

    When a fit begins, a table shows what trains: ``enable_model_summary=False`` hides
    it. The Trainer's loggers get the arguments as hyperparameters (``lora/r``), with
    the share of parameters that train and a digest of the base.

    The arguments before ``merge`` are those of ``LoRAConfig``.

    Args:
        merge: What to do with the adapters at the end of ``fit``. ``"last"`` merges
            them as they are. ``"best"`` merges those of ModelCheckpoint's best file.
            ``False`` leaves them on the model. A ``fast_dev_run`` merges nothing, but
            refuses what a fit would refuse.
        save: What every file of the Trainer holds. ``"adapters"``: only what training
            changed, some megabytes, which this package reads. ``"model"``: the whole
            merged model too, under its plain names, which any code reads (Lightning's
            ``load_from_checkpoint``, ``load_state_dict``). A run resumes exactly from
            both.
        lr_scale: The adapters' learning rate over that of ``configure_optimizers``, in
            each step of any scheduler. A new head keeps the module's. Begin with 10 if
            the module's rate was tuned for full fine-tuning. ``{"A": 10, "B": 160}`` is
            LoRA+, with a ratio of 16.
        name: The adapter's name. Others that the module has rest meanwhile, and never
            change: this one alone is trained, stored and merged. If it is not given, it
            is that of the module's active adapter.

    Raises:
        ConfigError: an argument has an invalid value.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". Hayou et
        al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models".

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> model = BoringModel()  # its layer is nn.Linear(32, 2)
        >>> trainer = Trainer(
        ...     callbacks=[LoRACallback(r=2)], max_steps=1, accelerator="cpu",
        ...     logger=False, enable_checkpointing=False,
        ...     enable_model_summary=False, enable_progress_bar=False,
        ... )
        >>> trainer.fit(model)
        >>> model.layer
        Linear(in_features=32, out_features=2, bias=True)
    """

    def __init__(
        self,
        r: int = 8,
        *,
        alpha: float | None = 8,
        dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        target_slices: dict[str, Any] | None = None,
        target_parameters: list[str] | None = None,
        exclude_modules: str | list[str] | None = None,
        modules_to_save: list[str] | None = None,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        bias: Bias = "none",
        init: Init = "kaiming",
        init_batches: int = 16,
        use_rslora: bool = False,
        use_dora: bool = False,
        autocast_adapter_dtype: bool = True,
        merge: Merge = "last",
        save: Save = "adapters",
        lr_scale: float | dict[str, float] = 1,
        name: str = "default",
    ) -> None:
        # the parameters are written out above for editors, mypy and LightningCLI
        arguments = locals()
        check_merge(merge)
        check_save(save)
        self.config = LoRAConfig(
            **{field.name: arguments[field.name] for field in fields(LoRAConfig)}
        )
        scale_of_each_factor(lr_scale)  # refuses what is no scale
        check_adapter_name(name)
        self.merge = merge
        self.save = save
        self.lr_scale = lr_scale
        self.name = name
        # once more, because pytorch_lightning may have been imported only now
        compatibility.subclass_pytorch_lightning_too(LoRACallback)
        self._prepare()

    def __repr__(self) -> str:
        """Show the arguments that are not at their defaults."""
        values = {**vars(self), **self.config.to_dict()}
        defaults = defaults_of(LoRACallback)
        changed = [
            f"{name}={values[name]!r}"
            for name in defaults
            if values[name] != defaults[name]
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __getstate__(self) -> dict[str, Any]:
        """Keep the arguments alone, as plain types: some modules have their callbacks as hyperparameters in files."""
        kept = without(vars(self), _OF_ONE_PROCESS)
        return {**kept, "config": self.config.to_stored(), "given": sorted(self.given)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own_defaults = without(defaults_of(LoRACallback), defaults_of(LoRAConfig))
        # an earlier version has pickled fewer arguments
        vars(self).update({**own_defaults, "gives_all": False, **state})
        self.config = LoRAConfig.from_dict(state["config"])
        self.given = frozenset(state["given"])
        self._prepare()


compatibility.subclass_pytorch_lightning_too(LoRACallback)
