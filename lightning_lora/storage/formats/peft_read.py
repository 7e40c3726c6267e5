"""Read PEFT's files: the layers come from the names of the tensors, the numbers from the configuration."""

import math
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig, matches
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, listed, warn
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import INITIALISATIONS, AdaptedMatrix, LoRALayer, LoRAParameters, adapter_for
from lightning_lora.layers.kinds import LoRAAttention, LoRAConv1D, LoRAEmbedding, LoRARecurrent, LoRATokens
from lightning_lora.model.view import View, root_of
from lightning_lora.storage.formats.format import Asked, Reader
from lightning_lora.storage.formats.peft.peft_config import (
    MERGE_THERE,
    PEFT_CONFIG,
    PREFIX,
    PeftConfig,
    is_peft,
    peft_key,
    read_config,
    tensors_in,
)
from lightning_lora.storage.formats.peft.peft_layers import has_layer, peft_layer, why_not, why_not_rows
from lightning_lora.storage.formats.reading import Update, adapters_of, check_shapes, pair_of, place_of
from lightning_lora.storage.renaming import Renaming, is_inside
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer, described
from lightning_lora.tensors.names import join, owner_of, starts_of

Tensors = Mapping[str, Tensor]  # of one adapter: "A", "B", "magnitude", "tokens"


def read(contents: Mapping[str, Any], path: Any, _: Asked) -> Reader | None:
    """Return how to read these contents of a file, if PEFT wrote it."""
    if not is_peft(contents, path):
        return None
    tensors = tensors_in(contents, path)

    def reader(view: View) -> StoredAdapters:
        peft = read_config(path)
        updates = read_updates(view, tensors, peft, path, root_of(view.model))
        return adapters_of(view, *updates, peft.config, peft.config.modules_to_save or ())

    return reader


def read_updates(
    view: View, tensors: Mapping[str, Any], peft: PeftConfig, path: Any, root: str
) -> tuple[list[Update], dict[str, Tensor]]:
    """Return the updates in a PEFT file, and its other tensors by their names here."""
    adapters, rest = _sorted(tensors, path)
    _check_magnitudes(adapters, path, use_dora=peft.config.use_dora)
    place = place_of(view, list(map(_plain, adapters)), list(rest), root)
    layers = _Layers(view, peft, place)
    rest = {place.name_here(name): value for name, value in rest.items()}
    updates = layers.updates(adapters)
    layers.check_complete(adapters, rest, path)
    return updates, rest


def _sorted(tensors: Mapping[str, Any], path: object) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each adapter, and the others by name in the base. Adapters have the name of what PEFT wraps."""
    adapters, rest, unknown = dict[str, dict[str, Tensor]](), dict[str, Tensor](), list[str]()
    for key, value in tensors.items():
        name, copied = key.removeprefix(PREFIX), _COPY.sub("", key)
        if found := peft_key(name):
            wrapped, what = found
            adapters.setdefault(wrapped, {})[what] = value
        elif any(mark in f"{name}." for mark in _LEFT):
            continue
        elif any(component.startswith(("lora_", "trainable_tokens")) for component in name.split(".")):
            unknown.append(key)
        elif copied == key or copied not in tensors:
            rest[_plain(name)] = value
    if unknown:
        raise AdapterFileError(f"{path} holds {listed(unknown)}, of a method of PEFT that is not here. {MERGE_THERE}")
    return adapters, rest


_LEFT = (".original_module.", ".lora_velora_embed.")  # the base's own values of a trained module; training's own
_COPY = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")  # bias="all" writes these biases twice


def _check_magnitudes(adapters: Mapping[str, Tensors], path: object, *, use_dora: bool) -> None:
    """Refuse a file that holds only some of DoRA's magnitudes, or against its configuration."""
    pairs = {name: "magnitude" in tensors for name, tensors in adapters.items() if "A" in tensors}
    if odd := [name for name, has_magnitude in pairs.items() if has_magnitude != use_dora]:
        raise AdapterFileError(
            f"{PEFT_CONFIG} says use_dora={use_dora}, and {path} holds {'no' if use_dora else 'a'} "
            f"lora_magnitude_vector for {listed(odd)}. Use the configuration and the tensors of one training."
        )


