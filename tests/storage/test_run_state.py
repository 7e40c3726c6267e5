"""What a resumed run reads is as it was written, or refused."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn

from lightning_lora import AdapterFileError, LoRAError, OptimizerError, load_adapter
from lightning_lora.model.view import View
from lightning_lora.storage.description import describe
from lightning_lora.storage.fingerprint import forms_of_base
from lightning_lora.storage.run_state import check_run, run_checksums
from tests.cases import held
from tests.models import LitTiny, best, data, lora, trainer
from tests.storage.faults import adapted, endless, laughs, unchanged


class Scheduled(LitTiny):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Keeps(L.Callback):
    """A callback with a state and an entry of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {"mine": [1, 2.5, "a", None, (True,)], "average": torch.arange(3.0)}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["noted"] = {"at": trainer.global_step}


def callbacks() -> list[L.Callback]:
    return [lora(merge=False), Keeps(), EarlyStopping("val_loss")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    saves = best(folder, filename="a")
    trainer(folder, [*callbacks(), saves], max_epochs=1).fit(Scheduled(), data(), data())
    return folder / "a.ckpt"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value inside ``value``."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


GONE = object()
MUTATIONS = {"deleted": GONE, "None": None, "list": [], "dict": {}, "text": "x", "NaN": float("nan")}


def mutated(path: Path, place: tuple[Any, ...], to: Any) -> dict[str, Any]:
    """The checkpoint with another value at one place."""
    checkpoint: Any = torch.load(path, weights_only=True)
    holder = checkpoint
    for key in place[:-1]:
        holder = holder[key]
    if to is GONE:
        del holder[place[-1]]
    else:
        holder[place[-1]] = to
    return checkpoint


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_entry_that_is_changed_is_refused(written: Path, tmp_path: Path, name: str) -> None:
    """Every entry is known; Lightning is asked about those at the top, which it reads first, and some inside."""
    whole = torch.load(written, weights_only=True)
    model, to = Scheduled(), MUTATIONS[name]
    rest = {key: value for key, value in whole.items() if key not in ("state_dict", "lightning_lora")}
    for place in places(rest):
        checkpoint = mutated(written, place, to)
        here = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "lightning_lora")}
        if repr(here) == repr(rest):
            continue  # it was so before
        with pytest.raises(AdapterFileError, match="is not as it was written"):
            check_run(here, whole["lightning_lora"]["run"], "a.ckpt", whole=True)
        if len(place) < 2:
            torch.save(checkpoint, tmp_path / "a.ckpt")
            for stage in ("fit", "test"):
                with unchanged(model), pytest.raises(LoRAError):
                    getattr(trainer(tmp_path, callbacks(), max_epochs=2), stage)(
                        model, data(), ckpt_path=tmp_path / "a.ckpt"
                    )
    assert {"loops", "callbacks", "optimizer_states", "lr_schedulers", "noted", "lightning_lora_random"} <= rest.keys()


