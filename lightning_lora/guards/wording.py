"""What several guards write: the arguments that would help, with the names to put there."""

from collections.abc import Iterable

from lightning_lora.errors import LoRAWarning, warn
from lightning_lora.model.view import View
from lightning_lora.targets.find_names import find_names
from lightning_lora.targets.lookup import Lookup

MOST_NAMES = 5
"""A message names no more layers, and then writes ``[...]`` for the argument."""


def warn_in_each_fit(message: str, category: type[LoRAWarning] = LoRAWarning) -> None:
    """Warn, also if an earlier fit of the same line has warned."""
    warn(message, category, anew=True)


def in_full_or_excluded(names: list[str]) -> str:
    """Return the two arguments under which these layers get no adapters, as the end of a sentence and another one."""
    entries = str(names) if len(names) <= MOST_NAMES else "[...]"
    return f"modules_to_save={entries}. Or leave them out: exclude_modules={entries}."


def to_save(view: View, names: Iterable[str]) -> str:
    """Return the ``modules_to_save`` to write, with what it already lists."""
    listed_already = view.config.modules_to_save or ()
    return f"modules_to_save={list(dict.fromkeys([*listed_already, *names]))}"


def excluded_names(view: View) -> list[str]:
    """Return the modules that ``exclude_modules`` means."""
    return find_names(
        Lookup(view.model), "exclude_modules", view.config.exclude_modules
    )
