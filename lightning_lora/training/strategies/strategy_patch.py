"""Patch methods of one strategy object with methods of ours, which call the original ones, and undo that."""

from collections.abc import Callable
from functools import update_wrapper
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

# a strategy's attribute, with the patch on it
_ATTRIBUTE = "lora_patch"
# an attribute of our methods that replace the strategy's of the same name
_MARK = "lora_patches_strategy"


class PatchedMethod:
    """What a strategy has in place of one of its methods.

    It calls our method, until it has stepped aside for the ``original``. Other code may
    have wrapped this object in a method of its own, or kept it: so it can be called for
    good.
    """

    def __init__(
        self,
        ours: Callable[..., Any],
        original: Callable[..., Any],
        *,
        is_by_other_code: bool,
    ) -> None:
        update_wrapper(self, ours)
        self.called = ours
        self.original = original
        # whether other code had set the original method on the strategy object
        self.is_by_other_code = is_by_other_code

    def step_aside(self) -> None:
        """Call the original method from now on."""
        self.called = self.original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call our method, which calls the original one, or the original one alone."""
        return self.called(*args, **kwargs)

    def __reduce__(self) -> Any:
        """Pickle and copy the original method: the next set-up of a copied strategy patches it again."""
        return _unchanged, (self.original,)


def _unchanged(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


Method = TypeVar("Method", bound=Callable[..., Any])


def patches_strategy(method: Method) -> Method:
    """Mark a method of ours that replaces the strategy's of the same name."""
    vars(method)[_MARK] = True
    return method


def _patching_names(kind: type) -> list[str]:
    """The names of a class's methods that are marked."""
    return [name for name in dir(kind) if hasattr(getattr(kind, name), _MARK)]


class StrategyPatch:
    """Methods of ours for one strategy.

    They call the methods that they replace by ``original``, as in
    ``self.original.setup(trainer)``.

    Each set-up of a Trainer calls ``patch``. For example, other code wraps a patched
    method between two set-ups:

    1. The first ``patch`` sets a :class:`PatchedMethod` P on the strategy, which calls
       ours. Ours calls the method of the strategy's class.
    2. Other code replaces P by W, which calls P.
    3. The second ``patch`` replaces W by Q, which calls ours. Ours calls W from now on,
       and W calls P, which has stepped aside for the method of the class.
    4. ``unpatch`` puts W back.
    """

    skipped_overrides: ClassVar[frozenset[str]] = frozenset()
    """The names of methods that the strategy's class overrides.

    ``original`` has those of Lightning's ``Strategy`` in their place.
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.original: Any = SimpleNamespace()
        self._patched: dict[str, PatchedMethod] = {}

    def __reduce__(self) -> Any:
        """Pickle and copy nothing: a copied strategy is as it was before."""
        return type(None), ()

    def patch(self) -> None:
        """Set our methods on the strategy, or again those that other code has replaced since."""
        on_strategy = vars(self.strategy)
        on_strategy[_ATTRIBUTE] = self
        for name in _patching_names(type(self)):
            earlier = self._patched.get(name)
            if earlier is None:
                self._patch_method(name)
            elif on_strategy.get(name) is not earlier:
                earlier.step_aside()
                self._patch_method(name)

    def _patch_method(self, name: str) -> None:
        """Set one method of ours on the strategy."""
        by_other_code = self._method_by_other_code(name)
        original = by_other_code or self._method_of_class(name)
        patched = PatchedMethod(
            getattr(self, name), original, is_by_other_code=by_other_code is not None
        )
        self._patched[name] = patched
        vars(self.strategy)[name] = patched
        setattr(self.original, name, original)

    def _method_by_other_code(self, name: str) -> Any:
        """The method of this name that other code has set on the strategy object, or None.

        A copied strategy object has the class's own method there, in place of ours:
        that is no other code.
        """
        on_strategy = vars(self.strategy).get(name)
        is_of_class = on_strategy == self._bound_method(type(self.strategy), name)
        return None if is_of_class else on_strategy

    def _method_of_class(self, name: str) -> Any:
        """The method that the strategy has from its class, or from the class of all strategies."""
        kind = type(self.strategy)
        if name in self.skipped_overrides:
            kind = _class_of_all_strategies(kind)
        return self._bound_method(kind, name)

    def _bound_method(self, kind: type, name: str) -> Any:
        """A class's method for the strategy, or None.

        Some versions of Lightning lack a method that we patch: then nothing calls ours.
        """
        method = getattr(kind, name, None)
        return None if method is None else method.__get__(self.strategy)

    def is_by_other_code(self, name: str) -> bool:
        """Whether our method of this name calls one that other code has set on the strategy."""
        return self._patched[name].is_by_other_code

    def unpatch(self) -> None:
        """Give the strategy back as it was: with its own methods, and those that other code has set on it."""
        on_strategy = vars(self.strategy)
        for name, patched in self._patched.items():
            patched.step_aside()
            if on_strategy.get(name) is patched:
                # the method of the class shows again, or that of other code
                del on_strategy[name]
                if patched.is_by_other_code:
                    on_strategy[name] = patched.original
        del on_strategy[_ATTRIBUTE]


def patch_of(strategy: Any) -> Any:
    """Return the patch on a strategy, if there is one."""
    return vars(strategy).get(_ATTRIBUTE)


def _class_of_all_strategies(kind: type) -> type:
    """The class above all strategies, of either Lightning package."""
    return next(
        ancestor for ancestor in kind.__mro__ if ancestor.__name__ == "Strategy"
    )
