"""Adapters outside of a model: what training changed, and what a file says of it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_lora.base.fingerprints import StoredFingerprint
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import (
    AdapterFileError,
    AdapterStateError,
    ConfigError,
    listed,
)
from lightning_lora.layers import LoRAParameters, LoRATokens
from lightning_lora.model.changed_since_adapted import (
    refuse_computed_weights,
    refuse_resized_or_tied,
)
from lightning_lora.model.untrained.of_no_base import names_of_no_base
from lightning_lora.model.view import View
from lightning_lora.storage.checksum import FORMAT, Description, checksum
from lightning_lora.storage.inner_model import root_of
from lightning_lora.storage.renaming import Renaming
from lightning_lora.storage.stored_layers import StoredLayer, layers_of, wanted_of
from lightning_lora.storage.stored_modules import (
    StoredModule,
    modules_of,
    modules_to_store,
    plain_modules,
)
from lightning_lora.targets.lookup import OUTPUT_HEAD
from lightning_lora.tensors.dicts import dict_or_empty, only, where
from lightning_lora.tensors.names import is_in_any, names_inside, names_not_in, owner_of
from lightning_lora.tensors.values import is_computable

# the entry of a checkpoint, or of a file's metadata, that describes the adapters
KEY = "lightning_lora"

DIVERGED = (
    "the training that wrote them had diverged. Use an earlier checkpoint, or train "
    "again with a lower learning rate"
)
"""What is said of NaN and infinite values in a file."""

_SAID_SINCE_0_2_0 = "copies"
"""The entry of a description that has what versions after 0.2.0 say in addition.

0.2.0 refuses an entry that it does not know. The list of this name it knows, and takes
whatever is in it.
"""


@dataclass(frozen=True)
class StoredAdapters:
    """Adapters outside of a model: every file format reads into this or writes from it.

    ``state`` has the values. Beside adapters and what trains in full, it has values
    that are not the base's own. Three lists of names say which these are::

        what it is                     frozen_in_state   of_no_base   filled_in_state
        frozen, not the base's value   yes               no           no
        frozen, it looks untrained     yes               yes          no
        a buffer that a hook filled    no                yes          yes
        another buffer                 no                no           no

    All names are those of the model that was saved; after :meth:`with_names_of_model`,
    those of the model at hand. Only ``base`` keeps the file's names, because its layout
    is a hash of them: ``renaming`` leads from one to the other.

    Another library's file says less. It has the defaults here, and so no
    :meth:`adapter_names` or :meth:`description`.
    """

    config: LoRAConfig
    """It adapts a model in the same way."""

    state: dict[str, Any]
    """Everything that training changed, by its name in the adapted model."""

    layers: dict[str, StoredLayer] = field(default_factory=dict)
    """The adapted layers by name. Of another library's file, only those whose single rows train."""

    base: list[StoredFingerprint] = field(default_factory=list)
    """The fingerprints of the base, one for each form that it had. Empty: nothing says the base."""

    frozen_in_state: Sequence[str] = field(default_factory=list)
    """The frozen weights whose values are in the state.

    Files call these ``changed``.
    """

    of_no_base: Sequence[str] = field(default_factory=list)
    """The frozen weights that look untrained, and the buffers that hooks filled, perhaps from data.

    Files call these ``random``.
    """

    saved: dict[str, list[str]] = field(default_factory=dict)
    """The names of all tensors in each module of ``modules_to_save``."""

    root: str = ""
    """The path of the one model inside, such as ``"model"``."""

    modules: dict[str, StoredModule] = field(default_factory=dict)
    """The modules that a file describes, by name."""

    metrics: dict[str, float] = field(default_factory=dict)
    """What the run has logged last before it wrote the file."""

    source: str = ""
    """The file, or the class of a model, for messages."""

    renaming: Renaming = field(default_factory=Renaming)
    """It leads from the names in ``base`` to all others."""

    @classmethod
    def from_view(
        cls, view: View, state: dict[str, Any], base: list[StoredFingerprint]
    ) -> "StoredAdapters":
        """Return ``state`` of an adapted model, and what a file says of it."""
        refuse_computed_weights(view)
        refuse_resized_or_tied(view)
        config = view.config
        layers = layers_of(view)
        _check_as_configured(view, config, layers.values())
        saved = _saved_entries(view, config)
        return cls(
            config=config,
            state=state,
            layers=layers,
            base=base,
            frozen_in_state=list(only(state, view.frozen_base)),
            of_no_base=list(names_of_no_base(view)),
            saved=saved,
            root=root_of(view.model),
            modules=modules_to_store(
                view.modules, layers, [*saved, *_tied_to_rows(layers.values())]
            ),
            source=view.title,
        )

    @classmethod
    def from_description(
        cls, state: dict[str, Any], description: Description, source: object
    ) -> "StoredAdapters":
        """Return adapters as a file describes them.

        ``source``: the file, for messages.
        """
        layers = dict[str, StoredLayer]()
        for about in description["layers"]:
            layers[about["name"]] = StoredLayer.from_dict(about)
        config = stored_config(description)
        since = _said_since_0_2_0(description)
        return cls(
            config=config,
            state=state,
            layers=layers,
            base=description.get("base", []),
            frozen_in_state=description.get("changed", []),
            of_no_base=description.get("random", []),
            saved=description.get("saved", {}),
            root=description.get("root", ""),
            modules=modules_of(since.get("modules", ())),
            metrics=since.get("metrics", {}),
            source=str(source),
        )

    def description(self) -> Description:
        """Return all but the state in plain types, with a checksum of both."""
        about = {
            "base": self.base,
            "changed": self.frozen_in_state,
            "random": self.of_no_base,
            "saved": self.saved,
            "root": self.root,
            "format": FORMAT,
            "config": self.config.to_stored(),
            "entries": len(self.state),
            "layers": [layer.to_dict() for layer in self.layers.values()],
            _SAID_SINCE_0_2_0: [
                {"modules": plain_modules(self.modules), "metrics": self.metrics}
            ],
        }
        return {**about, "checksum": checksum(self.state, about)}

    def with_names_of_model(
        self, renaming: Renaming, config: LoRAConfig
    ) -> "StoredAdapters":
        """Return the same by a model's names. ``config`` is for that model already."""
        layers = dict[str, StoredLayer]()
        for layer in self.layers.values():
            renamed_layer = layer.renamed(renaming.name_here)
            layers[renamed_layer.name] = renamed_layer
        saved = dict[str, list[str]]()
        for module, entries in self.saved.items():
            saved[renaming.name_here(module)] = renaming.names_here(entries)
        return replace(
            self,
            config=config,
            state=renaming.with_names_here(self.state),
            layers=layers,
            frozen_in_state=renaming.names_here(self.frozen_in_state),
            of_no_base=renaming.names_here(self.of_no_base),
            saved=saved,
            root=renaming.name_here(self.root),
            modules=renaming.with_names_here(self.modules),
            renaming=renaming,
        )

    @property
    def names_its_base(self) -> bool:
        """Whether it says on which base it was trained.

        Files of this package do. Those of other libraries do not, nor do sums of the
        adapters in a model.
        """
        return bool(self.base)

    @property
    def filled_in_state(self) -> list[str]:
        """The buffers that hooks filled and whose values are in the state.

        User code may have dropped some from the state: these are in ``of_no_base`` alone.
        """
        buffers = names_not_in(self.of_no_base, set(self.frozen_in_state))
        return [name for name in buffers if name in self.state]

    def adapter_names(self) -> set[str]:
        """Return the names of the adapters' tensors in the state."""
        names = set[str]()
        for layer in self.layers.values():
            names.update(layer.parameters(self.config).values())
        return names

    def check_finite(self) -> None:
        """Refuse NaN and infinite values, for whoever has no model to compare them with."""
        tensors = where(self.state, is_computable)
        broken = [
            name for name, tensor in tensors.items() if not tensor.isfinite().all()
        ]
        if broken:
            raise AdapterFileError(
                f"{listed(broken)} in {self.source} hold NaN or infinite values: "
                f"{DIVERGED}."
            )


