"""What a module had before its own hooks ran. These may fill buffers, and load the base."""

from torch import Tensor

from lightning_lora.model.record import records_in
from lightning_lora.model.view import View
from lightning_lora.private import NormBase
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.named import joined, of_type, only, where
from lightning_lora.tensors.names import owner_of
from lightning_lora.tensors.values import Seen


class BeforeHooks:
    """The buffers of a module, and its tensors that have a base value, as they came."""

    def __init__(self, view: View) -> None:
        self._modules = set(view.modules)
        self._buffers = _digests_of_buffers(view)
        self._with_base_value: dict[str, Seen] = {}
        with_base_value = set[str]()
        for prefix, record in records_in(view.modules).items():
            with_base_value.update(joined(prefix, where(record.adapter.originals, _has_values)))
        for name, tensor in only({**view.parameters, **view.buffers}, with_base_value).items():
            self._with_base_value[name] = Seen(tensor)

    def filled_buffers(self, view: View) -> set[str]:
        """Return the buffers that the hooks have filled, in modules that were there before."""
        filled = set()
        for name, now in _digests_of_buffers(view).items():
            if now != self._buffers.get(name) and owner_of(name) in self._modules:
                filled.add(name)
        return filled

    def has_changed(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor with a base value is another than it was, or new."""
        before = self._with_base_value.get(name)
        return before is None or not before.is_still(tensor)


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
