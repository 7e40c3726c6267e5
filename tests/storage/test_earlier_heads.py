"""Files of 0.2.0 load, whose ``"all-linear"`` meant output heads too that only their names and sizes tell."""

from pathlib import Path
from typing import Any

import torch

import lightning_lora as ll
from tests.support.models import LitTiny, TinyLM, X, data, trainer
from tests.support.storage import fitted, rewrite, saved, set_checksum

LAYERS = ["model.q_proj", "model.v_proj", "model.lm_head"]


class Language(LitTiny):
    """A module around a language model whose head is not tied.

    It is the same each time.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.model = TinyLM(tied=False)
        del self.embed, self.q_proj, self.v_proj, self.head

    def forward(self, index: Any) -> Any:
        return self.model(index)


def all_linear(about: dict[str, Any], _: Any) -> None:
    del about["config"]["target_modules"]  # which is the default


def test_a_file_whose_all_linear_meant_the_head_too_loads(tmp_path: Path) -> None:
    model = saved(tmp_path / "a.safetensors", Language(), target_modules=LAYERS)
    rewrite(tmp_path / "a.safetensors", all_linear)
    other = Language()
    ll.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(X), model(X))
    assert other.model.lm_head.lora_B.any()


def test_a_run_whose_all_linear_meant_the_head_too_goes_on(tmp_path: Path) -> None:
    old = ll.LoRACallback(r=2, target_modules=LAYERS, merge=False)
    file = tmp_path / "a.ckpt"
    fitted(file, Language(), old)
    checkpoint = torch.load(file, weights_only=True)
    all_linear(checkpoint["lightning_lora"], None)
    set_checksum(checkpoint)
    torch.save(checkpoint, file)
    t = trainer(tmp_path, [ll.LoRACallback(r=2, merge=False)], max_epochs=2)
    model = Language()
    t.fit(model, data(), ckpt_path=file)
    assert t.global_step == 8
    assert model.model.lm_head.lora_B.any()
