"""LoRASweep: several adapters in one fit."""

import inspect
import itertools
import math
import re
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.seed import _set_rng_states
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_module
from rich.table import Table
from torch import Tensor, is_autocast_enabled

from lightning_lora.argument_names import explains_arguments
from lightning_lora.callback import LoRACallback
from lightning_lora.errors import ConfigError, listed
from lightning_lora.model.state import find_record
from lightning_lora.storage.base import note_changed
from lightning_lora.sweep.runs import Run, play
from lightning_lora.sweep.sharing import Loaders, adopt, adopt_notes, copy_trainer, share_base
from lightning_lora.tables import fitting_console
from lightning_lora.tensors.inplace import class_names
from lightning_lora.training.compatibility import check_callbacks
from lightning_lora.training.stage import Phase

Mode = Literal["min", "max"] | None

_LISTS = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "trainable_token_indices")
_REFUSED = {"WeightAveraging", "StochasticWeightAveraging", "LearningRateFinder", "BatchSizeFinder", "Timer"}
_SHOWN = {"ProgressBar", "ModelSummary"}


def _with_lists(init: Any) -> inspect.Signature:
    """LoRACallback's arguments, and lists of them, for LightningCLI."""
    shown = list(inspect.signature(init).parameters.values())[:-1]
    own = inspect.signature(LoRACallback).parameters
    for each in (*own.values(), own["lr_scale"].replace(name="loraplus_lr_ratio", default=None)):
        kind: Any = each.annotation
        shown.append(each.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind | list[kind]))
    return inspect.Signature(shown)


