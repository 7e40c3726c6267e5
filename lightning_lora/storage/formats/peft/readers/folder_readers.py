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
    NOT_KNOWN,
    PEFT_READERS,
    RANKS,
    REFUSES,
    ROWS,
    RSLORA,
    Reader,
)
from lightning_lora.storage.formats.peft_names import (
    peft_key,
    without_prefix,
    without_wrappers,
)
from lightning_lora.storage.formats.peft_or_diffusers import is_peft
from lightning_lora.tensors.dicts import renamed
from lightning_lora.tensors.names import last_component, names_joined, starts_of

_WORDS = {
    DIFFERS: "scales otherwise:",
    REFUSES: "refuses",
    IGNORES: "ignores",
    NOT_KNOWN: "not known:",
}
"""How a line begins what a reader does. The worst comes first."""


@dataclass
class KindsOfTraining:
    """The kinds of training in one folder, as far as readers differ in them."""

    # the modules of each kind: {"adapted embeddings": ["wte"], "rsLoRA": []}
    modules: dict[str, list[str]] = field(default_factory=dict)
    # whether alpha over rank is the same everywhere
    has_one_scaling: bool = True

    def add(self, kind: str, name: str = "") -> None:
        """Add a kind, and the name of a module that is of it.

        A kind that the configuration says of all modules at once, such as rsLoRA, comes
        without a name.
        """
        names = self.modules.setdefault(kind, [])
        if name and name not in names:
            names.append(name)


def lines_of_readers(contents: Mapping[str, Any], path: Any) -> dict[str, str]:
    """Return, by its name, what each reader does with the folder of a file that holds these contents."""
    if not isinstance(contents, dict) or not is_peft(contents, path):
        raise no_adapters_of_peft(path)
    tensors = renamed(tensors_in(contents, path), without_prefix)
    kinds = kinds_in(tensors, read_config(path))
    lines = dict[str, str]()
    for reader in PEFT_READERS:
        lines[reader.name] = _line(reader, kinds)
    return lines


def no_adapters_of_peft(path: object) -> AdapterFileError:
    """Return the error for a file or a folder that PEFT does not read."""
    return AdapterFileError(
        f"{path} holds no adapters in PEFT's format. Pass a folder that PEFT reads. "
        "From a file of this package, lightning-lora export FILE FOLDER writes one."
    )


# What is in the folder


def kinds_in(tensors: Mapping[str, Tensor], peft: PeftConfig) -> KindsOfTraining:
    """Return the kinds of training that these tensors and this configuration come from."""
    kinds = KindsOfTraining()
    _add_settings(kinds, peft)
    others = dict[str, Tensor]()
    for name, tensor in tensors.items():
        wrapped, role = peft_key(name)
        name_in_base = without_wrappers(wrapped)
        if role is None:
            others[name_in_base] = tensor
        elif role is Role.ROWS:
            kinds.add(ROWS, name_in_base)
        else:
            _add_update(kinds, peft, name_in_base)
            if "lora_embedding_" in name:
                kinds.add(EMBEDDINGS, name_in_base)
    _add_others(kinds, peft, others)
    return kinds


def _add_settings(kinds: KindsOfTraining, peft: PeftConfig) -> None:
    """Add what the configuration says of all layers."""
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
            kinds.add(kind)


def _add_update(kinds: KindsOfTraining, peft: PeftConfig, module: str) -> None:
    """Add whether an update of this module is of experts, and whether it is scaled as most are.

    An update of experts is one of the module's parameters. The configuration tells: its
    ``target_parameters`` names some, and its ``target_modules`` does not name the
    module.
    """
    names = [module]  # those by which patterns may give the update its scaling
    parameters = peft.as_ours.target_parameters
    if parameters and not peft.adapts(module):
        kinds.add(EXPERTS, module)
        names = _parameters_in(module, parameters)
    if any(_is_scaled_otherwise(name, peft) for name in names):
        kinds.has_one_scaling = False


def _parameters_in(module: str, entries: Iterable[str]) -> list[str]:
    """The parameters of a module that these entries may mean: ``experts.down_proj`` for ``mlp.experts.down_proj``.

    Without the model, it is not known whether the module has all of them.
    """
    leaves = dict.fromkeys(map(last_component, entries))
    return names_joined(module, leaves)


def _is_scaled_otherwise(name: str, peft: PeftConfig) -> bool:
    """Whether a pattern gives a layer or a parameter another scaling than most have."""
    without_patterns = peft.as_ours.scaling("")
    difference = abs(peft.as_ours.scaling(name) - without_patterns)
    return difference > 1e-6 * without_patterns


def _add_others(
    kinds: KindsOfTraining, peft: PeftConfig, others: Mapping[str, Tensor]
) -> None:
    """Add what tensors that are no adapter's come from: whole norms, whole heads, and biases.

    A module that trained whole is a norm if its tensors have one dimension at most. A
    head has a matrix.
    """
    most_dimensions = dict[str, int]()  # of the tensors of each whole module
    for name, tensor in others.items():
        module = _whole_module_around(name, peft)
        if module is None:
            kinds.add(BIASES)
        else:
            most_dimensions[module] = max(tensor.dim(), most_dimensions.get(module, 0))
    for module, dimensions in most_dimensions.items():
        kind = NORMS if dimensions <= 1 else HEADS
        kinds.add(kind, module)


def _whole_module_around(name: str, peft: PeftConfig) -> str | None:
    """The module that trained whole and holds a tensor, if there is one."""
    for module in starts_of(name):
        if peft.saves(module):
            return module
    return None


# What readers do with it


def _line(reader: Reader, kinds: KindsOfTraining) -> str:
    """What a reader does with a folder: ``refuses biases; ignores whole heads (score)``."""
    parts = list[str]()
    for does, words in _WORDS.items():
        found = kinds_with(reader, kinds, does)
        if found:
            parts.append(f"{words} {', '.join(found)}")
    return "; ".join(parts) or "takes it as it is"


def kinds_with(reader: Reader, kinds: KindsOfTraining, does: str) -> list[str]:
    """Return the kinds in a folder with which a reader does this, each with its modules."""
    found = list[str]()
    for kind, modules in kinds.modules.items():
        if reader.cells[kind] == does and not _is_harmless(reader, kinds, kind):
            found.append(with_modules(kind, modules))
    return found


def _is_harmless(reader: Reader, kinds: KindsOfTraining, kind: str) -> bool:
    """Whether the ranks and alphas of single layers change nothing for a reader.

    One that does not read the ranks of single layers scales all updates by one alpha
    over one rank. That is right, if only ranks and alphas differ, and not their
    quotient.
    """
    return (
        kind in (RANKS, ALPHAS)
        and reader.cells[RANKS] == DIFFERS
        and kinds.has_one_scaling
    )


def with_modules(kind: str, modules: Iterable[str]) -> str:
    """Return a kind, and the modules that are of it, if they are known: ``whole heads (score)``."""
    return f"{kind} ({listed(modules)})" if modules else kind
