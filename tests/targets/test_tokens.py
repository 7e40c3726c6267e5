"""What ``trainable_token_indices`` means, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    TargetError,
    inject_adapters,
    merge_adapters,
    remove_adapters,
    save_adapter,
)
from lightning_lora.errors import AdapterMismatchError, AdapterStateError, ConfigError
from lightning_lora.model.view import View
from tests.support.compared import assert_all_refused
from tests.support.models import Around, TinyLM, randomise
from tests.support.ranks import alone


class Model(nn.Module):
    """It has an input embedding, as those of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.other = nn.Embedding(8, 4)
        self.embed_tokens = nn.Embedding(6, 4)
        self.inner = nn.Linear(4, 4)
        self.bag = nn.EmbeddingBag(5, 4)
        self.sparse = nn.Embedding(5, 4, sparse=True)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, index: Tensor) -> Any:
        return self.inner(self.words(index))


class Asks(Model):
    """A model whose input embedding is not to be asked for."""

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


class HasNone(Model):
    """A model for speech, which has no embedding of words."""

    def get_input_embeddings(self) -> Any:
        return None


class NamesAnOuterOne(Model):
    """It names an embedding that it reads, but does not hold."""

    outer = (nn.Embedding(10, 4),)

    def get_input_embeddings(self) -> nn.Module:
        return self.outer[0]


