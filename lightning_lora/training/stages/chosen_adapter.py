"""Which of a module's adapters a stage uses.

The module may come with another one, which is shown again afterwards.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field

from lightning.pytorch import LightningModule

from lightning_lora.base.record import Record
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError
from lightning_lora.model import switch
from lightning_lora.model.records import find_record
from lightning_lora.tensors.shards import is_dtensor


@dataclass
class ChosenAdapter:
    """The adapter that a stage uses: the one with a name, or the one that is active."""

    name: str | None = None
    """None: the adapter that is active."""

    is_new: bool = False
    """Whether the stage has begun this adapter, beside others."""

    undo_switch: ExitStack = field(default_factory=ExitStack)
    """Shows again what the module showed before ``activate``."""

    def name_in(self, record: Record) -> str:
        """Return the adapter's name in a module with adapters."""
        return self.name or record.adapter.name

    def is_shown_by(self, pl_module: LightningModule) -> bool:
        """Whether the module shows no other adapter than this one, nor its base instead.

        A module that has no adapters yet will get this one.
        """
        record = find_record(pl_module)
        return record is None or record.name_in_effect == self.name_in(record)

    def refuse_sum(self, pl_module: LightningModule) -> None:
        """Refuse to train a sum of adapters."""
        record = find_record(pl_module)
        if record is None:
            return
        adapter = record.adapter_states.get(self.name_in(record))
        if adapter is not None and adapter.sum_of:
            raise AdapterStateError(
                f"{type(pl_module).__name__} shows a sum of adapters, "
                f"{adapter.name!r}, which is not trained. Train one of them, "
                "LoRACallback(name=...), or make one of the sum with combine_adapters."
            )

    def activate(self, pl_module: LightningModule, config: LoRAConfig | None) -> None:
        """Make this adapter the active one of a module with adapters.

        If the module lacks it, it begins with ``config``. Without a ``config``, that is
        an error.
        """
        names = switch.adapters(pl_module)
        name = self.name or names[0]  # the active one
        self.is_new = name not in names
        self.undo_switch = switch.activate(pl_module, name, config)

    def switch_back(self, pl_module: LightningModule) -> None:
        """Show again what the module showed before ``activate``.

        The second time, this does nothing.
        """
        # a sharded module cannot switch its adapters
        if not any(map(is_dtensor, pl_module.parameters())):
            self.undo_switch.close()
