"""A format is one entry of a table, which all that reads and writes asks; what is of none is not read."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lightning_lora as ll
from lightning_lora.cli.main import main
from lightning_lora.layers.kinds import LoRALinear
from lightning_lora.model.view import View
from lightning_lora.storage.formats import own, registry
from lightning_lora.storage.formats.reading import Asked, Reader, Update, adapters_of
from lightning_lora.storage.formats.registry import FORMATS, Format
from lightning_lora.storage.formats.writing import Source, updates_of, write_files
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import described
from tests.support.models import as_trained

DOWN, UP = ".lora_down.weight", ".lora_up.weight"  # kohya's names, which without this are called what they are


def read(contents: Mapping[str, Any], path: Any, _: Asked) -> Reader | None:
    layers = [name.removesuffix(DOWN) for name in contents if name.endswith(DOWN)]

    def reader(view: View) -> StoredAdapters:
        updates = list[Update]()
        for name in layers:
            about = described(view, name, LoRALinear, LoRALinear.lora_matrices_of(view.modules[name]))
            about = replace(about, scaling=contents[f"{name}.alpha"].item() / len(contents[name + DOWN]))
            updates.append(Update(about, ((contents[name + DOWN], contents[name + UP]),)))
        return adapters_of(view, updates, {}, ll.LoRAConfig())

    return reader if layers else None


def write(source: Source, directory: Path, uniform: bool) -> None:
    tensors = dict[str, torch.Tensor]()
    for update in updates_of(source):
        a, b = update.factors
        tensors |= {update.name + DOWN: a, update.name + UP: b, f"{update.name}.alpha": torch.tensor(update.alpha)}
    write_files(directory, "other.safetensors", tensors, {})


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))


def test_a_format_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    other = Format("other", "others", read, ("other.safetensors",), write)
    model = as_trained(base(), alpha=5, rank_pattern={"2": 1})
    with pytest.raises(ll.ConfigError, match=r"'other' is not known\. Expected 'peft' or 'diffusers'"):
        ll.export_peft(model, tmp_path / "out", format="other")  # type: ignore[arg-type]
    monkeypatch.setattr(registry, "FORMATS", (*FORMATS, other))
    monkeypatch.setitem(registry.WRITTEN, "other", other)
    ll.export_peft(model, tmp_path / "out", format="other")  # type: ignore[arg-type]
    for path in (tmp_path / "out", tmp_path / "out" / "other.safetensors"):
        ll.load_adapter(loaded := base(), path)
        assert torch.equal(loaded(torch.eye(4)), model(torch.eye(4)))
        assert main(["inspect", str(path)]) == 1 and "holds adapters of others" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(ll.AdapterFileError, match="sd-scripts"):
        ll.load_adapter(base(), tmp_path / "out" / "other.safetensors")


@pytest.mark.parametrize("names", [["0.weight"], ["0.weight", "0.lora_A", "0.lora_B"], ["0.lora_down.weight"]])
def test_tensors_of_what_is_refused_are_not_read(tmp_path: Path, monkeypatch: Any, names: list[str]) -> None:
    @contextmanager
    def without_tensors(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(keys=lambda: names, metadata=dict)

    save_file({name: torch.ones(4, 4) for name in names}, tmp_path / "a.safetensors")
    monkeypatch.setattr(own, "safe_open", without_tensors)
    with pytest.raises(ll.AdapterFileError, match=r"no adapters of this|does not say how|sd-scripts"):
        ll.load_adapter(base(), tmp_path / "a.safetensors")
