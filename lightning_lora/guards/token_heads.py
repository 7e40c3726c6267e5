"""Output heads beside embeddings whose new rows train: if a head is not tied to them, its own rows stay random."""

from collections.abc import Iterator, Set

from torch import nn

from lightning_lora.errors import listed
from lightning_lora.guards.wording import warn_in_each_fit
from lightning_lora.model.untrained.find_untrained import Untrained
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.storage.same_base.compared_tensors import rows_of
from lightning_lora.tensors.dicts import only, without
from lightning_lora.tensors.names import owner_of


class TokenHeads(Guard):
    """Names output heads whose new rows stay frozen."""

    def new_adapters_begin(self, view: View, untrained: Untrained) -> None:
        """Name each, with the argument that trains its rows too."""
        # the weights of embeddings, and of heads that are tied to them
        weights_with_rows = rows_of(view).keys()
        owners = map(owner_of, weights_with_rows)
        # a tied head has no adapter: it uses the embedding's
        embeddings = [owner for owner in owners if owner in view.matrices]
        for head in _heads_beside(view, weights_with_rows):
            warn_in_each_fit(_about_head(head, embeddings))


def _heads_beside(view: View, weights_with_rows: Set[str]) -> Iterator[str]:
    """Linear layers without updates, with as many rows as one of these weights."""
    lengths = set(map(len, only(view.base_parameters, weights_with_rows).values()))
    without_updates = without(
        view.frozen_base, {*weights_with_rows, *view.adapted_weights}
    )
    for name, weight in without_updates.items():
        head = owner_of(name)
        rows = weight.shape[:-1].numel()  # a bias has one
        if rows in lengths and isinstance(view.modules[head], nn.Linear):
            yield head


def _about_head(head: str, embeddings: list[str]) -> str:
    entries = [f"{name!r}: [...]" for name in (*embeddings, head)]
    return (
        f"Single rows of {listed(embeddings)} train, but not of the output head "
        f"{head!r}: it is not tied. Rows of new tokens stay random there, and files "
        "fit no model that is resized again. Name both, with the same rows: "
        f"trainable_token_indices={{{', '.join(entries)}}}."
    )
