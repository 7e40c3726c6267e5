"""Which tensors of a base a file of adapters changes, and how: what a merge of files begins with."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_lora.base.fingerprints import says_names
from lightning_lora.errors import AdapterMismatchError, listed
from lightning_lora.storage.offline.tensor_files import TensorFiles
from lightning_lora.storage.offline.without_model import tensors_beside_adapters
from lightning_lora.storage.renaming import (
    Renaming,
    find_renamings,
    names_without_prefix,
)
from lightning_lora.storage.same_base.base_comparison import BaseThere
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.dicts import renamed, with_values
from lightning_lora.tensors.names import is_in, join, names_joined


@dataclass(frozen=True)
class AdaptedWeight:
    """A weight of the base that gets an update."""

    layer: StoredLayer
    weight: str  # its name in the layer

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight in the training."""
        return self.layer.shapes[self.weight]

    @property
    def is_tied(self) -> bool:
        """Whether other layers have the weight too, and would get an update that they did not have in the training.

        Single rows that train are no such update: all these layers had them.
        """
        return self.weight in self.layer.tied and not self.layer.tokens


class MergePlan:
    """What a merge of files does.

    The base's tensors may have other names than in the adapters' file. Here ``name`` is
    one in the adapters' file, and ``base_name`` one in the base. Of a ``name``:

    ``has_place``     whether the base, which may be a part of the model, is around it
    ``name_in_base``  what the base would call it, if it has a place there
    ``find_in_base``  what the base calls it, or None if it has no such tensor
    """

    def __init__(self, files: TensorFiles, stored: StoredAdapters) -> None:
        self.files = files
        self.stored = stored
        self.base_path = files.path
        self.source = stored.source
        # from names in the adapters' file to those in the base
        self.renaming = _find_renaming(files, stored)
        _check_inside(self.renaming, files, stored)

    def has_place(self, name: str) -> bool:
        """Whether a name in the adapters' file lies inside of what the base is."""
        return is_in(name, self.renaming.there)

    def name_in_base(self, name: str) -> str:
        """Return the name in the base for one in the adapters' file, if it has a place there."""
        return self.renaming.name_here(name)

    def find_in_base(self, name: str) -> str | None:
        """Return the base's name of the tensor that has this name in the adapters' file.

        None: the base has no such tensor.
        """
        # a name without a place is not renamed, and may be that of another tensor
        if not self.has_place(name):
            return None
        base_name = self.name_in_base(name)
        return base_name if base_name in self.files.file_of else None

    def names_written_for(self, file: Path) -> list[str]:
        """Return the tensors of the merged model that go to the counterpart of this file of the base."""
        return list(with_values(self.output_of, [file]))

    @property
    def not_of_the_base(self) -> set[str]:
        """The names of the tensors that are not compared with the base.

        The adapters' file holds its own values of some frozen weights. What belongs to
        no base (weights that look untrained, filled buffers) has other values in each
        run.
        """
        return {*self.stored.frozen_in_state, *self.stored.of_no_base}

    @cached_property
    def bases_there(self) -> list[BaseThere]:
        """The training's base, in each form whose fingerprint says the names."""
        return list(map(BaseThere, filter(says_names, self.stored.base)))

    @cached_property
    def adapted(self) -> dict[str, AdaptedWeight]:
        """The weights that get an update, by their names in the base."""
        adapted = dict[str, AdaptedWeight]()
        for layer in self.stored.layers.values():
            for weight in layer.shapes:
                base_name = self.name_in_base(join(layer.name, weight))
                adapted[base_name] = AdaptedWeight(layer, weight)
            for base_name in self._other_names_of_rows(layer):
                adapted[base_name] = AdaptedWeight(layer, "weight")
        return adapted

    def _other_names_of_rows(self, layer: StoredLayer) -> list[str]:
        """The other names in the base of an embedding of which single rows train, such as that of a tied head."""
        others = layer.tied.get("weight", ()) if layer.tokens else ()
        base_names = map(self.find_in_base, others)
        return [base_name for base_name in base_names if base_name is not None]

    @cached_property
    def replaced(self) -> dict[str, Any]:
        """The values of the adapters' file that come into the merged model as they are, by their names in the base.

        A buffer that the file's run filled is among them only if the base's file has a
        tensor of its name.
        """
        replaced = renamed(tensors_beside_adapters(self.stored), self.name_in_base)
        for name in self.stored.filled_in_state:
            base_name = self.find_in_base(name)
            if base_name is not None:
                replaced[base_name] = self.stored.state[name]
        return replaced

    @cached_property
    def output_of(self) -> dict[str, Path]:
        """The file of the base to whose counterpart each tensor of the merged model goes, by the tensor's name there.

        What the base lacks, such as a new head, goes to its last file.
        """
        output_of = dict(self.files.file_of)
        *_, last = output_of.values()
        for base_name in self.replaced:
            output_of.setdefault(base_name, last)
        return output_of


def _find_renaming(files: TensorFiles, stored: StoredAdapters) -> Renaming:
    """How names in the adapters' file become names in the base: one prefix may come off, or be added."""
    weights = list[str]()
    for layer in stored.layers.values():
        weights += names_joined(layer.name, layer.shapes)
    fitting = find_renamings(weights, files.file_of, root_there=stored.root)
    if len(fitting) > 1:
        places = sorted(renaming.name_here(weights[0]) for renaming in fitting)
        raise AdapterMismatchError(
            f"The weights that {stored.source} adapts are in {files.path} in several "
            f"places: {listed(places)}. Pass a base that holds the model once."
        )
    if not fitting:
        return Renaming()  # check_plan says what is absent
    return fitting[0]


def _check_inside(
    renaming: Renaming, files: TensorFiles, stored: StoredAdapters
) -> None:
    """Refuse an adapters' file with trained values of modules that the base lacks."""
    outside = names_without_prefix(tensors_beside_adapters(stored), renaming.there)
    if outside:
        raise AdapterMismatchError(
            f"{stored.source} also holds {listed(outside)}, trained outside of "
            f"{renaming.there!r}, for which {files.path} has no place. Merge in "
            "memory: load_adapter(model, path), then save_merged."
        )
