"""A merge into one use of a tied weight: it is two weights then."""

from collections.abc import Mapping, Sequence

from lightning_lora.errors import listed, warn
from lightning_lora.moments import Guard


class Untied(Guard):
    """Names layers whose weight was tied."""

    def merged(
        self, title: str, lost: Mapping[str, float], untied: Sequence[str]
    ) -> None:
        """Name them."""
        if untied:
            warn(
                f"The weight of {listed(untied)} in {title} was tied to another "
                "layer's: they are two weights now. Load the state dict into a model "
                "where they are not tied (in transformers, "
                "config.tie_word_embeddings=False)."
            )
