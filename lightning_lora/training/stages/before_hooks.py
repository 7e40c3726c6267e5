"""What a module had before its own hooks ran.

The hooks may fill buffers, and load the base. So a buffer that differs afterwards was
filled by them, and a tensor of the base that differs is the base from then on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_lora.model.records import records_in
from lightning_lora.model.view import View
from lightning_lora.private import NormBase
from lightning_lora.tensors.dicts import of_type, only, where
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import names_joined, owner_of
from lightning_lora.tensors.seen import Seen


@dataclass
class BeforeHooks:
    """A module as it came. By default, before the stage begins, nothing is known of it."""

    modules: frozenset[str] = frozenset()
    """The names of its modules."""

    buffers: dict[str, int] = field(default_factory=dict)
    """The digests of its buffers, by name."""

    base_tensors: dict[str, Seen] = field(default_factory=dict)
    """The tensors of which its adapters keep the base's values, because training changes them."""

    awaits_hooks: bool = False
    """Whether the module has come to a stage, and its hooks have not run yet."""

    @classmethod
    def of(cls, pl_module: LightningModule) -> "BeforeHooks":
        """Look at a module as it came, before its hooks run."""
        view = View(pl_module)
        return cls(
            frozenset(view.modules),
            _digests_of_buffers(view),
            _kept_by_adapters(view),
            awaits_hooks=True,
        )

    def take_filled_buffers(self, pl_module: LightningModule) -> set[str]:
        """Return the names of the buffers that the hooks have filled, in modules that were there before.

        Call this once the hooks have run. A second call returns none: what is filled by
        then, other code has filled.
        """
        filled = set[str]()
        if not self.awaits_hooks:
            return filled
        self.awaits_hooks = False
        for name, now in _digests_of_buffers(View(pl_module)).items():
            if now != self.buffers.get(name) and owner_of(name) in self.modules:
                filled.add(name)
        return filled

    def changed_base_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of these tensors that are new, or have other values now than before the hooks."""
        changed = {}
        for name, tensor in tensors.items():
            before = self.base_tensors.get(name)
            if before is None or not before.has_same_values(tensor):
                changed[name] = tensor
        return changed


def _kept_by_adapters(view: View) -> dict[str, Seen]:
    """The tensors of which an adapter keeps the base's values, as they are now.

    Networks inside the module may have records of their own.
    """
    names = set[str]()
    for prefix, record in records_in(view.modules).items():
        names.update(names_joined(prefix, where(record.adapter.originals, _has_values)))
    tensors = only({**view.parameters, **view.buffers}, names)
    return {name: Seen(tensor) for name, tensor in tensors.items()}


def _digests_of_buffers(view: View) -> dict[str, int]:
    """The digests of the buffers, but not of norms: their statistics belong to the base."""
    norms = of_type(view.modules, NormBase)
    digests = {}
    for name, buffer in where(view.buffers, _has_values).items():
        if owner_of(name) not in norms:
            digests[name] = digest(buffer)
    return digests


def _has_values(tensor: Tensor) -> bool:
    return not tensor.is_meta
