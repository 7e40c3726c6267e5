"""What every adapted layer is: its own class, factors beside its weights, and four verbs."""

import warnings
from collections.abc import Collection, Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, DeadAdapterWarning
from lightning_lora.functional.linear import (
    added,
    delta_weight,
    lost_share,
    magnitude_scale,
    merged,
    wide,
)
from lightning_lora.layers.parts import MAGNITUDE, Adapter, Part, Settings
from lightning_lora.layers.start import names_of, start
from lightning_lora.tensors.inplace import InPlace, Made, overlay, twin_of, uncover
from lightning_lora.tensors.names import own_parameter
from lightning_lora.tensors.values import Seen, digest

LayerTypes = tuple[type[nn.Module] | str, ...]
"""Classes of layers; the full name of one that this package does not import."""


class LoRALayer(InPlace, nn.Module):
    """The mixin laid over an adapted layer. The layer keeps its keys and gains ``lora_A`` and ``lora_B``.

    A subclass names what it adapts (:attr:`lora_layer_types`) and the matrices in it (:meth:`lora_parts_of`). Without
    more the layer is run on ``W + ΔW``. A subclass that can compute the update by itself, at the cost of its rank, says
    so in :meth:`lora_update`. Every name begins with ``lora_``, since the layer below may have any other for itself.
    """

    lora_layer_types: ClassVar[LayerTypes]
    """The classes it adapts."""

    lora_methods: ClassVar[tuple[str, ...]] = ("forward",)
    """The methods by which such a class computes. A subclass that overrides one may compute anything."""

    lora_is_linear: ClassVar[bool] = False
    """Whether ``"all-linear"`` means it."""

    lora_fits_dora: ClassVar[bool] = False
    """Whether each row of its one matrix writes a feature of the output, which DoRA can give a magnitude."""

    lora_writes_rows: ClassVar[bool] = True
    """Whether each row of its one matrix writes a feature of the output, so that slices of rows mean something."""

    lora_input: ClassVar[str] = "input"
    """What its forward calls its first argument."""

    lora_drops_input: ClassVar[bool] = True
    """Whether the input has features that can be dropped."""

    lora_zero: ClassVar[str] = "B"
    """The factor that starts at zero."""

    lora_twins_own: ClassVar[tuple[str, ...]] = ()
    """Attributes that its forward sets to what it takes from its weights."""

    lora_parts: tuple[Part, ...]
    lora_settings: Settings
    lora_bases: dict[str, Tensor]
    """The layer's own values of the weights that show an update merged in, by their names in the layer."""
    lora_started_on: dict[str, int]
    lora_enabled: bool
    lora_merged: bool
    """Whether there are such weights: a flag that torch.compile watches, as it does not watch a dictionary."""
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    _lora_is_additive: ClassVar[bool]
    _lora_is_matrix: ClassVar[bool]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Note, for a class laid over a layer's, whether the layer's own output and an update add up to its output.

        Not where that layer computes in a way of its own.
        """
        super().__init_subclass__(**kwargs)
        if "overlaid" in cls.__dict__:
            base: Any = cls.overlaid[1]
            known = next((ancestor for ancestor in base.__mro__ if cls.lora_adapts(ancestor)), base)
            cls._lora_is_matrix = cls.lora_as_matrix is LoRALayer.lora_as_matrix
            computes_itself = any(getattr(base, m) is not getattr(known, m) for m in cls.lora_methods)
            cls._lora_is_additive = cls.lora_update is not LoRALayer.lora_update and not computes_itself

    # What a subclass says

    @classmethod
    def lora_adapts(cls, layer_class: type) -> bool:
        """Whether ``layer_class`` is a class that this adapter is for."""
        kinds = cls.lora_layer_types
        return layer_class in kinds or f"{layer_class.__module__}.{layer_class.__qualname__}" in kinds

    @classmethod
    def lora_parts_of(cls, layer: Any) -> tuple[Part, ...]:
        """Return the matrices in ``layer`` that can be adapted."""
        rows, columns = cls.lora_as_matrix(own_parameter(layer, "weight")).shape
        return (Part("weight", columns, rows, rows=rows),)

    @staticmethod
    def lora_refusal(layer: Any) -> str | None:  # noqa: ARG004  # a subclass looks at the layer
        """Return why this one layer cannot be adapted although its type can, or None."""
        return None

    @staticmethod
    def lora_is_quantised(layer: Any) -> bool:
        """Whether no update can be merged into the layer's weight, since it has not the values of its dtype."""
        weight = layer._parameters.get("weight")
        return weight is not None and type(weight).dequantize is not Tensor.dequantize

    @staticmethod
    def lora_dtype(layer: Any, weight: Tensor) -> torch.dtype:  # noqa: ARG004
        """Return the dtype that the layer computes in."""
        return weight.dtype

    @staticmethod
    def lora_values(layer: Any, weight: Tensor) -> Tensor:  # noqa: ARG004
        """Return the values of a weight, which may be stored in another form."""
        return weight if type(weight).dequantize is Tensor.dequantize else weight.dequantize()

    @staticmethod
    def lora_as_matrix(weight: Tensor) -> Tensor:
        """Return a weight as a matrix (out, in), or a stack of them."""
        return weight

    @staticmethod
    def lora_as_weight(matrix: Tensor, weight: Tensor) -> Tensor:
        """Lay out a matrix (out, in) as ``weight`` is laid out."""
        return matrix.reshape(weight.shape)

    def lora_update(self, lora_A: Tensor, lora_B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what the factors add to the output, from the arguments of ``forward``, dropout done."""
        raise NotImplementedError

    # What every adapted layer does

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer with its update.

        A layer that computes in its own way (one that pads, scales or normalises) is run as it is, on the weight
        ``W + ΔW``: the only rule by which it computes the same with its update merged.
        """
        if not self.lora_enabled or self.lora_merged:
            return super().forward(*args, **kwargs)
        if self._lora_is_additive:
            return self.lora_forward(*args, **kwargs)
        return self.lora_forward_on_sum(*args, **kwargs)

    def lora_forward_on_sum(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the layer does on ``W + ΔW``."""
        dtypes = {name: self.lora_dtype(self, self._lora_own(name)) for name in self.lora_weights()}
        weights = {n: self.lora_effective_weight(n, dropping=True).to(dtype) for n, dtype in dtypes.items()}
        return self.lora_run_on(weights, *args, **kwargs)

    def lora_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer itself, and add the update; with DoRA, scale the sum to its magnitude."""
        output, settings = super().forward(*args, **kwargs), self.lora_settings
        if settings.dropout and self.training and self.lora_drops_input:
            if args:
                args = (F.dropout(args[0], settings.dropout), *args[1:])
            else:
                kwargs[self.lora_input] = F.dropout(kwargs[self.lora_input], settings.dropout)
        updates = [self.lora_update(a, b, *args, **kwargs) for a, b in self._lora_pairs("weight")]
        update = sum(updates[1:], updates[0]).to(output.dtype)
        if not settings.use_dora:
            return output + update
        with torch.autocast(output.device.type, enabled=False):
            with torch.no_grad():
                matrix = added(self.lora_values(self, self._lora_own("weight")), self._lora_delta("weight"))
            scale = magnitude_scale(self.lora_magnitude, self.lora_as_matrix(matrix))  # type: ignore[arg-type]
        after = (1,) * (self.weight.dim() - 2)  # type: ignore[operator]  # dimensions of the output after its features
        scale, bias = scale.view(-1, *after), getattr(self, "bias", None)
        unbiased = output if bias is None else output - bias.view(-1, *after).to(output.dtype)
        return output + (scale - 1).to(output.dtype) * unbiased + scale.to(output.dtype) * update

    def lora_weights(self) -> tuple[str, ...]:
        """Return the names of the weights that have updates."""
        return tuple(dict.fromkeys(part.weight for part in self.lora_parts))

    def lora_effective_weight(self, name: str, *, dropping: bool = False) -> Tensor:
        """Return a weight with its update, in float32 or wider.

        Args:
            name: The weight's name in the layer.
            dropping: In training, drop whole features that A reads: the input itself is out of reach.
        """
        own = self.lora_values(self, self._lora_own(name))
        p = self.lora_settings.dropout if dropping and self.training and self.lora_drops_input else 0.0
        with torch.autocast(own.device.type, enabled=False):
            effective = added(own, self._lora_delta(name, p))
            if not self.lora_settings.use_dora:
                return effective
            matrix = self.lora_as_matrix(effective)
            scaled = matrix * magnitude_scale(self.lora_magnitude, matrix).unsqueeze(-1)  # type: ignore[arg-type]
            return self.lora_as_weight(scaled, own)

    def _lora_delta(self, name: str, dropout: float = 0.0) -> Tensor:
        """The update of a weight, laid out as it is, in float32 or wider."""
        pairs = self._lora_pairs(name)
        kept = F.dropout(torch.ones_like(pairs[0][0][..., :1, :]), dropout) if dropout else 1
        matrices = [delta_weight(a * kept, b, self.lora_settings.scaling) for a, b in pairs]
        return self.lora_as_weight(sum(matrices[1:], matrices[0]), self._lora_own(name))

    def _lora_pairs(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """The factors of a weight's update, which is the sum of their products.

        From a start it is ``B A - B0 A0``, a small difference of what may be large. It is taken of the factors, before
        anything is rounded: ``(B - B0) A + B0 (A - A0)``.
        """
        a, b = self._lora_stacked(name)
        if not self.lora_settings.starts_from_base:
            return [(a, b)]
        a0, b0 = self._lora_stacked(name, start="0")
        return [(a, b - b0), (a - a0, b0)]

    def _lora_own(self, name: str) -> Tensor:
        """A weight without its update. It is read as an attribute, which is all that replicas of a module have."""
        if name in self.lora_bases:
            return self.lora_bases[name]
        holder: Any = self
        for part in name.split("."):
            holder = getattr(holder, part)
        return holder  # type: ignore[no-any-return]  # a tensor

    def _lora_stacked(self, name: str, start: str = "") -> tuple[Tensor, Tensor]:
        """The factors of all parts of a weight as one pair: what A reads one above the other, B in blocks beside it."""
        parts = [part for part in self.lora_parts if part.weight == name]
        if len(parts) == 1 and parts[0].is_whole:
            return getattr(self, parts[0].factor("A" + start)), getattr(self, parts[0].factor("B" + start))
        pairs = [(getattr(self, p.factor("A" + start)), getattr(self, p.factor("B" + start))) for p in parts]
        blocks = [
            F.pad(b, (0, 0, p.first, p.rows - p.first - p.writes)) for p, (_, b) in zip(parts, pairs, strict=True)
        ]
        return torch.cat([a for a, _ in pairs]), torch.cat(blocks, dim=1)

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the adapter added, by their names in the layer."""
        return {name: own_parameter(self, name) for name in names_of(self.lora_parts, self.lora_settings)}

    def lora_trained(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return those of them that train, for each weight that they adapt, by their names in the layer."""
        trained: dict[str, dict[str, nn.Parameter]] = {name: {} for name in self.lora_weights()}
        for part in self.lora_parts:
            for name in (part.factor("A"), part.factor("B")):
                trained[part.weight][name] = own_parameter(self, name)
        if self.lora_settings.use_dora:
            trained["weight"][MAGNITUDE] = own_parameter(self, MAGNITUDE)
        return trained

    # Merge and un-merge

    def lora_merge(self, tied: Collection[str] = ()) -> float:
        """Show ``W + ΔW`` as the weight.

        Args:
            tied: Weights that have another use, which is to stay as it is: show a parameter of its own for them,
                instead of giving them other values.

        Returns:
            The share of ``ΔW`` that was lost to rounding, of the weight that lost most.
        """
        if self.lora_bases:
            return 0.0
        lost = []
        with torch.inference_mode(False), torch.no_grad():
            shown = {}
            for name in self.lora_weights():
                shown[name], share = self._lora_merged(name)
                lost.append(share)
            for name, values in shown.items():
                weight = own_parameter(self, name)
                if name in tied:
                    self.lora_bases[name] = weight
                    self._lora_show(name, nn.Parameter(values, requires_grad=weight.requires_grad))
                else:
                    self.lora_bases[name] = weight.data
                    weight.data = values
        self.lora_merged = True
        self._lora_changed()
        _MERGED[self] = {name: Seen.of(own_parameter(self, name)) for name in shown}
        return max(lost, key=lambda share: (not share < float("inf"), share))

    def _lora_merged(self, name: str) -> tuple[Tensor, float]:
        """A weight with its update, in its own dtype, and the share of the update that was lost."""
        weight = own_parameter(self, name)
        is_plain = type(weight.data) is Tensor and weight.dim() == 2
        if self._lora_is_matrix and is_plain and not self.lora_settings.use_dora:
            with torch.autocast(weight.device.type, enabled=False):
                return merged(weight, self._lora_pairs(name), self.lora_settings.scaling)
        effective = self.lora_effective_weight(name)
        values = effective.to(weight.dtype)
        return values, lost_share(weight, effective, values)

    def lora_bases_to_host(self) -> None:
        """Move the layer's own values out of the way: but a tied weight's, which another use needs where it is."""
        for name, base in self.lora_bases.items():
            if not isinstance(base, nn.Parameter):
                self.lora_bases[name] = base.cpu()

    def lora_is_as_merged(self) -> bool:
        """Whether the merged weights are those that :meth:`lora_merge` left, or copies of them; or none is merged."""
        seen = _MERGED.get(self, {})
        return not any(name in seen and seen[name].differs(own_parameter(self, name)) for name in self.lora_bases)

    def lora_unmerge(self) -> None:
        """Show the layer's own weights again, bit for bit."""
        if not self.lora_bases:
            return
        shown = {name: own_parameter(self, name) for name in self.lora_bases}
        values = {name: base.data.to(shown[name]) for name, base in self.lora_bases.items()}  # it may have moved since
        for name, base in self.lora_bases.items():
            if isinstance(base, nn.Parameter):  # it was tied: show the very parameter again
                base.data = values[name]
                base.requires_grad_(shown[name].requires_grad)
                self._lora_show(name, base)
            else:
                shown[name].data = values[name]
        self.lora_bases, self.lora_merged = {}, False
        self._lora_changed()

    def _lora_changed(self) -> None:
        torch.clear_autocast_cache()  # which may hold copies of the weights as they were
        self.lora_weights_changed()

    def _lora_show(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(owner), leaf, parameter)

    def lora_weights_changed(self) -> None:
        """Do what the layer needs after its weights got other values."""

    # On and off

    def lora_detach(self) -> Adapter:
        """Take the adapter off: the layer has its class and its keys again, and the weights that it shows."""
        state = self.__dict__
        parameters = self.lora_parameters()
        for name in parameters:
            delattr(self, name)
        del state["lora_enabled"], state["lora_merged"]
        adapter = Adapter(
            kind=self.overlaid[0],
            settings=state.pop("lora_settings"),
            parts=state.pop("lora_parts"),
            parameters=parameters,
            started_on=state.pop("lora_started_on"),
            bases=state.pop("lora_bases"),
        )
        uncover(self)
        return adapter

    def extra_repr(self) -> str:
        """Describe the layer as before, and its adapter."""
        return f"{super().extra_repr()}, {self._lora_about()}".removeprefix(", ")

    def _lora_about(self) -> str:
        settings, parts = self.lora_settings, [part.name for part in self.lora_parts if part.name]
        more = ", use_dora=True" if settings.use_dora else f", init={settings.init!r}" * settings.starts_from_base
        return f"r={settings.r}, scaling={settings.scaling:g}{more}" + (f", parts={parts}" if parts else "")

    def __repr__(self) -> str:
        """Describe the layer so that its adapter is seen, though the layer may describe itself in a way of its own."""
        text, about, name = super().__repr__(), self._lora_about(), type(self).__name__
        if about not in text:
            text = f"{text.removesuffix(')')}, {about})"
        return text if text.startswith(name) else name + text[text.index("(") :]

    # Start

    def lora_restart(self) -> None:
        """Start the adapter anew: it changes nothing."""
        adapter = Adapter(type(self), self.lora_settings, self.lora_parts, self.lora_parameters())
        start(self, adapter)
        self.lora_started_on = adapter.started_on

    def lora_is_fresh(self) -> bool:
        """Whether there is no update yet."""
        for part in self.lora_parts:
            a, b = (getattr(self, part.factor(letter)) for letter in "AB")
            if a.is_meta:
                continue
            if self.lora_settings.starts_from_base:
                starts = (getattr(self, part.factor(letter)) for letter in ("A0", "B0"))
                if not all(torch.equal(now, start) for now, start in zip((a, b), starts, strict=True)):
                    return False
            elif a.any() and b.any():
                return False
        started = self.lora_started_on.get(MAGNITUDE)
        return started is None or started == digest(own_parameter(self, MAGNITUDE).float())

    def lora_follow_base(self) -> None:
        """Start anew from the base as it is now, if the adapter started from another one and has not trained."""
        if self.lora_started_on and self.lora_is_fresh() and not self.lora_bases:
            names = [name for name in self.lora_started_on if name != MAGNITUDE]
            if any(digest(own_parameter(self, name)) != self.lora_started_on[name] for name in names):
                self.lora_restart()

    def reset_parameters(self) -> None:
        """Start the layer's own parameters and the adapter anew, as is done after ``to_empty``."""
        if hasattr(self.overlaid[1], "reset_parameters"):
            super().reset_parameters()  # type: ignore[misc]  # as just asked
        self.lora_restart()

    # What nn.Module does

    def train(self, mode: bool = True) -> Any:
        """Set training mode, and say so if no gradient will reach the adapter there."""
        if mode and self.lora_bases:
            warnings.warn(
                "A model with merged adapters was set to train, which they cannot. Call unmerge_adapters(model) first, "
                "or remove_adapters(model) to go on with the merged weights.",
                DeadAdapterWarning,
                stacklevel=4,
            )
        return super().train(mode)

    def lora_run_on(self, values: Mapping[str, Tensor | None], *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward on other weights: in a twin that shares all else, for this one call.

        The layer itself does not change meanwhile: other threads may run it too.
        """
        made: list[Made] = []
        twin = twin_of(self, self.overlaid[1], values, made)
        output = twin.forward(*args, **kwargs)
        for module, before, state in made:
            changed = {name: v for name, v in state.items() if name not in before or before[name] is not v}
            module.update({name: v for name, v in changed.items() if name not in self.lora_twins_own})
        return output

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and convert as nn.Module does, but never round an adapter to half precision and back."""
        before = {name: (p.data, p.grad) for name, p in self.lora_parameters().items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        now = self.lora_parameters()
        if any(data.is_meta for data, _ in before.values()) and not any(p.is_meta for p in now.values()):
            self.lora_restart()  # to_empty left whatever the memory held
        for name, p in now.items():
            dtype = wide(p.dtype) if self.lora_settings.autocast_dtype or name == MAGNITUDE else p.dtype
            if p.dtype != dtype:
                data, grad = before[name]
                p.grad = None
                p.data = torch.empty_like(p, dtype=dtype) if data.is_meta else data.to(p.device, dtype)
                p.grad = None if grad is None else grad.to(p.device, dtype)
        self.lora_follow_base()  # which may have been converted
        return self

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any) -> Any:
        """Give a state of the layer as it is un-merged: beside its factors, a merged weight would count them twice."""
        state = super().state_dict(*args, prefix=prefix, keep_vars=keep_vars, **kwargs)
        for name, base in self.lora_bases.items():
            state[prefix + name] = base if keep_vars else base.detach()
        return state

    @staticmethod
    def lora_refuse_load(name: str) -> None:
        """Raise the error of a load into a merged layer.

        Raises:
            AdapterStateError: always.
        """
        raise AdapterStateError(
            f"Layer {name!r} shows a merged weight, which loading would overwrite. Call unmerge_adapters(model) before "
            "loading, or remove_adapters(model) to keep the merged weights for good."
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load as nn.Module does, and take a checkpoint of the base, which knows no adapter, as complete."""
        if any(prefix + name in state_dict for name in self.lora_bases):
            self.lora_refuse_load(prefix[:-1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        own = {prefix + name for name in self.lora_parameters()}
        if own.isdisjoint(state_dict):
            weight = own_parameter(self, self.lora_parts[0].weight)
            factors = self.lora_parameters()
            if any(p.is_meta for p in factors.values()) and not weight.is_meta:  # the base was loaded with assign=True
                for name, p in factors.items():
                    setattr(self, name, nn.Parameter(torch.empty_like(p, device=weight.device), p.requires_grad))
                self.lora_restart()
            self.lora_follow_base()
            missing: list[str] = args[2]
            missing[:] = [key for key in missing if key not in own]


_MERGED: WeakKeyDictionary[LoRALayer, dict[str, Seen]] = WeakKeyDictionary()
"""The merged weights of layers as the merge left them."""


def attach(layer: nn.Module, adapter: Adapter) -> None:
    """Put ``adapter`` on ``layer``, which stays the same object and computes ``W + ΔW`` from now on."""
    overlay(layer, adapter.kind)
    assert isinstance(layer, LoRALayer)
    layer._parameters.update(adapter.parameters)
    vars(layer).update(
        lora_settings=adapter.settings,
        lora_parts=adapter.parts,
        lora_started_on=adapter.started_on,
        lora_bases=adapter.bases,
        lora_enabled=True,
        lora_merged=bool(adapter.bases),
    )
