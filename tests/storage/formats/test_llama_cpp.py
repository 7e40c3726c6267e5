"""Layers that llama.cpp cannot run are named when an adapter is exported."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import lightning_lora as ll
from tests.support.peft_export import trained

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 40, "intermediate_size": 24}
TIED = r"llama.cpp cannot run 'model.embed_tokens': .*save_merged"
TRANSPOSED = r"llama.cpp does not load adapters of 'transformer.h.0.attn.c_attn': .*Conv1D.*save_merged"


def llama(*, tied: bool) -> Any:
    config = hf.LlamaConfig(**SIZES, num_attention_heads=2, tie_word_embeddings=tied)
    return hf.LlamaForCausalLM(config)


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))


def warned(model: Any, target: str, folder: Path) -> list[str]:
    """What an export says of llama.cpp: from the model, and the same from its file."""
    adapted = trained(model, ll.LoRAConfig(r=2, target_modules=[target]))
    ll.save_adapter(adapted, folder / "own.safetensors")
    sources = {"model": adapted, "file": folder / "own.safetensors"}
    said = []
    for name, source in sources.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ll.export_peft(source, folder / name, uniform=True)
        said.append([str(one.message) for one in caught if "llama.cpp" in str(one.message)])
    from_model, from_file = said
    assert from_model == from_file
    return from_model


def test_a_tied_embedding_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (text,) = warned(llama(tied=True), "embed_tokens", tmp_path)
    assert re.match(TIED, text)


def test_a_conv1d_is_named(tmp_path: Path) -> None:
    (text,) = warned(gpt2(), "c_attn", tmp_path)
    assert re.match(TRANSPOSED, text)


@pytest.mark.parametrize(("tied", "target"), [(False, "embed_tokens"), (True, "q_proj")])
def test_layers_that_it_runs_are_not_named(tied: bool, target: str, tmp_path: Path) -> None:
    assert warned(llama(tied=tied), target, tmp_path) == []
