"""New tokens, from the resized embedding to files: what a fit trains, resumes, merges and stores."""

import copy
from ast import literal_eval
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_lora as ll
from tests.support.cases import held
from tests.support.compared import assert_holds, assert_same_tensors
from tests.support.fits import resumes_to_the_bit
from tests.support.messages import lines_with, messages_of
from tests.support.models import exact, is_plain, state, trainer
from tests.support.parameters import chosen

TOKENS = [20, 21]
INDEX = torch.randint(0, 22, (16, 6), generator=torch.Generator().manual_seed(4))
CONFIGS: dict[str, Any] = {
    "gpt2": hf.GPT2Config(
        n_embd=8,
        n_layer=1,
        n_head=2,
        vocab_size=20,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    ),
    "llama": hf.LlamaConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=20,
        tie_word_embeddings=False,
    ),
}
EMBEDDINGS = {"gpt2": "model.transformer.wte", "llama": "model.model.embed_tokens"}
"""Where each has its embedding, in a module around it."""


def resized(name: str, drawn: int = 0) -> Any:
    """A model with the same base each time, and two new tokens, drawn anew."""
    config = copy.deepcopy(CONFIGS[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = hf.AutoModelForCausalLM.from_config(config).train()
        torch.manual_seed(drawn)
        model.resize_token_embeddings(22, mean_resizing=False)
    return model


class Lit(L.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def data() -> DataLoader[Any]:
    return DataLoader(INDEX, batch_size=4)  # type: ignore[arg-type]  # a tensor is a dataset


ARGUMENTS: dict[str, dict[str, Any]] = {
    "gpt2": {"target_modules": ["c_attn"], "trainable_token_indices": TOKENS},
    "llama": {  # its head is not tied
        "target_modules": ["q_proj", "v_proj"],
        "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS},
    },
}


def lora(name: str, /, **more: Any) -> ll.LoRACallback:
    arguments = {"r": 2, "merge": False, **ARGUMENTS[name], **more}
    L.seed_everything(0, verbose=False)
    return ll.LoRACallback(**arguments)


def fitted(folder: Path, name: str, **more: Any) -> Lit:
    """A module of this model after a fit."""
    module = Lit(resized(name))
    trainer(folder, [lora(name, **more)], max_epochs=1).fit(module, data())
    return module


def logits(model: Any) -> Tensor:
    """What a model says of the samples."""
    found: Tensor = model(input_ids=INDEX).logits
    return found


@exact
def test_a_run_resumes_to_the_bit_and_its_files_hold_only_the_rows(
    tmp_path: Path,
) -> None:
    def build() -> Lit:
        return Lit(resized("gpt2"))

    resumed = resumes_to_the_bit(
        tmp_path, build, partial(lora, "gpt2"), train=data, max_epochs=2
    )
    base = build().state_dict()
    found = resumed.state_dict()
    assert_holds(found, chosen(base, lines_with("wte", base)))
    stored = held(torch.load(tmp_path / "through" / "epoch=0.ckpt", weights_only=True))
    assert stored["model.transformer.wte.lora_rows"].shape == (2, 8)
    assert lines_with("lora_", stored) == list(stored)


@pytest.mark.parametrize(("name", "tied"), [("gpt2", True), ("llama", False)])
def test_a_merge_writes_the_rows_and_an_unmerge_gives_the_base_back(
    tmp_path: Path, name: str, tied: bool
) -> None:
    before = state(Lit(resized(name)))
    module = fitted(tmp_path, name, merge="last")
    assert module.model.config.tie_word_embeddings is tied
    embedding = module.model.get_input_embeddings()
    assert is_plain(module)
    assert (module.model.lm_head.weight is embedding.weight) is tied
    merged = state(module)
    plain = logits(module.model)
    ll.unmerge_adapters(module)
    rows = embedding.lora_rows.detach().clone()
    assert torch.equal(merged[f"{EMBEDDINGS[name]}.weight"][TOKENS], rows)
    distance = rows - embedding.weight[TOKENS]
    assert distance.abs().min() > 0.001  # they have trained
    assert (type(module.model.lm_head).__name__ == "TiedLinear") is tied
    torch.testing.assert_close(logits(module.model), plain)
    with ll.disable_adapters(module):
        assert torch.equal(logits(module.model), logits(resized(name)))
    ll.save_merged(module, tmp_path / "whole")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").train()
    assert torch.equal(logits(again), plain)
    ll.remove_adapters(module)
    assert_same_tensors(state(module), before)
    assert type(module.model.lm_head) is nn.Linear


def new_rows(model: Any) -> Tensor:
    return model.transformer.wte.weight[20:]


def with_another_old_row(model: Any) -> Lit:
    model.transformer.wte.weight.data[19] *= 2
    return Lit(model)


def test_rows_that_are_replaced_are_no_part_of_the_base_and_all_others_are(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.safetensors"
    module = fitted(tmp_path, "gpt2")
    ll.save_adapter(module, file)
    expected = logits(module.model)
    other = Lit(resized("gpt2", drawn=7))
    assert not torch.equal(new_rows(other.model), new_rows(resized("gpt2")))
    ll.load_adapter(other, file)
    torch.testing.assert_close(logits(other.model), expected)
    ll.merge_adapters(other)
    ll.adapter_state_dict(other)
    rounded = resized("gpt2", drawn=7).half().float()
    for wrong in (with_another_old_row(rounded), with_another_old_row(resized("gpt2"))):
        with pytest.raises(
            ll.BaseMismatchError, match=r"1 of \d+|trained on another base"
        ):
            ll.load_adapter(wrong, file)
    half = Lit(resized("gpt2", drawn=7).to(torch.bfloat16))
    with pytest.warns(ll.LoRAWarning, match="It is the same base, converted"):
        ll.load_adapter(half, file)
    larger = resized("gpt2")
    larger.resize_token_embeddings(23, mean_resizing=False)
    with pytest.raises(ll.LoRAError, match="names or shapes differ"):
        ll.load_adapter(Lit(larger), file)


def test_a_head_that_is_not_tied_must_be_named_too(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    says = "of 'model.model.embed_tokens' train, but not of the output head"
    with pytest.warns(ll.LoRAWarning, match=says) as caught:
        module = fitted(tmp_path, "llama", trainable_token_indices=TOKENS)
    ll.save_adapter(module, file)
    with pytest.raises(
        ll.BaseMismatchError,
        match=r"1 of .*'model.lm_head.weight'.*rows.*token_indices",
    ):
        ll.load_adapter(Lit(resized("llama", drawn=7)), file)
    (said,) = messages_of(caught, ll.LoRAWarning)
    _, _, named = said.partition("trainable_token_indices=")
    assert literal_eval(named.strip(".")) == {
        "model.model.embed_tokens": [...],
        "model.lm_head": [...],
    }


@pytest.mark.parametrize(
    "more",
    [
        {"trainable_token_indices": TOKENS, "modules_to_save": ["lm_head"]},
        {"trainable_token_indices": TOKENS, "target_modules": ["lm_head"]},
    ],
    ids=str,
)
def test_a_head_that_trains_otherwise_need_not_be_named(
    tmp_path: Path, more: Any
) -> None:
    fitted(tmp_path, "llama", **more)  # a warning would be an error


def test_what_is_said_of_a_head_that_is_not_tied_helps(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    rows = {"model.model.embed_tokens": TOKENS, "model.lm_head": TOKENS}
    # a warning would be an error
    module = fitted(tmp_path, "llama", trainable_token_indices=rows)
    ll.save_adapter(module, file)
    other = Lit(resized("llama", drawn=7))
    ll.load_adapter(other, file)
    torch.testing.assert_close(logits(other.model), logits(module.model))


def test_adapters_with_other_rows_are_of_the_same_base(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    module = Lit(resized("gpt2"))
    for name, tokens in (("a", [20]), ("b", [21])):
        callback = lora("gpt2", trainable_token_indices=tokens, name=name)
        run = trainer(tmp_path, [callback], max_epochs=1)
        run.fit(module, data())
    for name in ("a", "b"):
        ll.set_adapter(module, name)
        run.save_checkpoint(file)
        stored = held(torch.load(file, weights_only=True))
        assert lines_with("lora_", stored) == list(stored)
        other = Lit(resized("gpt2"))
        ll.load_adapter(other, file)
        assert torch.equal(logits(other.model), logits(module.model))
