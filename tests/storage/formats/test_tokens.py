"""Rows of tokens in files: PEFT's both ways, and the commands that need no model."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.cli.main import main
from lightning_lora.storage.offline.combine_files import combine_files
from lightning_lora.storage.offline.merge_files import merge_files
from tests.storage.formats.test_export_models import load_adapter, run, tiny
from tests.support.compared import assert_same_tensors
from tests.support.models import Around, TinyLM, as_trained
from tests.support.parameters import base_keys, chosen
from tests.support.peft_export import read
from tests.support.peft_reading import built, gap, write_peft
from tests.support.storage import refused, rewrite

INDEX = torch.arange(12).view(2, 6)
TOKENS = [18, 5]
MODELS: dict[str, tuple[str, str, list[str]]] = {
    "gpt2, a tied head": ("GPT2", "LMHeadModel", ["c_attn"]),
    "t5, four uses": ("T5", "ForConditionalGeneration", ["q", "v"]),
    "gemma, a scaled embedding": ("Gemma3Text", "Model", ["q_proj"]),
}


WEIGHTS = "adapter_model.safetensors"


def assert_same_rows(here: dict[str, Tensor], there: dict[str, Tensor]) -> None:
    """Expect the same tensors, but for the order of rows, which is that of the tokens here."""
    assert here.keys() == there.keys()
    for name, value in here.items():
        expected = there[name].flip(0) if "token" in name else there[name]
        assert torch.equal(value, expected)


@pytest.mark.filterwarnings(
    "ignore:.*may be untrained|llama.cpp does not|.* would leave "
    "out:lightning_lora.LoRAWarning"
)
@pytest.mark.parametrize(("kind", "head", "targets"), MODELS.values(), ids=MODELS)
def test_files_of_peft_are_read_and_written_as_they_are(
    tmp_path: Path, kind: str, head: str, targets: list[str]
) -> None:
    def make() -> Any:
        # these models round to 2e-6 in float32
        return built(partial(tiny, kind, head)).double()

    peft = write_peft(
        tmp_path / "there",
        make(),
        target_modules=targets,
        trainable_token_indices=TOKENS,
    )
    model = make()
    ll.load_adapter(model, tmp_path / "there")
    assert gap(run(model), run(peft)) < 1e-6
    ll.save_adapter(model, tmp_path / "own.safetensors")
    ll.export_peft(model, tmp_path / "here")
    ll.export_peft(tmp_path / "own.safetensors", tmp_path / "from a file")
    for folder in (tmp_path / "here", tmp_path / "from a file"):
        assert_same_rows(
            load_file(folder / WEIGHTS), load_file(tmp_path / "there" / WEIGHTS)
        )
        again = read(make(), folder)
        assert gap(run(again), run(model)) < 1e-6
        assert gap(run(load_adapter(make(), folder)), run(model)) < 1e-6
    ll.merge_adapters(model)
    assert gap(run(model), run(peft.merge_and_unload())) < 1e-6


def tied(bias: bool = False, told: bool = True) -> Any:
    model: Any = TinyLM()
    model.config = SimpleNamespace(tie_word_embeddings=told)
    if bias:
        model.lm_head.bias = nn.Parameter(torch.ones(20))
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            partial(tied, told=False),
            "'embed', 'lm_head' have one weight, and PEFT knows",
        ),
        (partial(tied, bias=True), "'lm_head' has a bias, which PEFT leaves out"),
    ],
)
def test_what_peft_computes_otherwise_is_refused_both_ways(
    tmp_path: Path, make: Any, match: str
) -> None:
    write_peft(
        tmp_path / "there",
        TinyLM(),
        target_modules=["q_proj"],
        trainable_token_indices={"embed": [1, 2]},
    )
    with pytest.raises(ll.AdapterMismatchError, match=match):
        ll.load_adapter(make(), tmp_path / "there")
    model = make()
    ll.inject_adapters(
        model, ll.LoRAConfig(r=2, trainable_token_indices={"embed": [1, 2]})
    )
    ll.save_adapter(model, tmp_path / "a.safetensors")
    for source in (model, tmp_path / "a.safetensors"):
        with pytest.raises(ll.ExportError, match=match):
            ll.export_peft(source, tmp_path / "here")


def marian(share: bool) -> Any:
    """A model whose decoder's embedding is tied to the head, and to the encoder's only if they share it."""
    sizes = {
        "d_model": 16,
        "vocab_size": 20,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "max_position_embeddings": 16,
    }
    tokens = {
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    }
    config = hf.MarianConfig(**sizes, **tokens, share_encoder_decoder_embeddings=share)
    return built(lambda: hf.MarianMTModel(config))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.filterwarnings("ignore:.*may be untrained:lightning_lora.LoRAWarning")
def test_peft_ties_layers_to_the_embedding_of_the_inputs_alone(
    share: bool, tmp_path: Path
) -> None:
    """Rows of the decoder's embedding change the head too, and in PEFT they do not."""
    rows_of_decoder = {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"decoder.embed_tokens": [1, 2]},
    }
    match = (
        "have one weight, and PEFT ties layers to .*'model.encoder.embed_tokens', alone"
    )
    write_peft(tmp_path / "there", marian(share), **rows_of_decoder)
    with pytest.raises(ll.AdapterMismatchError, match=match):
        ll.load_adapter(marian(share), tmp_path / "there")
    model = marian(share)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, **rows_of_decoder))
    ll.save_adapter(model, tmp_path / "a.safetensors")
    for source in (model, tmp_path / "a.safetensors"):
        with pytest.raises(ll.ExportError, match=match):
            ll.export_peft(source, tmp_path / "here")


