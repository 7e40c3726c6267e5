"""Summary of a model: what trains, and what it costs.

The costs are compared with those of full fine-tuning.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.optim import Adam, Adamax, AdamW, NAdam, Optimizer, RAdam

from lightning_lora.layer_names import Indices, Template, short_names, spelled
from lightning_lora.layers import LoRALayer, LoRAParameters, count
from lightning_lora.model.view import View
from lightning_lora.storage.stored import without_base
from lightning_lora.tensors.inplace import InPlace
from lightning_lora.tensors.names import join, state_dict, submodule

_ADAM_MOMENTS = 2
"""Tensors that Adam and similar optimizers keep for each trained parameter."""

_LIKE_ADAM = (Adam, Adamax, AdamW, NAdam, RAdam)

_PLAIN = (nn.Parameter, Tensor)

_NARROW = 72
"""Below this width, a table has no column of types, and rounded numbers."""

_MOST = 8
"""The number of layers that a line names."""

_LOG_WIDTH = 120
"""The width of a table that is not printed to a terminal."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose names differ only in the numbers of blocks.

    Args:
        name: Their name, with a ``*`` for a number that differs.
        layers: Number of layers.
        kind: Their class.
        r: Rank of their adapters, or None.
        trained: Number of trained parameters in all of them.
        frozen: Number of frozen parameters in all of them.
        parts: Names of the matrices that are adapted, if a layer has several.
    """

    name: str
    layers: int
    kind: str
    r: int | None
    trained: int
    frozen: int
    parts: tuple[str, ...] = ()


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
        smaller: Names of layers that are too small for the rank asked, each with the rank that it has.
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
    smaller: tuple[tuple[str, int], ...] = ()

    @property
    def share(self) -> float:
        """Share of parameters that train, from 0 to 1."""
        return self.trained / max(self.trained + self.frozen, 1)

    def table(self, *, trained_only: bool = False, optimizers: Sequence[Optimizer] = ()) -> "SummaryTable":
        """Return the summary as a table for rich.

        Two lines of costs follow below it, unless the model is plain.

        Args:
            trained_only: Put all groups without trained parameters into one row.
            optimizers: The optimizers that train the model. Their state is shown only if they keep what Adam keeps.
        """
        return SummaryTable(self, trained_only, tuple(optimizers))

    def headline(self) -> str:
        """Return the title of the table."""
        adapters = f"{self.adapters} adapter{'' if self.adapters == 1 else 's'}"
        if self.plain:
            return f"{self.title} is a plain model" + (f", with {adapters} merged into it" if self.adapters else "")
        return f"LoRA: {self.title} trains {self.share:.2%} of its parameters"

    def __rich__(self) -> "SummaryTable":
        """Print as a table with rich."""
        return self.table()

    def __str__(self) -> str:
        """Print as a table."""
        console = fitting_console(no_color=True, force_jupyter=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


@dataclass(frozen=True)
class SummaryTable:
    """The table of a summary, for any width.

    Args:
        summary: What it shows.
        trained_only: Put all groups without trained parameters into one row.
        optimizers: The optimizers that train the model.
    """

    summary: LoRASummary
    trained_only: bool = False
    optimizers: tuple[Optimizer, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        """Lay out the table, then the costs."""
        narrow = options.max_width < _NARROW
        yield Text(self.summary.headline(), style="bold")
        yield self._layers(options.max_width, narrow)
        if self.summary.smaller:
            names = [f"{name} (r={r})" for name, r in self.summary.smaller]
            more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
            yield Text(f"Layers smaller than r have their largest rank: {', '.join(names[:_MOST])}{more}")
        if not self.summary.plain:
            yield self._costs("full" if narrow else "full fine-tuning")

    def _layers(self, width: int, narrow: bool) -> Table:
        summary, number = self.summary, _rounded if narrow else "{:,}".format
        shown = [group for group in summary.groups if group.trained or not self.trained_only]
        rest = [group for group in summary.groups if group not in shown]
        cells = [(g.kind, "–" if g.r is None else str(g.r), number(g.trained), number(g.frozen)) for g in shown]
        if rest:
            cells.append(("", "–", "0", number(sum(group.frozen for group in rest))))
        cells.append(("", "", number(summary.trained), number(summary.frozen)))
        headings = ("Type", "r", "Trained", "Frozen")
        columns = range(1 if narrow else 0, 4)
        taken = sum(3 + max(len(row[i]) for row in (headings, *cells)) for i in columns)
        names = _short_names(shown, width - taken - (0 if narrow else 4))
        if rest:
            layers = sum(group.layers for group in rest)
            names.append(f"{layers} other layer{'s' if layers > 1 else ''}")
        table = Table(show_edge=not narrow, pad_edge=not narrow)
        table.box = box.SIMPLE_HEAD if narrow else box.HEAVY_HEAD
        table.add_column("Layers", overflow="fold")
        for i in columns:
            table.add_column(headings[i], justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
        for name, row in zip(names, cells[:-1], strict=True):
            table.add_row(Text(name), *(row[i] for i in columns))
        table.add_section()
        table.add_row("Total", *(cells[-1][i] for i in columns), style="bold")
        return table

    def _costs(self, full_name: str) -> Table:
        summary, costs = self.summary, Table.grid(padding=(0, 2))
        kinds = ", ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in self.optimizers))
        rows = [("Weights in a checkpoint", summary.checkpoint_bytes, summary.full_checkpoint_bytes)]
        if all(isinstance(optimizer, _LIKE_ADAM) for optimizer in self.optimizers):
            what = f"State of {kinds}" if kinds else "Optimizer, two moments"
            rows.insert(0, (what, summary.optimizer_bytes, summary.full_optimizer_bytes))
        for what, ours, full in rows:
            costs.add_row(what, decimal(ours), f"{full_name}: {decimal(full)}")
        return costs


def fitting_console(**options: Any) -> Console:
    """Return a console of the terminal's width.

    A log file has no width of its own, so that names are not cut there.
    """
    console = Console(**options)
    if not (console.is_terminal or console.is_jupyter or "COLUMNS" in os.environ):
        console = Console(width=_LOG_WIDTH, **options)
    return console


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
        >>> summary.trained, summary.frozen, [group.name for group in summary.groups]
        (128, 544, ['0', '2'])
    """
    view = View(model)
    layers: dict[tuple[Any, ...], list[tuple[Indices, int, int]]] = {}
    seen: set[int] = set()
    for name, module in view.modules.items():
        own = [p for p in _own_parameters(module) if id(p) not in seen]
        seen.update(map(id, own))
        if own:
            trained = sum(count(p) for p in own if p.requires_grad)
            frozen = sum(count(p) for p in own) - trained
            template, indices = _template(name, view.modules)
            key = (template, *_about(module), _smaller(view, name))
            layers.setdefault(key, []).append((indices, trained, frozen))
    groups, smaller = list[LayerGroup](), list[tuple[str, int]]()
    for (template, kind, r, parts, weights), rows in layers.items():
        others = [key for key in layers if key[0] == template]
        name = spelled(template, [indices for indices, _, _ in rows], exactly=len(others) > 1)
        trained, frozen = sum(row[1] for row in rows), sum(row[2] for row in rows)
        groups.append(LayerGroup(name, len(rows), kind, r, trained, frozen, parts))
        smaller += [(join(name, weight), rank) for weight, rank in weights]
    return _with_costs(view, tuple(groups), tuple(smaller))


