"""What every adapted layer is: its own class, two factors beside its weight, and four verbs."""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, DeadAdapterWarning
from lightning_lora.functional import delta_weight, init_factors, lost_share, merged_weight, wide
from lightning_lora.inplace import InPlace, overlay, uncover


@dataclass
class Adapter:
    """An adapter off its layer: what :meth:`LoRALayer.lora_detach` returns and :func:`attach` takes.

    Args:
        kind: The class that computes with it, such as ``LoRALinear``.
        lora_A: The factor that reads the input, (r, in).
        lora_B: The factor that writes the output, (out, r).
        scaling: The factor of ``B @ A``.
        dropout: Probability of dropping an input of A in training.
        init: How the factors start, for a later ``reset_parameters``.
        autocast_dtype: Whether the factors stay in float32 where the weight is in half precision.
        base: The values of the layer's own weight while the one it shows has ``B @ A`` merged in, else None.
    """

    kind: type["LoRALayer"]
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float
    dropout: float = 0.0
    init: str = "kaiming"
    autocast_dtype: bool = True
    base: Tensor | None = None


class LoRALayer(InPlace, nn.Module):
    """The mixin laid over an adapted layer. The layer keeps its keys and gains ``lora_A`` and ``lora_B``.

    A subclass names what it adapts (:attr:`lora_layer_type`), the sides of its weight (:meth:`lora_features`), and how
    the adapted layer computes (:meth:`lora_forward`); where its weight is not laid out (out, in), also
    :meth:`lora_as_weight`. Every name begins with ``lora_``, since the layer below may have any other for itself.
    """

    lora_layer_type: ClassVar[type[nn.Module] | str]
    """The class it adapts, or that class's full name where this package does not import it."""

    weight: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scaling: float
    lora_dropout: float
    lora_init: str
    lora_autocast_dtype: bool
    lora_enabled: bool
    _lora_computes_itself: ClassVar[bool]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Note, for a class laid over a layer's, whether that layer computes in a ``forward`` of its own."""
        super().__init_subclass__(**kwargs)
        if "overlaid" in cls.__dict__:
            base = cls.overlaid[1]
            known = next(ancestor for ancestor in base.__mro__ if cls.lora_adapts(ancestor))
            cls._lora_computes_itself = base.forward is not known.forward  # type: ignore[attr-defined]  # both are modules

    # What a subclass says

    @classmethod
    def lora_adapts(cls, layer_class: type) -> bool:
        """Whether ``layer_class`` is the very class that this adapter is for."""
        return cls.lora_layer_type in (layer_class, f"{layer_class.__module__}.{layer_class.__qualname__}")

    @staticmethod
    def lora_features(layer: Any) -> tuple[int, int]:
        """Return how many features ``layer`` reads and how many it writes: the sides of its update."""
        raise NotImplementedError

    @staticmethod
    def lora_refusal(layer: Any) -> str | None:  # noqa: ARG004  # a subclass looks at the layer
        """Return why this one layer cannot be adapted although its type can, or None."""
        return None

    @staticmethod
    def lora_as_weight(delta: Tensor) -> Tensor:
        """Lay out an update (out, in) as the layer's weight is laid out."""
        return delta

    @staticmethod
    def lora_start(lora_A: Tensor, lora_B: Tensor, init: str) -> None:
        """Start both factors in place, so that their product is zero."""
        init_factors(lora_A, lora_B, init)

    def lora_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the adapted layer, where the layer itself computes as :attr:`lora_layer_type` does."""
        raise NotImplementedError

    # What every adapted layer does

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer with its update.

        A layer that computes in its own way (one that pads, scales or normalises) is run as it is, on the weight
        ``W + ΔW``: the only rule by which it computes the same with its update merged.
        """
        if not self.lora_enabled or self.lora_base is not None:
            return super().forward(*args, **kwargs)
        if not self._lora_computes_itself:
            return self.lora_forward(*args, **kwargs)
        return self._lora_run_on(self.weight + self._lora_dropped_delta().to(self.weight.dtype), *args, **kwargs)

    def lora_delta_weight(self) -> Tensor:
        """Return the update in the layout of ``weight``, in float32 or wider."""
        return self.lora_as_weight(delta_weight(self.lora_A, self.lora_B, self.lora_scaling))

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the adapter added, by their names in the layer."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    @property
    def lora_base(self) -> Tensor | None:
        """The values of the layer's own weight while the one it shows has the update merged in, else None."""
        base: Tensor | None = self.__dict__["_lora_base"]
        return base

    def lora_keep_base(self, base: Tensor | None) -> None:
        """Set :attr:`lora_base`, round nn.Module's setter, which would register it and give it a key."""
        self.__dict__["_lora_base"] = base

    def lora_merge(self, *, tied: bool = False) -> float:
        """Show ``W + ΔW`` as the weight.

        Args:
            tied: The weight has another use, which is to stay as it is: show a parameter of its own, instead of
                giving the weight other values.

        Returns:
            The share of ``ΔW`` that was lost to rounding.
        """
        if self.lora_base is not None:
            return 0.0
        with torch.inference_mode(False), torch.no_grad():
            delta = self.lora_delta_weight()
            merged = merged_weight(self.weight, delta)
            lost = lost_share(self.weight, delta, merged)
            if tied:
                self.lora_keep_base(self.weight)
                self.weight = nn.Parameter(merged, requires_grad=self.weight.requires_grad)  # a use of its own
            else:
                self.lora_keep_base(self.weight.data)
                self.weight.data = merged
        _MERGED[self] = _version(self.weight)
        return lost

    def lora_is_as_merged(self) -> bool:
        """Whether the merged weight is the one that :meth:`lora_merge` left, or a copy of it; or none is merged."""
        (place, version), now = _MERGED.get(self, (0, 0)), _version(self.weight)
        return self.lora_base is None or place != now[0] or version == now[1]

    def lora_unmerge(self) -> None:
        """Show the layer's own weight again, bit for bit."""
        base = self.lora_base
        if base is None:
            return
        if isinstance(base, nn.Parameter):  # it was tied: show the very parameter again
            base.data = base.data.to(self.weight)  # the model may have moved since
            base.requires_grad_(self.weight.requires_grad)
            self.weight = base
        else:
            self.weight.data = base.to(self.weight)
        self.lora_keep_base(None)

    def lora_detach(self) -> Adapter:
        """Take the adapter off: the layer has its class and its keys again, and the weight that it shows."""
        state = self.__dict__
        adapter = Adapter(
            kind=self.overlaid[0],
            lora_A=self.lora_A,
            lora_B=self.lora_B,
            scaling=state.pop("lora_scaling"),
            dropout=state.pop("lora_dropout"),
            init=state.pop("lora_init"),
            autocast_dtype=state.pop("lora_autocast_dtype"),
            base=state.pop("_lora_base"),
        )
        del self.lora_A, self.lora_B, state["lora_enabled"]
        uncover(self)
        return adapter

    def extra_repr(self) -> str:
        """Describe the layer as before, and its adapter."""
        return f"{super().extra_repr()}, r={self.lora_A.shape[0]}, scaling={self.lora_scaling:g}".removeprefix(", ")

    def reset_parameters(self) -> None:
        """Start the layer's own parameters and the adapter anew, as is done after ``to_empty``."""
        if hasattr(self.overlaid[1], "reset_parameters"):
            super().reset_parameters()  # type: ignore[misc]  # as just asked
        self.lora_start(self.lora_A, self.lora_B, self.lora_init)

    def train(self, mode: bool = True) -> Any:
        """Set training mode, and say so if no gradient will reach the adapter there."""
        if mode and self.lora_base is not None:
            warnings.warn(
                "A model with merged adapters was set to train, which they cannot. Call unmerge_adapters(model) first, "
                "or remove_adapters(model) to go on with the merged weights.",
                DeadAdapterWarning,
                stacklevel=4,
            )
        return super().train(mode)

    def _lora_dropped_delta(self) -> Tensor:
        """The update; in training with dropout of whole features that A reads, the input itself being out of reach."""
        if not self.lora_dropout or not self.training:
            return self.lora_delta_weight()
        kept = F.dropout(torch.ones_like(self.lora_A[:1]), self.lora_dropout)
        return self.lora_as_weight(delta_weight(self.lora_A * kept, self.lora_B, self.lora_scaling))

    def _lora_run_on(self, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward on another weight: in a twin that shares all else, for this one call.

        The layer itself does not change meanwhile: other threads may run it too.
        """
        twin: Any = object.__new__(self.overlaid[1])
        state = vars(twin)
        state.update(self.__dict__, weight=weight)  # instance attributes come before parameters
        output = twin.forward(*args, **kwargs)
        del state["weight"]
        self.__dict__.update({name: value for name, value in state.items() if self.__dict__.get(name) is not value})
        return output

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and convert as nn.Module does, but never round an adapter to half precision and back."""
        before = {name: (p.data, p.grad) for name, p in self.lora_parameters().items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        if any(data.is_meta for data, _ in before.values()) and not self.lora_A.is_meta:
            self.lora_start(self.lora_A, self.lora_B, self.lora_init)  # to_empty left whatever the memory held
        for name, p in self.lora_parameters().items() if self.lora_autocast_dtype else ():
            dtype = wide(p.dtype)
            if p.dtype != dtype:
                data, grad = before[name]
                p.grad = None
                p.data = torch.empty_like(p, dtype=dtype) if data.is_meta else data.to(p.device, dtype)
                p.grad = None if grad is None else grad.to(p.device, dtype)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Give a state of the layer as it is un-merged: beside its factors, a merged weight would count them twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.lora_base is not None:
            destination[f"{prefix}weight"] = self.lora_base if keep_vars else self.lora_base.detach()

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
        if self.lora_base is not None and f"{prefix}weight" in state_dict:
            self.lora_refuse_load(prefix[:-1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        own = {prefix + name for name in self.lora_parameters()}
        if own.isdisjoint(state_dict):
            if self.lora_A.is_meta and not self.weight.is_meta:  # the base was loaded with assign=True
                for name, p in self.lora_parameters().items():
                    setattr(self, name, nn.Parameter(torch.empty_like(p, device=self.weight.device), p.requires_grad))
                self.lora_start(self.lora_A, self.lora_B, self.lora_init)
            missing: list[str] = args[2]
            missing[:] = [key for key in missing if key not in own]


_MERGED: WeakKeyDictionary[LoRALayer, tuple[int, int]] = WeakKeyDictionary()
"""Where each merged weight lies, and torch's count of its changes when it was merged."""


def _version(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def new_adapter(
    kind: type[LoRALayer],
    layer: nn.Module,
    *,
    r: int,
    scaling: float,
    dropout: float = 0.0,
    init: str = "kaiming",
    autocast_dtype: bool = True,
) -> Adapter:
    """Make an adapter for ``layer``, on its weight's device, that changes nothing yet.

    Its dtype is the weight's, or float32 instead of a narrower one if ``autocast_dtype``.
    """
    weight = layer.get_parameter("weight")
    dtype = wide(weight.dtype) if autocast_dtype else weight.dtype
    reads, writes = kind.lora_features(layer)
    lora_A, lora_B = (
        nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device)) for shape in ((r, reads), (writes, r))
    )
    kind.lora_start(lora_A, lora_B, init)
    return Adapter(kind, lora_A, lora_B, scaling, dropout, init, autocast_dtype)


def attach(layer: nn.Module, adapter: Adapter) -> None:
    """Put ``adapter`` on ``layer``, which stays the same object and computes ``W + ΔW`` from now on."""
    overlay(layer, adapter.kind)
    assert isinstance(layer, LoRALayer)
    layer.lora_A, layer.lora_B = adapter.lora_A, adapter.lora_B
    layer.lora_scaling, layer.lora_dropout, layer.lora_init = adapter.scaling, adapter.dropout, adapter.init
    layer.lora_autocast_dtype = adapter.autocast_dtype
    layer.lora_enabled = True
    layer.lora_keep_base(adapter.base)
