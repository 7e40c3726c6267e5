"""What the writers of other libraries' files share: the adapters to write, the update of each weight, the files."""

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

from torch import Tensor, nn

from lightning_lora.errors import AdapterFileError, ConfigError, ExportError, listed, warn
from lightning_lora.functional.dtypes import wide
from lightning_lora.functional.factors import Factors, with_rank
from lightning_lora.layers import LoRAParameters
from lightning_lora.layers.matrices import Role, matrices_of_weight, weight_factors
from lightning_lora.model.view import view_of
from lightning_lora.storage.inner_model import UNKNOWN, StoredModule
from lightning_lora.storage.on_disk.disk import write_errors, writing
from lightning_lora.storage.renaming import Renaming, entries_inside, names_outside
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.storage.whole_names import expression_of, list_or_expression
from lightning_lora.tensors.dicts import only, renamed, where, without
from lightning_lora.tensors.names import join, modules_around, modules_by_all_names, names_not_in


@dataclass(frozen=True)
class Source:
    """Adapters from a file, to write for a reader.

    The reader is the program that loads the files. It has the module ``stored.root`` of the trained model, or all of it
    (an empty root), and names modules from there.
    """

    stored: StoredAdapters
    base_name: str | None = field(default=None, kw_only=True)  # from which the reader loads its model; None: as stored

    def name_for_reader(self, name: str) -> str:
        """Return the reader's name: without the prefix of the root."""
        return Renaming(self.stored.root, "").name_here(name)

    @property
    def modules_of_model(self) -> dict[str, nn.Module]:
        """All modules of the model, by their names there. None: a file has no modules."""
        return {}

    @cached_property
    def modules_for_reader(self) -> dict[str, nn.Module]:
        """The modules that the reader has, by its names."""
        return renamed(entries_inside(self.stored.root, self.modules_of_model), self.name_for_reader)

    @property
    def inner(self) -> nn.Module | None:
        """The module that the reader has, with all others in it. None: a file has no modules."""
        return self.modules_for_reader.get("")

    @cached_property
    def described(self) -> dict[str, StoredModule]:
        """What a file says of modules, by the reader's names: nothing, if 0.2.0 wrote it. A model says it too."""
        return renamed(entries_inside(self.stored.root, self.stored.modules), self.name_for_reader)

    @property
    def inner_described(self) -> StoredModule:
        """What is known of the module that the reader has."""
        inner = self.described.get("", UNKNOWN)
        if self.base_name is None:
            return inner
        return replace(inner, pretrained=self.base_name)

    def as_targets(self, names: list[str]) -> list[str] | str:
        """Return the ``target_modules`` that mean exactly these modules.

        The names are the reader's. They are a list if no other name ends so, otherwise an expression.
        """
        if names and not self.described:
            return expression_of(names)
        return list_or_expression(names, self.described)

    @cached_property
    def layers_with_rows(self) -> dict[str, StoredLayer]:
        """The embeddings of which single rows train."""
        return where(self.stored.layers, _has_rows)

    @cached_property
    def saved(self) -> dict[str, Tensor]:
        """All entries of modules that train whole, unchanged ones too. An error, if a file lacks some."""
        present = self.present
        names = list(chain.from_iterable(self.stored.saved.values()))
        missing = names_not_in(names, present)
        if missing:
            raise ExportError(
                f"{self.stored.source} does not hold {listed(missing)}, which have the base's values, and PEFT's "
                "format needs all of a module in modules_to_save. Load the file onto its model, and export the model."
            )
        return only(present, set(names))

    @property
    def present(self) -> dict[str, Tensor]:
        """All tensors that are known: a file has those that training changed."""
        return self.stored.state


@dataclass(frozen=True)
class ModelSource(Source):
    """Adapters from a model, to write for a reader."""

    model: nn.Module

    @cached_property
    def modules_of_model(self) -> dict[str, nn.Module]:
        """All modules of the model."""
        return modules_by_all_names(self.model)

    @property
    def present(self) -> dict[str, Tensor]:
        """All tensors of the model: also those that training has not changed."""
        view = view_of(self.model)
        return {**view.parameters, **view.buffers, **self.stored.state}


def _has_rows(layer: StoredLayer) -> bool:
    """Whether single rows of a layer train, in place of factors."""
    return bool(layer.tokens)


def for_reader(source: Source, root: str | None) -> Source:
    """Return what to write for a reader that has the module ``root``. None: the root that is stored."""
    stored = source.stored
    if root is not None:
        _check_root(root, stored)
        stored = replace(stored, root=root)
    _warn_of_lost_values(stored)
    state = without(stored.state, set(stored.of_no_base))
    return replace(source, stored=replace(stored, state=state))


