"""Change the class of an object to a subclass of its class, and back.

It stays the same object. So an ``nn.Linear`` that gets an adapter becomes a
``LoRALinear``, of which ``nn.Linear`` is a base class: the combined class is
``type("LoRALinear", (LoRALinear, nn.Linear), ...)``, of our mixin and the original
class.
"""

import copyreg
from typing import Any, ClassVar


class InPlace:
    """A mixin that :func:`overlay` adds to the class of an object.

    Its ``super()`` is the original class. Copies and pickles of the object have the
    combined class too.
    """

    overlaid: ClassVar[tuple[type, type]]  # the mixin and the original class

    overlaid_prefix: ClassVar[str] = "LoRA"
    """The start of the combined class's name. The original class's name follows."""

    @classmethod
    def note_overlaid(cls, mixin: Any, original: Any) -> None:
        """Called once on the combined class of a mixin and an original class, when it is made."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by reference to the mixin and the original class."""
        reduced = super().__reduce_ex__(max(protocol, 2))
        if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_blank, self.overlaid, *reduced[2:])


_COMBINED: "dict[tuple[type[InPlace], type], type]" = {}


def combined(mixin: "type[InPlace]", base: type) -> type:
    """Return the class that combines ``mixin`` and ``base``: always the same one for the same pair."""
    if (mixin, base) not in _COMBINED:
        namespace = {
            "overlaid": (mixin, base),
            "__module__": mixin.__module__,
            "__doc__": mixin.__doc__,
        }
        made: Any = type(
            f"{mixin.overlaid_prefix}{base.__name__}", (mixin, base), namespace
        )
        made.note_overlaid(mixin, base)
        _COMBINED.setdefault((mixin, base), made)  # another thread may have been faster
    return _COMBINED[mixin, base]


def overlay(instance: object, mixin: type[InPlace]) -> None:
    """Add ``mixin`` to the class of ``instance``."""
    # a __setattr__ of the object's class may do something else
    object.__setattr__(instance, "__class__", combined(mixin, type(instance)))


def uncover(instance: InPlace) -> None:
    """Give ``instance`` its class from before :func:`overlay` back."""
    object.__setattr__(instance, "__class__", instance.overlaid[1])


def _blank(mixin: type[InPlace], base: type) -> object:
    cls: Any = combined(mixin, base)
    return cls.__new__(cls)


# Which class an object has


def is_overlaid(instance: InPlace) -> bool:
    """Whether ``instance`` still has the combined class that it got: other code may have changed it since."""
    return type(instance) is _COMBINED.get(instance.overlaid)


def original_class(instance: object) -> type:
    """Return the class that ``instance`` has, or had before :func:`overlay`."""
    if isinstance(instance, InPlace):
        return instance.overlaid[1]
    return type(instance)


def class_names(value: object) -> set[str]:
    """Return the names of an object's class and its base classes.

    Names are compared, because two Lightning packages have classes of the same names.
    """
    return {ancestor.__name__ for ancestor in type(value).__mro__}
