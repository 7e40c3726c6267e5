"""What is remembered of one adapter."""

import torch

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.config import LoRAConfig


def test_what_was_kept_for_an_error_does_not_change_with_later_events() -> None:
    state = AdapterState(LoRAConfig(r=2))
    state.set_base_values({"bias": torch.zeros(2)})
    state.fingerprints = [{"layout": "a"}]
    before = state.snapshot()
    state.set_base_values({"weight": torch.ones(2, 2)})
    state.fingerprints.append({"layout": "b"})
    assert list(before.originals) == ["bias"]
    assert before.fingerprints == [{"layout": "a"}]
