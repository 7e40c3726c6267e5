"""Adapted weights that the first training step reads outside of their layers: without their updates, so by mistake.

In the first batch, each frozen weight below an adapter is of a class that sees what torch computes with it. Its own
layer gets a plain tensor with the same values instead. So what the class sees is other code: a penalty, a decay by
name, a forward hook, a product by hand. It gives that code a tensor with a graph. A backward pass that comes there
shows that the loss depends on what was read. No value changes by that, and after the batch, nothing is left of it.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import private
from lightning_lora.errors import listed, warn
from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from lightning_lora.tensors.names import held_parameter, join, owner_of, submodule

_MOST_NAMES = 5


class Reads:
    """Finds adapted weights that other code than their layers reads, in the first batch of a fit."""

    def __init__(self) -> None:
        self.is_over = self.is_on = False
        self.found: dict[str, None] = {}  # the names of layers
        self.layers: dict[str, LoRALayer] = {}
        self.watched: dict[nn.Parameter, str] | None = None
        self.forwards: list[_OwnForward] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch the weights of ``model`` while a part of the first batch runs."""
        if self.watched is None:
            self._begin(model)
        if self.is_on or not self.watched:
            yield
            return
        try:
            self._set_on(True)
            with private.before_compiling(self._give_up):
                yield
        finally:
            self._set_on(False)

    def _give_up(self) -> None:
        """Something is compiled now, and must not see what is there for one batch."""
        self._set_on(False)
        self.watched = {}

    def end_batch(self, model: nn.Module) -> None:
        """End the first batch: warn of what was found."""
        if self.is_over:
            return
        called = {forward.layer for forward in self.forwards if forward.was_called}
        names = [name for name, layer in self.layers.items() if name in self.found and layer in called]
        self.close()
        if names:  # without layers that nothing calls: their adapters get no gradient, and another warning says so
            asked = str(names) if len(names) <= _MOST_NAMES else "[...]"
            warn(
                f"A training step reads the weight of {listed(names, _MOST_NAMES)} of {type(model).__name__} itself, "
                "without its update: a penalty, a hook, a product by hand. It sees the frozen weight, and a merge "
                f"would change what it computes. Train these layers in full: modules_to_save={asked}. Or leave them "
                f"out: exclude_modules={asked}. An output head that shares a weight can be a tied layer instead: "
                "nn.Linear without bias."
            )

    def close(self) -> None:
        """Watch nothing more, and let go of the weights."""
        self.is_over = True
        self.watched, self.layers, self.forwards = {}, {}, []

    def _begin(self, model: nn.Module) -> None:
        view = View(model)
        self.watched = {} if is_compiled(model) else watched_weights(view)
        self.layers = view.layers
        if self.watched:
            self.forwards = [_OwnForward(module) for module in _readers(view, self.watched)]

    def _set_on(self, flag: bool) -> None:
        self.is_on = flag
        for weight, name in (self.watched or {}).items():
            weight.__class__ = WatchedWeight if flag else nn.Parameter
            if flag:
                vars(weight).update(lora_layer=name, lora_found=self.found)
            else:
                vars(weight).pop("lora_layer", None)
                vars(weight).pop("lora_found", None)
        for forward in self.forwards:
            if flag:
                forward.put_on()
            else:
                forward.take_off()


def watched_weights(view: View) -> dict[nn.Parameter, str]:
    """Return the plain frozen weights below adapters that train, with their layers. None is sharded or quantised."""
    found = {}
    for name, layer in view.layers.items():
        trains = any(p.requires_grad for p in layer.lora_trained())
        for weight_name in layer.lora_weights() if trains else ():
            full_name = join(name, weight_name)
            weight = view.base.get(full_name)  # None: it is computed now
            if weight is not None and full_name not in view.frozen_by_user and _can_be_watched(weight):
                found[weight] = name
    return found


def _can_be_watched(weight: nn.Parameter) -> bool:
    has_values = type(weight) is nn.Parameter and not (weight.is_meta or weight.is_inference())
    return has_values and weight.is_floating_point() and not weight.requires_grad


def _readers(view: View, watched: Mapping[nn.Parameter, str]) -> list[nn.Module]:
    """The modules that may read watched weights: adapted layers, and layers that are tied to them."""
    readers: dict[nn.Module, None] = dict.fromkeys(view.layers.values())
    for module in view.modules.values():
        is_leaf = not module._modules and not isinstance(module, torch.jit.ScriptModule)
        if is_leaf and any(p is not None and p in watched for p in module._parameters.values()):
            readers[module] = None
    return list(readers)


