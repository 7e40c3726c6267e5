"""Summary of a model: what trains, and what it costs.

The costs are compared with those of full fine-tuning.
"""

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
"""Tensors that Adam and similar optimizers keep for each trained parameter."""

_PLAIN = (nn.Parameter, Tensor)


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose names differ only in a number.

    Args:
        name: Their name, with a ``*`` for the number.
        layers: Number of layers.
        kind: Their class.
        r: Rank of their adapters, or None.
        trained: Number of trained parameters in all of them.
        frozen: Number of frozen parameters in all of them.
    """

    name: str
    layers: int
    kind: str
    r: int | None
    trained: int
    frozen: int


@dataclass(frozen=True)
class LoRASummary:
    """The result of :func:`summarize`; it prints as a table.

    Args:
        title: Name of the model's class.
        groups: All layers that have parameters of their own, in groups.
        trained: Number of trained parameters.
        frozen: Number of frozen parameters.
        optimizer_bytes: Size of Adam's state for the trained parameters.
        full_optimizer_bytes: Size of Adam's state for all parameters of the base.
        checkpoint_bytes: Size of the weights in a checkpoint.
        full_checkpoint_bytes: Size of the weights in a checkpoint of full fine-tuning.
        adapters: Number of adapters.
        merged: Whether the updates are merged into the weights.
        plain: Whether the model has only its own classes and parameters: it was never adapted, or it is merged.
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
        """Share of parameters that train, from 0 to 1."""
        return self.trained / max(self.trained + self.frozen, 1)

    def table(self, *, trained_only: bool = False) -> Group:
        """Return the summary as a rich table.

        Two lines of costs follow below it, unless the model is plain.

        Args:
            trained_only: Put all groups without trained parameters into one row.
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
        """Print as a table with rich."""
        return self.table()

    def __str__(self) -> str:
        """Print as a table."""
        console = Console(width=100, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def summarize(model: nn.Module) -> LoRASummary:
    """Count the trained parameters of ``model``, and their costs.

    The costs are compared with those of full fine-tuning.

    Args:
        model: Any module, with or without adapters. Print the summary of a plain model to see the names of its layers.

    Returns:
        The summary. ``print`` shows it as a table.

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
    """Bytes of the parameters in full fine-tuning; quantised ones would train as float32."""
    return sum(p.nbytes if type(p) in _PLAIN and p.is_floating_point() else 4 * count(p) for p in parameters)


def _end_of(name: str, most: int = 26) -> str:
    """The last parts of a long name, so that the table fits a terminal."""
    parts = name.split(".")
    while len(parts) > 1 and (len(".".join(parts)) > most or (parts[0] == "*" and len(name) > most)):
        parts = parts[1:]
    return ".".join(parts) if len(".".join(parts)) == len(name) else "…" + ".".join(parts)


def _size(number: float) -> str:
    """A number of bytes as text, in powers of 1,000 as for files."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
