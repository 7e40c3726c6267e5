"""The classes of watched weights, which see what torch computes with them.

``reads.py`` says why, and what counts as a read in a training and in an evaluation.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import private
from lightning_lora.layers import LoRALayer

_COMPUTED_ATTRIBUTES = ("T", "mT", "H", "mH", "real", "imag")

# Functions of torch that read nothing on which a loss could depend

_NEED_THE_PARAMETER = (
    "__hash__",
    "__deepcopy__",
    "__reduce_ex__",
    "__setstate__",
    "__set__",
)
_SET_HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
_GIVE_NO_GRADIENT = (
    "__array__",
    "__dlpack__",
    "__setitem__",
    "backward",
    "detach",
    "numpy",
)
_NO_READS = {*_NEED_THE_PARAMETER, *_SET_HOOKS, *_GIVE_NO_GRADIENT}


_Run = Callable[[Any, Any], Any]
"""A function of torch, to call with its arguments and keyword arguments."""


class WatchedWeight(nn.Parameter):
    """A frozen weight of an adapted layer that notes when other code reads it."""

    lora_layer: LoRALayer
    lora_read: set[LoRALayer]
    """The layers whose weights were read so far: all watched weights have this one set."""

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch that gets a watched weight."""
        run = partial(super().__torch_function__, func, types)  # type: ignore[no-untyped-call]  # torch's own
        kwargs = kwargs or {}
        if _is_read(func, kwargs) and not _is_called_by_us():
            return cls.lora_run_read(run, args, kwargs)
        return run(args, kwargs)

    @classmethod
    def lora_run_read(cls, run: _Run, args: Any, kwargs: Any) -> Any:
        """Run a function with which other code reads a watched weight."""
        raise NotImplementedError

    def __deepcopy__(self, _: dict[int, Any]) -> nn.Parameter:
        return nn.Parameter(self.detach().clone(), self.requires_grad)


class WeightInTraining(WatchedWeight):
    """It notes a read only if a loss depends on what was read."""

    @classmethod
    def lora_run_read(cls, run: _Run, args: Any, kwargs: Any) -> Any:
        """Run it with tensors that have a graph, which shows what depends on them."""
        if _is_recorded():
            args, kwargs = private.tree_map(_as_read, (args, kwargs))
        return run(args, kwargs)


class WeightInEvaluation(WatchedWeight):
    """It notes each read that gives more than one number: there is no graph that says what depends on it."""

    @classmethod
    def lora_run_read(cls, run: _Run, args: Any, kwargs: Any) -> Any:
        """Run it, and note the weights if it gives values.

        In a block of ``disable_adapters``, the frozen weight is what is wanted.
        """
        result = run(args, kwargs)
        if not _has_values(result):
            return result
        for value in private.tree_leaves((args, kwargs)):
            if isinstance(value, WatchedWeight) and value.lora_layer.lora_enabled:
                value.lora_read.add(value.lora_layer)
        return result


def watch(
    weight: nn.Parameter,
    kind: type[WatchedWeight],
    layer: LoRALayer,
    read: set[LoRALayer],
) -> None:
    """Let a weight of ``layer`` add this layer to ``read`` when it is read."""
    weight.__class__ = kind
    vars(weight).update(lora_layer=layer, lora_read=read)


def unwatch(weight: nn.Parameter) -> None:
    """Make it a plain parameter again."""
    weight.__class__ = nn.Parameter
    vars(weight).pop("lora_layer", None)
    vars(weight).pop("lora_read", None)


def _is_recorded() -> bool:
    """Whether torch makes a graph of what is computed now."""
    if not torch.is_grad_enabled():
        return False
    return not private.is_transforming() and not private.tracing()


def _is_read(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of torch computes something from a weight."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return _attribute_of(func) in _COMPUTED_ATTRIBUTES
    if _is_in_place(name) or name in _NO_READS:
        return False
    return kwargs.get("out") is None


def _attribute_of(getter: Any) -> str:
    """The name of the attribute that a getter reads."""
    descriptor = getattr(getter, "__self__", None)
    return getattr(descriptor, "__name__", "")


def _is_in_place(name: str) -> bool:
    """Whether a function with this name writes into its tensor: ``add_``, ``__iadd__``."""
    if name.endswith("__"):
        return name.startswith("__i")
    return name.endswith("_")


def _has_values(result: object) -> bool:
    """Whether a result may be a part of what a module computes: values, or several of them.

    A single number is a look at a weight: its norm, for a logger.
    """
    return any(
        isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
        for value in private.tree_leaves(result)
    )


def _is_called_by_us() -> bool:
    """Whether the nearest code outside of torch is this package's.

    It adds the update itself.
    """
    here: Any = inspect.currentframe()
    # behind this function and __torch_function__ is the code that has called torch
    frame: FrameType | None = here.f_back.f_back
    while frame is not None and _package_of(frame) == "torch":
        frame = frame.f_back
    return frame is not None and _package_of(frame) == "lightning_lora"


def _package_of(frame: FrameType) -> str:
    """The outermost package of the code that runs in a frame."""
    module: str = frame.f_globals.get("__name__", "")
    return module.partition(".")[0]


def _as_read(value: Any) -> Any:
    """What other code gets in place of a watched weight: the same values, with a graph."""
    if not isinstance(value, WatchedWeight):
        return value
    switch = torch.zeros((), requires_grad=True)  # so that what is computed has a graph
    return _Read.apply(switch, value)  # type: ignore[no-untyped-call]


class _Read(torch.autograd.Function):
    """Return a weight.

    If a gradient comes back, note that a loss depends on it; it goes no further.
    """

    @staticmethod
    def forward(ctx: Any, _: Tensor, weight: WatchedWeight) -> Tensor:
        ctx.layer, ctx.read = weight.lora_layer, weight.lora_read
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:
        ctx.read.add(ctx.layer)
        return None, None