class Holder(nn.Module):
    """It reads the embedding's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = TinyLM()
        self.own = self.model.embed.weight


def rows(model: nn.Module, given: Any, **config: Any) -> dict[str, tuple[int, ...]]:
    """The rows that train, by the names of their embeddings."""
    inject_adapters(
        model, LoRAConfig(**{"r": 2, "trainable_token_indices": given, **config})
    )
    found = {}
    for name, (matrix, *_) in View(model).matrices.items():
        if matrix.tokens:
            found[name] = matrix.tokens
    return found


def test_a_list_means_the_input_embedding() -> None:
    assert rows(Model(), [9, 0]) == {"words": (0, 9)}  # in order
    assert rows(Around(Model()), range(2, 4)) == {"model.words": (2, 3)}
    for kind in (Asks, HasNone, NamesAnOuterOne):
        assert rows(kind(), [1]) == {"embed_tokens": (1,)}
    both = nn.ModuleDict({"a": Model(), "b": Model()})
    assert rows(both, [1]) == {"a.words": (1,), "b.words": (1,)}


@pytest.mark.parametrize(
    "given",
    [
        [3, -1],
        [3, 3],
        [True],
        "34",
        ["<pos>"],
        3,
        {"a": []},
        {"a": {"b": [1]}},
        {3: [1]},
    ],
)
def test_what_are_no_rows_is_refused(given: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"trainable_token_indices.* is not valid. Expected"
    ):
        LoRAConfig(trainable_token_indices=given)


TAKEN = "does not fit: target_modules, target_parameters or modules_to_save name it too"
REFUSED: list[tuple[type[nn.Module], Any, dict[str, Any], str]] = [
    (
        Model,
        [3, 10, 12],
        {},
        r"'words' does not fit: it has 10 rows, and no \[10, 12\]. Resize it first",
    ),
    (
        Model,
        {"wrods": [1]},
        {},
        r"\['wrods'\] match no module of Model. Nearest names: 'words'",
    ),
    (
        Model,
        {"bag": [1]},
        {},
        "'bag' does not fit: a EmbeddingBag is neither an nn.Embedding nor an "
        "nn.Linear",
    ),
    (Model, {"sparse": [1]}, {}, "its gradients are sparse"),
    (Model, [1], {"modules_to_save": ["words"]}, f"'words' {TAKEN}"),
    # what shares the weight must fit too
    (
        Holder,
        {"embed": [1]},
        {},
        r"'model.embed' of Holder. '' does not fit: a Holder is neither",
    ),
    (
        TinyLM,
        {"embed": [1], "lm_head": [2]},
        {},
        "other rows for 'lm_head' than for a name of the same weight",
    ),
    (TinyLM, {"embed": [1]}, {"target_modules": ["lm_head"]}, f"'lm_head' {TAKEN}"),
    (TinyLM, {"embed": [1]}, {"modules_to_save": ["lm_head"]}, f"'lm_head' {TAKEN}"),
]


@pytest.mark.parametrize(("build", "given", "config", "match"), REFUSED)
def test_what_cannot_have_rows_is_refused(
    build: Any, given: Any, config: dict[str, Any], match: str
) -> None:
    with pytest.raises(TargetError, match=match):
        rows(build(), given, **config)


def test_a_dict_names_embeddings() -> None:
    found = rows(Around(Model()), {"other": [7], "model.words": {1}})
    assert found == {"model.words": (1,), "model.other": (7,)}
    # one weight: the other one follows
    assert rows(TinyLM(), {"lm_head": [4], "embed": [4]}) == {"lm_head": (4,)}
    found = rows(
        TinyLM(), {"embed": [1]}, target_modules="all", exclude_modules=["embed"]
    )
    assert found == {"embed": (1,)}  # words leave it to its rows


def test_a_whole_name_means_no_end_of_another() -> None:
    inner = nn.ModuleDict({"embed": nn.Embedding(4, 4)})
    pair = nn.ModuleDict({"embed": nn.Embedding(4, 4), "x": inner})
    assert rows(pair, {"embed": [1]}) == {"embed": (1,)}


def resize(embedding: nn.Embedding, size: int) -> None:
    """As transformers does it."""
    embedding.weight.data = torch.randn(size, 4)
    embedding.num_embeddings = size


@pytest.mark.parametrize(
    "how",
    [
        {"trainable_token_indices": [1, 2]},
        {"target_modules": "words", "use_dora": True},
    ],
)
def test_a_resized_embedding_is_adapted_anew(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    model = Model()
    config = LoRAConfig(**{"target_modules": "inner", "r": 2, **how})
    inject_adapters(model, config)
    others = {name: p for name, p in model.named_parameters() if "words" not in name}
    resize(model.words, 11)
    inject_adapters(model, config)
    assert model(torch.tensor([10, 1])).isfinite().all()
    for name, p in others.items():
        assert model.get_parameter(name) is p
    save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(
        AdapterMismatchError, match=r"Layer 'words' .* is adapted already"
    ):
        rows(model, [1, 3])


# of older versions of torch
@pytest.mark.filterwarnings("ignore:DTensor random operators")
def test_a_sharded_embedding_is_refused() -> None:
    model = TinyLM(tied=False)
    with alone() as mesh:
        model.embed.weight = nn.Parameter(
            dist.tensor.distribute_tensor(model.embed.weight.detach(), mesh)
        )
        with pytest.raises(
            TargetError, match="'embed' does not fit: its weight is sharded"
        ):
            rows(model, {"embed": [1]})


@pytest.mark.parametrize(
    "how",
    [
        {"trainable_token_indices": [1, 2]},
        {"target_modules": "words", "use_dora": True},
    ],
)
def test_a_resized_embedding_that_has_trained_is_refused(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    model = Model()
    config = LoRAConfig(**{"target_modules": "inner", "r": 2, **how})
    inject_adapters(model, config)
    randomise(model)
    resize(model.words, 12)
    calls: list[Callable[[nn.Module], Any]] = [
        lambda model: inject_adapters(model, config),
        lambda model: save_adapter(model, tmp_path / "b.safetensors"),
        merge_adapters,
    ]
    assert_all_refused(
        model,
        calls,
        AdapterStateError,
        "'words' of Model was resized after inject_adapters",
    )
    assert not list(tmp_path.iterdir())
    remove_adapters(model)
    inject_adapters(model, config)
    merge_adapters(model)
    assert len(model.words.weight) == 12
