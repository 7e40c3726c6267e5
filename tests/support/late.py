"""Modules whose projections are made late, and one with a norm."""

import torch
from torch import Tensor, nn

from tests.support.models import LitTiny


class BornInSetup(LitTiny):
    """A module whose projections are made in ``setup``."""

    def __init__(self) -> None:
        super().__init__()
        del self.q_proj, self.v_proj

    def setup(self, stage: str) -> None:
        if not hasattr(self, "q_proj"):
            self.make()

    def make(self) -> None:
        other = LitTiny()
        self.q_proj = other.q_proj
        self.v_proj = other.v_proj


class BornInConfigureModel(BornInSetup):
    """A module whose projections are made in ``configure_model``."""

    def setup(self, stage: str) -> None:
        pass

    def configure_model(self) -> None:
        super().setup("fit")


class BuiltAnew(BornInConfigureModel):
    """A module that makes new projections whenever ``configure_model`` is called, though they exist already."""

    def configure_model(self) -> None:
        self.make()


class Normed(LitTiny):
    """A module with a batch norm of the base, whose statistics are not those of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.norm.running_mean.fill_(0.3)  # type: ignore[union-attr]

    def forward(self, index: Tensor) -> Tensor:
        x = self.norm(self.embed(index))
        return self.head(torch.tanh(self.q_proj(x)) + self.v_proj(x))
