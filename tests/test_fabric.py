"""Training loops of Fabric: its wrapper is seen through, and the files of its users are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.faults import unchanged
from tests.support.fits import adapted
from tests.support.models import TRAINED, WORDS, LitTiny, X, data, is_plain, lora, same, state
from tests.support.ranks import run_ranks


def fabric(**kwargs: Any) -> L.Fabric:
    return L.Fabric(accelerator="cpu", **({"devices": 1} | kwargs))


def fit(fabric: L.Fabric, model: nn.Module) -> tuple[Any, Any]:
    """Train as Fabric's pages do; return the model and the optimizer as Fabric wraps them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    wrapped, optimizer = fabric.setup(model, torch.optim.Adam(trained, lr=0.01))
    for index, labels in fabric.setup_dataloaders(data()):
        optimizer.zero_grad()
        fabric.backward(nn.functional.cross_entropy(wrapped(index), labels))
        optimizer.step()
    return wrapped, optimizer


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_every_call_sees_the_model_inside(tmp_path: Path, compiled: bool) -> None:
    model = adapted()
    wrapped, _ = fit(fabric(), torch.compile(model, backend="eager") if compiled else model)
    trained, base = state(model), LitTiny()(X)
    assert type(wrapped).__name__ != type(model).__name__ and list(ll.adapter_state_dict(wrapped)) == TRAINED
    assert ll.summarize(wrapped).title == "LitTiny" and ll.summarize(wrapped).trained == ll.summarize(model).trained
    ll.load_adapter_state_dict(wrapped, ll.adapter_state_dict(model))
    ll.save_adapter(wrapped, tmp_path / "a.safetensors")
    ll.load_adapter(again := LitTiny(), tmp_path / "a.safetensors")
    assert same(state(again), trained)
    ll.load_adapter(other := fabric().setup(LitTiny()), tmp_path / "a.safetensors")
    assert same(state(other), trained)
    with ll.disable_adapters(wrapped):
        assert torch.equal(wrapped(X), base)
    ll.export_peft(wrapped, tmp_path / "peft")
    ll.save_merged(wrapped, tmp_path / "merged.ckpt")
    ll.merge_adapters(wrapped)
    assert is_plain(model) and same(LitTiny.load_from_checkpoint(tmp_path / "merged.ckpt").state_dict(), state(model))
    ll.unmerge_adapters(wrapped)
    assert same(state(model), trained)
    ll.remove_adapters(wrapped)
    assert torch.equal(wrapped(X), base)
    with pytest.raises(ll.AdapterStateError, match="LitTiny has no adapters"):
        ll.save_adapter(wrapped, tmp_path / "b.safetensors")


# Files

