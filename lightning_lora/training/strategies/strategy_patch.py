"""Patch methods of one strategy object with methods of ours, which call the original ones, and undo that."""

from collections.abc import Callable
from functools import update_wrapper
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

from lightning_lora.tensors.dicts import only

_ATTRIBUTE = "lora_patch"  # of a strategy: the patch on it
# of a method of ours, which replaces the strategy's of the same name
_MARK = "lora_patches_strategy"


class PatchedMethod:
    """What a strategy has in place of one of its methods: ours runs, until it has stepped aside for the ``original``.

    Other code may have wrapped it in a method of its own, or kept it: so it stays
    callable for good.
    """

    def __init__(self, ours: Callable[..., Any], original: Callable[..., Any]) -> None:
        update_wrapper(self, ours)
        self.original = original
        self.runs = ours

    def step_aside(self) -> None:
        """Let the original method run alone."""
        self.runs = self.original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run our method, which calls the original one."""
        return self.runs(*args, **kwargs)

    def __reduce__(self) -> Any:
        """Pickle and copy the original method: the next set-up of a copied strategy adds ours again."""
        return _unchanged, (self.original,)


def _unchanged(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


Method = TypeVar("Method", bound=Callable[..., Any])


def patches_strategy(method: Method) -> Method:
    """Mark a method of ours that replaces the strategy's of the same name."""
    vars(method)[_MARK] = True
    return method


def _patching_names(kind: type) -> list[str]:
    """The names of a class's methods that are marked, there or in a class above it."""
    names = dict[str, None]()
    for each in reversed(kind.__mro__):
        for name, method in vars(each).items():
            if _MARK in getattr(method, "__dict__", {}):
                names[name] = None
    return list(names)


class StrategyPatch:
    """Methods of ours for one strategy.

    Its own are in ``original``, by which ours call them.
    """

    skipped_overrides: ClassVar[frozenset[str]] = frozenset()
    """Methods that the strategy's class overrides.

    In ``original`` are those of Lightning's ``Strategy`` instead.
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.original: Any = SimpleNamespace()
        self._patched: dict[str, PatchedMethod] = {}
        # methods that other code had set on the strategy before ours
        self._by_other_code: dict[str, Any] = {}

    def __reduce__(self) -> Any:
        """Pickle and copy nothing: a copied strategy is as it was before."""
        return type(None), ()

    def patch(self) -> None:
        """Set our methods on the strategy.

        If other code has set some since the last time, ours call those.
        """
        on_strategy = vars(self.strategy)
        on_strategy[_ATTRIBUTE] = self
        for name in _patching_names(type(self)):
            before = self._patched.get(name)
            if before is not None:
                if on_strategy.get(name) is before:
                    continue
                before.step_aside()  # other code may still call it
            self._patch_method(name)

    def _patch_method(self, name: str) -> None:
        """Set one method of ours on the strategy."""
        self._note_other_code(name)
        original = self._by_other_code.get(name, self._method_of_class(name))
        patched = PatchedMethod(getattr(self, name), original)
        self._patched[name] = patched
        vars(self.strategy)[name] = patched
        setattr(self.original, name, original)

    def _note_other_code(self, name: str) -> None:
        """Note whether other code has set a method of this name on the strategy.

        In a copied strategy, the class's own method stands in place of ours.
        """
        self._by_other_code.pop(name, None)
        of_class = self._bound_method(type(self.strategy), name)
        on_strategy = vars(self.strategy).get(name, of_class)
        if on_strategy != of_class:
            self._by_other_code[name] = on_strategy

    def _method_of_class(self, name: str) -> Any:
        """The method that the strategy has from its class, or from the class of all strategies."""
        kind = type(self.strategy)
        if name in self.skipped_overrides:
            kind = _class_of_all_strategies(kind)
        return self._bound_method(kind, name)

    def _bound_method(self, kind: type, name: str) -> Any:
        """A class's method for the strategy.

        None: the class has none, so nothing calls ours.
        """
        method = getattr(kind, name, None)
        return None if method is None else method.__get__(self.strategy)

    def is_by_other_code(self, name: str) -> bool:
        """Whether other code has set a method of this name on the strategy."""
        return name in self._by_other_code

    def unpatch(self) -> None:
        """Give the strategy back as it was: with its own methods, and those that other code has set on it."""
        on_strategy = vars(self.strategy)
        for name, patched in self._patched.items():
            patched.step_aside()
            if on_strategy.get(name) is patched:
                del on_strategy[name]
                on_strategy.update(only(self._by_other_code, [name]))
        del on_strategy[_ATTRIBUTE]


def patch_of(strategy: Any) -> Any:
    """Return the patch on a strategy, if there is one."""
    return vars(strategy).get(_ATTRIBUTE)


def _class_of_all_strategies(kind: type) -> type:
    """The class above all strategies, of either Lightning package."""
    return next(
        ancestor for ancestor in kind.__mro__ if ancestor.__name__ == "Strategy"
    )
