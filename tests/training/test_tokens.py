"""New tokens, from the resized embedding to files: what a fit trains, resumes, merges and stores."""

import copy
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
from tests.support.fits import resumes_to_the_bit
from tests.support.models import exact, is_plain, same, state, trainer

TOKENS = [20, 21]
INDEX = torch.randint(0, 22, (16, 6), generator=torch.Generator().manual_seed(4))
MODELS: dict[str, tuple[Any, str, list[str]]] = {
    "gpt2": (
        hf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        "transformer.wte",
        ["c_attn"],
    ),
    "llama": (
        hf.LlamaConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20,
            tie_word_embeddings=False,
        ),
        "model.embed_tokens",
        ["q_proj", "v_proj"],
    ),
}  # fmt: skip


def resized(name: str, drawn: int = 0) -> Any:
    """A model with the same base each time, and two new tokens, drawn anew."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = hf.AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name][0])).train()
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


def lora(name: str, /, **more: Any) -> ll.LoRACallback:
    rows = TOKENS if name == "gpt2" else {"embed_tokens": TOKENS, "lm_head": TOKENS}  # not tied
    arguments = {"r": 2, "target_modules": MODELS[name][2], "trainable_token_indices": rows, "merge": False}
    L.seed_everything(0, verbose=False)
    return ll.LoRACallback(**(arguments | more))


@exact
def test_a_run_resumes_to_the_bit_and_its_files_hold_only_the_rows(tmp_path: Path) -> None:
    resumed = resumes_to_the_bit(tmp_path, lambda: Lit(resized("gpt2")), lambda: lora("gpt2"), train=data, max_epochs=2)
    base = Lit(resized("gpt2")).state_dict()
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in base.items() if "wte" in name)
    stored = held(torch.load(tmp_path / "through" / "epoch=0.ckpt", weights_only=True))
    assert stored[f"model.{MODELS['gpt2'][1]}.lora_rows"].shape == (2, 8)
    assert all("lora_" in name for name in stored)


@pytest.mark.parametrize("name", MODELS)
def test_a_merge_writes_the_rows_and_an_unmerge_gives_the_base_back(tmp_path: Path, name: str) -> None:
    module = Lit(resized(name))
    tied, before = module.model.config.tie_word_embeddings, state(module)
    trainer(tmp_path, [lora(name, merge="last")], max_epochs=1).fit(module, data())
    embedding = module.model.get_input_embeddings()
    assert is_plain(module) and (module.model.lm_head.weight is embedding.weight) is tied
    merged, plain = state(module), module.model(input_ids=INDEX).logits
    ll.unmerge_adapters(module)
    rows = embedding.lora_rows.detach().clone()
    assert torch.equal(merged[f"model.{MODELS[name][1]}.weight"][TOKENS], rows)
    assert (rows - embedding.weight[TOKENS]).abs().min() > 0.001  # they have trained
    assert (type(module.model.lm_head).__name__ == "TiedLinear") is tied
    torch.testing.assert_close(module.model(input_ids=INDEX).logits, plain)
    with ll.disable_adapters(module):
        assert torch.equal(module.model(input_ids=INDEX).logits, resized(name)(input_ids=INDEX).logits)
    ll.save_merged(module, tmp_path / "whole")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").train()
    assert torch.equal(again(input_ids=INDEX).logits, plain)
    ll.remove_adapters(module)
    assert same(state(module), before) and type(module.model.lm_head) is nn.Linear


def test_rows_that_are_replaced_are_no_part_of_the_base_and_all_others_are(tmp_path: Path) -> None:
    module = Lit(resized("gpt2"))
    trainer(tmp_path, [lora("gpt2")], max_epochs=1).fit(module, data())
    ll.save_adapter(module, tmp_path / "a.safetensors")
    expected = module.model(input_ids=INDEX).logits
    other = Lit(resized("gpt2", drawn=7))
    assert not torch.equal(other.model.transformer.wte.weight[20:], resized("gpt2").transformer.wte.weight[20:])
    ll.load_adapter(other, tmp_path / "a.safetensors")
    torch.testing.assert_close(other.model(input_ids=INDEX).logits, expected)
    ll.merge_adapters(other)
    ll.adapter_state_dict(other)
    for wrong in (resized("gpt2", drawn=7).half().float(), resized("gpt2")):
        wrong.transformer.wte.weight.data[19] *= 2
        with pytest.raises(ll.BaseMismatchError, match=r"1 of \d+|trained on another base"):
            ll.load_adapter(Lit(wrong), tmp_path / "a.safetensors")
    half = Lit(resized("gpt2", drawn=7).to(torch.bfloat16))
    with pytest.warns(ll.LoRAWarning, match="It is the same base, converted"):
        ll.load_adapter(half, tmp_path / "a.safetensors")
    plain = resized("gpt2")
    plain.resize_token_embeddings(23, mean_resizing=False)
    with pytest.raises(ll.LoRAError, match="names or shapes differ"):
        ll.load_adapter(Lit(plain), tmp_path / "a.safetensors")


def test_a_head_that_is_not_tied_must_be_named_too(tmp_path: Path) -> None:
    module, file = Lit(resized("llama")), tmp_path / "a.safetensors"
    with pytest.warns(
        ll.LoRAWarning, match="of 'model.model.embed_tokens' train, but not of the output head"
    ) as caught:
        trainer(tmp_path, [lora("llama", trainable_token_indices=TOKENS)], max_epochs=1).fit(module, data())
    ll.save_adapter(module, file)
    with pytest.raises(ll.BaseMismatchError, match=r"1 of .*'model.lm_head.weight'.*rows.*token_indices"):
        ll.load_adapter(Lit(resized("llama", drawn=7)), file)
    (said,) = [str(each.message) for each in caught if issubclass(each.category, ll.LoRAWarning)]
    named = eval(said.partition("trainable_token_indices=")[2].strip("."), {"__builtins__": {}})
    assert named == {"model.model.embed_tokens": [...], "model.lm_head": [...]}
    for more in (
        {"trainable_token_indices": TOKENS, "modules_to_save": ["lm_head"]},
        {"trainable_token_indices": TOKENS, "target_modules": ["lm_head"]},
        {"trainable_token_indices": dict.fromkeys(named, TOKENS)},
    ):
        module = Lit(resized("llama"))
        trainer(tmp_path, [lora("llama", **more)], max_epochs=1).fit(module, data())  # a warning would be an error
    ll.save_adapter(module, file)
    other = Lit(resized("llama", drawn=7))
    ll.load_adapter(other, file)
    torch.testing.assert_close(other.model(input_ids=INDEX).logits, module.model(input_ids=INDEX).logits)


def test_adapters_with_other_rows_are_of_the_same_base(tmp_path: Path) -> None:
    module, file = Lit(resized("gpt2")), tmp_path / "a.ckpt"
    for name, tokens in (("a", [20]), ("b", [21])):
        callback = lora("gpt2", trainable_token_indices=tokens, name=name)
        run = trainer(tmp_path, [callback], max_epochs=1)
        run.fit(module, data())
    for name in ("a", "b"):
        ll.set_adapter(module, name)
        run.save_checkpoint(file)
        assert all("lora_" in entry for entry in held(torch.load(file, weights_only=True)))
        other = Lit(resized("gpt2"))
        ll.load_adapter(other, file)
        assert torch.equal(other.model(input_ids=INDEX).logits, module.model(input_ids=INDEX).logits)
