"""Summary of a model: what trains, and what it costs beside full fine-tuning."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.optim import Adam, Adamax, AdamW, NAdam, Optimizer, RAdam

from lightning_lora.errors import counted, listed
from lightning_lora.layers import LoRALayer, number_of_values
from lightning_lora.model.record import find_record
from lightning_lora.model.untrained import random_weights
from lightning_lora.model.view import View
from lightning_lora.printing import Writable, fitting_console
from lightning_lora.storage.state import values_to_store
from lightning_lora.tables import LayerName, grouped_by_name, layer_table, shown_range
from lightning_lora.tensors.inplace import original_class
from lightning_lora.tensors.names import owner_of, submodule
from lightning_lora.tensors.plain_states import state_dict

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

    Sizes are those of Adam's state and of a checkpoint's weights; ``full_``, of full fine-tuning. ``adapters`` is the
    number of adapted matrices. A ``plain`` model was never adapted, or is merged. ``active`` is what the headline says
    of its named adapters: nothing if there is "default" alone.
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
        shown = self._groups_that_train_most() if trained_only else self.groups
        layers = self._layers(shown)
        if self.plain:
            return Writable(_headline(self._what_is_plain()), layers)
        share = f"{self.share:.2%} of its parameters"
        headline = _headline(f"LoRA{self.active}: {self.title} trains {share}")
        costs = self._costs(optimizers)
        if any(rates):
            costs.add_row("Learning rate", *rates)
        return Writable(headline, layers, costs)

    def _what_is_plain(self) -> str:
        """The headline of a plain model, perhaps with adapters merged into it."""
        what = f"{self.title} is a plain model"
        if self.adapters:
            what += f", with {counted(self.adapters, 'adapter')} merged into it{self.active}"
        return what

    def _groups_that_train_most(self) -> list[LayerGroup]:
        """The groups of the 15 rows that train most, in the order of all groups."""
        most_first = sorted(self.groups, key=attrgetter("trained"), reverse=True)
        first_15 = most_first[:15]
        return [group for group in self.groups if group.trained > 0 and group in first_15]

    def _layers(self, shown: Sequence[LayerGroup]) -> Table:
        """The table of these groups, with a row for all others."""
        table = layer_table("r", "Trained", "Frozen")
        for group in shown:
            numbers = _cells_of_numbers(group.trained, group.frozen)
            table.add_row(LayerName(_shown_name(group)), group.kind, group.r, *numbers)
        others = _left_out_of(shown, self.groups)
        if others:
            trained, frozen = _sums(others)
            name = _name_of_others(others, trains=trained > 0)
            table.add_row(LayerName(name), "", "–", *_cells_of_numbers(trained, frozen))
        table.add_section()
        table.add_row("Total", "", "", *_cells_of_numbers(self.trained, self.frozen), style="bold")
        return table

    def _costs(self, optimizers: Sequence[Optimizer]) -> Table:
        costs = Table.grid(padding=(0, 2))
        are_like_adam = all(isinstance(optimizer, _LIKE_ADAM) for optimizer in optimizers)
        if are_like_adam:
            state = f"State of {_classes_of(optimizers)}"
            _add_cost(costs, state, self.optimizer_bytes, self.full_optimizer_bytes)
        _add_cost(costs, "Weights in a checkpoint", self.checkpoint_bytes, self.full_checkpoint_bytes)
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
    view = View(model)
    groups = list[LayerGroup]()
    for pattern, layers in grouped_by_name(_counted_layers(view), attrgetter("described")):
        groups.append(_row_of(pattern, list(layers.values())))
    return _with_costs(view, tuple(groups))


# The texts of the table


def _headline(text: str) -> Text:
    return Text(text, style="bold")


def _shown_name(group: LayerGroup) -> str:
    """The layers' name, the names of the adapted matrices, and how many layers there are."""
    name = group.name
    if group.parts:
        name += f" [{','.join(group.parts)}]"
    if group.layers > 1:
        name += f" (×{group.layers})"
    return name