@explains_arguments
class LoRASweep(LoRACallback):
    """Train several adapters in one fit, and keep the best.

    Use it in place of LoRACallback. Each batch is loaded once and goes through all adapters, which share the base's
    memory. After each validation, the better ones go on. Each adapter trains exactly as alone, to the bit, and the
    Trainer and the module end as after a fit of the best one alone.

    Args:
        monitor: The metric that decides, logged in validation.
        mode: Whether ``"min"`` or ``"max"`` is best. It may be left out for a loss.
        keep: The share of the adapters that goes on after each validation. 1 keeps all to the end.
        arguments: LoRACallback's, as values or lists of values (of lists, for ``target_modules`` and the like).

    Raises:
        ConfigError: an argument has an invalid value, or the Trainer has a part that a sweep does not work with.

    Source:
        Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", figure 1.

    Example:
        >>> sweep = LoRASweep(r=[8, 16], alpha=[16, 32], dropout=0.1)
        >>> list(sweep.runs)
        ['r8-alpha16', 'r8-alpha32', 'r16-alpha16', 'r16-alpha32']
    """

    runs: dict[str, dict[str, Any]]  # the arguments of each adapter, by its name
    results: list[dict[str, Any]]  # after a fit: name, arguments, metrics and validation of the drop, the best first

    def __init__(self, *, monitor: str = "val_loss", mode: Mode = None, keep: float = 0.5, **arguments: Any) -> None:
        mode = mode or ("min" if "loss" in monitor else None)
        if mode not in ("min", "max") or not 0 < keep <= 1:
            raise ConfigError(f"mode={mode!r}, keep={keep!r}: {monitor} needs 'min' or 'max', keep a share in (0, 1].")
        self.monitor, self.mode, self.keep = monitor, mode, keep
        self.runs, self.results = {}, []
        lists = {name: value for name, value in arguments.items() if _is_list(name, value)}
        self.varied = [name for name in lists if len(lists[name]) > 1]
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            name = "-".join(map(_named, self.varied, map(chosen.get, self.varied)))
            if arguments | chosen not in self.runs.values():
                self.runs[f"{name}_{len(self.runs) + 1}" if name in self.runs else name] = arguments | chosen
            super().__init__(**arguments | chosen)
        if len(self.runs) < max(2, math.prod(map(len, lists.values()))):
            raise ConfigError(
                f"LoRASweep got {len(self.runs)} different adapter{'s' * (len(self.runs) > 1)}. Expected several, and "
                "none twice: lists such as r=[8, 16], and a list of lists for target_modules and its like."
            )

    __init__.__signature__ = _with_lists(__init__)  # type: ignore[attr-defined]

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Fit all adapters, before the Trainer's own fit, which gets the best one's arguments."""
        if stage == "fit":
            self._check(trainer, pl_module)
            self._play(trainer, pl_module)
        self.given = frozenset()
        super().setup(trainer, pl_module, stage)

    def _check(self, trainer: Any, pl_module: LightningModule) -> None:
        check_callbacks(trainer.callbacks, "fit", is_sharded=False)
        frames = [each.frame.f_locals for each in inspect.stack(0)]  # the Trainer tells no callback before it loads
        refused = {
            "a module with adapters, perhaps merged (call remove_adapters(model) first)": find_record(pl_module),
            "a fit without validation": not trainer.enable_validation,
            type(trainer.strategy).__name__: "SingleDeviceStrategy" not in class_names(trainer.strategy),
            "ckpt_path": any(each.get("self") is trainer and each.get("ckpt_path") for each in frames),
            "torch.autocast around fit (use a precision)": is_autocast_enabled(trainer.strategy.root_device.type),
            "overfit_batches": trainer.overfit_batches > 0,
            "a val_check_interval in time": vars(trainer).get("_val_check_time_interval") is not None,
            **{type(each).__name__: class_names(each) & _REFUSED for each in trainer.callbacks},
        }
        if found := ", ".join(filter(refused.get, refused)):
            raise ConfigError(f"LoRASweep does not work with {found}. Change that, or use LoRACallback.")

    def _play(self, trainer: Any, pl_module: LightningModule) -> None:
        log, said, at_end = rank_zero_module.log, dict[str, Any](), self._training.callback
        log.addFilter(is_new := lambda record: said.setdefault(record.getMessage(), record) is record)
        at_end(log.removeFilter, is_new)  # no run says what another has said, such as why it stops
        hidden = {"SaveConfigCallback"}  # LightningCLI's, which cannot be copied
        for each in trainer.callbacks:
            if class_names(each) & hidden:
                each.setup(trainer, pl_module, "fit")
        loops = trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop
        runs, loaders = list(map(Run, self.runs)), [Loaders(loop._data_source) for loop in loops]
        base = {name: p.data for name, p in pl_module.named_parameters()}
        log.info(f"LoRASweep trains {len(runs)} adapters. The first table shows {runs[0].name}.")
        for run in runs:
            memo = {id(each): Callback() for each in trainer.callbacks if class_names(each) & hidden}
            memo[id(self)] = _Member(run, self.monitor, base, self.runs[run.name])
            copy_trainer(trainer, run, memo, loaders)
            hidden |= _SHOWN  # of the first run alone
        ranked, self.results = play(runs, self.keep, 1 if self.mode == "min" else -1), []
        for each in ranked:
            chosen = {key: self.runs[each.name][key] for key in self.varied}
            self.results.append({"name": each.name, **chosen, "metrics": each.metrics, "dropped": each.dropped})
        self._best = ranked[0]
        vars(self).update({**vars(LoRACallback(**self.runs[self._best.name])), "_training": self._training})
        at_end(setattr, trainer, "callbacks", trainer.callbacks)
        trainer.callbacks = [each for each in trainer.callbacks if not class_names(each) & _SHOWN]
        self._training.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Checkpoint directory")  # is not empty: the runs' files are in it

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Go on with the best adapter, where its fit ended."""
        self._loops = deepcopy(trainer.fit_loop.state_dict())
        adopt(trainer, self._best)
        super().on_fit_start(trainer, pl_module)
        _set_rng_states(self._best.random)
        self._training.callback(vars(self).pop, "_best", None)
        for limit in ("limit_train_batches", "limit_val_batches"):
            self._training.callback(setattr, trainer, limit, getattr(trainer, limit))
            setattr(trainer, limit, 0)

    def on_fit_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Show all adapters, and merge the best one's updates."""
        adopt_notes(trainer, self._best)  # now, as on_fit_start of the module may reset them
        fitting_console().print(self.table())
        if trainer.global_step:  # of the best run
            self._stage.phase = Phase.LOADED
        super().on_fit_end(trainer, pl_module)
        del self._loops

    def on_exception(self, trainer: Any, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the module, and let the next fit begin at the start."""
        super().on_exception(trainer, pl_module, exception)
        if loops := vars(self).pop("_loops", None):
            trainer.fit_loop.load_state_dict(loops)

    def table(self) -> Table:
        """Return a table of the adapters of the last fit."""
        table = Table("Adapter", *self.varied, self.monitor, "Dropped after validation", title="LoRASweep")
        for each in self.results:
            metrics = "  ".join(f"{value:.4g}" for value in each["metrics"])
            values = [str(each[key]).removesuffix(".0") for key in self.varied]
            table.add_row(each["name"], *values, metrics, str(each["dropped"] or ""))
        return table


class _Member(LoRACallback):
    """The LoRACallback of one run."""

    def __init__(self, run: Run, monitor: str, base: dict[str, Tensor], arguments: dict[str, Any]) -> None:
        super().__init__(**arguments)
        self.run, self.monitor, self.base = run, monitor, base

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        _set_rng_states(self.run.random)  # as in a fit of this adapter alone
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.merge, self._stage.phase = False, Phase.LOADED  # the sweep reads the adapters, trained or not, and merges
        share_base(pl_module, self.base)
        for each in trainer.callbacks:
            if vars(each).get("dirpath"):
                each.dirpath = str(Path(each.dirpath, self.run.name))

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:  # a training step has run
            self._check_base(pl_module)

    def on_fit_end(self, trainer: Any, pl_module: LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)  # it reads all weights
        self._check_base(pl_module)

    def _check_base(self, pl_module: LightningModule) -> None:
        note_changed(pl_module, anew=False)
        if changed := getattr(find_record(pl_module), "changed", None):
            raise ConfigError(
                f"The code of {type(pl_module).__name__} writes frozen weights: {listed(changed)}. All adapters of "
                "LoRASweep share them. Build the module anew, and use LoRACallback, or train them: modules_to_save."
            )

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        found, is_check = trainer.callback_metrics, trainer.sanity_checking
        is_kept = len(trainer.num_sanity_val_batches) == 1  # Lightning keeps nothing of a check of several loaders
        if self.monitor not in found and (not is_check or (is_kept and found)):
            raise ConfigError(
                f"monitor={self.monitor!r} is not logged in validation. Found: {listed(found)}. "
                f"Log it in validation_step: self.log({self.monitor!r}, ...)."
            )
        if not is_check:
            self.run.metrics.append(float(found[self.monitor]))


def _is_list(name: str, value: object) -> bool:
    """Whether it is a list of values for this argument."""
    return isinstance(value, list) and (name not in _LISTS or any(isinstance(each, list) for each in value))


def _named(argument: str, value: object) -> str:
    """An argument and its value as part of a name, also of a folder: ``r8`` or ``init_pissa``."""
    between = "" if isinstance(value, int | float) and not isinstance(value, bool) else "_"
    return argument + between + re.sub(r"[^\w.+]+", "_", str(value).removesuffix(".0")).strip("_")