def _about(module: nn.Module) -> tuple[str, int | None, tuple[str, ...]]:
    """A layer's own class, and the rank and the parts of its adapter."""
    kind = module.overlaid[1].__name__ if isinstance(module, InPlace) else type(module).__name__
    if not isinstance(module, LoRALayer):
        return kind, None, ()
    return kind, module.lora_settings.r, tuple(part.name for part in module.lora_matrices if part.name)


def _smaller(view: View, name: str) -> tuple[tuple[str, int], ...]:
    """A layer's weights that are too small for the rank asked, with their ranks. One name is empty for all of them."""
    layer, found = view.layers.get(name), dict[str, int]()
    if layer is None or not view.is_adapted:
        return ()
    for part in layer.lora_matrices:
        target = join(name, part.weight) if isinstance(layer, LoRAParameters) else name
        r = part.rank(layer.lora_settings.r)
        if r < view.config.rank(name, target):
            found[part.weight] = r
    are_all = len(found) == len(layer.lora_weights()) and len({*found.values()}) == 1
    return (("", next(iter(found.values()))),) if are_all else tuple(found.items())


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """A layer's parameters, with those of the layers inside it whose weights its adapter updates."""
    weights = module.lora_weights() if isinstance(module, LoRALayer) else ()
    holders = dict.fromkeys(submodule(module, weight.rpartition(".")[0]) for weight in weights)
    return [p for holder in {module: None, **holders} for p in holder.parameters(recurse=False)]


def _with_costs(view: View, groups: tuple[LayerGroup, ...], smaller: tuple[tuple[str, int], ...]) -> LoRASummary:
    model, merged = view.model, len(view.matrices) if view.is_merged else 0
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    added = {id(p) for p in view.adapters.values()}
    base = [p for p in model.parameters() if id(p) not in added]
    state = without_base(view, state_dict(model)) if view.is_adapted else model.state_dict()
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
        smaller=smaller,
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


def _rounded(number: int) -> str:
    """A number of parameters in three digits."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:.0f} {unit}"
    return str(number)


# Names


def _template(name: str, modules: Mapping[str, nn.Module]) -> tuple[Template, Indices]:
    """Split a name into what it has in common with other blocks, and its indices.

    An index is a number in place of a name, or at the end of a block's name. The number of a layer in an nn.Sequential,
    or at the end of a layer's own name, says which layer it is.
    """
    parts = name.split(".")
    template: list[tuple[str, str | None]] = []
    indices = []
    for place, part in enumerate(parts):
        path, parent = ".".join(parts[: place + 1]), ".".join(parts[:place])
        text, number = re.fullmatch(r"(.*?)(\d*)", part).groups()  # type: ignore[union-attr]  # it always matches
        is_block = place < len(parts) - 1
        is_item = not text and not isinstance(modules.get(parent), nn.Sequential)
        if number and (is_block or is_item):
            template.append((text, type(modules[path]).__name__ if is_block else ""))
            indices.append(int(number))
        else:
            template.append((part, None))
    return tuple(template), tuple(indices)


def _short_names(groups: Sequence[LayerGroup], room: int) -> list[str]:
    """Names that fit into a column, with the parts and the number of layers behind them."""
    tails = [f" (×{group.layers})" if group.layers > 1 else "" for group in groups]
    texts = []
    for group, name, tail in zip(
        groups, short_names([group.name for group in groups], room, tails), tails, strict=True
    ):
        parts = f" [{','.join(group.parts)}]" if group.parts else ""
        texts.append(name + (parts if len(parts) <= room else "") + tail)
    return texts