def _name_of_others(groups: Iterable[LayerGroup], *, trains: bool) -> str:
    """What stands for groups that a table leaves out. If something in them trains, it says how to see them."""
    layers = sum(group.layers for group in groups)
    name = counted(layers, "other layer")
    if trains:
        name += ": lightning_lora.summarize(model)"
    return name


def _left_out_of(shown: Iterable[LayerGroup], groups: Iterable[LayerGroup]) -> list[LayerGroup]:
    """The groups that are not shown."""
    shown = set(shown)
    return [group for group in groups if group not in shown]


def _cells_of_numbers(trained: int, frozen: int) -> tuple[str, str]:
    return f"{trained:,}", f"{frozen:,}"


def _classes_of(optimizers: Sequence[Optimizer]) -> str:
    """The classes of a fit's optimizers. Without a fit, it is Adam."""
    if not optimizers:
        return "Adam"
    names = [type(optimizer).__name__ for optimizer in optimizers]
    return ", ".join(dict.fromkeys(names))


def _add_cost(costs: Table, what: str, size: int, full_size: int) -> None:
    costs.add_row(what, decimal(size), f"full fine-tuning: {decimal(full_size)}")


# The layers


@dataclass(frozen=True)
class _Described:
    """What the table says of a layer, besides its name and numbers: its own class, and its adapted matrices."""

    kind: str
    r: str = "–"
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class _CountedLayer:
    """A layer, and how many values of it train."""

    described: _Described
    trained: int
    frozen: int


def _counted_layers(view: View) -> dict[str, _CountedLayer]:
    """The layers with parameters, by name. A shared parameter counts in the first of its layers."""
    layers: dict[str, _CountedLayer] = {}
    seen: set[nn.Parameter] = set()
    for name, module in view.modules.items():
        parameters = [p for p in _parameters_with_inner(module) if p not in seen]
        seen.update(parameters)
        if parameters:
            layers[name] = _CountedLayer(_describe(module), *_trained_and_frozen(parameters))
    return layers


def _parameters_with_inner(module: nn.Module) -> list[nn.Parameter]:
    """A layer's parameters, with those of the layers inside it whose weights its adapter updates."""
    holders = {module: None}  # in this order, each once
    if isinstance(module, LoRALayer):
        for weight in module.lora_weights():
            holders[submodule(module, owner_of(weight))] = None
    parameters: list[nn.Parameter] = []
    for holder in holders:
        parameters += holder.parameters(recurse=False)
    return parameters


def _describe(module: nn.Module) -> _Described:
    kind = original_class(module).__name__
    if not isinstance(module, LoRALayer):
        return _Described(kind)
    tokens = module.lora_matrices[0].tokens
    if tokens:
        return _Described(kind, parts=(f"{len(tokens)} rows",))
    return _Described(kind, _ranks(module), _parts(module))


def _ranks(layer: LoRALayer) -> str:
    """The rank of a layer's updates, or the least and the largest one."""
    ranks = [matrix.rank_for(layer.lora_settings.r) for matrix in layer.lora_matrices]
    return shown_range(str(min(ranks)), str(max(ranks)))


def _parts(layer: LoRALayer) -> tuple[str, ...]:
    """The names of a layer's matrices, or their number if the names are long."""
    names = [matrix.name for matrix in layer.lora_matrices if matrix.name]
    are_short = len("".join(names)) < 24
    return tuple(names) if are_short else (f"{len(names)} matrices",)


def _row_of(pattern: str, layers: Sequence[_CountedLayer]) -> LayerGroup:
    """A row of the table: layers that are described in the same way."""
    described = layers[0].described
    trained, frozen = _sums(layers)
    return LayerGroup(
        name=pattern,
        layers=len(layers),
        kind=described.kind,
        r=described.r,
        trained=trained,
        frozen=frozen,
        parts=described.parts,
    )


