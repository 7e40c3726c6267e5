"""LoRASweep: several adapters, each in fits of its own, of which the better ones go on.

``LoRASweep.run`` trains each adapter, a :class:`.SweptAdapter`, in one or more fits. A
fit is one call of the user's function. Two public names say "run" of an adapter:
``LoRASweep.runs`` has the arguments of each, and ``run`` of the callback that the
function gets is the adapter's name.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from rich.table import Column, Table

from lightning_lora.callback import LoRACallback
from lightning_lora.errors import ConfigError, counted, listed, warn
from lightning_lora.printing import fitting_console
from lightning_lora.sweep_run import FitFunction, SweptAdapter

_LISTS = {
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "modules_to_save",
    "trainable_token_indices",
}
"""Arguments of which one value may be a list itself."""


class LoRASweep:
    """Train several adapters, and keep the best.

    After each epoch with a validation, the better ones go on, from their files
    (successive halving). Each trains exactly as alone, to the bit, and at the end the
    module is merged as after a fit of the best one alone.

    Args:
        monitor: The metric that decides, logged in validation.
        mode: Whether ``"min"`` or ``"max"`` is best. It may be left out for a loss.
        keep: The share of the adapters that goes on. 1 keeps all to the end.
        directory: The folder for the file of each adapter. It is made. Files of an
            earlier sweep with the same names are written over, with a warning.
        arguments: LoRACallback's, as values or lists of values (of lists, for
            ``target_modules`` and the like). At least one has several.

    Raises:
        ConfigError: an argument has an invalid value.

    Source:
        Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and
        Hyperparameter Optimization", figure 1.

    Example:
        >>> sweep = LoRASweep(r=[8, 16], alpha=[16, 32], dropout=0.1)
        >>> sweep
        LoRASweep(r=[8, 16], alpha=[16, 32], dropout=0.1)
        >>> list(sweep.runs)
        ['r8-alpha16', 'r8-alpha32', 'r16-alpha16', 'r16-alpha32']
    """

    # the arguments of each adapter, by its name
    runs: dict[str, dict[str, Any]]
    # what SweptAdapter.result says of each adapter, the best one first
    results: list[dict[str, Any]]

    def __init__(
        self,
        *,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] | None = None,
        keep: float = 0.5,
        directory: str | Path = "lora_sweep",
        **arguments: Any,
    ) -> None:
        mode = _checked_mode(mode, monitor)
        _check_share(keep)
        self.monitor = monitor
        self.mode = mode
        self.keep = keep
        self.directory = Path(directory)
        self.runs = {}
        self.results = []
        self._arguments = arguments
        values_of = {
            name: _values_to_try(name, value) for name, value in arguments.items()
        }
        # the arguments of which there are several values to try
        self._varied = [name for name, values in values_of.items() if len(values) > 1]
        for combination in itertools.product(*values_of.values()):
            self._add(dict(zip(arguments, combination, strict=True)))
        if len(self.runs) < 2:
            raise ConfigError(
                f"{self} has one adapter: each argument has one value. Give a list of "
                f"values, such as r=[4, 8].{_about_lists(arguments)}"
            )

    def _add(self, arguments: dict[str, Any]) -> None:
        """Add an adapter under a name that says its arguments."""
        LoRACallback(**arguments)  # checks them
        if arguments in self.runs.values():
            varied = [f"{name}={arguments[name]!r}" for name in self._varied]
            raise ConfigError(
                f"{self} has an adapter twice: {', '.join(varied)}. Expected each value "
                "once."
            )
        parts = [_part_of_name(name, arguments[name]) for name in self._varied]
        name = "-".join(parts)[:200]
        if name in self.runs:
            name = f"{name}_{len(self.runs) + 1}"
        self.runs[name] = arguments

    def __repr__(self) -> str:
        """Show the arguments of the adapters."""
        arguments = list[str]()
        for name, value in self._arguments.items():
            arguments.append(f"{name}={value!r}")
        return f"LoRASweep({', '.join(arguments)})"

    def run(self, fit: FitFunction) -> list[dict[str, Any]]:
        """Train all adapters, merge the best one, show a table, and return ``results``.

        Args:
            fit: A function of a callback, which has the adapter's name as its attribute
                ``run``, and of a ``ckpt_path`` or None. It makes a Trainer with the
                callback, and fits with the ``ckpt_path``: all epochs, as if it were
                alone. It is called several times for each adapter. The module may be
                the same in all calls, or a new one with the same weights.

        Raises:
            ConfigError: ``fit`` does not use what it gets, ``monitor`` is not logged,
                or is NaN for all adapters. No adapter is on the module then.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        adapters = list[SweptAdapter]()
        for name, arguments in self.runs.items():
            adapters.append(SweptAdapter(name, arguments, self.directory, self.monitor))
        self._tell_what_is_written_over(adapters)
        self._train(adapters, fit)
        adapters.sort(key=self._order)
        self.results = [adapter.result(self._varied, self.mode) for adapter in adapters]
        try:
            self._merge(adapters[0], fit)
        finally:
            rank_zero_only(fitting_console().print)(self.table())
        return self.results

    def _tell_what_is_written_over(self, adapters: Iterable[SweptAdapter]) -> None:
        """Name files of an earlier sweep, perhaps of other adapters or another base."""
        files = [adapter.file.name for adapter in adapters if adapter.file.exists()]
        if files:
            warn(
                f"LoRASweep writes over {counted(len(files), 'file')} of an earlier sweep "
                f"in {self.directory}: {listed(files)}. To keep them, give this sweep "
                "another directory.",
                anew=True,
            )

    def _train(self, adapters: Sequence[SweptAdapter], fit: FitFunction) -> None:
        """Train all adapters in turns, until each was trained to the end or dropped.

        A turn is a fit of each: to the next validation while some will be dropped, and
        otherwise to the end. The first fit of all is followed by a short one, so that
        a ``fit`` that forgets its path is known before the other adapters train.
        """
        while adapters:
            will_drop_some = len(adapters) > 1 and self.keep < 1
            for adapter in adapters:
                is_first_fit = not adapters[0].epochs
                adapter.go_on(fit, to_next_validation=will_drop_some)
                if is_first_fit:
                    adapter.check_goes_on(fit)
            adapters = [adapter for adapter in adapters if not adapter.has_ended]
            if adapters:
                adapters = self._drop_worse(adapters)

    def _drop_worse(self, adapters: Sequence[SweptAdapter]) -> list[SweptAdapter]:
        """Drop the worse adapters. Return those that go on."""
        ranked = sorted(adapters, key=self._order)
        best = ranked[0]
        count = math.ceil(len(ranked) * self.keep)
        going_on = f"{count} of {len(ranked)} go on"
        rank_zero_info(
            f"LoRASweep, epoch {best.epochs}: {best.name} is best; {going_on}."
        )
        for adapter in ranked[count:]:
            adapter.dropped = adapter.epochs
        return ranked[:count]

    def _order(self, adapter: SweptAdapter) -> tuple[bool, float, float]:
        """The key that sorts the best adapter first: NaN last, then who trained longest, then by the last metric."""
        value = adapter.metrics[-1]
        trained_epochs = adapter.dropped or math.inf
        badness = value if self.mode == "min" else -value
        return math.isnan(value), -trained_epochs, badness

    def _merge(self, best: SweptAdapter, fit: FitFunction) -> None:
        """Merge the best adapter, in a fit that ends at once."""
        if math.isnan(best.metrics[-1]):
            raise ConfigError(
                f"{self.monitor} is NaN for all adapters: none is best, and none is "
                f"merged. Their files are in {self.directory}. Try a lower learning "
                "rate."
            )
        if not best.merge(fit):
            raise ConfigError(
                "LoRASweep expects that fit fits in each call: the last one merges the "
                f"best adapter, and did not. Its file is {best.file}."
            )

    def table(self) -> Table:
        """Return a table of the adapters that ``run`` has trained last."""
        table = Table(
            "Adapter",
            Column("Weights", justify="right"),
            self.monitor,
            "Best (epoch)",
            "Dropped\nafter epoch",
            title="LoRASweep",
        )
        for result in self.results:
            table.add_row(
                result["name"],
                f"{result['weights']:,}",
                _last_values(result["metrics"]),
                _best_value(result),
                str(result["dropped"] or ""),
            )
        return table


