"""Read PEFT's files: the layers come from the names of the tensors, the numbers from the configuration."""

import math
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import starmap
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig, matches
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, listed, warn
from lightning_lora.functional.combine import Factors
from lightning_lora.layers import INITIALISATIONS, AdaptedMatrix, LoRALayer, LoRAParameters, adapter_for
from lightning_lora.layers.kinds import LoRAAttention, LoRAConv1D, LoRAEmbedding, LoRARecurrent, LoRATokens
from lightning_lora.model.view import View, root_of
from lightning_lora.storage.formats.others import check_tool
from lightning_lora.storage.formats.peft_config import (
    DIFFUSERS_WEIGHTS,
    MERGE_THERE,
    METADATA,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PREFIX,
    PeftConfig,
    is_peft,
    peft_key,
    read_config,
)
from lightning_lora.storage.formats.peft_layers import has_layer, peft_layer, why_not, why_not_rows
from lightning_lora.storage.formats.reading import Asked, Reader, Update, adapters_of, place_of, uses_of
from lightning_lora.storage.names import Renaming, is_inside
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer, described
from lightning_lora.tensors.names import join, owner_of, starts_of

Tensors = Mapping[str, Tensor]  # of one adapter: "A", "B", "magnitude", "tokens"


def weights_of(path: Path) -> Path:
    """Return the file with the tensors: ``path`` itself, or in the folder ``path``, or of a repository of the hub."""
    if _REPOSITORY.fullmatch(path.as_posix()) and not path.exists():
        path = _cached(path.as_posix())
    if not os.path.isdir(path):  # noqa: PTH112  # Path raises if a name is too long
        return path
    found = [path / name for name in (*PEFT_WEIGHTS, *DIFFUSERS_WEIGHTS) if (path / name).is_file()]
    if not found:
        check_tool(path)
        file = next(path.glob("*.safetensors"), Path("last.ckpt")).name
        raise AdapterFileError(
            f"{path} is not a file, and as a folder it holds no adapters of PEFT. Expected {PEFT_CONFIG} and "
            f"{PEFT_WEIGHTS[0]}, or {DIFFUSERS_WEIGHTS[0]}. Otherwise pass one file, such as {file!r}."
        )
    return found[0]


def _cached(repository: str) -> Path:
    """Return the folder of a repository of the Hugging Face hub, if this machine has it."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, local_files_only=True))
    except (ImportError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{repository} is no file or folder here, and no repository in the cache of the Hugging Face hub. If it is "
            f"one, download it: load_adapter(model, huggingface_hub.snapshot_download({repository!r}))."
        ) from error


def reader(contents: Mapping[str, Any], path: Any, _: Asked) -> Reader | None:
    """Return how to read these contents of a file, if PEFT wrote it."""
    tensors = dict(contents)
    tensors.pop(METADATA, None)  # diffusers' header, where PEFT's own configuration is beside the file

    def read(view: View) -> StoredAdapters:
        peft = read_config(path)
        updates = updates_of(view, tensors, peft, path, root_of(view.model))
        return adapters_of(view, *updates, peft.config, peft.config.modules_to_save or ())

    return read if is_peft(contents) else None


def updates_of(
    view: View, tensors: Mapping[str, Any], peft: PeftConfig, path: Any, root: str
) -> tuple[list[Update], dict[str, Tensor]]:
    """Return the updates in a PEFT file for the model inside, and its other tensors by their names here."""
    adapters, rest = _sorted(tensors, path)
    _check_magnitudes(adapters, path, use_dora=peft.config.use_dora)
    place = place_of(view, list(map(_plain, adapters)), list(rest), root)
    layers = _Layers(view, peft, place)
    rest = {place.name_here(name): value for name, value in rest.items()}
    updates = layers.updates(adapters)
    layers.check_complete(adapters, rest, path)
    return updates, rest


def _sorted(tensors: Mapping[str, Any], path: object) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each adapter, by the name of what PEFT wraps, and the others, by their names in the base."""
    adapters, rest, unknown = dict[str, dict[str, Tensor]](), dict[str, Tensor](), list[str]()
    if odd := [key for key, value in tensors.items() if not (isinstance(value, Tensor) and isinstance(key, str))]:
        raise AdapterFileError(f"{path} holds {listed(odd)}, which is no tensor with a name: it was changed.")
    for key, value in tensors.items():
        name, copied = key.removeprefix(PREFIX), _COPY.sub("", key)
        if parts := peft_key(name):
            wrapped, what = parts
            adapters.setdefault(wrapped, {})[what] = value
        elif any(part in f"{name}." for part in _LEFT):
            continue
        elif any(part.startswith(("lora_", "trainable_tokens")) for part in name.split(".")):
            unknown.append(key)
        elif copied == key or copied not in tensors:
            rest[_plain(name)] = value
    if unknown:
        raise AdapterFileError(
            f"{path} holds {listed(unknown)}, which belong to a method of PEFT that this package does not have. "
            f"{MERGE_THERE}"
        )
    return adapters, rest


