"""Run a module with the adapter of one name, while its class, its attributes and its tensors stay as they are."""

from collections.abc import Mapping
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
from lightning_lora.tensors.inplace import combined

Name = str | None
"""An adapter's name. None: the base."""

Values = dict[Name, dict[str, Any]]
"""What a module has with each name, in the place of its own tensors."""

_DERIVED = LoRARecurrent.lora_from_weights
"""Attributes that a module may have made of its weights, and must make anew.

Only recurrent layers have attributes of these names.
"""


class ModuleRunner:
    """Runs a module with the adapter of one name, or as the base.

    ``adapters`` has the adapter of each name that has one here, and ``values`` the
    other tensors of the module with each name. ``running`` is a stack that all modules
    of the block share: the names whose rows run now, the innermost last. By it, the
    modules inside this one run with the same adapter.
    """

    def __init__(
        self,
        module: Any,
        adapters: Mapping[Name, LayerAdapter],
        values: Values,
        running: list[Name],
    ) -> None:
        self.module = module
        self.adapters = adapters
        self.values = values
        self.running = running
        self.plain_class: Any = (
            module.lora_plain_class if isinstance(module, LoRALayer) else type(module)
        )
        self.step = vars(module).get("lora_step", Step())
        self.has_dropout = any(
            adapter.settings.dropout > 0 for adapter in adapters.values()
        )
        self.is_additive = self._is_additive()

    def run_as(self, name: Name, args: Any, kwargs: Any) -> Any:
        """Run the module with the adapter of this name."""
        cls = self.plain_class
        attributes = self.values.get(name, {})
        adapter = self.adapters.get(name)
        if adapter is not None:
            cls = self._adapted_class(adapter)
            attributes = {
                **attributes_of(adapter),
                "lora_step": self.step,
                **adapter.parameters,
                **attributes,
            }
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
        return self.is_additive and not dropout_acts

    def _is_additive(self) -> bool:
        """Whether each name runs the base, and adds an update to its output or nothing."""
        if self.values or not self.adapters:
            return False
        return all(self._adds_to_output(adapter) for adapter in self.adapters.values())

    def _adds_to_output(self, adapter: LayerAdapter) -> bool:
        cls = self._adapted_class(adapter)
        return (
            issubclass(cls, LoRALinear)
            and cls._lora_is_additive
            and not adapter.settings.use_dora
        )
