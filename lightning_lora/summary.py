"""Summary of a model: what trains, and what it costs beside full fine-tuning."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.layers import LoRALayer, number_of_values
from lightning_lora.model.records import find_record
from lightning_lora.model.untrained.of_no_base import names_of_no_base_now
from lightning_lora.model.view import View
from lightning_lora.printing import Writable, fitting_console
from lightning_lora.storage.state import values_to_store
from lightning_lora.summary_table import table_of, text_on_adapters, total_counts
from lightning_lora.tables import grouped_by_name, shown_range
from lightning_lora.tensors.inplace import original_class
from lightning_lora.tensors.names import owner_of, submodule
from lightning_lora.tensors.plain_states import state_dict
from lightning_lora.tensors.values import PlaceInMemory, place_in_memory


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one kind whose names differ only in blocks, such as ``layers.*.query``.

    ``parts`` says what of them is adapted: the names of matrices, or how many matrices
    or rows. ``r`` are the ranks.
    """

    name: str
    layers: int
    kind: str
    r: str
    trained: int
    frozen: int
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamedAdapters:
    """The adapters of a model by name: the active one, and those that rest beside it."""

    active_name: str
    is_new: bool  # whether the active one has learned nothing yet
    resting: tuple[str, ...]
    is_base_shown: bool


@dataclass(frozen=True)
class LoRASummary:
    """The result of :func:`summarize`; it prints as a table."""

    title: str  # the class of the model
    groups: tuple[LayerGroup, ...]
    trained: int  # how many values train
    frozen: int  # how many do not
    optimizer_bytes: int  # the size of Adam's state
    full_optimizer_bytes: int  # the same in full fine-tuning
    checkpoint_bytes: int  # the size of the weights in a checkpoint
    full_checkpoint_bytes: int  # the same in full fine-tuning
    adapters: int  # how many layers have an adapter, on them or merged
    plain: bool  # whether no layer has one on it
    # None: there is nothing to say, as the model shows its only one, "default"
    named: NamedAdapters | None = None

    @property
    def active(self) -> str:
        """What the headline says of the active adapter and others: `` 'a' (new; 'b' rests)``, or nothing."""
        return text_on_adapters(self.named)

    @property
    def share(self) -> float:
        """Share of parameters that train, from 0 to 1."""
        return self.trained / max(self.trained + self.frozen, 1)

    def table(
        self,
        *,
        trained_only: bool = False,
        optimizers: Sequence[Optimizer] = (),
        rates: Sequence[str] = (),
    ) -> Writable:
        """Return a headline, a table and the costs, for rich.

        With ``trained_only``, of the 15 rows that train most.
        """
        return table_of(
            self, trained_only=trained_only, optimizers=optimizers, rates=rates
        )

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
        model: Any module, with or without adapters. Print the summary of a plain model
            to see the names of its layers.

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
    parameters = list(model.parameters())
    parameters_of_adapters = set(view.adapter_parameters.values())
    base = [p for p in parameters if p not in parameters_of_adapters]
    trained, frozen = _trained_and_frozen(parameters)
    return LoRASummary(
        title=view.title,
        groups=_groups(view),
        trained=trained,
        frozen=frozen,
        optimizer_bytes=2 * _bytes(_trained(parameters)),
        full_optimizer_bytes=2 * _full_bytes(base),
        checkpoint_bytes=_bytes(_checkpoint_entries(view).values()),
        full_checkpoint_bytes=_full_bytes(base) + _bytes(view.buffers.values()),
        adapters=len(view.matrices),
        plain=not view.layers,
        named=_named_adapters(view),
    )


# The layers


def _groups(view: View) -> tuple[LayerGroup, ...]:
    """The rows of the table: layers of one kind, whose names differ only in blocks."""
    groups = list[LayerGroup]()
    for pattern, layers in grouped_by_name(
        _single_layers(view), attrgetter("kind", "r", "parts")
    ):
        groups.append(_joined(pattern, list(layers.values())))
    return tuple(groups)


def _joined(pattern: str, layers: Sequence[LayerGroup]) -> LayerGroup:
    """Several layers in one group, whose name stands for all of theirs."""
    trained, frozen = total_counts(layers)
    return replace(
        layers[0], name=pattern, layers=len(layers), trained=trained, frozen=frozen
    )


