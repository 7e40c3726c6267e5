"""A call walks over a model few times."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    disable_adapters,
    inject_adapters,
    load_adapter,
    load_adapter_state_dict,
    merge_adapters,
    remove_adapters,
    save_adapter,
    summarize,
    unmerge_adapters,
)
from lightning_lora.tensors import names
from tests.support.models import randomise


class Model(nn.Module):
    """Blocks of two linear layers and a norm, and a head."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = {"q": nn.Linear, "k": nn.Linear}
        make = [nn.ModuleDict({name: kind(4, 4) for name, kind in block.items()}) for _ in range(blocks)]
        self.blocks = nn.ModuleList(make)
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)


class Walks:
    """Counts the walks over all modules of a model: ours, torch's, and state dicts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for holder, name in ((names, "_walk"), (nn.Module, "named_modules"), (nn.Module, "state_dict")):
            monkeypatch.setattr(holder, name, self.counted(getattr(holder, name)))

    def counted(self, walk: Callable[..., Any]) -> Callable[..., Any]:
        def counting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.count += isinstance(module, Model)
            return walk(module, *args, **kwargs)

        return counting

    def of(self, call: Callable[[], Any]) -> int:
        before = self.count
        call()
        return self.count - before


def walks(blocks: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    model, other, config = Model(blocks), Model(blocks), LoRAConfig(r=2, modules_to_save=["head"])
    found, file = {}, folder / f"{blocks}.safetensors"

    def disable() -> None:
        with disable_adapters(model):
            pass

    with monkeypatch.context() as patch:
        counted = Walks(patch)
        found["inject"] = counted.of(lambda: inject_adapters(model, config))
        randomise(model)
        state = adapter_state_dict(model)
        found["adapter_state_dict"] = counted.of(lambda: adapter_state_dict(model))
        found["load_adapter_state_dict"] = counted.of(lambda: load_adapter_state_dict(model, state))
        found["save_adapter"] = counted.of(lambda: save_adapter(model, file))
        found["load_adapter"] = counted.of(lambda: load_adapter(other, file))
        found["disable"] = counted.of(disable)
        found["merge"] = counted.of(lambda: merge_adapters(model))
        found["summarize"] = counted.of(lambda: summarize(model))
        found["unmerge"] = counted.of(lambda: unmerge_adapters(model))
        found["remove"] = counted.of(lambda: remove_adapters(model))
    return found


def test_walks_over_a_model_do_not_grow_with_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (walks(blocks, tmp_path, monkeypatch) for blocks in (2, 24))
    assert few == many
    assert max(few.values()) <= 16 and few["inject"] <= 5 and few["save_adapter"] <= 4 and few["merge"] <= 4