ReadFor = Callable[[View], StoredAdapters]
"""Reads what a file holds for a model that is not merged, by the model's names."""


# What a model has


def _saved_entries(view: View, config: LoRAConfig) -> dict[str, list[str]]:
    """The names of all tensors in each module of ``modules_to_save``: ``{"head": ["head.weight", "head.bias"]}``.

    A module inside another one of them is not named.
    """
    modules = [name for name in view.modules if config.is_saved(name)]
    outermost = [name for name in modules if not is_in_any(owner_of(name), modules)]
    names = [*view.parameters, *view.buffers]
    return {module: names_inside(names, [module]) for module in outermost}


def _tied_to_rows(layers: Iterable[StoredLayer]) -> list[str]:
    """The modules that share a weight with an embedding of which single rows train."""
    names = list[str]()
    for layer in layers:
        if layer.tokens:
            names += layer.others_with_its_weights()
    return names


def _check_as_configured(
    view: View, config: LoRAConfig, layers: Iterable[StoredLayer]
) -> None:
    """Refuse layers with another rank or scaling than the configuration says, by which a reader adapts its model."""
    wrong = dict[str, None]()
    for layer in layers:
        for matrix in layer.matrices:
            wanted = wanted_of(config, layer.name, matrix, layer.kind)
            if not wanted.is_met(matrix, layer.r, layer.scaling):
                wrong[wanted.target] = None
    if wrong:
        raise AdapterStateError(
            f"{listed(wrong)} of {view.title} have another rank or scaling than its "
            "configuration says, so a file of them would give other outputs. They come "
            "from another model. Adapt this one with their r and alpha (rank_pattern, "
            "alpha_pattern), and copy lora_A and lora_B."
        )


# What a file says


def _said_since_0_2_0(description: Description) -> dict[str, Any]:
    """Return what a description says that 0.2.0 does not know.

    Its own files do not say it.
    """
    entries = description.get(_SAID_SINCE_0_2_0)
    return dict_or_empty(entries[0]) if entries else {}


def stored_config(description: Description) -> LoRAConfig:
    """Return the configuration in a file's description.

    In files of 0.2.0, ``"all-linear"`` meant output heads too that only their names and
    sizes tell. Now it does not. So if the file has such a head, its layers are named.
    """
    try:
        config = LoRAConfig.from_dict(description["config"])
    except ConfigError as error:
        raise AdapterFileError(
            f"The file's configuration cannot be used: {error}"
        ) from error
    if config.target_modules != "all-linear":
        return config
    names = [
        layer["name"]
        for layer in description["layers"]
        if layer["kind"] not in _NAMED_OTHERWISE
    ]
    if any(_is_named_as_head(name) for name in names):
        return replace(config, target_modules=names)
    return config


def _is_named_as_head(layer: str) -> bool:
    """Whether a layer has the name of a language model's output head."""
    return layer.rpartition(".")[2] == OUTPUT_HEAD


# the kinds of layers that target_modules does not mean
_NAMED_OTHERWISE = (LoRAParameters.__name__, LoRATokens.__name__)
