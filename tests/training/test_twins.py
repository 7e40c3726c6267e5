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
from tests.support.compared import assert_holds, assert_same_tensors
from tests.support.fits import fit
from tests.support.models import lora, state
from tests.support.parameters import names_of_parameters, trainable

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))


class Towers(L.LightningModule):
    """A network and a copy of it.

    Nobody froze it, and the optimizer holds both. Each runs in every other step.
    """

    def __init__(self, *, alike: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 4)})
        self.other = copy.deepcopy(self.one)
        if not alike:
            for p in self.other.parameters():
                nn.init.normal_(p, std=0.4)

    def loss_of(self, tower: nn.ModuleDict, batch: Tensor) -> Tensor:
        features = tower["body"](batch).relu()
        loss: Tensor = tower["head"](features).square().mean()
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        is_odd = batch_idx % 2
        tower = self.other if is_odd else self.one
        return self.loss_of(tower, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(trainable(self), lr=0.01)


class RunsOne(Towers):
    """The first network alone runs, or later on the other one."""

    runs_other = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        tower = self.other if self.runs_other else self.one
        return self.loss_of(tower, batch)


class Follows(RunsOne):
    """The other network follows the first one, which runs alone."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.follow()
        return super().training_step(batch, batch_idx)

    @torch.no_grad()
    def follow(self) -> None:
        for p, q in zip(self.one.parameters(), self.other.parameters(), strict=True):
            q.lerp_(p, 0.01)


def adapters(**arguments: Any) -> ll.LoRACallback:
    return lora(**{"merge": False, "modules_to_save": None, **arguments})


def trained(
    folder: Path, module: Any, callback: Any = None, *callbacks: Any, **options: Any
) -> Any:
    """The module after two epochs with these adapters, or with those of the defaults."""
    if callback is None:
        callback = adapters()
    loader = DataLoader(X, batch_size=4)  # type: ignore[arg-type]
    fit(
        folder,
        callback,
        *callbacks,
        model=module,
        train=loader,
        max_epochs=2,
        **options,
    )
    return module


def learned(network: nn.Module) -> bool:
    """Whether every adapter of a network has learned something, and there are some."""
    names = names_of_parameters(network, "lora_B")
    has_learned = {bool(network.get_parameter(name).any()) for name in names}
    return has_learned == {True}


@pytest.mark.parametrize(
    "options", [{}, {"target_modules": ["body", "head"]}, {"bias": "all"}], ids=str
)
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_twin_that_trains_later_does_so_and_its_run_resumes_to_the_bit(
    tmp_path: Path, options: Any, epoch: int
) -> None:
    files = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    through = trained(tmp_path, Towers(), adapters(**options), files)
    assert learned(through.one)
    assert learned(through.other)
    resumed = trained(
        tmp_path,
        Towers(),
        adapters(**options),
        ckpt_path=tmp_path / f"epoch={epoch}.ckpt",
    )
    assert_same_tensors(state(resumed), state(through))


class WarmsUp(Towers):
    """Both run in the first epoch, whose rate is zero, then one of them, and then the other."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        of_one = self.loss_of(self.one, batch)
        of_other = self.loss_of(self.other, batch)
        return [of_one + of_other, of_one, of_other][self.current_epoch]

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: float(epoch > 0)
        )
        return [optimizer], [schedule]


def test_a_file_from_before_their_first_update_resumes_to_the_bit(
    tmp_path: Path,
) -> None:
    def warmed_up(*callbacks: L.Callback, **options: Any) -> Any:
        loader = DataLoader(X[:4], batch_size=4)  # type: ignore[arg-type]
        model, _ = fit(
            tmp_path,
            adapters(),
            *callbacks,
            model=WarmsUp(),
            train=loader,
            max_epochs=3,
            **options,
        )
        return model

    through = warmed_up(ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    resumed = warmed_up(ckpt_path=tmp_path / "epoch=0.ckpt")
    assert learned(through.other)
    assert_same_tensors(state(resumed), state(through))


def update_of(layer: Any) -> Tensor:
    return (layer.lora_B @ layer.lora_A).flatten()


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["head"]}, {"bias": "all"}, {}], ids=str
)
def test_a_copy_that_nobody_froze_follows_and_its_files_load(
    tmp_path: Path, options: Any
) -> None:
    file = tmp_path / "adapter.safetensors"
    module = trained(tmp_path, Follows(), adapters(**options))
    of_one = update_of(module.one["body"])
    of_other = update_of(module.other["body"])
    # with other random A, they would hardly be alike
    assert torch.cosine_similarity(of_one, of_other, dim=0) > 0.9
    assert learned(module.other)
    ll.save_adapter(module, file)
    loaded = Follows()
    ll.load_adapter(loaded, file)
    assert_same_tensors(state(loaded), state(module))


