"""What undoes a change that fails midway."""

from contextlib import ExitStack


class Undo(ExitStack):
    """Undoes a change at the end of a ``with`` block, unless the change is kept. The last step is undone first."""

    def keep(self) -> None:
        """Keep the change: it has succeeded."""
        self.pop_all()