def _single_layers(view: View) -> dict[str, LayerGroup]:
    """Each layer with parameters, as a group of one.

    A shared parameter counts in the first of its layers.
    """
    layers: dict[str, LayerGroup] = {}
    seen: set[nn.Parameter] = set()
    for name, module in view.modules.items():
        parameters = [p for p in _parameters_with_inner(module) if p not in seen]
        seen.update(parameters)
        if parameters:
            layers[name] = _single_layer(name, module, parameters)
    return layers


def _single_layer(
    name: str, module: nn.Module, parameters: Sequence[nn.Parameter]
) -> LayerGroup:
    trained, frozen = _trained_and_frozen(parameters)
    return LayerGroup(
        name=name,
        layers=1,
        kind=original_class(module).__name__,
        r=_ranks(module),
        trained=trained,
        frozen=frozen,
        parts=_parts(module),
    )


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


def _ranks(module: nn.Module) -> str:
    """The rank of a layer's updates, or the least and the largest one."""
    if not isinstance(module, LoRALayer) or _token_rows(module):
        return "–"
    ranks = [matrix.rank_for(module.lora_settings.r) for matrix in module.lora_matrices]
    return shown_range(str(min(ranks)), str(max(ranks)))


def _parts(module: nn.Module) -> tuple[str, ...]:
    """The names of a layer's matrices, or their number if the names are long.

    Of an embedding, how many rows train.
    """
    if not isinstance(module, LoRALayer):
        return ()
    rows = _token_rows(module)
    if rows:
        return (f"{rows} rows",)
    names = [matrix.name for matrix in module.lora_matrices if matrix.name]
    are_short = len("".join(names)) < 24
    return tuple(names) if are_short else (f"{len(names)} matrices",)


def _token_rows(layer: LoRALayer) -> int:
    """How many rows of an embedding train by themselves: it has one matrix then, without a rank."""
    return len(layer.lora_matrices[0].tokens)


# The costs


def _checkpoint_entries(view: View) -> Mapping[str, Any]:
    """What a checkpoint holds of a model."""
    if not view.is_adapted:
        return view.model.state_dict()
    return values_to_store(
        view, state_dict(view.model), _noted_or_found_of_no_base(view)
    )


def _noted_or_found_of_no_base(view: View) -> tuple[str, ...]:
    """The frozen weights that files hold because they look untrained."""
    # to look for them in shards needs every process, and this one alone may ask for a
    # summary
    if view.is_sharded:
        return view.adapter.known_of_no_base
    # names_of_no_base would note what it finds, but the base may change until a fit begins
    return names_of_no_base_now(view)


# The named adapters


def _named_adapters(view: View) -> NamedAdapters | None:
    """The adapters of a model by name. None: it has none, or shows "default", its only one."""
    record = find_record(view.model)
    if record is None:
        return None
    is_base_shown = record.state.shows_base
    has_default_alone = list(record.adapter_states) == ["default"]
    if has_default_alone and not is_base_shown:
        return None
    is_on_layers = bool(view.layers)  # a merged one counts as trained
    is_new = is_on_layers and not view.adapter.may_have_learned and view.is_fresh()
    return NamedAdapters(
        record.adapter.name, is_new, tuple(record.inactive_adapters), is_base_shown
    )


# Values and bytes


def _trained_and_frozen(parameters: Sequence[nn.Parameter]) -> tuple[int, int]:
    """How many values of these parameters train, and how many do not."""
    trained = _count_values(_trained(parameters))
    return trained, _count_values(parameters) - trained


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def _count_values(parameters: Iterable[nn.Parameter]) -> int:
    return sum(number_of_values(p) for p in parameters)


def _bytes(values: Iterable[Any]) -> int:
    """The size of tensors in a file or in memory.

    Tensors that share their memory count once.
    """
    sizes: dict[PlaceInMemory, int] = {}
    for value in values:
        if isinstance(value, Tensor) and value.layout is torch.strided:
            sizes[place_in_memory(value)] = value.nbytes
    return sum(sizes.values())


def _full_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the parameters in full fine-tuning; quantised ones would train as float32."""
    total = 0
    for p in parameters:
        trains_as_it_is = type(p) in (nn.Parameter, Tensor) and p.is_floating_point()
        total += p.nbytes if trains_as_it_is else 4 * number_of_values(p)
    return total
