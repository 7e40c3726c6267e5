"""Summary of a model: what trains, and what it costs beside full fine-tuning."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.optim import Adam, Adamax, AdamW, NAdam, Optimizer, RAdam

from lightning_lora.errors import listed
from lightning_lora.layers import LoRALayer, count
from lightning_lora.model.fresh import random_weights
from lightning_lora.model.record import find_record
from lightning_lora.model.view import View
from lightning_lora.printing import Writable, fitting_console
from lightning_lora.storage.state import without_base
from lightning_lora.tables import LayerName, grouped, layer_table
from lightning_lora.tensors.inplace import InPlace
from lightning_lora.tensors.names import owner_of, state_dict, submodule
from lightning_lora.tensors.shards import is_dtensor

_LIKE_ADAM = (Adam, Adamax, AdamW, NAdam, RAdam)  # they keep two tensors for each trained parameter
_USUAL = (nn.Parameter, Tensor)


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one kind whose names differ only in blocks. ``parts`` names adapted matrices, ``r`` their ranks."""

    name: str
    layers: int
    kind: str
    r: str
    trained: int
    frozen: int
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoRASummary:
    """The result of :func:`summarize`; it prints as a table.

    Sizes are those of Adam's state and of a checkpoint's weights; ``full_``, of full fine-tuning. A ``plain`` model
    was never adapted, or is merged. ``active`` says which adapter is, unless it is "default" alone.
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
    plain: bool
    active: str = ""

    @property
    def share(self) -> float:
        """Share of parameters that train, from 0 to 1."""
        return self.trained / max(self.trained + self.frozen, 1)

    def table(
        self, *, trained_only: bool = False, optimizers: Sequence[Optimizer] = (), rates: Sequence[str] = ()
    ) -> Writable:
        """Return a headline, a table and the costs, for rich. With ``trained_only``, of the 15 rows that train most."""
        headline = f"LoRA{self.active}: {self.title} trains {self.share:.2%} of its parameters"
        if self.plain:
            merged = f", with {self.adapters} adapter{'' if self.adapters == 1 else 's'} merged into it{self.active}"
            headline = f"{self.title} is a plain model{merged if self.adapters else ''}"
        shown: list[RenderableType] = [Text(headline, style="bold"), self._layers(trained_only)]
        if not self.plain:
            shown.append(costs := self._costs(optimizers))
            if any(rates):
                costs.add_row("Learning rate", *rates)
        return Writable(*shown)

    def _layers(self, trained_only: bool) -> Table:
        table = layer_table("Layers", "Type", "r", "Trained", "Frozen")
        most = sorted(self.groups, key=lambda group: group.trained, reverse=True)[:15]
        others = trained = frozen = 0
        for group in self.groups:
            if trained_only and not (group.trained and group in most):
                others, trained, frozen = others + group.layers, trained + group.trained, frozen + group.frozen
                continue
            parts = f" [{','.join(group.parts)}]" if group.parts else ""
            times = f" (×{group.layers})" if group.layers > 1 else ""
            name, numbers = LayerName(group.name + parts + times), (f"{group.trained:,}", f"{group.frozen:,}")
            table.add_row(name, group.kind, group.r, *numbers)
        if others:
            see = ": lightning_lora.summarize(model)" if trained else ""
            rest = LayerName(f"{others} other layer{'s' if others > 1 else ''}{see}")
            table.add_row(rest, "", "–", f"{trained:,}", f"{frozen:,}")
        table.add_section()
        table.add_row("Total", "", "", f"{self.trained:,}", f"{self.frozen:,}", style="bold")
        return table

    def _costs(self, optimizers: Sequence[Optimizer]) -> Table:
        costs = Table.grid(padding=(0, 2))
        kinds = ", ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in optimizers))
        if all(isinstance(optimizer, _LIKE_ADAM) for optimizer in optimizers):
            what, full = f"State of {kinds or 'Adam'}", decimal(self.full_optimizer_bytes)
            costs.add_row(what, decimal(self.optimizer_bytes), f"full fine-tuning: {full}")
        full = decimal(self.full_checkpoint_bytes)
        costs.add_row("Weights in a checkpoint", decimal(self.checkpoint_bytes), f"full fine-tuning: {full}")
        return costs

    __rich__ = table  # for rich's print

    def __str__(self) -> str:
        """Print as a table."""
        console = fitting_console(no_color=True, force_jupyter=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def summarize(model: nn.Module) -> LoRASummary:
    """Count the trained parameters of ``model``, and their costs beside those of full fine-tuning.

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
    view, seen = View(model), set[nn.Parameter]()
    counts, kinds = dict[str, tuple[int, int]](), dict[str, tuple[Any, ...]]()
    for name, module in view.modules.items():
        parameters = [p for p in _parameters(module) if p not in seen]
        seen.update(parameters)
        if parameters:
            trained = sum(count(p) for p in parameters if p.requires_grad)
            counts[name] = trained, sum(map(count, parameters)) - trained
            kinds[name] = _about(module)
    groups = list[LayerGroup]()
    for group, names in grouped(kinds):
        kind, r, parts = kinds[names[0]]
        trained, frozen = (sum(each) for each in zip(*(counts[name] for name in names), strict=True))
        groups.append(LayerGroup(group, len(names), kind, r, trained, frozen, parts))
    return _with_costs(view, tuple(groups))


