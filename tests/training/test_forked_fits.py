"""Fits in forked processes bring back all they trained."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_lora import DeadAdapterWarning, inject_adapters, load_adapter
from tests.support.cases import held
from tests.support.models import TRAINED, LitTiny, best, data, lora, same, state, trainer

pytestmark = pytest.mark.processes


class Skips(LitTiny):
    """A module that calls a layer on which no loss depends."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(8, 8)

    def forward(self, index: Tensor) -> Tensor:
        self.unused(self.embed(index))
        return super().forward(index)


def forked(folder: Path, callbacks: list[L.Callback], max_steps: int = -1, **options: Any) -> L.Trainer:
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", **options)
    return trainer(folder, callbacks, strategy=strategy, devices=2, enable_checkpointing=False, max_steps=max_steps)


class KeepsState(L.Callback):
    """Writes the module's state in every process, before anything is merged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(state(pl_module), self.folder / f"{trainer.global_rank}.pt")


def test_a_static_graph_trains_the_layers_that_it_reaches_and_leaves_the_others(tmp_path: Path) -> None:
    states = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadAdapterWarning)
        for options in ({"static_graph": True}, {"find_unused_parameters": True}):
            torch.manual_seed(5)
            forked(tmp_path, [lora(), KeepsState(tmp_path)], **options).fit(Skips(), data())
            first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
            assert same(first, second)
            states.append(first)
    assert states[0]["q_proj.lora_B"].any() and not states[0]["unused.lora_B"].any()
    torch.testing.assert_close(states[0], states[1])  # unused.lora_A too: not even its weight decays


class Freezes(LitTiny):
    """A module that freezes an adapter of its own as training starts."""

    def on_train_start(self) -> None:
        self.v_proj.requires_grad_(False)
        self.start: Any = self.v_proj.lora_A.detach().clone()

    def on_train_end(self) -> None:
        assert torch.equal(self.v_proj.lora_A, self.start)  # not even its weight decays


@pytest.mark.parametrize("steps", [1, 4])
def test_an_adapter_that_the_user_froze_stands_still_beside_those_that_train(tmp_path: Path, steps: int) -> None:
    model = Freezes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadAdapterWarning)
        forked(tmp_path, [lora(), KeepsState(tmp_path)], max_steps=steps).fit(model, data())
    assert torch.equal(model.v_proj.weight, LitTiny().v_proj.weight)
    assert not torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)
    assert same(
        *(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    )  # of the mean of both gradients


X = torch.arange(20)


def test_each_file_holds_the_adapters_of_the_fit_before_it(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    model, merged = LitTiny(), []
    for number in range(2):
        t = trainer(tmp_path, [lora()], strategy="ddp_fork", devices=2, enable_checkpointing=False)
        t.fit(model, data())
        for name in (f"{number}.ckpt", "again.ckpt"):
            t.save_checkpoint(tmp_path / name)
        merged.append(model(X))
    assert not torch.allclose(merged[0], merged[1])
    assert caplog.text.count("gets its base and its adapters back") == 2  # once for each fit, not for each file
    for number in range(2):
        assert set(held(torch.load(tmp_path / f"{number}.ckpt", weights_only=True))) == set(TRAINED)
        again = LitTiny()  # which takes the adapters of its own base alone
        load_adapter(again, tmp_path / f"{number}.ckpt")
        torch.testing.assert_close(again(X), merged[number])


@pytest.mark.filterwarnings("ignore:.*all_gather is deprecated:FutureWarning")  # of torch, in Lightning's code
@pytest.mark.filterwarnings("ignore:.*Using `DistributedSampler`:UserWarning")
def test_the_main_process_reads_files_after_a_fork(tmp_path: Path) -> None:
    model, worst = LitTiny(lr=0.5), best(tmp_path, mode="max", save_top_k=-1, save_last=True)
    t = trainer(tmp_path, [lora(), worst], strategy="ddp_fork", devices=2)
    t.fit(model, data(), data())
    merged = state(model)
    checkpoint = t.strategy.load_checkpoint(worst.best_model_path)
    assert set(held(checkpoint)) == set(TRAINED)
    says = r"only adapters: .* into a model with lightning_lora\.load_adapter\(model, path\)"
    with pytest.raises(RuntimeError, match=says):  # torch's, as no call of ours came before
        t.strategy.load_model_state_dict(checkpoint)
    model.load_state_dict(merged)
    losses = {}
    last = str(tmp_path / "last.ckpt")
    for path in (worst.best_model_path, last):
        expected = LitTiny()
        load_adapter(expected, path)
        (numbers,) = trainer(tmp_path).test(expected, data(), verbose=False)
        losses[path] = numbers["test_loss"]
    assert len(set(losses.values())) == 2
    for ckpt_path, path in (("best", worst.best_model_path), (last, last)):
        assert t.validate(model, data(), ckpt_path=ckpt_path, verbose=False)[0]["val_loss"] == pytest.approx(
            losses[path]
        )
        assert t.test(model, data(), ckpt_path=ckpt_path, verbose=False)[0]["test_loss"] == pytest.approx(losses[path])
    assert same(state(model), merged)
    t.save_checkpoint(tmp_path / "a.ckpt")
    t.strategy.load_checkpoint(worst.best_model_path)
    assert same(state(model), merged)
    t.strategy.load_model_state_dict(checkpoint)
    (numbers,) = trainer(tmp_path).test(model, data(), verbose=False)
    assert numbers["test_loss"] == pytest.approx(losses[worst.best_model_path])


@pytest.mark.filterwarnings("ignore:.*all_gather is deprecated:FutureWarning")  # of torch, in Lightning's code
@pytest.mark.filterwarnings("ignore:.*Using `DistributedSampler`:UserWarning")
def test_the_main_process_loads_an_adapter_file_after_a_fork(tmp_path: Path) -> None:
    model, saves = LitTiny(lr=0.5), best(tmp_path, save_top_k=-1, monitor=None)
    trainer(tmp_path, [lora(), saves], strategy="ddp_fork", devices=2).fit(model, data())
    other, first = LitTiny(), tmp_path / "best-epoch=0.ckpt"
    load_adapter(model, first)
    load_adapter(other, first)
    assert same(state(model), state(other))


def test_the_main_process_reads_files_of_adapters_that_are_not_merged(tmp_path: Path) -> None:
    model = LitTiny()
    inject_adapters(model, lora().config)
    t = trainer(tmp_path, [lora(merge=False)], strategy="ddp_fork", devices=2, enable_checkpointing=False)
    t.fit(model, data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    before = state(model)
    checkpoint = t.strategy.load_checkpoint(tmp_path / "a.ckpt")
    assert same(state(model), before) and before["q_proj.lora_B"].any()
    t.strategy.load_model_state_dict(checkpoint)
    assert same(state(model), before)


ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lightning_lora import remove_adapters
from tests.support.models import LitTiny, data, lora, trainer

os.umask(0)
model = LitTiny()

def fit():
    options = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 1, "enable_checkpointing": False}
    trainer(sys.argv[1], [lora()], **options).fit(model, data())

fit()
left = [path for path in Path(os.environ["TMPDIR"]).iterdir() if path.name.startswith("lightning_lora")]
print("modes", [oct(path.stat().st_mode & 0o777) for path in left])
print("files before", any(path.is_file() for each in left for path in each.rglob("*")))
remove_adapters(model)
print("files after", any(path.is_file() for each in left for path in each.rglob("*")))
fit()
"""


def test_what_is_left_for_the_main_process_is_private_and_goes(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "temporary").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LIGHTNING_LORA")}
    environment |= {"TMPDIR": str(tmp_path / "temporary"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    said = [line for line in run.stdout.splitlines() if line.startswith(("modes", "files"))]
    assert said == ["modes ['0o700']", "files before True", "files after False"]
    assert not [path for path in (tmp_path / "temporary").iterdir() if "lora" in path.name]
