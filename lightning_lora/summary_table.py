"""The table of a summary: a headline, a row for each group of layers, and the costs."""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from torch.optim import Adam, Adamax, AdamW, NAdam, Optimizer, RAdam

from lightning_lora.errors import counted, listed
from lightning_lora.printing import Writable
from lightning_lora.tables import LayerName, layer_table

if TYPE_CHECKING:
    from lightning_lora.summary import LayerGroup, LoRASummary, NamedAdapters

# they keep two tensors for each trained parameter
_LIKE_ADAM = (Adam, Adamax, AdamW, NAdam, RAdam)


def table_of(
    summary: "LoRASummary",
    *,
    trained_only: bool,
    optimizers: Sequence[Optimizer],
    rates: Sequence[str],
) -> Writable:
    """Return a headline, a table and the costs, as :meth:`LoRASummary.table` does."""
    shown = _groups_that_train_most(summary) if trained_only else summary.groups
    headline = Text(_headline(summary), style="bold")
    layers = _layers(summary, shown)
    if summary.plain:
        return Writable(headline, layers)
    costs = _costs(summary, optimizers)
    if any(rates):
        costs.add_row("Learning rate", *rates)
    return Writable(headline, layers, costs)


def _headline(summary: "LoRASummary") -> str:
    """What a model is: one with adapters, or a plain one, perhaps with adapters merged into it."""
    title = summary.title
    if not summary.plain:
        return (
            f"LoRA{summary.active}: {title} trains {summary.share:.2%} of its "
            "parameters"
        )
    if not summary.adapters:
        return f"{title} is a plain model"
    adapters = counted(summary.adapters, "adapter")
    return f"{title} is a plain model, with {adapters} merged into it{summary.active}"


def text_on_adapters(named: "NamedAdapters | None") -> str:
    """Return what the headline says of named adapters, with a blank before it: `` 'a' (new; 'b' rests)``."""
    if named is None:
        return ""
    states = ["new" if named.is_new else "trained before"]
    if named.resting:
        rest = "rests" if len(named.resting) == 1 else "rest"
        states.append(f"{listed(named.resting)} {rest}")
    if named.is_base_shown:
        states.append("the base is shown")
    return f" {named.active_name!r} ({'; '.join(states)})"


def _groups_that_train_most(summary: "LoRASummary") -> list["LayerGroup"]:
    """The groups of the 15 rows that train most, in the order of all groups."""
    most_first = sorted(summary.groups, key=attrgetter("trained"), reverse=True)
    first_15 = most_first[:15]
    return [
        group for group in summary.groups if group.trained > 0 and group in first_15
    ]


# The layers


def _layers(summary: "LoRASummary", shown: Sequence["LayerGroup"]) -> Table:
    """The table of these groups, with a row for all others."""
    table = layer_table("r", "Trained", "Frozen")
    for group in shown:
        numbers = _cells_of_numbers(group.trained, group.frozen)
        table.add_row(LayerName(_shown_name(group)), group.kind, group.r, *numbers)
    others = _left_out_of(shown, summary.groups)
    if others:
        trained, frozen = total_counts(others)
        name = _name_of_others(others, trains=trained > 0)
        table.add_row(LayerName(name), "", "–", *_cells_of_numbers(trained, frozen))
    table.add_section()
    table.add_row(
        "Total",
        "",
        "",
        *_cells_of_numbers(summary.trained, summary.frozen),
        style="bold",
    )
    return table


def _shown_name(group: "LayerGroup") -> str:
    """The layers' name, the names of the adapted matrices, and how many layers there are."""
    name = group.name
    if group.parts:
        name += f" [{','.join(group.parts)}]"
    if group.layers > 1:
        name += f" (×{group.layers})"
    return name


def _name_of_others(groups: Iterable["LayerGroup"], *, trains: bool) -> str:
    """What stands for groups that a table leaves out.

    If something in them trains, it says how to see them.
    """
    layers = sum(group.layers for group in groups)
    name = counted(layers, "other layer")
    if trains:
        name += ": lightning_lora.summarize(model)"
    return name


def _left_out_of(
    shown: Iterable["LayerGroup"], groups: Iterable["LayerGroup"]
) -> list["LayerGroup"]:
    """The groups that are not shown."""
    shown = set(shown)
    return [group for group in groups if group not in shown]


def _cells_of_numbers(trained: int, frozen: int) -> tuple[str, str]:
    return f"{trained:,}", f"{frozen:,}"


def total_counts(groups: Iterable["LayerGroup"]) -> tuple[int, int]:
    """Return how many values train in all of these layers, and how many do not."""
    trained = frozen = 0
    for group in groups:
        trained += group.trained
        frozen += group.frozen
    return trained, frozen


# The costs


def _costs(summary: "LoRASummary", optimizers: Sequence[Optimizer]) -> Table:
    costs = Table.grid(padding=(0, 2))
    are_like_adam = all(isinstance(optimizer, _LIKE_ADAM) for optimizer in optimizers)
    if are_like_adam:
        state = f"State of {_classes_of(optimizers)}"
        _add_cost(costs, state, summary.optimizer_bytes, summary.full_optimizer_bytes)
    _add_cost(
        costs,
        "Weights in a checkpoint",
        summary.checkpoint_bytes,
        summary.full_checkpoint_bytes,
    )
    return costs


def _classes_of(optimizers: Sequence[Optimizer]) -> str:
    """The classes of a fit's optimizers. Without a fit, it is Adam."""
    if not optimizers:
        return "Adam"
    names = [type(optimizer).__name__ for optimizer in optimizers]
    return ", ".join(dict.fromkeys(names))


def _add_cost(costs: Table, what: str, size: int, full_size: int) -> None:
    costs.add_row(what, decimal(size), f"full fine-tuning: {decimal(full_size)}")