def _plain(name: str) -> str:
    """A name of the base, without PEFT's wrappers inside."""
    wrappers = ("base_layer", "token_adapter", "modules_to_save")
    return ".".join(component for component in name.split(".") if component not in wrappers)


@dataclass(frozen=True)
class _Layers:
    """The layers of a model by the names of a PEFT file. They may be adapted already."""

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
            is_of_attention = inner == "out_proj" and isinstance(above, nn.MultiheadAttention)
            of_layer.setdefault(outer if is_of_attention else _plain(wrapped), {})[wrapped] = tensors
        found = list(starmap(self._update, of_layer.items()))
        return [update for update in found if update.layer.matrices]  # an attention's may all be zero

    def _update(self, there: str, wrapped: Mapping[str, Tensors]) -> Update:
        """The update of one layer, from what PEFT wraps around it or inside of it."""
        layer = self._module(there)
        kind = adapter_for(layer)
        adapted_as = layer.overlaid[0] if isinstance(layer, LoRALayer) else None
        if kind is None or kind is LoRARecurrent or adapted_as is LoRAParameters:
            return self._parameters(there, wrapped)
        (tensors, *more) = wrapped.values()
        if "tokens" in tensors and not more:
            return self._tokens(there, tensors)
        about = self._described(there, kind, kind.lora_matrices_of(layer))
        if kind is LoRAAttention:
            return self._attention(there, about, wrapped)
        if more:
            raise AdapterFileError(f"The file holds {listed(wrapped)}: two updates of one {type(layer).__name__}.")
        return self._weight(there, about, kind, tensors)

    def _weight(self, there: str, about: StoredLayer, kind: type[LoRALayer], tensors: Tensors) -> Update:
        """The update of a layer with one weight."""
        (matrix,), said, factors = about.matrices, there, pair_of(there, tensors)
        if kind is LoRAConv1D and self.config.init == "olora":
            raise AdapterMismatchError(
                f"{there!r} is a Conv1D, trained with init_lora_weights='olora'. PEFT starts it from another matrix "
                "than its weight, so its update cannot be computed again. Merge it with PEFT, and use the merged model."
            )
        if self._is_named(f"{there}.weight"):
            said = f"{there}.weight"  # patterns mean a parameter by its own name
            if kind in (LoRAEmbedding, LoRAConv1D):  # this parameter is (in, out)
                factors = factors[1].T, factors[0].T
        factors = self._factors(about, matrix, factors, said)
        return Update(replace(about, scaling=self.config.scaling(said)), (factors,), tensors.get("magnitude"))

    def _attention(self, there: str, about: StoredLayer, wrapped: Mapping[str, Tensors]) -> Update:
        """q, k and v share A, and lie one after the other in B. PEFT adds the output projection's update twice."""
        *qkv, out = about.matrices
        matrices, factors = list[AdaptedMatrix](), list[Factors]()
        for name, tensors in wrapped.items():
            a, b = pair_of(name, tensors)
            if _plain(name) == there:
                matrices += qkv
                for matrix, block in zip(qkv, torch.atleast_1d(b).tensor_split(3), strict=True):
                    factors.append(self._factors(about, matrix, (a, block), there))
            elif name.endswith(".base_layer.out_proj"):
                matrices.append(out)
                factors.append(self._factors(about, out, (a, 2 * b), there))
            else:
                warn(f"Nothing calls {name!r} in an nn.MultiheadAttention: its update is left out, as PEFT does.")
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
            a, b = self._factors(about, matrix, pair_of(name, wrapped[name]), said)
            factors.append((a, b * (self.config.scaling(said) / scaling)))
        return Update(replace(about, scaling=scaling), tuple(factors))

    def _tokens(self, there: str, tensors: Tensors) -> Update:
        """The rows as they are: PEFT's name says delta, but they are whole."""
        (matrix,), rows = LoRATokens.lora_matrices_of(self._module(there)), tensors["tokens"]
        indices = self.peft.tokens
        if isinstance(indices, dict):
            indices = next((named for end, named in indices.items() if there.endswith(end)), [])
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

    # What these share

    def _module(self, there: str) -> Any:
        return self.view.modules[self.place.name_here(there)]

    def _is_named(self, parameter: str) -> bool:
        return any(matches(entry, parameter) for entry in self.config.target_parameters or ())

    def _described(self, there: str, kind: type[LoRALayer], matrices: tuple[AdaptedMatrix, ...]) -> StoredLayer:
        """The layer with this adapter, if PEFT computes the same."""
        about = described(self.view, self.place.name_here(there), kind, matrices)
        if why := why_not(about):
            raise AdapterMismatchError(
                f"The file has an update of {there!r}, which cannot be read: {why} Pass the model that the file was "
                "trained on, or merge it with PEFT, and use the merged model."
            )
        return about

    def _factors(self, about: StoredLayer, matrix: AdaptedMatrix, factors: Factors, said: str) -> Factors:
        """A and B of one matrix as they are here. Their rank and their shapes are checked."""
        (a, b), stack = factors, math.prod(matrix.stack)
        is_difference = INITIALISATIONS[self.config.init].is_difference
        weight = self.view.base[join(about.name, matrix.weight)]
        shared = [name for name, p in self.view.base.items() if p is weight] if is_difference else []
        if len(shared) > 1:
            raise AdapterMismatchError(
                f"{listed(shared)} are one weight, and init_lora_weights is {self.config.init!r}: PEFT takes a start "
                "off it for each use, and its merge gives another model. Train anew, from another start."
            )
        rank, asked = (a.shape[0] if a.dim() else 0) // stack, self.config.rank(said)
        most = min(asked, matrix.largest_rank) if is_difference else asked  # its start has no more
        if rank not in (asked, most):
            raise AdapterFileError(
                f"lora_A of {said!r} has rank {rank}, but the configuration says {asked}: the scaling is not known. "
                "Use the adapter_config.json that was written with these tensors."
            )
        with suppress(IndexError, RuntimeError):  # other shapes
            a, b = peft_layer(about).here(factors, about.shapes[matrix.weight], about.options)
        check_shapes(about, matrix, (a, b), rank)
        return a, b

    # What a whole file holds

    def check_complete(self, adapters: Mapping[str, Tensors], rest: Collection[str], path: object) -> None:
        """Refuse a file that lacks some of what its configuration names, or warn: an encoder's has no decoder."""
        names, left = [self.place.name_here(_plain(name)) for name in adapters], list[str]()
        wrapped = set(map(self.view.modules.__getitem__, names))
        held = {"", *(above for name in (*names, *rest) for above in starts_of(name)[:-1])}
        rows = [name for name, tensors in adapters.items() if "tokens" in tensors]
        ends = self.peft.tokens if isinstance(self.peft.tokens, dict) else [""] if self.peft.tokens else []
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
            f"{PEFT_CONFIG} also names {listed(lacking or left)} in {self.view.title}, and {path} holds "
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
        parameters = [join(there, leaf) for leaf, _ in module._parameters.items()]
        return (self.peft.adapts(there) and has_layer(adapter_for(module))) or any(map(self._is_named, parameters))

    def _is_saved_whole(self, name: str, there: str, rest: Collection[str]) -> bool:
        """Whether the file holds each tensor of a module, if that trains whole. PEFT takes any ending of a name."""
        if not there.endswith(tuple(self.config.modules_to_save or ())):
            return True
        return all(own in rest for own in (*self.view.base, *self.view.buffers) if own.startswith(f"{name}."))
