"""Read loralib's files, for a model of plain layers.

loralib's ``lora_state_dict`` holds tensors only. Its alpha, and the parts of a ``MergedLinear``, are in no file.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig, Slices, matches_pattern
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, ConfigError, TargetError, listed
from lightning_lora.layers import LoRALayer, adapter_for
from lightning_lora.layers.convolution import LoRAConvNd
from lightning_lora.layers.embedding import LoRAEmbedding, LoRAEmbeddingBag
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.model.view import View
from lightning_lora.storage.formats.libraries import LORALIB
from lightning_lora.storage.formats.updates import Foreign, Update, assembled, place_of
from lightning_lora.targets.lookup import Names
from lightning_lora.targets.slices import sliced


def tensors_in(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a loralib file."""
    for key in ("model_state_dict", "state_dict"):
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
    tensors = {name: value for name, value in contents.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def read_loralib(
    view: View, tensors: Mapping[str, Tensor], path: object, alpha: float | None, target_slices: Slices | None
) -> Foreign:
    """Return what a loralib file is in this package.

    Args:
        view: The model, which is not merged.
        tensors: The tensors of the file.
        path: The file.
        alpha: The ``lora_alpha`` of its layers.
        target_slices: The parts that its ``MergedLinear`` layers adapt, in the order of their rows.

    Raises:
        ConfigError: ``alpha`` is missing or invalid.
        TargetError: ``target_slices`` name layers or parts that are not there.
        AdapterFileError: the file is damaged.
        AdapterMismatchError: it does not fit the model.
    """
    if alpha is None:
        raise ConfigError(
            f"{path} holds adapters of loralib, or the state_dict() of a model that was adapted here. The alpha of "
            "loralib's is in no file: pass the one of the training, load_adapter(model, path, alpha=...). For a "
            "state_dict(), call inject_adapters(model, config) as for the training, then "
            "model.load_state_dict(torch.load(path))."
        )
    settings = LoRAConfig(alpha=alpha, target_slices=target_slices)
    layers: dict[str, dict[str, Tensor]] = {}
    others = {}
    for name, value in tensors.items():
        if name.endswith(LORALIB):
            layers.setdefault(name[:-7], {})[name[-1]] = value
        else:
            others[name] = value
    broken = [name for name, pair in layers.items() if len(pair) != 2]
    if broken:
        raise AdapterFileError(f"{path} holds only one of lora_A and lora_B of {listed(broken)}: it is damaged.")
    rest = {_without_wrapper(name, layers): value for name, value in others.items()}
    place = place_of(view, list(layers), list(rest))
    pairs = {place.name_here(name): (pair["A"], pair["B"]) for name, pair in layers.items()}
    unused = [key for key in settings.target_slices or {} if not any(matches_pattern(key, name) for name in pairs)]
    if unused:
        raise TargetError(f"target_slices {unused} match no layer of the file. It has {listed(pairs)}.")
    updates = [_update(view, name, *pair, settings) for name, pair in pairs.items()]
    rest = {place.name_here(name): value for name, value in rest.items()}
    return assembled(view, updates, rest, LoRAConfig())


def _without_wrapper(name: str, layers: Mapping[str, object]) -> str:
    """A name without loralib's ``conv``: its convolutions hold a plain one inside."""
    owner, _, leaf = name.rpartition(".")
    outer = owner.removesuffix(".conv")
    return f"{outer}.{leaf}" if outer != owner and outer in layers else name


def _update(view: View, name: str, a: Tensor, b: Tensor, settings: LoRAConfig) -> Update:
    """The update of one layer. Its kind decides how loralib has laid it out."""
    layer, alpha = view.modules[name], settings.alpha
    kind = adapter_for(layer)
    is_known = kind is not None and issubclass(kind, LoRALinear | LoRAEmbedding | LoRAConvNd)
    if kind is None or not is_known or issubclass(kind, LoRAEmbeddingBag) or not a.dim() == b.dim() == 2:
        raise AdapterMismatchError(
            f"The file has factors {tuple(a.shape)} and {tuple(b.shape)} for {name!r}, which is "
            f"a {type(layer).__name__} in this model. loralib does not adapt it so. Pass the model of the training."
        )
    assert alpha is not None
    (whole,) = kind.lora_matrices_of(layer)
    slices = settings.slices(name)
    if slices:
        return _parts(view, name, kind, (a, b), settings)
    if issubclass(kind, LoRAConvNd):
        r, (a, b) = _convolution(name, layer, a, b)
        return Update(name, kind, (whole,), ((a, b),), alpha / r)
    if (a.shape[1], b.shape[0], a.shape[0]) != (whole.reads, whole.writes, b.shape[1]):
        merged = a.shape[1] == whole.reads and b.shape[1] and a.shape[0] % b.shape[1] == 0
        hint = "Pass the model that they were trained on."
        if merged:
            hint = (
                f"If it was a MergedLinear, name the parts that it adapted (enable_lora): target_slices={{{name!r}: "
                "['q', 'v']}."
            )
        raise AdapterMismatchError(
            f"The factors of {name!r} are {tuple(a.shape)} and {tuple(b.shape)}. This {type(layer).__name__} reads "
            f"{whole.reads} features and writes {whole.writes}. {hint}"
        )
    return Update(name, kind, (whole,), ((a, b),), alpha / a.shape[0])


def _parts(view: View, name: str, kind: type[LoRALayer], pair: tuple[Tensor, Tensor], settings: LoRAConfig) -> Update:
    """A ``MergedLinear``: A of all parts stacked, their rows of B stacked."""
    (a, b), slices = pair, settings.slices(name)
    assert slices is not None
    assert settings.alpha is not None
    layer = view.modules[name]
    parts = sliced(Names(view.model), name, kind, kind.lora_matrices_of(layer), slices)
    parts = tuple(sorted(parts, key=lambda part: part.first))
    n, r = len(parts), b.shape[1]
    sizes = {part.writes for part in parts}
    if (a.shape[0], a.shape[1]) != (n * r, parts[0].reads) or sizes != {len(b) // n} or len(b) % n:
        raise AdapterMismatchError(
            f"The factors of {name!r} are {tuple(a.shape)} and {tuple(b.shape)}: rank {r}, {a.shape[0] / r:g} parts. "
            f"target_slices name {n}, {listed(part.name for part in parts)}, of {sorted(sizes)} rows. Name the parts "
            "that enable_lora had."
        )
    pairs = tuple(zip(a.chunk(n), b.chunk(n), strict=True))
    return Update(name, kind, parts, pairs, settings.alpha / r)


def _convolution(name: str, layer: nn.Module, a: Tensor, b: Tensor) -> tuple[int, tuple[Tensor, Tensor]]:
    """The rank there, and the factors here. There, ``B A`` has the weight's elements, in another shape."""
    own: Any = layer
    weight, k = own.weight, own.kernel_size[0]
    if a.shape[0] != b.shape[1] or a.shape[0] % k or b.shape[0] * a.shape[1] != weight.numel():
        raise AdapterMismatchError(
            f"The factors of {name!r} are {tuple(a.shape)} and {tuple(b.shape)}, whose product cannot be the weight "
            f"{tuple(weight.shape)} of this {type(layer).__name__}. Pass the model that they were trained on."
        )
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    blocks = len(b) // len(weight)
    if blocks * len(weight) == len(b):  # a row of the weight is made of this many rows of B A
        return a.shape[0] // k, (
            torch.block_diag(*[wide] * blocks),
            torch.cat([b[i::blocks] for i in range(blocks)], dim=1),
        )
    product = (b.double() @ a.double()).reshape(len(weight), -1).to(wide.dtype)
    return a.shape[0] // k, (product, torch.eye(len(weight), dtype=wide.dtype))
