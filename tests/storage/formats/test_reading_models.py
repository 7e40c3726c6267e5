"""PEFT's adapters of transformers models load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft.tuners import lora
from torch import nn

from lightning_lora import AdapterFileError, AdapterMismatchError, LoRAWarning, load_adapter
from tests.support.models import Around
from tests.support.peft_reading import built, gap, read_by_peft, write_peft

INDEX = torch.arange(12).view(2, 6) + 2
BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
LLAMA = {**BERT, "num_key_value_heads": 1, "max_position_embeddings": 32}


def causal(config: Any) -> Callable[[], nn.Module]:
    return lambda: hf.AutoModelForCausalLM.from_config(config)


def classifier(config: Any) -> Callable[[], nn.Module]:
    return lambda: hf.AutoModelForSequenceClassification.from_config(config)


def t5() -> nn.Module:
    return hf.T5EncoderModel(hf.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=20))


def case(make: Callable[[], nn.Module], targets: Any = None, **config: Any) -> tuple[Any, dict[str, Any]]:
    return make, {"target_modules": targets, **config}


CLASSES, CAUSAL = {"task_type": "SEQ_CLS"}, {"task_type": "CAUSAL_LM"}
SHORT = {**BERT, "max_position_embeddings": 16}
ROBERTA, CLIP = hf.RobertaConfig(**SHORT), hf.CLIPTextConfig(**SHORT)
DISTIL = hf.DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=16, vocab_size=20)
GPT2 = hf.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20)
TIED, UNTIED = (causal(hf.Qwen2Config(**LLAMA, tie_word_embeddings=tied)) for tied in (True, False))
MIXTRAL = causal(hf.MixtralConfig(**LLAMA, num_local_experts=3))
STACKS: dict[str, Any] = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
MODELS = {
    "bert": case(lambda: hf.AutoModel.from_config(hf.BertConfig(**BERT)), ["query", "value"]),
    "bert classifier": case(classifier(hf.BertConfig(**BERT)), "all-linear", **CLASSES, r=4, lora_alpha=16),
    "roberta": case(classifier(ROBERTA), ["query", "value"], **CLASSES, bias="lora_only"),
    "roberta, biases": case(classifier(ROBERTA), ["query"], modules_to_save=["classifier"], bias="all"),
    "distilbert": case(classifier(DISTIL), ["q_lin", "v_lin"], **CLASSES, use_dora=True),
    "gpt2": case(causal(GPT2), **CAUSAL),
    "gpt-neox": case(causal(hf.GPTNeoXConfig(**BERT)), **CAUSAL, use_rslora=True),
    "falcon": case(causal(hf.FalconConfig(**BERT, bias=True)), ["query_key_value", "dense"], **CAUSAL),
    "llama": case(causal(hf.LlamaConfig(**LLAMA)), **CAUSAL, layers_to_transform=[1]),
    "llama, embeddings": case(causal(hf.LlamaConfig(**LLAMA)), ["embed_tokens", "q_proj", "lm_head"], **CAUSAL),
    "llama, pissa": case(causal(hf.LlamaConfig(**LLAMA)), ["q_proj", "v_proj"], init_lora_weights="pissa"),
    "qwen2, tokens of tied embeddings": case(TIED, ["q_proj"], trainable_token_indices=[2, 5]),
    "qwen2, tokens": case(UNTIED, ["q_proj"], trainable_token_indices=[2, 5]),
    "mixtral": case(MIXTRAL, ["q_proj"], **STACKS, rank_pattern={"experts.down_proj": 1}),
    "t5": case(t5, ["q", "v"]),
    "clip": case(lambda: hf.CLIPTextModel(CLIP), ["q_proj", "k_proj"], modules_to_save=["final_layer_norm"]),
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
    whole: Any = classifier(hf.BertConfig(**BERT))
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


VISION = {**BERT, "image_size": 8, "patch_size": 4}
PIXELS = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)


def siglip() -> nn.Module:
    return hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION))


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_zero_update_of_a_layer_that_is_never_called_is_left_out(tmp_path: Path, init: Any) -> None:
    """all-linear names the output projection of SigLIP's pooling head, an nn.MultiheadAttention."""

    def untrained(peft: nn.Module) -> None:
        for name, p in peft.named_parameters():
            if "attention.out_proj.lora_B" in name:
                nn.init.zeros_(p)

    config = {"target_modules": "all-linear", "init_lora_weights": init}
    expected = write_peft(tmp_path, built(siglip), untrained, **config)
    model = built(siglip)
    with pytest.warns(LoRAWarning, match=r"head.attention.out_proj' is zero.*never calls it: it is left out") as told:
        load_adapter(model, tmp_path)
    assert len(told) == 1
    assert gap(model(PIXELS).pooler_output, built(siglip)(PIXELS).pooler_output) > 1e-4
    assert gap(model(PIXELS).pooler_output, expected(PIXELS).pooler_output) < 2e-6
    write_peft(tmp_path, built(siglip), **config)
    with pytest.raises(AdapterMismatchError, match=r"head.attention.out_proj', which its nn.MultiheadAttention never"):
        load_adapter(built(siglip), tmp_path)


class Shared(nn.Module):
    """Two layers with one weight, as in Zamba2."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.k.weight = self.q.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(torch.tanh(self.k(x)))


@pytest.mark.parametrize("init", ["pissa", "olora", True])
@pytest.mark.parametrize("targets", [["q", "k"], ["q"]])
def test_a_start_that_peft_takes_off_a_shared_weight_is_refused(tmp_path: Path, init: Any, targets: list[str]) -> None:
    expected = write_peft(tmp_path, built(Shared), target_modules=targets, init_lora_weights=init)(torch.eye(8))
    if init is True:
        load_adapter(model := built(Shared), tmp_path)
        assert gap(model(torch.eye(8)), expected) < 2e-6
        return
    with pytest.raises(AdapterMismatchError, match=f"'q.weight', 'k.weight' are one weight.*'{init}'.*Train anew"):
        load_adapter(built(Shared), tmp_path)


METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "layer_replication": (hf.LlamaConfig, {"layer_replication": [[0, 2], [1, 2]]}),
    "aLoRA": (hf.LlamaConfig, {"alora_invocation_tokens": [3]}),
    "lora_bias": (hf.LlamaConfig, {"lora_bias": True}),
    "lora_bias, with biases": (hf.Qwen2Config, {"lora_bias": True}),
    "kasa": (hf.LlamaConfig, {"kasa_config": lora.KasaConfig()}),
    "bdlora": (hf.LlamaConfig, {"use_bdlora": lora.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)}),
    "monteclora": (hf.LlamaConfig, {"monteclora_config": lora.MontecloraConfig()}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "fields"), METHODS.values(), ids=METHODS)
def test_a_merge_by_peft_is_advised_where_it_is_right(tmp_path: Path, config: Any, fields: Any) -> None:
    make = causal(config(**LLAMA))
    peft = write_peft(tmp_path, built(make), target_modules=["q_proj"], task_type="CAUSAL_LM", **fields)
    expected = peft(input_ids=INDEX)
    try:
        merges = gap(peft.merge_and_unload()(input_ids=INDEX), expected) < 1e-6
    except (NotImplementedError, RuntimeError):
        merges = False
    with pytest.raises(AdapterFileError) as error:
        load_adapter(built(make), tmp_path)
    advised = "if that can" if "lora_bias" in fields else "Merge it with PEFT" if merges else "does not merge it right"
    assert advised in str(error.value) and f"'{next(iter(fields))}'" in str(error.value)