def test_a_file_of_0_2_0_does_not_say_what_peft_knows_of_a_tied_weight(
    tmp_path: Path,
) -> None:
    model = tied()
    ll.inject_adapters(
        model,
        ll.LoRAConfig(
            r=2, target_modules=["q_proj"], trainable_token_indices={"embed": [1]}
        ),
    )
    ll.save_adapter(model, tmp_path / "a.safetensors")
    ll.export_peft(tmp_path / "a.safetensors", tmp_path / "here")
    rewrite(tmp_path / "a.safetensors", lambda about, _: about.pop("copies"))
    with pytest.raises(
        ll.ExportError,
        match=r"'embed', 'lm_head' have one weight\. Load the file onto its model",
    ):
        ll.export_peft(tmp_path / "a.safetensors", tmp_path / "other")


def rows(*numbers: int) -> dict[str, Any]:
    """A configuration that trains these rows."""
    return {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed": list(numbers)},
    }


def test_a_peft_folder_of_other_rows_is_refused(tmp_path: Path) -> None:
    write_peft(tmp_path, TinyLM(tied=False), **rows(1, 2))
    model = TinyLM(tied=False)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, **rows(1, 3)))
    message = r"other rows .* trainable_token_indices={'embed': \[1, 2"
    with refused(model, ll.AdapterMismatchError, message):
        ll.load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("targets", "how", "match"),
    [
        ([], {}, "nothing else is adapted.*Adapt a layer too"),
        (["q_proj"], {"uniform": True}, "no alpha to make uniform.*Leave uniform out"),
        (
            ["q_proj"],
            {"format": "diffusers", "root": ""},
            "a file of a pipeline has no place.*Leave format out",
        ),
    ],
)
def test_readers_that_know_no_rows_are_not_given_any(
    tmp_path: Path, targets: list[str], how: dict[str, Any], match: str
) -> None:
    config = ll.LoRAConfig(
        target_modules=targets, trainable_token_indices={"embed": [1]}
    )
    model = TinyLM(tied=False)
    ll.inject_adapters(model, config)
    with pytest.raises(ll.ExportError, match=f"^'embed' has rows that train.*{match}"):
        ll.export_peft(model, tmp_path / "here", **how)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """A file of adapters with rows of a tied embedding."""
    model = as_trained(TinyLM(), trainable_token_indices={"embed": TOKENS})
    ll.save_adapter(model, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize(
    "names", [["embed.weight"], ["embed.weight", "lm_head.weight"]]
)
def test_files_are_merged_without_the_model(tmp_path: Path, names: list[str]) -> None:
    base = tmp_path / "base.safetensors"
    file = tmp_path / "a.safetensors"
    model = as_trained(TinyLM(), trainable_token_indices={"embed": TOKENS})
    ll.save_adapter(model, file)
    plain = chosen(model.state_dict(), base_keys(model))
    drawn = plain["embed.weight"].index_fill(0, torch.tensor(TOKENS), 9.0)
    del plain["embed.weight"], plain["lm_head.weight"]
    for name in names:
        plain[name] = drawn.clone()
    save_file(plain, base)
    merge_files(base, file, tmp_path / "whole.safetensors")
    ll.merge_adapters(model)
    whole = load_file(tmp_path / "whole.safetensors")
    assert whole.keys() == plain.keys()
    assert_same_tensors(whole, chosen(model.state_dict(), whole))
    save_file({**plain, "embed.weight": drawn + 1}, base)
    with pytest.raises(ll.BaseMismatchError, match=r"such as 'embed.weight'"):
        merge_files(base, file, tmp_path / "other.safetensors")


def test_files_with_rows_are_shown_and_not_added_up(
    tmp_path: Path, rows_file: Path, capsys: Any
) -> None:
    assert main(["inspect", str(rows_file)]) == 0
    assert "Rows of embed train: 2." in capsys.readouterr().out
    with pytest.raises(ll.AdapterMismatchError, match="trains single rows of 'embed'"):
        combine_files([rows_file, rows_file], tmp_path / "sum.safetensors", (1.0, 1.0))


def test_a_file_says_its_names_in_a_model_around_another(tmp_path: Path) -> None:
    inner: Any = TinyLM(tied=False)
    plain = deepcopy(inner)
    module = as_trained(
        Around(inner), init="pissa", trainable_token_indices={"embed": TOKENS}
    )
    ll.save_adapter(module, tmp_path / "a.safetensors")
    with pytest.warns(ll.LoRAWarning, match="begin with 'model'"):
        ll.load_adapter(plain, tmp_path / "a.safetensors")
    assert torch.equal(plain(INDEX), module(INDEX))
    assert plain.embed.lora_matrices[0].tokens == (5, 18)