def _check_root(root: str, stored: StoredAdapters) -> None:
    """Refuse a name of no module around adapted layers."""
    if root not in {"", *modules_around(stored.layers)}:
        raise ConfigError(
            f"root={root!r} holds no adapted layer. Expected the name of the module that the reader has, such as "
            f"{stored.root!r}; the adapted layers are {listed(stored.layers)}."
        )


def _warn_of_lost_values(stored: StoredAdapters) -> None:
    """Warn of values that the reader does not get, such as those of a buffer that ``setup`` filled.

    They are neither in its base nor trained. Buffers outside of the root it does not have.
    """
    outside = names_outside(stored.root, stored.filled_in_state)
    lost = names_not_in(stored.of_no_base, outside)
    if lost:
        warn(
            f"{listed(lost)} may be untrained or were filled by setup, and PEFT's format has no place for them. If the "
            "reader's base has not these values: train them in full (modules_to_save), or use save_merged(model, path)."
        )


# The update of each weight


@dataclass(frozen=True)
class WeightUpdate:
    """The update of one weight of a layer: ``scaling`` times B @ A."""

    layer: StoredLayer
    name: str  # the reader's name of the layer
    weight: str  # its name in the layer
    factors: Factors  # A and B
    alpha: float
    scaling: float
    magnitude: Tensor | None = None  # of DoRA

    @property
    def rank(self) -> int:
        """The rank of this weight's update."""
        a, _ = self.factors
        return int(a.shape[-2])


def weight_updates(source: Source) -> list[WeightUpdate]:
    """Return the updates of all weights, but not single rows that train."""
    updates = list[WeightUpdate]()
    for layer in without(source.stored.layers, source.layers_with_rows).values():
        for weight in layer.shapes:
            updates.append(_update_of(source, layer, weight))
    return updates


def _update_of(source: Source, layer: StoredLayer, weight: str) -> WeightUpdate:
    """The update of one weight, with the sum of all its parts."""
    config = source.stored.config
    settings = layer.settings(config)
    value_of = partial(_value_of, source.stored, layer)
    factors = weight_factors(weight, layer.matrices, settings, value_of)
    a, _ = factors
    is_parameter = layer.adapter_class is LoRAParameters
    parameter = join(layer.name, weight) if is_parameter else ""
    first, *_ = matrices_of_weight(weight, layer.matrices)
    magnitude = value_of(first.parameter_name(Role.MAGNITUDE)) if settings.use_dora else None
    return WeightUpdate(
        layer=layer,
        name=source.name_for_reader(layer.name),
        weight=weight,
        factors=factors,
        alpha=config.alpha_of(layer.name, parameter, r=a.shape[-2]),
        scaling=first.scaling_for(layer.scaling),
        magnitude=magnitude,
    )


def _value_of(stored: StoredAdapters, layer: StoredLayer, parameter: str) -> Tensor:
    """The value of one of an adapter's parameters."""
    value: Tensor = stored.state[join(layer.name, parameter)]
    value = value.detach().cpu()
    if layer.settings(stored.config).is_difference:  # half precision would round the difference away
        return value.to(wide(value.dtype))
    return value


def with_largest_rank(updates: Collection[WeightUpdate]) -> list[WeightUpdate]:
    """Give all the largest rank of any, by rows and columns of zeros. Alpha is as before."""
    rank = max(update.rank for update in updates)
    return [replace(update, factors=with_rank(update.factors, rank)) for update in updates]


def with_scaling(updates: Iterable[WeightUpdate], scaling: float) -> list[WeightUpdate]:
    """Give all the same scaling. B takes over what differs, so the updates are as before."""
    changed = list[WeightUpdate]()
    for update in updates:
        a, b = with_rank(update.factors, update.rank)  # the same rank, in float32 or wider
        factors = a, b * (update.scaling / scaling)
        alpha = scaling * update.rank
        changed.append(replace(update, factors=factors, alpha=alpha, scaling=scaling))
    return changed


# Files


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write all of these files into a directory, or nothing."""
    with write_errors(directory):
        is_new = not directory.exists()
        directory.mkdir(exist_ok=True)
    try:
        with ExitStack() as stack:  # all are whole before one takes its place
            for name, contents in files.items():
                part = stack.enter_context(writing(directory / name))
                part.write_bytes(contents)
    except AdapterFileError:
        if is_new:
            with suppress(OSError):
                directory.rmdir()
        raise
