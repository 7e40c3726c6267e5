"""Methods of ours over those of one strategy. They are set on the object, and can be taken away again."""

from collections.abc import Callable
from functools import update_wrapper
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

from lightning_lora.tensors.dicts import only

_ATTRIBUTE = "lora_methods"  # of a strategy: what lies over its methods
_MARK = "lora_overlaid"  # of a method of ours: it lies over one of the strategy's


class OverlaidMethod:
    """One method of ours, set on a strategy. Once it has stepped aside, it only calls the ``original`` method.

    Other code may have wrapped it in a method of its own, or kept it: so it stays callable for good.
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


Method = TypeVar("Method", bound=Callable[..., Any])


def overlaid(method: Method) -> Method:
    """Mark a method of ours that lies over the strategy's of the same name."""
    vars(method)[_MARK] = True
    return method


def overlaid_names(kind: type) -> list[str]:
    """Return the names of a class's methods that are marked, there or in a class above it."""
    names = dict[str, None]()
    for each in reversed(kind.__mro__):
        for name, method in vars(each).items():
            if _MARK in getattr(method, "__dict__", {}):
                names[name] = None
    return list(names)


class OverlaidMethods:
    """Our methods for one strategy. ``original`` has those below them: of other code, or of its class."""

    skips_own_override: ClassVar[tuple[str, ...]] = ()
    """Over these, the strategy has its own, which is skipped: ``original`` has those of Lightning's Strategy."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.original: Any = SimpleNamespace()
        self._set: dict[str, OverlaidMethod] = {}
        self._by_other_code: dict[str, Any] = {}  # the methods that it had set on the strategy

    def __reduce__(self) -> Any:
        """Pickle and copy nothing: a copied strategy is as it was before."""
        return type(None), ()

    def lay_over(self) -> None:
        """Put our methods over those of the strategy. Other code may have set some since, which lie below."""
        on_strategy = vars(self.strategy)
        on_strategy[_ATTRIBUTE] = self
        for name in overlaid_names(type(self)):
            if name in self._set:
                if on_strategy.get(name) is self._set[name]:
                    continue
                self._set[name].step_aside()  # other code may still call it
            self._lay_over(name)

    def _lay_over(self, name: str) -> None:
        """Put one method of ours over the strategy's."""
        method = self._find_method_below(name)
        ours = OverlaidMethod(getattr(self, name), method)
        self._set[name] = ours
        vars(self.strategy)[name] = ours
        setattr(self.original, name, method)

    def _find_method_below(self, name: str) -> Any:
        """Find the method over which ours lies, and note if it is other code's.

        Otherwise it is that of the strategy's class, or of the class of all strategies.
        """
        kind = type(self.strategy)
        of_class = self._method_of(kind, name)
        on_strategy = vars(self.strategy).get(name, of_class)
        self._by_other_code.pop(name, None)
        if on_strategy != of_class:  # in a copied strategy, the class's own method stands in place of ours
            self._by_other_code[name] = on_strategy
            return on_strategy
        if name in self.skips_own_override:
            return self._method_of(_class_of_all_strategies(kind), name)
        return of_class

    def _method_of(self, kind: type, name: str) -> Any:
        """A class's method for the strategy. None: the class has none, so nothing calls ours."""
        method = getattr(kind, name, None)
        return None if method is None else method.__get__(self.strategy)

    def is_by_other_code(self, name: str) -> bool:
        """Whether other code has set a method of this name on the strategy."""
        return name in self._by_other_code

    def take_away(self) -> None:
        """Give the strategy back as it was: with its own methods, and those that other code has set on it."""
        on_strategy = vars(self.strategy)
        for name, method in self._set.items():
            method.step_aside()
            if on_strategy.get(name) is method:
                del on_strategy[name]
                on_strategy.update(only(self._by_other_code, [name]))
        del on_strategy[_ATTRIBUTE]


def overlaid_methods(strategy: Any) -> Any:
    """Return what lies over a strategy's methods, if there is anything."""
    return vars(strategy).get(_ATTRIBUTE)


def _class_of_all_strategies(kind: type) -> type:
    """The class above all strategies, of either Lightning package."""
    return next(ancestor for ancestor in kind.__mro__ if ancestor.__name__ == "Strategy")


def _unchanged(method: Callable[..., Any]) -> Callable[..., Any]:
    return method