def _about(module: nn.Module) -> tuple[str, str, tuple[str, ...]]:
    """A layer's own class, and the ranks and the names of its adapted matrices."""
    kind = module.overlaid[1].__name__ if isinstance(module, InPlace) else type(module).__name__
    if not isinstance(module, LoRALayer):
        return kind, "–", ()
    if tokens := module.lora_matrices[0].tokens:
        return kind, "–", (f"{len(tokens)} rows",)
    ranks = sorted(matrix.rank(module.lora_settings.r) for matrix in module.lora_matrices)
    r = "–".join(dict.fromkeys(map(str, (ranks[0], ranks[-1]))))
    names = [matrix.name for matrix in module.lora_matrices if matrix.name]
    return kind, r, tuple(names if len("".join(names)) < 24 else [f"{len(names)} matrices"])


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """A layer's parameters, with those of the layers inside it whose weights its adapter updates."""
    weights = module.lora_weights() if isinstance(module, LoRALayer) else ()
    holders = dict.fromkeys([module, *(submodule(module, owner_of(weight)) for weight in weights)])
    return [p for holder in holders for p in holder.parameters(recurse=False)]


def _with_costs(view: View, groups: tuple[LayerGroup, ...]) -> LoRASummary:
    parameters, added = list(view.model.parameters()), set(view.adapters.values())
    trained, base = [p for p in parameters if p.requires_grad], [p for p in parameters if p not in added]
    state = without_base(view, state_dict(view.model), _random(view)) if view.is_adapted else view.model.state_dict()
    return LoRASummary(
        title=view.title,
        groups=groups,
        trained=sum(map(count, trained)),
        frozen=sum(map(count, parameters)) - sum(map(count, trained)),
        optimizer_bytes=2 * _bytes(trained),
        full_optimizer_bytes=2 * _full_bytes(base),
        checkpoint_bytes=_bytes(state.values()),
        full_checkpoint_bytes=_full_bytes(base) + _bytes(view.buffers.values()),
        adapters=len(view.matrices),
        plain=not view.layers,
        active=_active(view),
    )


def _random(view: View) -> tuple[str, ...]:
    """The frozen weights that files hold because they look untrained. Of shards, only the known ones: others wait."""
    known = view.adapter.random
    if any(map(is_dtensor, view.base.values())):
        return known or ()
    found, view.adapter.random = random_weights(view), known  # the base may change until a fit begins
    return found


def _active(view: View) -> str:
    """The active adapter's name, and about the others. Empty for "default" alone."""
    record = find_record(view.model)
    if record is None or (record.shown == "default" and not record.others):
        return ""
    is_new = view.layers and not record.adapter.is_trained and view.is_fresh()
    rest = f"; {listed(record.others)} rest{'s' * (len(record.others) == 1)}" if record.others else ""
    base = "; the base is shown" if record.is_disabled else ""
    return f" {record.adapter.name!r} ({'new' if is_new else 'trained before'}{rest}{base})"


def _bytes(values: Iterable[Any]) -> int:
    """The size of tensors in a file or in memory. Tensors that share their memory count once."""
    sizes = {}
    for value in values:
        if isinstance(value, Tensor) and value.layout is torch.strided:
            place = value.data_ptr() if type(value) in _USUAL else 0  # other classes have no pointer, and meta has 0
            sizes[place or id(value), value.nbytes] = value.nbytes
    return sum(sizes.values())


def _full_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the parameters in full fine-tuning; quantised ones would train as float32."""
    return sum(p.nbytes if type(p) in _USUAL and p.is_floating_point() else 4 * count(p) for p in parameters)
