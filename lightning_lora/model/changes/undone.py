"""If a change of a model fails, restore the model."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_lora.layers import LoRALayer
from lightning_lora.layers.norms import FrozenNorm, set_frozen
from lightning_lora.model.changes.attach import attach_adapters
from lightning_lora.model.records import forget_record, keep_record, records_in
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import of_type, without
from lightning_lora.tensors.values import set_requires_grad


@contextmanager
def undone_on_error(view: View) -> Iterator[None]:
    """If the ``with`` block fails, restore adapters, records, frozen norms and ``requires_grad``.

    Values are not restored: for these, a caller has an :class:`.Undo`.
    """
    before = _ModelBefore(view)
    try:
        yield
    except BaseException:
        before.restore(view)
        raise


class _ModelBefore:
    """A model as it was before a change, without its values."""

    def __init__(self, view: View) -> None:
        self.requires_grad = {
            parameter: parameter.requires_grad for parameter in view.parameters.values()
        }
        self.adapters = {
            name: layer.lora_adapter() for name, layer in view.layers.items()
        }
        self.frozen_norms = set(of_type(view.modules, FrozenNorm).values())
        self.records = records_in(view.modules)
        self.contents = {
            name: record.snapshot() for name, record in self.records.items()
        }

    def restore(self, view: View) -> None:
        """Undo all that has changed since."""
        view.look_again()
        self._restore_adapters(view)
        for module in view.modules.values():
            set_frozen(module, module in self.frozen_norms)
        for parameter, flag in self.requires_grad.items():
            # torch allows no write to a lazy parameter, whose flag never changes
            if parameter.requires_grad != flag:
                set_requires_grad(parameter, flag)
        self._restore_records(view)

    def _restore_records(self, view: View) -> None:
        """Give the model and its modules their records again, with what these held before.

        A record stays the same object, because an open block of ``adapter_names`` holds
        it too.
        """
        forget_record(view.model)
        for name, record in self.records.items():
            vars(record).update(vars(self.contents[name]))
            keep_record(view.modules[name], record)

    def _restore_adapters(self, view: View) -> None:
        """Take off the adapters that are new, and attach those that were taken off.

        Two adapters of a layer are told apart by their ``step`` (:class:`.Step`): each
        adapter has one of its own for life, and its layer holds it as ``lora_step``.
        """
        steps_before = {adapter.step for adapter in self.adapters.values()}
        for layer in view.layers.values():
            if layer.lora_step not in steps_before:
                layer.lora_detach()
        taken_off = without(self.adapters, of_type(view.modules, LoRALayer))
        attach_adapters(view, taken_off)
