"""Whether a PEFT file holds all that its configuration names in a model."""

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from lightning_lora.errors import AdapterFileError, listed, warn
from lightning_lora.layers import adapter_for
from lightning_lora.layers.matrices import Role
from lightning_lora.storage.formats.layer_updates import AdapterTensors
from lightning_lora.storage.formats.peft.counterparts import wraps_layers_of
from lightning_lora.storage.formats.peft.reading.peft_file import PeftFile
from lightning_lora.storage.formats.peft_names import PEFT_CONFIG, without_wrappers
from lightning_lora.storage.renaming import entries_inside
from lightning_lora.tensors.dicts import only, where, without
from lightning_lora.tensors.names import (
    modules_around,
    names_joined,
    owner_of,
    starts_of,
)


def check_complete(file: PeftFile) -> None:
    """Refuse a file that lacks some of what its configuration names in the model, or warn of it.

    It is refused if it lacks rows, a part of a module that trained whole, or the update
    of a module beside others of which it has tensors: PEFT wrote all these. What the
    configuration names elsewhere may be no loss, because the file may be of a part of
    the model, such as its encoder.
    """
    _check_rows_are_there(file)
    comparison = _Comparison(file)
    lost = list[str]()
    elsewhere = list[str]()
    for name in _modules_inside(file):
        if comparison.is_saved_in_part(name):
            lost.append(name)
        elif comparison.lacks_update_of(name):
            is_beside_others = comparison.has_something_in(owner_of(name))
            if is_beside_others:
                lost.append(name)
            else:
                elsewhere.append(name)
    if lost:
        raise AdapterFileError(
            f"{_says(listed(lost), file)}Use all that was saved, on the model of the "
            "training. If they are to stay as they are, name them in exclude_modules "
            "of the configuration, or remove them from modules_to_save."
        )
    if elsewhere:
        warn(
            f"{_says(listed(elsewhere), file)}They stay as they are. To hide this "
            "warning, name them in exclude_modules there."
        )


def _says(named: str, file: PeftFile) -> str:
    """What the configuration says and the file does not hold, for messages."""
    return (
        f"{PEFT_CONFIG} also names {named} in {file.view.title}, and "
        f"{file.path} holds no tensors for them: it is not whole, or of another model. "
    )


def _modules_inside(file: PeftFile) -> list[str]:
    """The names of the modules inside of the one that the file is for."""
    root = file.renaming.here
    return list(without(entries_inside(root, file.view.modules), [root]))


def _check_rows_are_there(file: PeftFile) -> None:
    """Refuse a file that lacks the rows of an embedding that its configuration names."""
    with_rows = list(map(without_wrappers, where(file.adapters, _holds_rows)))
    for end in file.config.tokens:
        if any(name.endswith(end) for name in with_rows):
            continue
        # the configuration may have a list of rows, without the name of the embedding
        embedding = repr(end) if end else "an embedding"
        raise AdapterFileError(
            f"{_says(f'rows of {embedding}', file)}Use all that was saved, on the "
            "model of the training. If the rows are to stay as they are, remove them "
            "from trainable_token_indices of the configuration."
        )


@dataclass(frozen=True)
class _Comparison:
    """Compares what a file's configuration names with what the file has tensors of.

    All names here are the model's.
    """

    file: PeftFile

    def has_something_in(self, name: str) -> bool:
        """Return whether the file has tensors inside of a module, or this is the model itself."""
        return name in self._modules_around_tensors

    @cached_property
    def _modules_around_tensors(self) -> set[str]:
        """The names of the modules around all that the file has, and of the model itself."""
        owners = map(owner_of, (*self.file.layers, *self.file.rest))
        return {"", *modules_around(owners)}

    def lacks_update_of(self, name: str) -> bool:
        """Return whether PEFT would adapt a module, and the file has no update of it, or of a module around it."""
        around = {self.file.view.modules[start] for start in starts_of(name)}
        has_update = not around.isdisjoint(self._modules_with_update)
        return not has_update and self._is_adapted_by_peft(name)

    @cached_property
    def _modules_with_update(self) -> set[nn.Module]:
        """The modules themselves, not their names: a shared module has several."""
        return set(only(self.file.view.modules, set(self.file.layers)).values())

    def _is_adapted_by_peft(self, name: str) -> bool:
        """Whether PEFT would adapt a module, or one of its parameters."""
        config = self.file.config
        name_in_file = self.file.renaming.name_there(name)
        if config.is_in_saved(name_in_file):
            return False
        module = self.file.view.modules[name]
        if config.adapts(name_in_file) and wraps_layers_of(adapter_for(module)):
            return True
        parameters = names_joined(name_in_file, module._parameters)
        return any(map(config.names_parameter, parameters))

    def is_saved_in_part(self, name: str) -> bool:
        """Return whether a module trains whole, and the file lacks some of it."""
        if not self.file.config.saves(self.file.renaming.name_there(name)):
            return False
        view = self.file.view
        entries = entries_inside(name, {**view.base_parameters, **view.buffers})
        return not entries.keys() <= self.file.rest.keys()


def _holds_rows(tensors: AdapterTensors) -> bool:
    """Whether an adapter is single rows, in place of A and B."""
    return Role.ROWS in tensors
