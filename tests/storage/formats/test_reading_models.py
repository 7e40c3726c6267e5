"""PEFT's adapters of transformers models load."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import AdapterMismatchError, LoRAWarning, load_adapter
from tests.storage.formats.test_export_models import run, tiny
from tests.storage.formats.test_reading import TOKENS
from tests.support.models import Around
from tests.support.peft_reading import Attending, built, gap, write_peft

CAUSAL = {"task_type": "CAUSAL_LM"}
STACKS: dict[str, Any] = {
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]
}
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "Bert",
        "ForSequenceClassification",
        {"target_modules": "all-linear", "task_type": "SEQ_CLS", "lora_alpha": 16},
    ),
    ("GPT2", "LMHeadModel", CAUSAL),
    (
        "Falcon",
        "ForCausalLM",
        {"target_modules": ["query_key_value", "dense"], **CAUSAL},
    ),
    ("Llama", "ForCausalLM", {**CAUSAL, "layers_to_transform": [1]}),
    ("Llama", "ForCausalLM", {"target_modules": ["embed_tokens", "lm_head"], **CAUSAL}),
    (
        "Mixtral",
        "ForCausalLM",
        {
            "target_modules": ["q_proj"],
            **STACKS,
            "rank_pattern": {"experts.down_proj": 1},
        },
    ),
    ("T5", "ForConditionalGeneration", {"target_modules": ["q", "v"]}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "head", "config"), MODELS)
def test_outputs_are_those_of_peft(
    tmp_path: Path, kind: str, head: str, config: dict[str, Any]
) -> None:
    make = partial(tiny, kind, head)
    expected = run(write_peft(tmp_path, built(make), **config))
    plain = built(make)
    around = Around(built(make)).eval()
    for model, inner in ((plain, plain), (around, around.model)):
        assert gap(run(inner), expected) > 1e-5
        load_adapter(model, tmp_path)
        assert gap(run(inner), expected) < 5e-6


def test_an_update_of_a_layer_that_is_never_called_is_left_out(tmp_path: Path) -> None:
    """all-linear names the output projection of an nn.MultiheadAttention, such as that of SigLIP's pooling head."""
    expected = write_peft(
        tmp_path, built(Attending), target_modules=["out_proj", "out"]
    )(TOKENS)
    model = built(Attending)
    with pytest.warns(
        LoRAWarning, match=r"Nothing calls .*attn.out_proj'.*left out"
    ) as told:
        load_adapter(model, tmp_path)
    assert len(told) == 1
    assert gap(model(TOKENS), expected) < 2e-6


class Shared(nn.Module):  # two layers with one weight, as in Zamba2
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 8)
        self.k.weight = self.q.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(torch.tanh(self.k(x)))


def test_a_start_that_peft_takes_off_a_shared_weight_is_refused(tmp_path: Path) -> None:
    expected = write_peft(tmp_path / "usual", built(Shared), target_modules=["q", "k"])(
        torch.eye(8)
    )
    model = built(Shared)
    load_adapter(model, tmp_path / "usual")
    assert gap(model(torch.eye(8)), expected) < 2e-6
    write_peft(
        tmp_path / "pissa",
        built(Shared),
        target_modules=["q", "k"],
        init_lora_weights="pissa",
    )
    with pytest.raises(
        AdapterMismatchError,
        match=r"'q.weight', 'k.weight' are one weight.*'pissa'.*Train anew",
    ):
        load_adapter(built(Shared), tmp_path / "pissa")