ONLY_TRAINED = {"model": lambda name, _: name in TRAINED}
SAVES: dict[str, Callable[[Any, Any, Any, Path], None]] = {
    "everything": lambda fabric, model, adam, path: fabric.save(path, {"model": model, "optimizer": adam, "step": 4}),
    "filtered": lambda fabric, model, _, path: fabric.save(path, {"model": model}, filter=ONLY_TRAINED),
    "state of adapters": lambda fabric, model, _, path: fabric.save(path, {"model": ll.adapter_state_dict(model)}),
    "beside a class": lambda fabric, model, _, path: fabric.save(path, {"model": model, "settings": ll.LoRAConfig}),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
@pytest.mark.parametrize("setup", [lambda model: model, lambda model: fabric().setup(model)], ids=["plain", "wrapped"])
def test_files_of_fabric_are_loaded_onto_an_adapted_model(tmp_path: Path, save: Any, setup: Any) -> None:
    f = fabric()
    wrapped, optimizer = fit(f, model := adapted())
    save(f, wrapped, optimizer, path := tmp_path / "a.ckpt")
    ll.load_adapter(setup(again := adapted()), path)
    assert same(state(again), state(model)) and not same(state(again), state(adapted()))
    ll.merge_adapters(again)
    ll.load_adapter(again, path)  # onto its base, as ever
    assert same(state(again), state(model))


def whole(model: nn.Module, without: str = "", **changed: Any) -> dict[str, Any]:
    values = {**model.state_dict(), **{name.replace("__", "."): value for name, value in changed.items()}}
    values.pop(without, None)
    return {"model": values}


@pytest.mark.parametrize(
    ("contents", "build", "error", "says"),
    [
        (whole(adapted()), LitTiny, ll.AdapterStateError, r"LitTiny has no adapters. Call inject_adapters\(model"),
        (whole(LitTiny()), LitTiny, ll.AdapterFileError, r"6 tensors.*no adapters.*torch.load\(path\)"),
        (whole(adapted(), "q_proj.lora_B"), adapted, ll.AdapterMismatchError, "missing 'q_proj.lora_B'"),
        (whole(adapted(), "head.bias"), adapted, ll.AdapterMismatchError, "missing 'head.bias'"),
        (whole(adapted(), other__lora_A=torch.ones(2, 8)), adapted, ll.AdapterMismatchError, "unexpected 'other.l"),
        (whole(adapted(), q_proj__lora_A=torch.ones(3, 8)), adapted, ll.AdapterMismatchError, r"\(3, 8\).*\(2, 8\)"),
        (whole(adapted(), q_proj__lora_A=torch.full((2, 8), torch.nan)), adapted, ll.AdapterFileError, "NaN"),
        (whole(adapted(), q_proj__weight=torch.ones(8, 8)), adapted, ll.BaseMismatchError, "1 of 4.*'q_proj.weight'"),
        (whole(adapted(), q_proj__lora_A=ll.LoRAConfig), adapted, ll.AdapterFileError, "LoRAConfig.* plain tensors"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, contents: Any, build: Any, error: Any, says: str) -> None:
    torch.save(contents, path := tmp_path / "a.ckpt")
    with unchanged(model := build()), pytest.raises(error, match=says):
        ll.load_adapter(model, path)


def test_another_base_is_taken_if_it_is_asked_for(tmp_path: Path) -> None:
    changed = whole(adapted(), embed__weight=torch.ones(WORDS, 8), head__bias=torch.ones(4))
    torch.save(changed, path := tmp_path / "a.ckpt")
    ll.load_adapter(model := adapted(), path, check_base=False)
    assert same({"w": model.embed.weight, "b": model.head.bias}, {"w": LitTiny().embed.weight, "b": torch.ones(4)})


# Several processes


def train_in_two(folder: Path) -> dict[str, Tensor]:
    f = fabric(devices=2, strategy="ddp")
    f.launch()
    wrapped, _ = fit(f, adapted())
    assert type(wrapped._forward_module).__name__ == "DistributedDataParallel"
    ll.save_adapter(wrapped, folder / "a.safetensors")
    f.save(folder / "a.ckpt", {"model": wrapped})
    return ll.adapter_state_dict(wrapped)


@pytest.mark.processes
def test_two_processes_train_the_same_adapters_and_write_one_file(tmp_path: Path) -> None:
    first, second = run_ranks(train_in_two, tmp_path)
    assert same(first, second) and first["q_proj.lora_B"].any()
    for path, build in ((tmp_path / "a.safetensors", LitTiny), (tmp_path / "a.ckpt", adapted)):
        ll.load_adapter(model := build(), path)
        assert same(ll.adapter_state_dict(model), first)


def adapt_late() -> None:
    f = fabric(devices=2, strategy="ddp")
    f.launch()
    with pytest.raises(ll.AdapterStateError, match=r"before fabric.setup"):
        ll.inject_adapters(model := f.setup(LitTiny()), lora().config)
    assert is_plain(model)
    with pytest.raises(ll.AdapterStateError, match="before DistributedDataParallel"):
        ll.inject_adapters(nn.parallel.DistributedDataParallel(LitTiny()), ll.LoRAConfig(r=2))
    ll.inject_adapters(f.setup(adapted()), lora().config)  # which has them already


@pytest.mark.processes
def test_adapters_that_come_after_the_processes_were_joined_are_refused() -> None:
    run_ranks(adapt_late)
