"""What undoes a change that fails midway."""

from contextlib import ExitStack


class Undo(ExitStack):
    """Undoes a change at the end of a ``with`` block, unless the change is kept.

    The last step is undone first.
    """

    def keep(self) -> None:
        """Keep the change: it has succeeded."""
        self.pop_all()


def set_own_attribute(owner: object, name: str, value: object, undo: ExitStack) -> None:
    """Set an attribute of an object itself.

    Undone, the object has its earlier one, or that of its class again.
    """
    attributes = vars(owner)
    if name in attributes:
        undo.callback(attributes.update, {name: attributes[name]})
    else:
        undo.callback(attributes.pop, name)
    attributes[name] = value