class _OwnForward:
    """The forward of a layer, which sees its watched weights as plain tensors."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.number = layer, id(layer)
        names = layer.lora_weights() if isinstance(layer, LoRALayer) else tuple(layer._parameters)
        self.places = [(submodule(layer, owner_of(name)), name.rpartition(".")[2]) for name in names]
        self.before: Callable[..., Any] | None = None
        self.shown: list[tuple[nn.Module, str]] = []
        self.was_called = False

    def put_on(self) -> None:
        """Put it in place of the layer's own, or of what other code has put there."""
        self.before = vars(self.layer).get("forward")
        vars(self.layer)["forward"] = self

    def take_off(self) -> None:
        """Put back what was there."""
        self._hide()
        if vars(self.layer).get("forward") is self:
            del vars(self.layer)["forward"]
            if self.before is not None:
                vars(self.layer)["forward"] = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if id(self.layer) != self.number:  # of a copy that was made meanwhile
            self.take_off()
        self.was_called = True
        if self.shown:  # the layer calls itself
            return self._run(*args, **kwargs)
        self._show_plain_weights()
        try:
            return self._run(*args, **kwargs)
        finally:
            self._hide()

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.layer).forward(self.layer, *args, **kwargs)

    def _show_plain_weights(self) -> None:
        """Set them as attributes, which come before parameters."""
        for owner, name in self.places:
            weight = held_parameter(owner, name)
            if type(weight) is WatchedWeight and name not in vars(owner):
                vars(owner)[name] = weight.detach()
                self.shown.append((owner, name))

    def _hide(self) -> None:
        while self.shown:
            owner, name = self.shown.pop()
            vars(owner).pop(name, None)


# The class of a watched weight

_TRANSPOSED = {"T", "mT", "H", "mH", "real", "imag"}  # attributes that are computed
_NO_READS = {  # they need the parameter itself, or give no gradient
    *("__hash__", "__deepcopy__", "__reduce_ex__", "__setstate__", "__array__", "__dlpack__", "__setitem__", "__set__"),
    *("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward", "detach", "numpy"),
}


class WatchedWeight(nn.Parameter):
    """A frozen weight that notes which computations of other code a loss depends on."""

    lora_layer: str
    lora_found: dict[str, None]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_recorded = torch.is_grad_enabled() and not (private.is_transforming() or private.tracing())
        if is_recorded and _is_read(func, kwargs) and not _is_called_by_us():
            args, kwargs = private.tree_map(_as_read, (args, kwargs))
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]  # torch's own

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
        copied: nn.Parameter = memo[id(self)]
        return copied


def _is_read(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of torch computes something from a weight, and does not write into it."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _TRANSPOSED
    is_in_place = name.startswith("__i") if name.endswith("__") else name.endswith("_")
    return not (is_in_place or name in _NO_READS or kwargs.get("out") is not None)


def _is_called_by_us() -> bool:
    """Whether the nearest code outside of torch is of this package, which adds the update itself."""
    here: Any = inspect.currentframe()
    frame = here.f_back.f_back  # of the code that has called the weight's class
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package != "torch":
            return bool(package == __name__.partition(".")[0])
        frame = frame.f_back
    return False


def _as_read(value: Any) -> Any:
    if type(value) is not WatchedWeight:
        return value
    switch = torch.zeros((), requires_grad=True)  # so that what is computed has a graph
    return _Read.apply(switch, value)  # type: ignore[no-untyped-call]


class _Read(torch.autograd.Function):
    """Return a weight. If a gradient comes back, note that a loss depends on it; it goes no further."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, weight: WatchedWeight) -> Tensor:
        ctx.noted = weight.lora_found, weight.lora_layer
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:
        found, name = ctx.noted
        found[name] = None
        return None, None


# Compiled code


def is_compiled(model: nn.Module) -> bool:
    """Whether code of a model is compiled: it would be compiled once more for the first batch."""
    modules = list(model.modules())
    for module in modules:
        held = vars(module)
        is_wrapper = private.COMPILED in module._modules or held.get(private.COMPILED_CALL) is not None
        if is_wrapper or any(map(_is_compiled_function, held.values())):
            return True
    classes = {cls for module in modules for cls in type(module).__mro__ if not _is_torchs(cls)}
    files = {sys.modules[cls.__module__] for cls in classes if cls.__module__ in sys.modules}
    for each in (*classes, *files):
        for name, value in list(vars(each).items()):
            if _is_compiled_function(value) and not name.startswith(private.COMPILED_RESULT):
                return True
    return False


def _is_torchs(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("torch", "builtins", "lightning", "pytorch_lightning", "lightning_lora")


def _is_compiled_function(value: object) -> bool:
    return isinstance(value, FunctionType) and hasattr(value, private.COMPILED_FUNCTION)