def test_an_entry_that_is_added_is_not_the_runs(written: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(written, weights_only=True) | {"more": 1}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    t = trainer(tmp_path, callbacks(), max_epochs=2)
    t.fit(Scheduled(), data(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert t.global_step == 8


def test_adapters_alone_load_from_a_file_whose_run_was_changed(written: Path, tmp_path: Path) -> None:
    torch.save(torch.load(written, weights_only=True) | {"noted": 1}, tmp_path / "a.ckpt")
    with pytest.raises(AdapterFileError, match=r"'noted' was changed.*load_adapter\(model, path\)"):
        trainer(tmp_path, callbacks()).fit(Scheduled(), data(), ckpt_path=tmp_path / "a.ckpt")
    load_adapter(LitTiny(), tmp_path / "a.ckpt")


def without_checksums(path: Path, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """A file as an earlier version would have written it, with a change."""
    checkpoint = torch.load(path, weights_only=True)
    view = View(adapted())
    checkpoint["lightning_lora"] = describe(view, held(checkpoint), forms_of_base(view))
    change(checkpoint)
    return checkpoint


def put(key: str, to: Any) -> Callable[[dict[str, Any]], object]:
    return lambda checkpoint: checkpoint.pop(key) if to is GONE else checkpoint.update({key: to})


OLD: dict[str, Callable[[dict[str, Any]], object]] = {
    f"{key} {name}": put(key, to)
    for key in ("optimizer_states", "lr_schedulers", "loops", "pytorch-lightning_version")
    for name, to in MUTATIONS.items()
    if not (isinstance(to, list) and key == "lr_schedulers")  # then it had none
    if not (isinstance(to, dict) and key == "loops")
} | {
    "an optimizer's state": lambda checkpoint: checkpoint["optimizer_states"].__setitem__(0, {}),
    "another optimizer": lambda checkpoint: checkpoint["optimizer_states"][0]["param_groups"].clear(),
    "moments": lambda checkpoint: checkpoint["optimizer_states"][0]["state"][0]["exp_avg"].fill_(float("nan")),
    "squares": lambda checkpoint: checkpoint["optimizer_states"][0]["state"][1]["exp_avg_sq"].fill_(float("inf")),
    "epoch": lambda checkpoint: checkpoint.update(epoch="x"),
    "callbacks": lambda checkpoint: checkpoint.update(callbacks=[]),
    "a loop": lambda checkpoint: checkpoint["loops"].update(fit_loop=None),
}  # fmt: skip


@pytest.mark.parametrize("change", OLD.values(), ids=OLD)
def test_a_file_without_checksums_of_the_run_is_looked_through(written: Path, tmp_path: Path, change: Any) -> None:
    model = Scheduled()
    torch.save(without_checksums(written, change), tmp_path / "a.ckpt")
    with unchanged(model), pytest.raises(LoRAError):
        trainer(tmp_path, callbacks(), max_epochs=2).fit(model, data(), data(), ckpt_path=tmp_path / "a.ckpt")


def test_a_file_without_checksums_of_the_run_resumes(written: Path, tmp_path: Path) -> None:
    torch.save(without_checksums(written, lambda _: None), tmp_path / "a.ckpt")
    t = trainer(tmp_path, callbacks(), max_epochs=2)
    t.fit(Scheduled(), data(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert t.global_step == 8


@pytest.mark.parametrize("version", ["x", None, 3, "", "0.9"])
def test_a_full_checkpoint_of_any_version_is_a_base_or_refused(tmp_path: Path, version: Any) -> None:
    plain = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    plain.fit(LitTiny(), data())
    plain.save_checkpoint(tmp_path / "full.ckpt")
    checkpoint = torch.load(tmp_path / "full.ckpt", weights_only=True) | {"pytorch-lightning_version": version}
    torch.save(checkpoint, tmp_path / "full.ckpt")
    t, model = trainer(tmp_path, [lora()], max_epochs=1), LitTiny()
    if version == "0.9":
        t.fit(model, data(), ckpt_path=tmp_path / "full.ckpt")
        assert t.global_step == 4
        return
    with unchanged(model), pytest.raises(AdapterFileError, match="is no version of Lightning"):
        t.fit(model, data(), ckpt_path=tmp_path / "full.ckpt")


def test_a_diverged_optimizer_is_refused_by_fit_and_not_read_by_test(tmp_path: Path) -> None:
    class Diverges(L.Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["optimizer_states"][0]["state"][0]["exp_avg"].fill_(float("nan"))

    saves = best(tmp_path, monitor=None, filename="a")
    trainer(tmp_path, [lora(), Diverges(), saves], max_epochs=1).fit(LitTiny(), data())
    model = LitTiny()
    with unchanged(model), pytest.raises(AdapterFileError, match="had diverged"):
        trainer(tmp_path, [lora()], max_epochs=2).fit(model, data(), ckpt_path=tmp_path / "a.ckpt")
    trainer(tmp_path, [lora()]).test(model, data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)


def test_weights_alone_are_not_resumed(tmp_path: Path) -> None:
    t = trainer(tmp_path, [lora()], max_epochs=1)
    t.fit(LitTiny(), data())
    t.save_checkpoint(tmp_path / "light.ckpt", weights_only=True)
    model = LitTiny()
    with unchanged(model), pytest.raises(AdapterFileError, match="save_weights_only=True"):
        trainer(tmp_path, [lora()], max_epochs=2).fit(model, data(), ckpt_path=tmp_path / "light.ckpt")
    trainer(tmp_path, [lora()]).test(model, data(), ckpt_path=tmp_path / "light.ckpt", verbose=False)


class Two(LitTiny):
    """A module with two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        parts = (self.q_proj, self.v_proj), (self.head,)
        return [torch.optim.SGD([p for part in each for p in part.parameters()], 0.1) for each in parts]


def test_a_run_with_other_optimizers_is_not_resumed(written: Path, tmp_path: Path) -> None:
    model = Two()
    with unchanged(model), pytest.raises(OptimizerError, match="1 states, and the module 2 optimizers"):
        trainer(tmp_path, callbacks(), max_epochs=2).fit(model, data(), data(), ckpt_path=written)


# Checksums


class Odd:
    """An object of a type of the user's own."""


SAME: dict[str, Callable[[], Any]] = {
    "plain": lambda: [None, True, 3, 10**5000, 0.1, float("nan"), 1j, "a\ud800", b"x"],
    "containers": lambda: {"a": [1, (2, {3, "b"})], 4: OrderedDict(x=1), None: defaultdict(list, y=[1])},
    "tensors": lambda: [torch.ones(2), torch.ones(2).bfloat16(), torch.eye(3).to_sparse(), torch.ones(1).expand(9)],
    "more tensors": lambda: [torch.ones(2, device="meta"), nn.Parameter(torch.ones(1)), torch.ones(4, 4).t()],
    "names": lambda: [torch.float32, torch.device("cpu"), torch.Size([1, 2])],
    "sets": lambda: {str(number) for number in range(100)},
    "itself": endless,
    "explosion": laughs,
    "depth": lambda: laughs(20_000),
}  # fmt: skip


@pytest.mark.parametrize("make", SAME.values(), ids=SAME)
def test_equal_values_have_equal_checksums(tmp_path: Path, make: Callable[[], Any]) -> None:
    first = run_checksums({"a": make()})
    assert first == run_checksums({"a": make()}) and first["a"] < 1 << 63
    if make not in (SAME["depth"], SAME["plain"]):
        torch.save({"a": make()}, tmp_path / "a.pt")
        assert run_checksums(torch.load(tmp_path / "a.pt", weights_only=False)) == first


DIFFERENT: list[Any] = [
    None, True, 1, 1.0, "1", b"1", [], {}, (), set(), [1], (1,), {1}, {1: 1}, {1: 2}, [[1]], [1, 1], "11",
    torch.ones(1), torch.ones(2), torch.zeros(1), torch.ones(1).double(), torch.ones(1, 1), torch.ones(1).expand(2),
    bytearray(b"1"), bytearray(b"2"), Odd(), -0.0, 0.0,
]  # fmt: skip


def test_different_values_have_different_checksums() -> None:
    found = [run_checksums({"a": value})["a"] for value in DIFFERENT]
    assert len(set(found)) == len(found)


def test_giant_tensors_cost_what_their_memory_costs() -> None:
    run_checksums({"a": torch.ones(1).expand(1 << 30, 1 << 30)})
