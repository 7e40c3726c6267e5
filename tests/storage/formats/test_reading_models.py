"""PEFT's adapters of transformers models load."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_lora import AdapterMismatchError, LoRAWarning, load_adapter
from tests.support.models import Around
from tests.support.peft_reading import built, gap, write_peft

INDEX = torch.arange(12).view(2, 6) + 2
BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
LLAMA = {**BERT, "num_key_value_heads": 1, "max_position_embeddings": 32}


def causal(config: type, **sizes: Any) -> Callable[[], nn.Module]:
    return lambda: hf.AutoModelForCausalLM.from_config(config(**sizes))


def classifier(config: type, **sizes: Any) -> Callable[[], Any]:
    return lambda: hf.AutoModelForSequenceClassification.from_config(config(**sizes))


def t5() -> nn.Module:
    return hf.T5EncoderModel(hf.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=20))


CAUSAL = {"task_type": "CAUSAL_LM"}
MIXTRAL = causal(hf.MixtralConfig, **LLAMA, num_local_experts=3)
ROBERTA = classifier(hf.RobertaConfig, **BERT, max_position_embeddings=16)
STACKS: dict[str, Any] = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
MODELS: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    (classifier(hf.BertConfig, **BERT), {"target_modules": "all-linear", "task_type": "SEQ_CLS", "lora_alpha": 16}),
    (ROBERTA, {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "all"}),
    (causal(hf.GPT2Config, n_embd=8, n_layer=2, n_head=2, vocab_size=20), CAUSAL),
    (causal(hf.FalconConfig, **BERT, bias=True), {"target_modules": ["query_key_value", "dense"], **CAUSAL}),
    (causal(hf.LlamaConfig, **LLAMA), {**CAUSAL, "layers_to_transform": [1]}),
    (causal(hf.LlamaConfig, **LLAMA), {"target_modules": ["embed_tokens", "lm_head"], **CAUSAL}),
    (MIXTRAL, {"target_modules": ["q_proj"], **STACKS, "rank_pattern": {"experts.down_proj": 1}}),
    (t5, {"target_modules": ["q", "v"]}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "config"), MODELS)
def test_outputs_are_those_of_peft(tmp_path: Path, make: Callable[[], nn.Module], config: dict[str, Any]) -> None:
    expected = write_peft(tmp_path, built(make), **config)(input_ids=INDEX)
    for model in (built(make), Around(built(make)).eval()):
        assert gap(model(input_ids=INDEX), expected) > 1e-5
        load_adapter(model, tmp_path)
        assert gap(model(input_ids=INDEX), expected) < 2e-6


def untrained(layer: str, peft: nn.Module) -> None:
    """Let the updates of these layers be zero."""
    for name, p in peft.named_parameters():
        if f"{layer}.lora_B" in name:
            nn.init.zeros_(p)


def siglip() -> nn.Module:
    return hf.SiglipVisionModel(hf.SiglipVisionConfig(**BERT, image_size=8, patch_size=4))


def test_an_update_of_a_layer_that_is_never_called_is_left_out(tmp_path: Path) -> None:
    """all-linear names the output projection of SigLIP's pooling head, an nn.MultiheadAttention."""
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)
    change = partial(untrained, "attention.out_proj")
    expected = write_peft(tmp_path, built(siglip), change, target_modules="all-linear")
    model = built(siglip)
    with pytest.warns(LoRAWarning, match=r"Nothing calls .*head.attention.out_proj'.*left out") as told:
        load_adapter(model, tmp_path)
    assert len(told) == 1
    assert gap(model(pixels).pooler_output, built(siglip)(pixels).pooler_output) > 1e-4
    assert gap(model(pixels).pooler_output, expected(pixels).pooler_output) < 2e-6


class Shared(nn.Module):
    """Two layers with one weight, as in Zamba2."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.k.weight = self.q.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(torch.tanh(self.k(x)))


@pytest.mark.parametrize(("init", "targets"), [("pissa", ["q", "k"]), (True, ["q", "k"])])
def test_a_start_that_peft_takes_off_a_shared_weight_is_refused(tmp_path: Path, init: Any, targets: list[str]) -> None:
    expected = write_peft(tmp_path, built(Shared), target_modules=targets, init_lora_weights=init)(torch.eye(8))
    if init is True:
        load_adapter(model := built(Shared), tmp_path)
        assert gap(model(torch.eye(8)), expected) < 2e-6
        return
    with pytest.raises(AdapterMismatchError, match=f"'q.weight', 'k.weight' are one weight.*'{init}'.*Train anew"):
        load_adapter(built(Shared), tmp_path)