def _sums(layers: Iterable[_CountedLayer | LayerGroup]) -> tuple[int, int]:
    """How many values train in all of these layers, and how many do not."""
    trained = frozen = 0
    for layer in layers:
        trained += layer.trained
        frozen += layer.frozen
    return trained, frozen


# The costs


def _with_costs(view: View, groups: tuple[LayerGroup, ...]) -> LoRASummary:
    parameters = list(view.model.parameters())
    parameters_of_adapters = set(view.adapter_parameters.values())
    base = [p for p in parameters if p not in parameters_of_adapters]
    trained, frozen = _trained_and_frozen(parameters)
    return LoRASummary(
        title=view.title,
        groups=groups,
        trained=trained,
        frozen=frozen,
        optimizer_bytes=2 * _bytes(_trained(parameters)),
        full_optimizer_bytes=2 * _full_bytes(base),
        checkpoint_bytes=_bytes(_checkpoint_entries(view).values()),
        full_checkpoint_bytes=_full_bytes(base) + _bytes(view.buffers.values()),
        adapters=len(view.matrices),
        plain=not view.layers,
        active=_what_is_active(view),
    )


def _checkpoint_entries(view: View) -> Mapping[str, Any]:
    """What a checkpoint holds of a model."""
    if not view.is_adapted:
        return view.model.state_dict()
    return values_to_store(view, state_dict(view.model), _random_in_files(view))


def _random_in_files(view: View) -> tuple[str, ...]:
    """The frozen weights that files hold because they look untrained."""
    if view.is_sharded:  # to look for them needs every process, and this one alone may ask for a summary
        return view.adapter.random_so_far
    noted = view.adapter.random
    found = random_weights(view)  # it notes what it finds
    view.adapter.random = noted  # which is too early: the base may change until a fit begins
    return found


def _what_is_active(view: View) -> str:
    """What the headline says of a model's named adapters: `` 'a' (new; 'b' rests)``."""
    record = find_record(view.model)
    if record is None:
        return ""
    if record.name_in_effect == "default" and not record.others:
        return ""
    states = [_age_of_adapter(view)]
    if record.others:
        rest = "rests" if len(record.others) == 1 else "rest"
        states.append(f"{listed(record.others)} {rest}")
    if record.is_disabled:
        states.append("the base is shown")
    return f" {record.adapter.name!r} ({'; '.join(states)})"


def _age_of_adapter(view: View) -> str:
    """Whether the active adapter has been trained."""
    is_new = view.layers and not view.adapter.is_trained and view.is_fresh()
    return "new" if is_new else "trained before"


def _trained_and_frozen(parameters: Sequence[nn.Parameter]) -> tuple[int, int]:
    """How many values of these parameters train, and how many do not."""
    trained = _count_values(_trained(parameters))
    return trained, _count_values(parameters) - trained


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def _count_values(parameters: Iterable[nn.Parameter]) -> int:
    return sum(number_of_values(p) for p in parameters)


def _bytes(values: Iterable[Any]) -> int:
    """The size of tensors in a file or in memory. Tensors that share their memory count once."""
    sizes: dict[tuple[int, int], int] = {}
    for value in values:
        if isinstance(value, Tensor) and value.layout is torch.strided:
            sizes[_place(value), value.nbytes] = value.nbytes
    return sum(sizes.values())


def _place(tensor: Tensor) -> int:
    """Where the values of a tensor are, or which object it is: on meta it has no address, nor have other classes."""
    if type(tensor) in _USUAL and tensor.data_ptr() != 0:
        return tensor.data_ptr()
    return id(tensor)


def _full_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the parameters in full fine-tuning; quantised ones would train as float32."""
    total = 0
    for p in parameters:
        trains_as_it_is = type(p) in _USUAL and p.is_floating_point()
        total += p.nbytes if trains_as_it_is else 4 * number_of_values(p)
    return total
