"""Networks that are alike and all train, and what users freeze, thaw or replace between two fits."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_lora as ll
from tests.support.fits import fit
from tests.support.models import lora, same, state

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))


class Towers(L.LightningModule):
    """A network and a copy of it. Nobody froze it, and the optimizer holds both. ``runs`` says when each trains."""

    follows = True

    def __init__(self, runs: str = "one other", *, alike: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 4)})
        self.other = copy.deepcopy(self.one)
        for p in [] if alike else self.other.parameters():
            nn.init.normal_(p, std=0.4)
        self.runs = runs.split()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        tower = getattr(self, self.runs[batch_idx % len(self.runs)])
        if self.runs == ["one"] and self.follows:
            self.follow()
        loss: Tensor = tower["head"](tower["body"](batch).relu()).square().mean()
        return loss

    @torch.no_grad()
    def follow(self) -> None:
        for p, q in zip(self.one.parameters(), self.other.parameters(), strict=True):
            q.lerp_(p, 0.01)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


def trained(folder: Path, module: L.LightningModule, *callbacks: Any, **options: Any) -> Any:
    own = lora(**{"merge": False, "modules_to_save": None} | options.pop("lora", {}))
    return fit(folder, own, *callbacks, model=module, train=DataLoader(X, batch_size=4), max_epochs=2, **options)[0]


def learned(network: nn.Module) -> bool:
    found = [bool(p.any()) for name, p in network.named_parameters() if name.endswith("lora_B")]
    return bool(found) and all(found)


@pytest.mark.parametrize("options", [{}, {"target_modules": ["body", "head"]}, {"bias": "all"}], ids=str)
def test_a_twin_that_trains_later_does_so_and_its_run_resumes_to_the_bit(tmp_path: Path, options: Any) -> None:
    files = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    through = trained(tmp_path, Towers(), files, lora=options)
    assert learned(through.one) and learned(through.other)
    for epoch in (0, 1):
        resumed = trained(tmp_path, Towers(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", lora=options)
        assert same(state(resumed), state(through))


def test_a_file_from_before_their_first_update_resumes_to_the_bit(tmp_path: Path) -> None:
    class WarmUp(Towers):  # both run in the first epoch, whose rate is zero, then one of them
        follows = False

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.runs = [["one", "one", "other"][self.current_epoch]]
            loss = super().training_step(batch, 0)
            self.runs = ["other"]
            return loss + super().training_step(batch, 0) if self.current_epoch == 0 else loss

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: float(epoch > 0))]

    options = {"train": DataLoader(X[:4], batch_size=4), "max_epochs": 3}
    files, own = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), {"merge": False, "modules_to_save": None}
    through, _ = fit(tmp_path, lora(**own), files, model=WarmUp(), **options)
    resumed, _ = fit(tmp_path, lora(**own), model=WarmUp(), ckpt_path=tmp_path / "epoch=0.ckpt", **options)
    assert learned(through.other) and same(state(resumed), state(through))


@pytest.mark.parametrize("options", [{"modules_to_save": ["head"]}, {"bias": "all"}, {}], ids=str)
def test_a_copy_that_nobody_froze_follows_and_its_files_load(tmp_path: Path, options: Any) -> None:
    module = trained(tmp_path, Towers("one"), lora=options)
    updates = [(layer.lora_B @ layer.lora_A).flatten() for layer in (module.other["body"], module.one["body"])]
    assert torch.cosine_similarity(*updates, dim=0) > 0.9  # with other random A, they would hardly be alike
    assert learned(module.other)
    ll.save_adapter(module, tmp_path / "adapter.safetensors")
    ll.load_adapter(loaded := Towers("one"), tmp_path / "adapter.safetensors")
    assert same(state(loaded), state(module))


# Between two fits


def between(module: Towers, *, one: bool, other: bool) -> Towers:
    module.one.requires_grad_(one)
    module.other.requires_grad_(other)
    return module


@pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")  # one network runs alone
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("merge", [False, "last"])
def test_what_is_thawed_trains_and_what_is_frozen_is_named(tmp_path: Path, merge: Any, alike: bool) -> None:
    module = between(Towers("one", alike=alike), one=True, other=False)
    module.follows = False
    trained(tmp_path, module, lora={"merge": merge})
    module.runs = ["other"]
    again = trained(tmp_path, between(copy.deepcopy(module), one=True, other=True), lora={"merge": merge})
    if merge:
        ll.unmerge_adapters(again)
    assert learned(again.other)
    frozen = between(copy.deepcopy(module), one=False, other=True)
    with pytest.warns(ll.LoRAWarning, match=r"'one.body', 'one.head' of Towers were frozen .* these train on"):
        trained(tmp_path, frozen, lora={"merge": merge})
    trained(tmp_path, frozen, lora={"merge": merge})  # it is said once
    ll.merge_adapters(module)
    ll.remove_adapters(module)
    before = state(module.one)
    trained(tmp_path, between(module, one=False, other=True))
    assert all(torch.equal(value, module.one.get_parameter(name)) for name, value in before.items())
    assert learned(module.other) and not learned(module.one)


@pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")  # in the second fit, they are not alike
def test_a_layer_that_was_replaced_between_two_fits_is_named(tmp_path: Path) -> None:
    module = trained(tmp_path, Towers())
    module.one["head"] = nn.Linear(8, 4)
    with pytest.warns(ll.LoRAWarning, match=r"New adapters for 'one.head' of Towers"):
        trained(tmp_path, module)


class Backbones(Towers):  # two frozen networks under one head, which train in one epoch each. A validation runs both.
    def __init__(self) -> None:
        super().__init__(alike=False)
        self.top = nn.Linear(4, 2)
        between(self, one=False, other=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.runs = [["one", "other"][self.current_epoch]]
        tower = getattr(self, self.runs[0])
        loss: Tensor = self.top(tower["head"](tower["body"](batch))).square().mean()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for tower in (self.one, self.other):
            self.top(tower["head"](tower["body"](X)))


@pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")  # of the first epoch
def test_a_validation_does_not_decide_which_networks_feed_what_trains(tmp_path: Path) -> None:
    module = trained(
        tmp_path, Backbones(), val_check_interval=0.5, num_sanity_val_steps=0, lora={"modules_to_save": ["top"]}
    )
    assert learned(module.one) and learned(module.other)