_LEFT = (".original_module.", ".lora_velora_embed.")  # the base's own values of a trained module; training's own
_REPOSITORY = re.compile(r"[\w.-]{1,96}/(?!.*\.(safetensors|ckpt|bin|pt)$)[\w.-]{1,96}")  # no name of a file
_MIXERS = ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")  # they read the weight of dt_proj
_COPY = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")  # bias="all" writes these biases twice


def _check_magnitudes(adapters: Mapping[str, Tensors], path: object, *, use_dora: bool) -> None:
    """Refuse a file that holds DoRA's magnitudes only here and there, or against its configuration."""
    pairs = {name: "magnitude" in tensors for name, tensors in adapters.items() if "A" in tensors}
    if odd := [name for name, has_magnitude in pairs.items() if has_magnitude != use_dora]:
        raise AdapterFileError(
            f"{PEFT_CONFIG} says use_dora={use_dora}, and {path} holds {'no' if use_dora else 'a'} "
            f"lora_magnitude_vector for {listed(odd)}. Use the configuration and the tensors of one training."
        )


def _plain(name: str) -> str:
    """A name of the base, without PEFT's wrappers inside."""
    wrappers = ("base_layer", "token_adapter", "modules_to_save")
    return ".".join(part for part in name.split(".") if part not in wrappers)


