"""A call walks over a model few times."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.tensors import names


class Model(nn.Module):
    """Blocks of two linear layers and a norm, and a head."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({name: nn.Linear(4, 4) for name in "qk"}) for _ in range(blocks))
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
    model, config, file = Model(blocks), ll.LoRAConfig(r=2, modules_to_save=["head"]), folder / f"{blocks}.safetensors"
    calls: dict[str, Callable[[], Any]] = {
        "inject": lambda: ll.inject_adapters(model, config),
        "load_adapter_state_dict": lambda: ll.load_adapter_state_dict(model, ll.adapter_state_dict(model)),
        "save_adapter": lambda: ll.save_adapter(model, file),
        "load_adapter": lambda: ll.load_adapter(Model(blocks), file),
        "disable": lambda: ll.disable_adapters(model).__enter__(),
        "merge": lambda: ll.merge_adapters(model),
        "summarize": lambda: ll.summarize(model),
        "unmerge": lambda: ll.unmerge_adapters(model),
        "remove": lambda: ll.remove_adapters(model),
    }
    with monkeypatch.context() as patch:
        counted = Walks(patch)
        return {name: counted.of(call) for name, call in calls.items()}


def test_walks_over_a_model_do_not_grow_with_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (walks(blocks, tmp_path, monkeypatch) for blocks in (2, 24))
    assert few == many
    assert max(few.values()) <= 16 and few["inject"] <= 5 and few["save_adapter"] <= 4 and few["merge"] <= 4