def _checked_mode(mode: Any, monitor: str) -> Literal["min", "max"]:
    """Which value of the metric is best: as given, or the least one of a loss."""
    if mode is None and "loss" in monitor:
        return "min"
    if mode is None:
        raise ConfigError(
            f"monitor={monitor!r} is not called a loss, so LoRASweep cannot tell which "
            "value is best. Write mode='max' if it is a high one, as of an accuracy, or "
            "mode='min'."
        )
    if mode not in ("min", "max"):
        raise ConfigError(f"mode={mode!r} is not valid. Expected 'min' or 'max'.")
    best: Literal["min", "max"] = mode
    return best


def _check_share(keep: Any) -> None:
    """Refuse what is no share of the adapters."""
    is_share = isinstance(keep, int | float) and 0 < keep <= 1
    if not is_share:
        raise ConfigError(
            f"keep={keep!r} is not valid. Expected the share of the adapters that goes "
            "on, above 0 and at most 1, such as keep=0.5."
        )


def _values_to_try(argument: str, given: object) -> Sequence[Any]:
    """The values of an argument: one, or those in a list."""
    if not _is_list(given):
        return [given]
    values: Any = given
    if argument in _LISTS and not any(map(_is_list, values)):
        return [given]
    if not values:
        raise ConfigError(
            f"{argument}={given!r} is not valid. Expected a list of values to try, or "
            "one value."
        )
    return values  # type: ignore[no-any-return]


def _is_list(value: object) -> bool:
    """Whether it is a list or a tuple."""
    return isinstance(value, list | tuple)


def _about_lists(arguments: Mapping[str, Any]) -> str:
    """What to write for the arguments of which the one value is a list."""
    remedies = list[str]()
    for name, value in arguments.items():
        is_one_list = _is_list(value) and not any(map(_is_list, value))
        if name in _LISTS and is_one_list:
            remedies.append(f"{name}=[{list(value)!r}, [...]]")
    if not remedies:
        return ""
    return (
        f" Where a value is a list itself, give a list of lists: {', '.join(remedies)}."
    )


def _last_values(metrics: Sequence[float]) -> str:
    """The last four of some numbers, for a cell."""
    shown = "  ".join(f"{value:.4g}" for value in metrics[-4:])
    return f"... {shown}" if len(metrics) > 4 else shown


def _best_value(result: Mapping[str, Any]) -> str:
    """The best metric of an adapter with its epoch, for a cell."""
    if result["best_epoch"] is None:
        return ""
    return f"{result['best']:.4g} ({result['best_epoch']})"


def _part_of_name(argument: str, value: object) -> str:
    """An argument and its value as a short part of a name, also of a file: ``r8`` or ``init_pissa``."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    between = "" if is_number else "_"
    text = re.sub(r"[^\w.+]+", "_", str(value).removesuffix(".0"))
    return argument + between + text[:60].strip("_")
