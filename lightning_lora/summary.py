"""What of a model trains, what it costs, and what full fine-tuning would cost instead."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from torch import Tensor, nn

from lightning_lora.layers import LoRALayer, count
from lightning_lora.model.view import View
from lightning_lora.storage.state import adapter_state_dict
from lightning_lora.tensors.inplace import InPlace

_ADAM_MOMENTS = 2
"""Tensors that Adam and its kin keep for each trained parameter."""

_PLAIN = (nn.Parameter, Tensor)


@dataclass(frozen=True)
class LayerGroup:
    """Layers that differ only in a number of their names.

    Args:
        name: Their name, with a ``*`` for the number.
        layers: How many they are.
        kind: Their class.
        r: The rank of their adapters, or None.
        trained: Parameters that train, in all of them.
        frozen: Parameters that do not.
    """

    name: str
    layers: int
    kind: str
    r: int | None
    trained: int
    frozen: int


@dataclass(frozen=True)
class LoRASummary:
    """What :func:`summarize` returns; it prints as a table.

    Args:
        title: The model's class.
        groups: Every layer that has parameters of its own, in groups.
        trained: Parameters that train.
        frozen: Parameters that do not.
        optimizer_bytes: State that Adam keeps for the trained parameters.
        full_optimizer_bytes: State that it would keep for all parameters of the base.
        checkpoint_bytes: Weights in a checkpoint.
        full_checkpoint_bytes: Weights in a checkpoint of full fine-tuning.
        adapters: How many adapters the model has.
        merged: Whether the updates are merged into the weights.
        plain: Whether the model has only its own classes and parameters: it was never adapted, or is merged.
    """

    title: str
    groups: tuple[LayerGroup, ...]
    trained: int
    frozen: int
    optimizer_bytes: int
    full_optimizer_bytes: int
    checkpoint_bytes: int
    full_checkpoint_bytes: int
    adapters: int
    merged: bool
    plain: bool

    @property
    def share(self) -> float:
        """Trained parameters over all of them."""
        return self.trained / max(self.trained + self.frozen, 1)

    def table(self, *, trained_only: bool = False) -> Group:
        """Return the summary as a rich table, and two lines of costs below it.

        Args:
            trained_only: Put the groups in which nothing trains into one row.
        """
        table = Table(title=self._headline(), min_width=60)
        table.add_column("Layers", overflow="fold")
        table.add_column("Type")
        for heading in ("r", "Trained", "Frozen"):
            table.add_column(heading, justify="right", no_wrap=True)
        shown = [group for group in self.groups if group.trained or not trained_only]
        rest = [group for group in self.groups if group not in shown]
        for group in shown:
            times = f" (×{group.layers})" if group.layers > 1 else ""
            r = "–" if group.r is None else str(group.r)
            name = _end_of(group.name) if trained_only else group.name
            table.add_row(name + times, group.kind, r, f"{group.trained:,}", f"{group.frozen:,}")
        if rest:
            layers = sum(group.layers for group in rest)
            table.add_row(
                f"{layers} other layer{'s' if layers > 1 else ''}",
                "",
                "–",
                "0",
                f"{sum(group.frozen for group in rest):,}",
            )
        table.add_section()
        table.add_row("Total", "", "", f"{self.trained:,}", f"{self.frozen:,}", style="bold")
        if self.plain:
            return Group(table)
        costs = Table.grid(padding=(0, 2))
        for what, ours, full in (
            ("Optimizer state (Adam)", self.optimizer_bytes, self.full_optimizer_bytes),
            ("Weights in a checkpoint", self.checkpoint_bytes, self.full_checkpoint_bytes),
        ):
            costs.add_row(what, _size(ours), f"full fine-tuning: {_size(full)}")
        return Group(table, costs)

    def _headline(self) -> str:
        adapters = f"{self.adapters} adapter{'' if self.adapters == 1 else 's'}"
        if self.plain:
            return f"{self.title} is a plain model" + (f", with {adapters} merged into it" if self.adapters else "")
        return f"LoRA: {self.title} trains {self.share:.2%} of its parameters"

    def __rich__(self) -> Group:
        """Print as the whole table under rich."""
        return self.table()

    def __str__(self) -> str:
        """Print as the whole table."""
        console = Console(width=100, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def summarize(model: nn.Module) -> LoRASummary:
    """Count what trains in ``model``, and what it costs.

    The costs are shown beside those of full fine-tuning.

    Args:
        model: Any module, with adapters or without. Print the summary of a plain model to see its layers' names.

    Returns:
        The counts; ``print`` shows them as a table.

    Example:
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        >>> names = inject_adapters(model, LoRAConfig(r=2))
        >>> summary = summarize(model)
        >>> summary.trained, summary.frozen, summary.groups[0].name
        (128, 544, '*')
    """
    grouped: dict[tuple[str, str, int | None], list[tuple[int, int]]] = {}
    seen: set[int] = set()
    view = View(model)
    for name, module in view.modules.items():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in own)
        if own:
            trained = sum(count(p) for p in own if p.requires_grad)
            r = module.lora_settings.r if isinstance(module, LoRALayer) else None
            kind = module.overlaid[1].__name__ if isinstance(module, InPlace) else type(module).__name__
            key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", name) or "(root)", kind, r)
            grouped.setdefault(key, []).append((trained, sum(count(p) for p in own) - trained))
    groups = tuple(
        LayerGroup(name, len(rows), kind, r, sum(trained for trained, _ in rows), sum(frozen for _, frozen in rows))
        for (name, kind, r), rows in grouped.items()
    )
    return _with_costs(view, groups)


def _with_costs(view: View, groups: tuple[LayerGroup, ...]) -> LoRASummary:
    model, merged = view.model, len(view.adapted_parts) if view.is_merged else 0
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    added = {id(p) for p in view.adapters.values()}
    base = [p for p in model.parameters() if id(p) not in added]
    state = adapter_state_dict(model) if view.is_adapted else model.state_dict()
    return LoRASummary(
        title=type(model).__name__,
        groups=groups,
        trained=sum(map(count, trained)),
        frozen=sum(map(count, frozen)),
        optimizer_bytes=_ADAM_MOMENTS * _bytes(trained),
        full_optimizer_bytes=_ADAM_MOMENTS * _full_bytes(base),
        checkpoint_bytes=_bytes(state.values()),
        full_checkpoint_bytes=_full_bytes(base) + _bytes(view.buffers.values()),
        adapters=merged or len(view.layers),
        merged=view.is_merged,
        plain=not view.layers,
    )


def _bytes(values: Iterable[Any]) -> int:
    """The size of tensors in a file or in memory. Tensors that share their memory count once."""
    sizes = {}
    for value in values:
        if isinstance(value, Tensor):
            place = value.data_ptr() if type(value) in _PLAIN else 0  # other classes have no pointer, and meta has 0
            sizes[place or id(value), value.nbytes] = value.nbytes
    return sum(sizes.values())


def _full_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """What parameters take that could be trained: quantised ones cannot, but as float32."""
    return sum(p.nbytes if type(p) in _PLAIN and p.is_floating_point() else 4 * count(p) for p in parameters)


def _end_of(name: str, most: int = 26) -> str:
    """The last parts of a long name, which tell it from others, for a table that fits a terminal."""
    parts = name.split(".")
    while len(parts) > 1 and (len(".".join(parts)) > most or (parts[0] == "*" and len(name) > most)):
        parts = parts[1:]
    return ".".join(parts) if len(".".join(parts)) == len(name) else "…" + ".".join(parts)


def _size(number: float) -> str:
    """A number of bytes as people read it, in powers of 1,000 as files are measured."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
