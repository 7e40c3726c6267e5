"""The moments of a fit at which its guards look."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from lightning_lora.model.view import View
from lightning_lora.training.guards.left_copies import LeftCopies
from lightning_lora.training.guards.reads import Reads
from lightning_lora.training.guards.written import Writes


class Guards:
    """What looks at the code of a fit that touches adapted weights. ``is_aloud``: one process warns for all."""

    def __init__(self) -> None:
        self.reads, self.writes, self.copies = Reads(), Writes(), LeftCopies()
        self.steps_begun = 0

    def begin_step(self, model: nn.Module) -> None:
        """Look at the weights before the first step and after it."""
        if self.steps_begun > 1:
            return
        self.steps_begun += 1
        view = View(model)
        if self.steps_begun == 1:
            self.writes.begin(view)
            self.copies.begin(view)
        else:
            self.copies.check(view)

    def watching(self, model: nn.Module, *, is_aloud: bool) -> AbstractContextManager[None]:
        """Watch a part of the first batch."""
        return nullcontext() if self.reads.is_over or not is_aloud else self.reads.watching(model)

    def end_batch(self, model: nn.Module) -> None:
        """Say what the first batch reads."""
        self.reads.end_batch(model)

    def base_was_compared(self, model: nn.Module, *, is_aloud: bool) -> None:
        """Say what was written: a file was made, or the fit ends, and so the record knows."""
        if is_aloud and self.steps_begun:
            view = View(model)
            self.writes.tell(view)
            self.copies.tell(view)

    def close(self) -> None:
        """Let go of the model's weights."""
        self.reads.close()
        self.writes, self.copies = Writes(), LeftCopies()
