"""Run a copy of a module with the adapter of one name: the module itself does not change meanwhile."""

from typing import Any

from lightning_lora.layers import (
    LayerAdapter,
    LoRALayer,
    LoRALinear,
    Step,
    attributes_of,
)
from lightning_lora.layers.each_kind.recurrent import LoRARecurrent
from lightning_lora.layers.functional_call import functional_call
from lightning_lora.model.rows.differences import Differences, Name
from lightning_lora.tensors.inplace import combined

RunningNames = list[Name]
"""The names whose rows run now, the innermost last: all modules of a block share one list.

A module that runs the rows of one name puts it here, and the modules inside it run with
the same adapter.
"""

_DERIVED = LoRARecurrent.lora_from_weights
"""Attributes that a recurrent layer makes of its weights: those of one name's weights are not kept.

No other layer has attributes of these names.
"""


class ModuleRunner:
    """Runs a module with the adapter of one name, or as the base."""

    def __init__(
        self, module: Any, differences: Differences, running: RunningNames
    ) -> None:
        self.module = module
        self.adapters = differences.adapters
        self.values = differences.values
        self.running = running
        self.plain_class: Any = (
            module.lora_plain_class if isinstance(module, LoRALayer) else type(module)
        )
        # a Trainer notes in the active adapter's step that a training step runs: so the
        # copies of the module have this very object
        self.step = vars(module).get("lora_step", Step())
        self.has_dropout = any(
            adapter.settings.dropout > 0 for adapter in self.adapters.values()
        )
        self.only_adds_updates = self._each_name_only_adds_an_update()

    def run_as(self, name: Name, args: Any, kwargs: Any) -> Any:
        """Run a copy of the module, which has the class, the attributes and the tensors of this name."""
        cls = self.plain_class
        attributes = dict[str, Any]()
        adapter = self.adapters.get(name)
        if adapter is not None:
            cls = self._adapted_class(adapter)
            attributes.update(attributes_of(adapter))
            attributes.update(adapter.parameters)
            attributes["lora_step"] = self.step
        attributes.update(self.values.get(name, {}))
        self.running.append(name)
        try:
            return functional_call(
                self.module, cls, attributes, _DERIVED, *args, **kwargs
            )
        finally:
            self.running.pop()

    def _adapted_class(self, adapter: LayerAdapter) -> Any:
        return combined(adapter.kind, self.plain_class)

    def can_add_updates(self) -> bool:
        """Whether one run as the base, and one product that adds the updates of all rows, do for all names.

        They do not while dropout acts: each name has masks of its own.
        """
        dropout_acts = self.has_dropout and (self.module.training or self.step.runs)
        return self.only_adds_updates and not dropout_acts

    def _each_name_only_adds_an_update(self) -> bool:
        """Whether each name computes what the base does, and perhaps adds an update to that."""
        if self.values or not self.adapters:
            return False
        return all(map(self._adds_to_output, self.adapters.values()))

    def _adds_to_output(self, adapter: LayerAdapter) -> bool:
        """Whether an adapter adds its update to the output of the base, as on most linear layers."""
        cls = self._adapted_class(adapter)
        return (
            issubclass(cls, LoRALinear)
            and cls._lora_is_additive
            and not adapter.settings.use_dora
        )
