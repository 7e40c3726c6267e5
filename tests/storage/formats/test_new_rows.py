"""Tokens that were added to a model: an export says that its reader does not have them."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_lora as ll
from tests.storage.formats.test_export_models import tiny
from tests.support.models import Around


def resized(folder: Path, by: int, **config: Any) -> Any:
    """An adapted Llama from a folder, with so many tokens more."""
    base = tiny("Llama", "ForCausalLM")
    base.save_pretrained(folder / "base")
    model: Any = Around(type(base).from_pretrained(folder / "base"))
    inner = model.model
    inner.resize_token_embeddings(inner.config.vocab_size + by, mean_resizing=False)
    ll.inject_adapters(model, ll.LoRAConfig(**{"target_modules": ["q_proj"], **config}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


def said(model: Any, folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ll.export_peft(model, folder / "out")
    return [
        str(each.message) for each in caught if "rows and its base" in str(each.message)
    ]


def test_new_tokens_that_no_file_holds_are_named(tmp_path: Path) -> None:
    (message,) = said(resized(tmp_path, by=4), tmp_path)
    assert "'model.embed_tokens' has " in message
    assert "base_name" in message


@pytest.mark.parametrize(
    ("by", "config"),
    [
        (0, {}),
        (4, {"modules_to_save": ["embed_tokens"]}),
        (4, {"target_modules": ["q_proj", "embed_tokens"]}),
    ],
    ids=["no new ones", "trained whole", "adapted"],
)
def test_tokens_that_the_reader_has_or_the_files_hold_are_not(
    tmp_path: Path, by: int, config: dict[str, Any]
) -> None:
    assert said(resized(tmp_path, by, **config), tmp_path) == []


@pytest.mark.parametrize("text", ["[]", "{", '{"vocab_size": "many"}'])
def test_a_configuration_of_another_tool_says_nothing(
    tmp_path: Path, text: str
) -> None:
    model = resized(tmp_path, by=4)
    (tmp_path / "base" / "config.json").write_text(text)
    assert said(model, tmp_path) == []
