"""Change what an object does and leave it the same object: its class becomes a subclass of its own class."""

import copyreg
from typing import Any, ClassVar


class InPlace:
    """A mixin that is laid over the class of a living object, and taken off again.

    The object keeps its identity, its attributes and its place in every ``isinstance`` test; ``super()`` in the mixin
    reaches the class that was there; copying and pickling work, although the combined class has no name to import.

    Example:
        >>> class Loud(InPlace):
        ...     def speak(self):
        ...         return super().speak().upper()
        >>> class Cat:
        ...     def speak(self):
        ...         return "meow"
        >>> cat = Cat()
        >>> overlay(cat, Loud)
        >>> cat.speak(), isinstance(cat, Cat)
        ('MEOW', True)
        >>> uncover(cat)
        >>> type(cat) is Cat
        True
    """

    overlaid: ClassVar[tuple[type, type]]
    """The mixin, and the class that was there before."""

    overlaid_prefix: ClassVar[str] = "LoRA"
    """How the name of the combined class begins; the rest is that of the class below."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by naming the mixin and the class below it."""
        reduced = super().__reduce_ex__(max(protocol, 2))
        if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_blank, self.overlaid, *reduced[2:])


_COMBINED: "dict[tuple[type[InPlace], type], type]" = {}


def combined(mixin: "type[InPlace]", base: type) -> type:
    """Return the class in which ``mixin`` lies over ``base``; one class for a pair, however often it is asked for."""
    if (mixin, base) not in _COMBINED:
        namespace = {"overlaid": (mixin, base), "__module__": mixin.__module__, "__doc__": mixin.__doc__}
        _COMBINED[mixin, base] = type(f"{mixin.overlaid_prefix}{base.__name__}", (mixin, base), namespace)
    return _COMBINED[mixin, base]


def overlay(instance: object, mixin: type[InPlace]) -> None:
    """Lay ``mixin`` over the class of ``instance``."""
    object.__setattr__(instance, "__class__", combined(mixin, type(instance)))  # whatever its own __setattr__ does


def is_overlaid(instance: InPlace) -> bool:
    """Whether the class of ``instance`` is the combined one, and nothing was laid over it since."""
    return type(instance) is _COMBINED.get(instance.overlaid)


def uncover(instance: InPlace) -> None:
    """Give ``instance`` back the class that it had before :func:`overlay`."""
    object.__setattr__(instance, "__class__", instance.overlaid[1])


def _blank(mixin: type[InPlace], base: type) -> object:
    cls: Any = combined(mixin, base)
    return cls.__new__(cls)