@dataclass(frozen=True)
class _Layers:
    """The layers of a model, which may be adapted already, by the names of a PEFT file."""

    view: View
    peft: PeftConfig
    place: Renaming

    @property
    def config(self) -> LoRAConfig:
        return self.peft.config

    def updates(self, adapters: Mapping[str, Tensors]) -> list[Update]:
        """Return the updates of the layers."""
        of_layer: dict[str, dict[str, Tensors]] = {}
        for wrapped, tensors in adapters.items():
            outer, _, inner = _plain(wrapped).rpartition(".")
            above = self.view.modules.get(self.place.name_here(outer))
            is_inside = inner == "out_proj" and isinstance(above, nn.MultiheadAttention)
            of_layer.setdefault(outer if is_inside else _plain(wrapped), {})[wrapped] = tensors
        return list(filter(attrgetter("layer.matrices"), starmap(self._update, of_layer.items())))

    def _update(self, there: str, wrapped: Mapping[str, Tensors]) -> Update:
        layer = self._module(there)
        kind = adapter_for(layer)
        adapted_as = layer.overlaid[0] if isinstance(layer, LoRALayer) else None
        if kind is None or kind is LoRARecurrent or adapted_as is LoRAParameters:
            return self._parameters(there, wrapped)
        (tensors, *more) = wrapped.values()
        if "tokens" in tensors and not more:
            return self._tokens(there, tensors)
        about = self._described(there, kind, kind.lora_matrices_of(layer), tensors.get("magnitude"))
        if kind is LoRAAttention:
            return self._attention(there, about, wrapped)
        if more:
            raise AdapterFileError(f"The file holds {listed(wrapped)}: two updates of one {type(layer).__name__}.")
        if kind is LoRAConv1D and self.config.init == "olora":
            raise AdapterMismatchError(
                f"{there!r} is a Conv1D, trained with init_lora_weights='olora'. PEFT starts it from another matrix "
                "than its weight, so its update cannot be computed again. Merge it with PEFT, and use the merged model."
            )
        (matrix,), said, factors = about.matrices, there, _pair(there, tensors)
        if self._is_read_alone(there) and (INITIALISATIONS[self.config.init].is_difference or factors[1].any()):
            raise AdapterMismatchError(
                f"The file has an update of {there!r}, which the module around it never calls: it computes with the "
                "weight. PEFT's model leaves the update out and its merge adds it. Train again without this layer."
            )
        if self._is_named(f"{there}.weight"):
            said = f"{there}.weight"  # patterns mean a parameter by its own name
            if kind in (LoRAEmbedding, LoRAConv1D):  # this parameter is (in, out)
                factors = factors[1].T, factors[0].T
        factors = self._factors(about, matrix, factors, said)
        return Update(replace(about, scaling=self.config.scaling(said)), (factors,), tensors.get("magnitude"))

    def _is_read_alone(self, there: str) -> bool:
        outer, _, leaf = there.rpartition(".")
        around = self.view.modules.get(self.place.name_here(outer))
        return leaf == "dt_proj" and type(around).__name__ in _MIXERS

    def _module(self, there: str) -> Any:
        return self.view.modules[self.place.name_here(there)]

    def _described(
        self, there: str, kind: type[LoRALayer], matrices: tuple[AdaptedMatrix, ...], magnitude: Tensor | None = None
    ) -> StoredLayer:
        """The layer with this adapter, if PEFT computes the same."""
        about = described(self.view, self.place.name_here(there), kind, matrices)
        if why := why_not(about, magnitude):
            raise AdapterMismatchError(
                f"The file has an update of {there!r}, which cannot be read: {why} Pass the model that the file was "
                "trained on, or merge it with PEFT, and use the merged model."
            )
        return about

    def _is_named(self, parameter: str) -> bool:
        return any(matches(entry, parameter) for entry in self.config.target_parameters or ())

    def _factors(self, about: StoredLayer, matrix: AdaptedMatrix, factors: Factors, said: str) -> Factors:
        """A and B of one matrix as they are here, after a check of their rank and their shapes."""
        (a, b), stack = factors, math.prod(matrix.stack)
        shared = uses_of(self.view, join(about.name, matrix.weight))
        is_difference = INITIALISATIONS[self.config.init].is_difference
        if is_difference and len(shared) > 1:
            raise AdapterMismatchError(
                f"{listed(shared)} are one weight, and init_lora_weights is {self.config.init!r}: PEFT takes a start "
                "off it for each use, and its merge gives another model. Train anew, from another start."
            )
        rank, asked = (a.shape[0] if a.dim() else 0) // stack, self.config.rank(said)
        most = min(asked, matrix.largest_rank) if is_difference else asked  # their start has no more
        if rank not in (asked, most):
            raise AdapterFileError(
                f"lora_A of {said!r} has rank {rank}, but the configuration says {asked}: the scaling is not known. "
                "Use the adapter_config.json that was written with these tensors."
            )
        expected = [(*matrix.stack, rank, matrix.reads), (*matrix.stack, matrix.writes, rank)]
        with suppress(IndexError, RuntimeError):  # other shapes
            a, b = peft_layer(about).here(factors, about.shapes[matrix.weight], about.options)
        if [a.shape, b.shape] != expected:
            raise AdapterMismatchError(
                f"The file's update of {said!r} has factors {tuple(factors[0].shape)} and {tuple(factors[1].shape)}. "
                f"This {about.layer_class.rpartition('.')[2]} reads {matrix.reads} features and writes "
                f"{matrix.writes}. Pass the model that it was trained on."
            )
        return a, b

    def _attention(self, there: str, about: StoredLayer, wrapped: Mapping[str, Tensors]) -> Update:
        """q, k and v share A, and lie one after the other in B. PEFT adds the output projection's update twice."""
        *qkv, out = about.matrices
        matrices, factors = list[AdaptedMatrix](), list[Factors]()
        for name, tensors in wrapped.items():
            a, b = _pair(name, tensors)
            if "magnitude" in tensors:
                raise AdapterMismatchError(f"{there!r} is an attention, which PEFT does not adapt with DoRA.")
            if _plain(name) == there:
                matrices += qkv
                for matrix, block in zip(qkv, torch.atleast_1d(b).tensor_split(3), strict=True):
                    factors.append(self._factors(about, matrix, (a, block), there))
            elif name.endswith(".base_layer.out_proj"):
                matrices.append(out)
                factors.append(self._factors(about, out, (a, 2 * b), there))
            elif b.any():
                raise AdapterMismatchError(
                    f"The file updates {name!r}, which its nn.MultiheadAttention never calls. Train {there!r} instead."
                )
            else:
                warn(f"The update of {name!r} is zero, as its nn.MultiheadAttention never calls it: it is left out.")
        return Update(replace(about, scaling=self.config.scaling(there), matrices=tuple(matrices)), tuple(factors))

    def _parameters(self, there: str, wrapped: Mapping[str, Tensors]) -> Update:
        """Parameters of a module. PEFT wraps it once for each, in the module's own order: the last one is outermost."""
        layer = self._module(there)
        ours = layer.lora_roles() if isinstance(layer, LoRALayer) else {}
        named = [leaf for leaf in layer._parameters if leaf not in ours and self._is_named(f"{there}.{leaf}")]
        if len(named) != len(wrapped):
            raise AdapterMismatchError(
                f"The file has {len(wrapped)} updates of {there!r}, a {type(layer).__name__} in this model, and its "
                f"target_parameters name {named or 'no parameter of it'}. Pass the model that it was trained on."
            )
        kind: type[LoRALayer] = LoRAParameters
        matrices = tuple(LoRAParameters.lora_matrix_of(layer, leaf) for leaf in named)
        if adapter_for(layer) is LoRARecurrent:
            kind = LoRARecurrent
            matrices = tuple(matrix for matrix in kind.lora_matrices_of(layer) if matrix.weight in named)
        about, factors = self._described(there, kind, matrices), list[Factors]()
        scaling = self.config.scaling(f"{there}.{named[0]}")
        for matrix, name in zip(matrices, sorted(wrapped, key=len, reverse=True), strict=True):
            said = f"{there}.{matrix.weight}"
            a, b = self._factors(about, matrix, _pair(name, wrapped[name]), said)
            factors.append((a, b * (self.config.scaling(said) / scaling)))
        return Update(replace(about, scaling=scaling), tuple(factors))

    # What a whole file holds

    def check_complete(self, adapters: Mapping[str, Tensors], rest: Collection[str], path: object) -> None:
        """Refuse a file that lacks some of what its configuration names, or warn: an encoder's has no decoder."""
        names, left = [self.place.name_here(_plain(name)) for name in adapters], list[str]()
        wrapped = set(map(self.view.modules.__getitem__, names))
        held = {"", *(above for name in (*names, *rest) for above in starts_of(name)[:-1])}
        rows = [name for name, tensors in adapters.items() if "tokens" in tensors]
        ends = self.peft.tokens if isinstance(self.peft.tokens, dict) else [""] * bool(self.peft.tokens)
        lacking = [f"{end}: rows" for end in ends if not any(_plain(name).endswith(end) for name in rows)]
        for name, module in self.view.modules.items():
            if not is_inside(name, self.place.here) or name == self.place.here:
                continue
            around, there = map(self.view.modules.__getitem__, starts_of(name)), self.place.name_there(name)
            if not self._is_saved_whole(name, there, rest):
                lacking.append(name)
            elif wrapped.isdisjoint(around) and self._is_meant(there, module):
                (lacking if owner_of(name) in held else left).append(name)
        says = (
            f"{PEFT_CONFIG} also names {listed(lacking or left)} in {type(self.view.model).__name__}, and {path} holds "
            "no tensors for them: it is not whole, or of another model. "
        )
        if lacking:
            raise AdapterFileError(
                f"{says}Use all that was saved, on the model of the training. If they are to stay as they are, name "
                "them in exclude_modules of the configuration, or remove them from modules_to_save."
            )
        if left:
            warn(f"{says}They stay as they are. To hide this warning, name them in exclude_modules there.")

    def _is_meant(self, there: str, module: nn.Module) -> bool:
        """Whether PEFT would adapt a module, or one of its parameters."""
        if any(map(self.config.is_saved, starts_of(there))):
            return False
        parameters = [join(there, leaf) for leaf in module._parameters]
        return (self.peft.adapts(there) and has_layer(adapter_for(module))) or any(map(self._is_named, parameters))

    def _is_saved_whole(self, name: str, there: str, rest: Collection[str]) -> bool:
        """Whether the file holds each tensor of a module, if that trains whole. PEFT takes any ending of a name."""
        if not there.endswith(tuple(self.config.modules_to_save or ())):
            return True
        return all(own in rest for own in (*self.view.base, *self.view.buffers) if own.startswith(f"{name}."))

    # Rows of an embedding that train

    def _tokens(self, there: str, tensors: Tensors) -> Update:
        """The rows as they are: PEFT's name says delta, but they are whole."""
        (matrix,), rows = LoRATokens.lora_matrices_of(self._module(there)), tensors["tokens"]
        indices = self.peft.tokens
        if isinstance(indices, dict):
            indices = next((rows for end, rows in indices.items() if there.endswith(end)), [])
        if len(tensors) > 1:
            raise AdapterFileError(f"{there!r} trains single rows, and has another update too. That cannot be read.")
        matrix = replace(matrix, tokens=tuple(sorted({*indices})))
        is_valid = all(0 <= index < matrix.reads for index in indices) and rows.shape[1:] == (matrix.writes,)
        if not is_valid or not len(indices) == len(rows) == len(matrix.tokens) > 0:
            raise AdapterMismatchError(
                f"The file holds {len(rows)} rows of {there!r} {(matrix.reads, matrix.writes)}, and its configuration "
                f"names {len(indices)}, up to {max(indices, default=0)}. Resize it first, as for the training."
            )
        if why := why_not_rows(self.view.modules, self.place.name_here(there)):
            raise AdapterMismatchError(f"The rows of {there!r} cannot be read: {why} Merge it with PEFT.")
        about = replace(self._described(there, LoRATokens, (matrix,)), scaling=self.config.scaling(there))
        about = replace(about, r=matrix.rank(self.config.rank(there)))
        return Update(about, (), rows=rows[torch.tensor(indices).argsort()])


def _pair(there: str, tensors: Tensors) -> Factors:
    """A and B of one wrapper."""
    if "A" not in tensors or "B" not in tensors:
        raise AdapterFileError(f"The file holds only one of A and B of {there!r}: it is damaged or was changed.")
    return tensors["A"], tensors["B"]
