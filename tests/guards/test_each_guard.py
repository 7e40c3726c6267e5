"""Each guard can be taken out: nothing else knows it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_lora
from lightning_lora import moments
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from tests.support.models import LitTiny, data, lora, same, state, trainer

HOUSE = Path(lightning_lora.__file__).parent
ROOM = HOUSE / "guards"


def methods_of(cls: type) -> set[str]:
    """The names of what a class itself has for others."""
    return {name for name in vars(cls) if not name.startswith("_")}


MOMENTS = methods_of(Guard)

# Fits, merges and loads, in a script of its own
LIFE = """
import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
import lightning_lora as ll
from lightning_lora.moments import GUARDS

assert not GUARDS
trainer = L.Trainer(callbacks=[ll.LoRACallback(r=2)], max_steps=2, accelerator="cpu", logger=False,
                    enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(model := BoringModel())
assert type(model.layer) is torch.nn.Linear
plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
assert ll.inject_adapters(plain, ll.LoRAConfig(r=2)) == ("0",)
ll.merge_adapters(plain)
"""


def fit(folder: Path) -> LitTiny:
    torch.manual_seed(0)
    model = LitTiny()
    trainer(folder, [lora()], max_steps=2).fit(model, data())
    return model


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> LitTiny:
    return fit(tmp_path_factory.mktemp("watched"))


@pytest.mark.parametrize("guard", moments.GUARDS, ids=lambda guard: guard.__name__)
def test_a_fit_without_a_guard_has_the_same_bits(
    guard: type[Guard],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    watched: LitTiny,
) -> None:
    monkeypatch.setattr(
        moments, "GUARDS", [each for each in moments.GUARDS if each is not guard]
    )
    assert same(state(fit(tmp_path)), state(watched))


def test_nothing_of_the_package_needs_a_guard(tmp_path: Path) -> None:
    house = tmp_path / HOUSE.name
    shutil.copytree(
        HOUSE, house, ignore=shutil.ignore_patterns("guards", "__pycache__")
    )
    (house / "guards").mkdir()
    (house / "guards" / "__init__.py").touch()
    path = {"PYTHONPATH": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", LIFE],
        cwd=tmp_path,
        env={**os.environ, **path},
        check=True,
    )


@pytest.mark.parametrize("guard", moments.GUARDS, ids=lambda guard: guard.__name__)
def test_a_guard_has_a_moment_and_no_moment_is_mistyped(guard: type[Guard]) -> None:
    assert methods_of(guard)
    assert methods_of(guard) <= MOMENTS


def test_each_file_of_the_room_is_in_the_list() -> None:
    files = {
        path.relative_to(ROOM).parts[0].removesuffix(".py")
        for path in ROOM.glob("[!_]*")
    }
    in_list = {guard.__module__.split(".")[2] for guard in moments.GUARDS}
    assert in_list == files - {"wording"}


def test_guards_are_told_of_a_moment_in_the_order_of_the_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = []

    class First(Guard):
        def merged_offline(self, base: str, lost: Mapping[str, float]) -> None:
            told.append((type(self), base, lost))

    class Second(First):
        pass

    monkeypatch.setattr(moments, "GUARDS", [First, Guard, Second])
    moments.Guards().tell(Guard.merged_offline, "base", {})
    moments.NO_GUARDS.tell(Guard.merged_offline, "base", {})
    assert told == [(First, "base", {}), (Second, "base", {})]


@pytest.mark.parametrize("is_first_process", [True, False])
def test_a_moment_that_all_processes_see_alike_is_told_in_the_first_one(
    monkeypatch: pytest.MonkeyPatch, is_first_process: bool
) -> None:
    told = []

    class Noting(Guard):
        def base_compared(self, view: View) -> None:
            told.append("base_compared")

        def first_batch_runs(self, model: nn.Module) -> AbstractContextManager[None]:
            told.append("first_batch_runs")
            return nullcontext()

        def training_ended(self, view: View) -> None:
            told.append("training_ended")

    monkeypatch.setattr(moments, "GUARDS", [Noting])
    guards = moments.Guards(is_first_process=is_first_process)
    model = nn.Linear(1, 1)
    guards.tell(Guard.base_compared, View(model))
    with guards.watching(Guard.first_batch_runs, model):
        guards.tell(Guard.training_ended, View(model))
    alike = ["base_compared", "first_batch_runs"] if is_first_process else []
    assert told == [*alike, "training_ended"]
