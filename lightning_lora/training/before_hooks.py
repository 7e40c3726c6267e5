"""What a module had before its own hooks ran. These may fill buffers, and load the base."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_lora.model.record import records_in
from lightning_lora.model.view import View
from lightning_lora.private import NormBase
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.named import joined, of_type, only, where
from lightning_lora.tensors.names import owner_of
from lightning_lora.tensors.seen import Seen


@dataclass
class BeforeHooks:
    """A module's buffers, and its tensors that have a base value, as they came. By default, there were none."""

    digests: dict[str, int] = field(default_factory=dict)
    """Of the buffers."""

    with_base_value: dict[str, Seen] = field(default_factory=dict)

    modules: set[str] = field(default_factory=set)
    """The modules that were there, until their hooks have run."""

    @classmethod
    def of(cls, pl_module: LightningModule) -> "BeforeHooks":
        """Look at a module as it came."""
        view = View(pl_module)
        return cls(_digests_of_buffers(view), _seen_with_base_value(view), set(view.modules))

    def take_filled_buffers(self, pl_module: LightningModule) -> set[str]:
        """Return the buffers that the hooks have filled in modules that were there. Later, it is others who do."""
        filled = set[str]()
        if not self.modules:
            return filled
        for name, now in _digests_of_buffers(View(pl_module)).items():
            if now != self.digests.get(name) and owner_of(name) in self.modules:
                filled.add(name)
        self.modules.clear()
        return filled

    def changed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of these tensors with a base value that are others than they were, or new."""
        return {name: tensor for name, tensor in tensors.items() if not self._is_as_before(name, tensor)}

    def _is_as_before(self, name: str, tensor: Tensor) -> bool:
        return name in self.with_base_value and self.with_base_value[name].has_same_values(tensor)


def _seen_with_base_value(view: View) -> dict[str, Seen]:
    """The tensors whose base values an adapter keeps."""
    names = set[str]()
    for prefix, record in records_in(view.modules).items():
        names.update(joined(prefix, where(record.adapter.originals, _has_values)))
    tensors = only({**view.parameters, **view.buffers}, names)
    return {name: Seen(tensor) for name, tensor in tensors.items()}


def _digests_of_buffers(view: View) -> dict[str, int]:
    """The digests of all buffers but the statistics of norms, which are the base's."""
    norms = of_type(view.modules, NormBase)
    digests = {}
    for name, buffer in where(view.buffers, _has_values).items():
        if owner_of(name) not in norms:
            digests[name] = digest(buffer)
    return digests


def _has_values(tensor: Tensor) -> bool:
    return not tensor.is_meta
