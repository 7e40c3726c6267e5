"""Files that were imported from PEFT without the model.

What the files alone could not show is checked when a model loads them.
"""

from collections.abc import Mapping
from typing import Any

from lightning_lora.errors import AdapterMismatchError
from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from lightning_lora.storage.foreign.contents import check_ties
from lightning_lora.storage.foreign.peft.updates import check_computes_alike
from lightning_lora.storage.layout import StoredLayer
from lightning_lora.storage.renaming import Renaming


def check_imported(view: View, state: Mapping[str, Any], description: Mapping[str, Any], renaming: Renaming) -> None:
    """Refuse an imported file that does not fit the model.

    The model would compute something else than PEFT. The same is checked when PEFT's own files are read.

    Args:
        view: The adapted model.
        state: The tensors of the file, by the names of the model.
        description: What the file says of them.
        renaming: How the names in the file became those of the model.

    Raises:
        AdapterMismatchError: a layer is of another kind than it seemed, or has a forward of its own, or a weight that
            was trained in full is tied.
    """
    for stored in map(StoredLayer.from_dict, description["layers"]):
        name = renaming.name_here(stored.name)
        layer: Any = view.layers.get(name)
        if layer is None:  # it is adapted in another way, or under its first name
            continue
        kind: type[LoRALayer] = layer.overlaid[0]
        check_computes_alike(name, layer, kind)
        seemed = stored.adapter_class
        if seemed is None or not issubclass(kind, seemed) or kind.lora_as_matrix is not seemed.lora_as_matrix:
            raise AdapterMismatchError(
                f"{name!r} is a {layer.overlaid[1].__name__} in {type(view.model).__name__}. From its shape alone, "
                f"lightning-lora import has taken it for a {stored.layer_class.rpartition('.')[2]}. Load PEFT's own "
                "folder instead: load_adapter(model, folder), and save it with save_adapter."
            )
    check_ties(view, {name: value for name, value in state.items() if name in view.base})
