"""What is said of tokens that were added to a model, and that its base does not have."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from lightning_lora.errors import warn
from lightning_lora.storage.formats.export import Export
from lightning_lora.tensors.dicts import dict_or_empty, with_values
from lightning_lora.tensors.names import is_in


def warn_of_new_rows(export: Export) -> None:
    """Warn if the embedding has rows that neither the reader's base has nor the files.

    ``resize_token_embeddings`` has added them. The reader loads the base without them,
    or gives them other values.
    """
    embedding = _embedding_of(export.inner)
    rows_of_base = _rows_of(export.stored_inner.pretrained)
    if embedding is None or rows_of_base is None:
        return
    name, *_ = with_values(export.modules_for_reader, {embedding})
    rows = len(embedding.weight)
    if rows > rows_of_base and not _is_exported(name, export):
        warn(
            f"{name!r} has {rows} rows and its base {rows_of_base}, and the files hold "
            "none of them: the reader has other values for the new tokens. Train the "
            "new rows (trainable_token_indices), or save the resized base for the "
            "reader too and pass its folder as base_name."
        )


def _embedding_of(inner: nn.Module | None) -> nn.Embedding | None:
    """The embedding of the tokens, as any class may give it that has the method of transformers."""
    find: Any = getattr(inner, "get_input_embeddings", None)
    embedding = None
    if find is not None:
        with suppress(NotImplementedError):  # transformers: a model without tokens
            embedding = find()
    return embedding if isinstance(embedding, nn.Embedding) else None


def _rows_of(pretrained: str) -> int | None:
    """The size of the vocabulary of a base, if its configuration is on this machine."""
    if not pretrained:
        return None
    path = Path(pretrained) / "config.json"
    config: Any = None
    with suppress(OSError, ValueError):
        config = json.loads(path.read_text(encoding="utf-8"))
    size = dict_or_empty(config).get("vocab_size")  # the file may be of another tool
    return size if isinstance(size, int) else None


def _is_exported(name: str, export: Export) -> bool:
    """Whether the files hold rows of a module, its update, or all of it."""
    named = [*export.stored.layers, *export.stored.saved]
    return any(is_in(export.name_for_reader(each), name) for each in named)
