"""What each reader does with one folder of PEFT's format, by the table of readers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.layers.matrices import Role
from lightning_lora.storage.formats.format import tensors_in
from lightning_lora.storage.formats.peft.peft_config import PeftConfig, read_config
from lightning_lora.storage.formats.peft.readers.reader_table import (
    ALPHAS,
    BIASES,
    DIFFERS,
    DORA,
    EMBEDDINGS,
    EXPERTS,
    HEADS,
    IGNORES,
    NORMS,
    PEFT_READERS,
    RANKS,
    REFUSES,
    ROWS,
    RSLORA,
    UNKNOWN,
    Reader,
)
from lightning_lora.storage.formats.peft_names import PREFIX, peft_key, without_wrappers
from lightning_lora.storage.formats.peft_or_diffusers import is_peft
from lightning_lora.tensors.dicts import renamed
from lightning_lora.tensors.names import names_joined, starts_of

_WORDS = {
    DIFFERS: "scales otherwise:",
    REFUSES: "refuses",
    IGNORES: "ignores",
    UNKNOWN: "not known:",
}
"""How a line begins what a reader does. The worst comes first."""


@dataclass
class Contents:
    """What a folder holds of the kinds of training in which readers differ."""

    # the modules of each: {"adapted embeddings": ["wte"]}
    kinds: dict[str, list[str]] = field(default_factory=dict)
    has_one_scaling: bool = True

    def add(self, kind: str, name: str = "") -> None:
        """Note a kind, and the name of a module that is of it.

        Some kinds are said of all modules at once.
        """
        names = self.kinds.setdefault(kind, [])
        if name and name not in names:
            names.append(name)


def lines_of_readers(contents: Mapping[str, Any], path: Any) -> dict[str, str]:
    """Return, by its name, what each reader does with a folder."""
    if not isinstance(contents, dict) or not is_peft(contents, path):
        raise no_adapters_of_peft(path)
    tensors = renamed(tensors_in(contents, path), _name_in_base)
    held = contents_of(tensors, read_config(path))
    lines = dict[str, str]()
    for reader in PEFT_READERS:
        lines[reader.name] = _line(reader, held)
    return lines


def no_adapters_of_peft(path: object) -> AdapterFileError:
    """Return the error for a file or a folder that PEFT does not read."""
    return AdapterFileError(
        f"{path} holds no adapters in PEFT's format. Pass a folder that PEFT reads. "
        "From a file of this package, lightning-lora export FILE FOLDER writes one."
    )


def _name_in_base(key: str) -> str:
    """A tensor's name without PEFT's prefix."""
    return key.removeprefix(f"{PREFIX}.")


# What is in the folder


def contents_of(tensors: Mapping[str, Tensor], peft: PeftConfig) -> Contents:
    """Return what these tensors and this configuration are, in the columns of the table."""
    held = Contents()
    _add_settings(held, peft)
    others = dict[str, Tensor]()
    for name, tensor in tensors.items():
        wrapped, role = peft_key(name)
        if role is None:
            others[without_wrappers(name)] = tensor
        else:
            _add_adapter(held, peft, role, without_wrappers(wrapped))
            if "lora_embedding_" in name:
                held.add(EMBEDDINGS, without_wrappers(wrapped))
    _add_others(held, peft, others)
    return held


def _add_settings(held: Contents, peft: PeftConfig) -> None:
    """Note what the configuration says of all layers."""
    config = peft.as_ours
    settings = {
        RANKS: config.rank_pattern,
        ALPHAS: config.alpha_pattern,
        RSLORA: config.use_rslora,
        DORA: config.use_dora,
        EXPERTS: config.target_parameters,
    }
    for kind, is_set in settings.items():
        if is_set:
            held.add(kind)


def _add_adapter(held: Contents, peft: PeftConfig, role: Role, layer: str) -> None:
    """Note whether an adapter is of rows or of experts, and whether it is scaled as all others."""
    if role is Role.ROWS:
        held.add(ROWS, layer)
        return
    adapted = [layer]
    if peft.as_ours.target_parameters and not peft.adapts(layer):
        held.add(EXPERTS, layer)
        adapted = _parameters_in(layer, peft.as_ours.target_parameters)
    if any(_is_scaled_otherwise(name, peft) for name in adapted):
        held.has_one_scaling = False


def _parameters_in(module: str, entries: Iterable[str]) -> list[str]:
    """The parameters of a module that these entries may mean: each is a name, or its last components."""
    leaves = [entry.rpartition(".")[2] for entry in entries]
    return names_joined(module, dict.fromkeys(leaves))


def _is_scaled_otherwise(name: str, peft: PeftConfig) -> bool:
    """Whether a pattern gives a layer or a parameter another scaling than most have."""
    without_patterns = peft.as_ours.scaling("")
    difference = abs(peft.as_ours.scaling(name) - without_patterns)
    return difference > 1e-6 * without_patterns


def _add_others(held: Contents, peft: PeftConfig, others: Mapping[str, Tensor]) -> None:
    """Note tensors that are no adapter's: of modules that trained whole, and biases."""
    # of a tensor in each whole module: a head has a matrix, and perhaps a bias
    most_dimensions = dict[str, int]()
    for name, tensor in others.items():
        module = _whole_module_around(name, peft)
        if module is None:
            held.add(BIASES)
        else:
            most_dimensions[module] = max(tensor.dim(), most_dimensions.get(module, 0))
    for module, dimensions in most_dimensions.items():
        kind = NORMS if dimensions <= 1 else HEADS
        held.add(kind, module)


def _whole_module_around(name: str, peft: PeftConfig) -> str | None:
    """The module that trained whole and holds a tensor, if there is one."""
    for module in starts_of(name):
        if peft.saves(module):
            return module
    return None


# What readers do with it


def _line(reader: Reader, held: Contents) -> str:
    """What a reader does with a folder, in a line."""
    parts = list[str]()
    for does, words in _WORDS.items():
        kinds = _kinds_with(reader, held, does)
        if kinds:
            parts.append(f"{words} {', '.join(kinds)}")
    return "; ".join(parts) or "takes it as it is"


def _kinds_with(reader: Reader, held: Contents, does: str) -> list[str]:
    """The kinds in a folder with which a reader does this, and the modules."""
    found = list[str]()
    for kind, names in held.kinds.items():
        if reader.cells[kind] == does and not _is_harmless(reader, held, kind):
            found.append(with_names(kind, names))
    return found


def _is_harmless(reader: Reader, held: Contents, kind: str) -> bool:
    """Whether a reader that knows one scaling has the right one: ranks and alphas differ, and not their quotient."""
    return (
        kind in (RANKS, ALPHAS)
        and reader.cells[RANKS] == DIFFERS
        and held.has_one_scaling
    )


def with_names(kind: str, names: Iterable[str]) -> str:
    """Return a kind, and the modules that are of it, if they are known."""
    return f"{kind} ({listed(names)})" if names else kind