# Between two fits


def freeze_one(module: Towers) -> Towers:
    module.one.requires_grad_(False)
    module.other.requires_grad_(True)
    return module


def freeze_other(module: Towers) -> Towers:
    module.one.requires_grad_(True)
    module.other.requires_grad_(False)
    return module


def after_one_has_trained(folder: Path, alike: bool, merge: Any) -> RunsOne:
    """A module of which the first network has trained, beside the other one, which was frozen; that one runs now."""
    module = RunsOne(alike=alike)
    freeze_other(module)
    trained(folder, module, adapters(merge=merge))
    module.runs_other = True
    return module


one_runs_alone = pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")
for_twins_and_others = pytest.mark.parametrize("alike", [False, True])
merged_or_not = pytest.mark.parametrize("merge", [False, "last"])


@one_runs_alone
@for_twins_and_others
@merged_or_not
def test_what_is_thawed_trains(tmp_path: Path, merge: Any, alike: bool) -> None:
    module = after_one_has_trained(tmp_path, alike, merge)
    module.requires_grad_(True)
    trained(tmp_path, module, adapters(merge=merge))
    ll.unmerge_adapters(module)
    assert learned(module.other)


@one_runs_alone
@for_twins_and_others
@merged_or_not
def test_what_is_frozen_is_named_once_and_trains_on(
    tmp_path: Path, merge: Any, alike: bool
) -> None:
    module = after_one_has_trained(tmp_path, alike, merge)
    freeze_one(module)
    with pytest.warns(
        ll.LoRAWarning,
        match=r"'one.body', 'one.head' of RunsOne were frozen .* these train on",
    ):
        trained(tmp_path, module, adapters(merge=merge))
    trained(tmp_path, module, adapters(merge=merge))  # a warning would be an error


@one_runs_alone
@for_twins_and_others
@merged_or_not
def test_what_is_frozen_stands_still_once_its_adapters_are_gone(
    tmp_path: Path, merge: Any, alike: bool
) -> None:
    module = after_one_has_trained(tmp_path, alike, merge)
    ll.merge_adapters(module)
    ll.remove_adapters(module)
    before = state(module.one)
    freeze_one(module)
    trained(tmp_path, module)
    assert_holds(state(module.one), before)
    assert learned(module.other)
    assert not learned(module.one)


# in the second fit, they are not alike
@pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")
def test_a_layer_that_was_replaced_between_two_fits_is_named(tmp_path: Path) -> None:
    module = trained(tmp_path, Towers())
    module.one["head"] = nn.Linear(8, 4)
    with pytest.warns(ll.LoRAWarning, match=r"New adapters for 'one.head' of Towers"):
        trained(tmp_path, module)


class Backbones(Towers):
    """Two frozen networks under one head, which train in one epoch each.

    A validation runs both.
    """

    def __init__(self) -> None:
        super().__init__(alike=False)
        self.top = nn.Linear(4, 2)
        self.one.requires_grad_(False)
        self.other.requires_grad_(False)

    def output_of(self, tower: nn.ModuleDict, batch: Tensor) -> Tensor:
        features = tower["head"](tower["body"](batch))
        return self.top(features)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        tower = (self.one, self.other)[self.current_epoch]
        return self.output_of(tower, batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.output_of(self.one, X)
        self.output_of(self.other, X)


# of the first epoch
@pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")
def test_a_validation_does_not_decide_which_networks_feed_what_trains(
    tmp_path: Path,
) -> None:
    callback = adapters(modules_to_save=["top"])
    module = trained(
        tmp_path, Backbones(), callback, val_check_interval=0.5, num_sanity_val_steps=0
    )
    assert learned(module.one)
    assert learned(module.other)
