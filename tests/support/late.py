"""Modules whose projections are made late."""

from tests.support.models import LitTiny


class BornInSetup(LitTiny):
    """A module whose projections are made in ``setup``."""

    def __init__(self) -> None:
        super().__init__()
        del self.q_proj, self.v_proj

    def make(self) -> None:
        if not hasattr(self, "q_proj"):
            other = LitTiny()
            self.q_proj, self.v_proj = other.q_proj, other.v_proj

    def setup(self, stage: str) -> None:
        self.make()


class BornInConfigureModel(BornInSetup):
    """A module whose projections are made in ``configure_model``."""

    def setup(self, stage: str) -> None:
        pass

    def configure_model(self) -> None:
        self.make()


class BuiltAnew(BornInSetup):
    """A module that makes new projections whenever ``configure_model`` is called, though they exist already."""

    def setup(self, stage: str) -> None:
        pass

    def configure_model(self) -> None:
        other = LitTiny()
        self.q_proj, self.v_proj = other.q_proj, other.v_proj
