"""What is exported: adapters for another program, with their names there, and what is known of their modules."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

from torch import Tensor, nn

from lightning_lora.errors import ConfigError, ExportError, listed, warn
from lightning_lora.model.view import view_of
from lightning_lora.storage.renaming import (
    by_names_inside,
    name_within,
    names_without_prefix,
)
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.storage.stored_modules import UNKNOWN_MODULE, StoredModule
from lightning_lora.storage.whole_names import expression_of, list_or_expression
from lightning_lora.tensors.dicts import only, where, without
from lightning_lora.tensors.names import (
    modules_around,
    modules_by_all_names,
    names_not_in,
)


@dataclass(frozen=True)
class Export:
    """Adapters for a reader: in all of ``formats``, this word means another program that opens the files.

    This class has them from a file, :class:`ModelExport` from a model. The reader has
    the module ``stored.root`` of the trained model, or all of it (an empty root), and
    names modules from there: with the root ``net.bert``, ``net.bert.q`` is its ``q``.
    What is known of modules:

    by names            of what they are    here
    ------------------  ------------------  --------------------------------------------------
    of the model        the modules         ``modules_of_model``; empty if a file is exported
    of the reader       the modules         ``modules_for_reader``, the root is ``inner``
    of the reader       what a file says    ``stored_modules``, of the root ``stored_inner``
    """

    stored: StoredAdapters
    # the name from which the reader loads its model; None: that which is stored
    base_name: str | None = field(default=None, kw_only=True)

    def name_for_reader(self, name: str) -> str:
        """Return the reader's name for a name of the model, without the prefix of the root."""
        return name_within(self.stored.root, name)

    @property
    def modules_of_model(self) -> dict[str, nn.Module]:
        """All modules of the model, by their names there. Empty: a file is exported, and no model."""
        return {}

    @cached_property
    def modules_for_reader(self) -> dict[str, nn.Module]:
        """The modules that the reader has, by its names for them."""
        return by_names_inside(self.stored.root, self.modules_of_model)

    @property
    def inner(self) -> nn.Module | None:
        """The module that the reader has, with all others in it. None: a file is exported."""
        return self.modules_for_reader.get("")

    @cached_property
    def stored_modules(self) -> dict[str, StoredModule]:
        """What a file says of modules, by the reader's names. Empty: 0.2.0 wrote the file."""
        return by_names_inside(self.stored.root, self.stored.modules)

    @property
    def stored_inner(self) -> StoredModule:
        """What a file says of the module that the reader has, with ``base_name`` if one is given."""
        inner = self.stored_modules.get("", UNKNOWN_MODULE)
        if self.base_name is None:
            return inner
        return replace(inner, pretrained=self.base_name)

    def as_targets(self, names: list[str]) -> list[str] | str:
        """Return the ``target_modules`` that mean exactly these modules.

        The names are the reader's. They are a list if no other name ends so, otherwise
        an expression.
        """
        if names and not self.stored_modules:
            return expression_of(names)
        return list_or_expression(names, self.stored_modules)

    @cached_property
    def layers_with_rows(self) -> dict[str, StoredLayer]:
        """The embeddings of which single rows train, by their names in the model."""
        return where(self.stored.layers, _has_rows)

    @cached_property
    def saved_tensors(self) -> dict[str, Tensor]:
        """All tensors of ``modules_to_save``, unchanged ones too. If a file lacks some, it is refused."""
        known = self.known_tensors
        names = list(chain.from_iterable(self.stored.saved.values()))
        missing = names_not_in(names, known)
        if missing:
            raise ExportError(
                f"{self.stored.source} does not hold {listed(missing)}, which have the "
                "base's values, and PEFT's format needs all of a module in "
                "modules_to_save. Load the file onto its model, and export the model."
            )
        return only(known, set(names))

    @property
    def known_tensors(self) -> dict[str, Tensor]:
        """All tensors that are known. Of a file, these are the ones that training changed."""
        return self.stored.state


@dataclass(frozen=True)
class ModelExport(Export):
    """Adapters from a model, for a reader."""

    model: nn.Module

    @cached_property
    def modules_of_model(self) -> dict[str, nn.Module]:
        """All modules of the model."""
        return modules_by_all_names(self.model)

    @property
    def known_tensors(self) -> dict[str, Tensor]:
        """All tensors of the model: also those that training has not changed."""
        view = view_of(self.model)
        return {**view.parameters, **view.buffers, **self.stored.state}


def _has_rows(layer: StoredLayer) -> bool:
    """Whether single rows of a layer train, in place of factors."""
    return bool(layer.tokens)


def for_reader(export: Export, root: str | None) -> Export:
    """Return what a reader with the module ``root`` gets. None: the root that is stored.

    Values of weights that look untrained, and of filled buffers, have no place in its
    files: they are left out, with a warning.
    """
    stored = export.stored
    if root is not None:
        _check_root(root, stored)
        stored = replace(stored, root=root)
    _warn_of_lost_values(stored)
    state = without(stored.state, set(stored.of_no_base))
    return replace(export, stored=replace(stored, state=state))


def _check_root(root: str, stored: StoredAdapters) -> None:
    """Refuse a name of no module around adapted layers."""
    if root not in {"", *modules_around(stored.layers)}:
        raise ConfigError(
            f"root={root!r} holds no adapted layer. Expected the name of the module "
            f"that the reader has, such as {stored.root!r}; the adapted layers are "
            f"{listed(stored.layers)}."
        )


def _warn_of_lost_values(stored: StoredAdapters) -> None:
    """Warn of values that the reader does not get, such as those of a buffer that ``setup`` filled.

    They are neither in its base nor trained. The reader has no buffers outside of the
    root, so it does not miss these.
    """
    not_missed = names_without_prefix(stored.filled_in_state, stored.root)
    lost = names_not_in(stored.of_no_base, not_missed)
    if lost:
        warn(
            f"{listed(lost)} may be untrained or were filled by setup, and PEFT's "
            "format has no place for them. If the reader's base has not these values: "
            "train them in full (modules_to_save), or use save_merged(model, path)."
        )
