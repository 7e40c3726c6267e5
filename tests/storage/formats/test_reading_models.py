"""PEFT's adapters of transformers models load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_lora import AdapterMismatchError, LoRAWarning, load_adapter
from tests.support.models import Around
from tests.support.peft_reading import built, gap, read_by_peft, write_peft

INDEX = torch.arange(12).view(2, 6) + 2
BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
LLAMA = {**BERT, "num_key_value_heads": 1, "max_position_embeddings": 32}


def causal(config: Any) -> Callable[[], nn.Module]:
    return lambda: hf.AutoModelForCausalLM.from_config(config)


def classifier(config: Any) -> Callable[[], nn.Module]:
    return lambda: hf.AutoModelForSequenceClassification.from_config(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "bert": (lambda: hf.AutoModel.from_config(hf.BertConfig(**BERT)), {"target_modules": ["query", "value"]}),
    "bert classifier": (
        classifier(hf.BertConfig(**BERT)),
        {"target_modules": "all-linear", "task_type": "SEQ_CLS", "r": 4, "lora_alpha": 16},
    ),
    "roberta": (
        classifier(hf.RobertaConfig(**BERT, max_position_embeddings=16)),
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "lora_only"},
    ),
    "roberta, biases": (
        classifier(hf.RobertaConfig(**BERT, max_position_embeddings=16)),
        {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "all"},
    ),
    "distilbert": (
        classifier(hf.DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=16, vocab_size=20)),
        {"target_modules": ["q_lin", "v_lin"], "task_type": "SEQ_CLS", "use_dora": True},
    ),
    "gpt2": (causal(hf.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20)), {"task_type": "CAUSAL_LM"}),
    "gpt-neox": (causal(hf.GPTNeoXConfig(**BERT)), {"task_type": "CAUSAL_LM", "use_rslora": True}),
    "falcon": (
        causal(hf.FalconConfig(**BERT, bias=True)),
        {"target_modules": ["query_key_value", "dense"], "task_type": "CAUSAL_LM"},
    ),
    "llama": (causal(hf.LlamaConfig(**LLAMA)), {"task_type": "CAUSAL_LM", "layers_to_transform": [1]}),
    "llama, embeddings": (
        causal(hf.LlamaConfig(**LLAMA)),
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "task_type": "CAUSAL_LM"},
    ),
    "llama, pissa": (
        causal(hf.LlamaConfig(**LLAMA)),
        {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "pissa"},
    ),
    "qwen2, tokens of tied embeddings": (
        causal(hf.Qwen2Config(**LLAMA, tie_word_embeddings=True)),
        {"target_modules": ["q_proj"], "trainable_token_indices": [2, 5]},
    ),
    "qwen2, tokens": (
        causal(hf.Qwen2Config(**LLAMA, tie_word_embeddings=False)),
        {"target_modules": ["q_proj"], "trainable_token_indices": [2, 5]},
    ),
    "mixtral": (
        causal(hf.MixtralConfig(**LLAMA, num_local_experts=3)),
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 1},
        },
    ),
    "t5": (
        lambda: hf.T5EncoderModel(hf.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=20)),
        {"target_modules": ["q", "v"]},
    ),
    "clip": (
        lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**BERT, max_position_embeddings=16)),
        {"target_modules": ["q_proj", "k_proj"], "modules_to_save": ["final_layer_norm"]},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "config"), MODELS.values(), ids=MODELS)
def test_outputs_are_those_of_peft(tmp_path: Path, make: Callable[[], nn.Module], config: dict[str, Any]) -> None:
    expected = write_peft(tmp_path, built(make), **config)(input_ids=INDEX)
    for model in (built(make), Around(built(make)).eval()):
        assert gap(model(input_ids=INDEX), expected) > 1e-5
        load_adapter(model, tmp_path)
        assert gap(model(input_ids=INDEX), expected) < 2e-6


def test_adapters_of_the_model_without_its_head(tmp_path: Path) -> None:
    def whole() -> Any:
        return hf.AutoModelForSequenceClassification.from_config(hf.BertConfig(**BERT))

    write_peft(tmp_path, built(lambda: whole().bert), target_modules=["query"])
    model = built(whole)
    with pytest.warns(LoRAWarning, match="they begin with 'bert'"):
        load_adapter(model, tmp_path)
    expected = read_by_peft(tmp_path, built(lambda: whole().bert))
    assert gap(model.bert(input_ids=INDEX), expected(input_ids=INDEX)) < 2e-6


@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("trained", [False, True])
def test_an_update_that_a_mixer_of_mamba_leaves_out_is_never_loaded(tmp_path: Path, init: Any, trained: bool) -> None:
    def train(peft: nn.Module) -> None:
        for name, p in peft.named_parameters():
            if "dt_proj.lora_B" in name and not trained:
                nn.init.zeros_(p)

    base = causal(hf.MambaConfig(hidden_size=8, state_size=4, num_hidden_layers=2, vocab_size=20))
    targets = {"target_modules": ["in_proj", "x_proj", "dt_proj"], "init_lora_weights": init}
    expected, model = write_peft(tmp_path, built(base), train, **targets), built(base)
    if trained or init == "pissa":
        with pytest.raises(AdapterMismatchError, match="dt_proj', which the module around it never calls"):
            load_adapter(model, tmp_path)
    else:
        load_adapter(model, tmp_path)
        assert gap(model(input_ids=INDEX), expected(input_ids=INDEX)) < 2e-6
