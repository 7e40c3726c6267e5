"""What a file of PEFT holds of each adapter, and where that lies in the model for which it is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from lightning_lora.model.view import View
from lightning_lora.storage.formats.layer_updates import AdapterTensors
from lightning_lora.storage.formats.peft.peft_config import PeftConfig
from lightning_lora.storage.formats.peft_names import without_wrappers
from lightning_lora.storage.renaming import Renaming


@dataclass(frozen=True)
class PeftFile:
    """A file of PEFT that is read for a model."""

    path: Any
    config: PeftConfig  # the configuration beside the tensors
    view: View  # of the model
    renaming: Renaming  # how names in the file become names in the model
    # the adapters, by the names in the file of what PEFT wraps, such as
    # "attn.base_layer.out_proj"
    adapters: Mapping[str, AdapterTensors]
    # the tensors of what trains in full, and copies of the base's, by their names in the
    # model
    rest: Mapping[str, Tensor]

    @cached_property
    def layers(self) -> list[str]:
        """The names in the model of what PEFT wraps."""
        return self.renaming.names_here(map(without_wrappers, self.adapters))

    def module(self, name_in_file: str) -> nn.Module:
        """Return the module of the model that has this name in the file."""
        return self.view.modules[self.renaming.name_here(name_in_file)]
