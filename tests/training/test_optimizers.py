"""An optimizer holds exactly what trains, in its weight's group."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from lightning_lora import (
    OptimizerError,
    remove_adapters,
)
from lightning_lora.model.view import View
from tests.models import ADAPTERS, CLASSES, TRAINED, WORDS, LitTiny, data, is_plain, lora, trainer

X = torch.arange(WORDS)


# Optimizers


def optimizer_of(t: L.Trainer, number: int = 0) -> list[list[nn.Parameter]]:
    return [group["params"] for group in t.optimizers[number].param_groups]


def names_in(model: nn.Module, group: list[nn.Parameter]) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in group]


def fit_with(tmp_path: Path, configure: Callable[[LitTiny], Any], **options: Any) -> tuple[L.Trainer, LitTiny]:
    model = LitTiny()
    made = configure(model)
    model.configure_optimizers = (lambda: made()) if callable(made) else (lambda: made)  # type: ignore[method-assign]
    t = trainer(tmp_path, [lora(merge=False, **options)], max_epochs=1)
    t.fit(model, data(), data())
    return t, model


def adam(params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.05, **kwargs)


ONE_GROUP: dict[str, Callable[[LitTiny], Any]] = {
    "over self.parameters()": lambda m: lambda: adam(m.parameters()),
    "over a filter": lambda m: lambda: adam(filter(lambda p: p.requires_grad, m.parameters())),
    "made early": lambda m: adam(m.parameters()),
    "only of the head": lambda m: lambda: adam(m.head.parameters()),
    "in a dict": lambda m: lambda: {"optimizer": adam(m.parameters())},
    "fused": lambda m: lambda: adam(m.parameters(), fused=True),
    "foreach": lambda m: lambda: adam(m.parameters(), foreach=True),
    "lbfgs": lambda m: lambda: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2),
    "lbfgs made early": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2),
    "sgd": lambda m: lambda: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
}


if Version(torch.__version__) >= Version("2.6"):  # optimizers take names from there on
    ONE_GROUP["by name"] = lambda m: lambda: adam(m.named_parameters())
    ONE_GROUP["made early by name"] = lambda m: adam(m.named_parameters())


@pytest.mark.parametrize("configure", ONE_GROUP.values(), ids=ONE_GROUP)
def test_optimizer_holds_exactly_what_trains(tmp_path: Path, configure: Any) -> None:
    t, model = fit_with(tmp_path, configure)
    (group,) = optimizer_of(t)
    assert sorted(names_in(model, group)) == sorted(TRAINED)
    assert all(p.any() for name, p in model.named_parameters() if name.endswith("lora_B"))
    held = t.optimizers[0].param_groups[0]
    assert "param_names" not in held or held["param_names"] == names_in(model, group)


def test_adapters_take_the_group_of_their_weight_and_schedulers_keep_theirs(tmp_path: Path) -> None:
    def configure(m: LitTiny) -> Any:
        def make() -> Any:
            mine = {id(m.v_proj.weight), id(m.head.weight)}
            groups = [
                {"params": [p for p in m.parameters() if id(p) not in mine], "lr": 0.01},
                {"params": [m.v_proj.weight], "lr": 0.02},
                {"params": [m.head.weight], "lr": 0.03},
            ]
            optimizer = torch.optim.AdamW(groups)
            return [optimizer], [
                torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda _: 0.5, lambda _: 0.1])
            ]

        return make

    t, model = fit_with(tmp_path, configure)
    assert [names_in(model, group) for group in optimizer_of(t)] == [
        ["q_proj.lora_A", "q_proj.lora_B", "head.bias"],
        ["v_proj.lora_A", "v_proj.lora_B"],
        ["head.weight"],
    ]
    assert [group["lr"] for group in t.optimizers[0].param_groups] == pytest.approx([0.01, 0.01, 0.003])


def test_groups_chosen_by_names_follow_the_weight_too(tmp_path: Path) -> None:
    def configure(m: LitTiny) -> Any:
        def make() -> Any:
            decayed = [p for name, p in m.named_parameters() if name.endswith("weight")]
            others = [p for name, p in m.named_parameters() if not name.endswith("weight")]
            return torch.optim.AdamW(
                [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
            )

        return make

    t, model = fit_with(tmp_path, configure)
    assert [names_in(model, group) for group in optimizer_of(t)] == [[*ADAPTERS, "head.weight"], ["head.bias"]]


class TwoOptimizers(LitTiny):
    """Manual optimization by two optimizers, each with a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            scheduler.step()

    def configure_optimizers(self) -> Any:
        first = adam([*self.embed.parameters(), *self.q_proj.parameters()])
        second = adam([*self.v_proj.parameters(), *self.head.parameters()])
        return [first, second], [torch.optim.lr_scheduler.StepLR(each, 1) for each in (first, second)]


def test_several_optimizers_under_manual_optimization(tmp_path: Path) -> None:
    model, t = TwoOptimizers(), trainer(tmp_path, [lora(merge=False)], max_epochs=1)
    t.fit(model, data())
    assert names_in(model, optimizer_of(t)[0]) == ADAPTERS[:2]
    assert names_in(model, optimizer_of(t, 1)[0]) == [*ADAPTERS[2:], "head.weight", "head.bias"]
    assert model.q_proj.lora_B.any() and model.v_proj.lora_B.any()


@pytest.mark.parametrize("early", [False, True])
def test_an_optimizer_handed_out_twice_trains_in_both_fits(tmp_path: Path, early: bool) -> None:
    model = LitTiny()
    made = adam(model.parameters())
    model.configure_optimizers = lambda: made if early else adam(model.parameters())  # type: ignore[method-assign]
    t = trainer(tmp_path, [lora()], max_epochs=1)
    outputs = [model(X)]
    for epochs in (1, 2):
        t.fit_loop.max_epochs = epochs
        t.fit(model, data())
        outputs.append(model(X))
        held = [*View(model).adapters.values(), *model.head.parameters()]
        assert {id(p) for p in optimizer_of(t)[0]} == {id(p) for p in held}
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    remove_adapters(model)
    before = model(X)
    t = trainer(tmp_path, [lora(r=3)], max_epochs=1)
    t.fit(model, data())
    assert not torch.equal(model(X), before)


def test_an_early_optimizer_of_groups_trains_other_adapters_later(tmp_path: Path) -> None:
    model = LitTiny()
    groups = [{"params": [model.v_proj.weight], "lr": 0.1}, {"params": [model.q_proj.weight, *model.head.parameters()]}]
    made = adam(groups)
    model.configure_optimizers = lambda: made  # type: ignore[method-assign]
    trainer(tmp_path, [lora()], max_epochs=1).fit(model, data())
    remove_adapters(model)
    t = trainer(tmp_path, [lora(r=3, merge=False)], max_epochs=1)
    t.fit(model, data())
    assert [names_in(model, group) for group in optimizer_of(t)] == [ADAPTERS[2:], [*ADAPTERS[:2], *TRAINED[4:]]]


def test_a_filter_over_what_is_now_frozen_finds_parameters_all_the_same(tmp_path: Path) -> None:
    def configure(m: LitTiny) -> Any:
        def make() -> Any:
            def trainable(*modules: nn.Module) -> list[nn.Parameter]:
                return [p for module in modules for p in module.parameters() if p.requires_grad]

            assert trainable(m.embed)  # or torch would say that the optimizer got an empty parameter list
            return adam([{"params": trainable(m.embed)}, {"params": trainable(m.q_proj, m.v_proj, m.head)}])

        return make

    t, model = fit_with(tmp_path, configure)
    assert [names_in(model, group) for group in optimizer_of(t)] == [[], TRAINED]
    assert not model.embed.weight.requires_grad


def test_pre_frozen_backbone_is_adapted_all_the_same(tmp_path: Path) -> None:
    def configure(m: LitTiny) -> Any:
        m.q_proj.requires_grad_(False)
        m.v_proj.requires_grad_(False)
        return lambda: adam(p for p in m.parameters() if p.requires_grad)

    t, model = fit_with(tmp_path, configure)
    assert sorted(names_in(model, optimizer_of(t)[0])) == sorted(TRAINED)


def test_a_filter_over_a_frozen_base_keeps_the_groups_apart(tmp_path: Path) -> None:
    def configure(m: LitTiny) -> Any:
        m.q_proj.requires_grad_(False)
        m.v_proj.requires_grad_(False)

        def make() -> Any:
            trainable = [(name, p) for name, p in m.named_parameters() if p.requires_grad]
            decayed = [p for name, p in trainable if name.endswith("weight")]
            return adam([{"params": decayed}, {"params": [p for name, p in trainable if name.endswith("bias")]}])

        return make

    t, model = fit_with(tmp_path, configure)
    assert [names_in(model, group) for group in optimizer_of(t)] == [[*ADAPTERS, "head.weight"], ["head.bias"]]


def test_adapters_in_no_optimizer_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptimizerError, match=r"'q_proj.lora_A'.*2 parameter groups"):
        fit_with(tmp_path, lambda m: lambda: adam([{"params": m.head.weight}, {"params": m.head.bias}]))
    with pytest.warns(UserWarning, match="no optimizer"), pytest.raises(OptimizerError, match="'q_proj"):
        fit_with(tmp_path, lambda m: lambda: None)


class Gan(LitTiny):
    """Two networks, each with an optimizer and a loss of its own."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.nets = nn.ModuleDict({"judge": nn.Sequential(nn.Linear(CLASSES, 4), nn.Linear(4, 1))})
        self.nets.requires_grad_(not frozen)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        makes, judges = self.optimizers()  # type: ignore[misc]
        made = self(batch[0])
        for optimizer, loss in ((makes, self.nets["judge"](made)), (judges, -self.nets["judge"](made.detach()))):
            optimizer.zero_grad()
            if loss.requires_grad:
                self.manual_backward(loss.mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        own = [*self.embed.parameters(), *self.q_proj.parameters(), *self.v_proj.parameters()]
        return [adam(own), torch.optim.RMSprop(self.nets["judge"].parameters())]


def test_optimizer_that_would_train_nothing_is_an_error(tmp_path: Path) -> None:
    model, targets = Gan(), ["q_proj", "v_proj"]
    before, optimizers = list(model.state_dict()), []
    model.configure_optimizers = lambda: optimizers  # type: ignore[method-assign]
    optimizers += Gan.configure_optimizers(model)
    held = [list(each.param_groups[0]["params"]) for each in optimizers]
    match = r"Optimizer 1 of Gan \(RMSprop\).*'nets\.judge'.*target_modules.*modules_to_save=\['nets\.judge'\]"
    with pytest.raises(OptimizerError, match=match):
        trainer(tmp_path, [lora(target_modules=targets, modules_to_save=None)]).fit(model, data())
    assert is_plain(model) and list(model.state_dict()) == before
    assert [[id(p) for p in each.param_groups[0]["params"]] for each in optimizers] == [list(map(id, h)) for h in held]


def test_networks_that_are_saved_or_that_the_user_froze_are_no_error(tmp_path: Path) -> None:
    for model, saved in ((Gan(), ["nets.judge"]), (Gan(frozen=True), None)):
        before = [p.clone() for p in model.nets.parameters()]
        options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": saved}
        trainer(tmp_path, [lora(**options)], max_epochs=1).fit(model, data())
        moved = [not torch.equal(p, was) for p, was in zip(model.nets.parameters(), before, strict=True)]
        assert all(moved) if saved else not any(moved)


def test_gradient_clipping_and_accumulation_see_only_adapters(tmp_path: Path) -> None:
    model = LitTiny()
    t = trainer(tmp_path, [lora()], gradient_clip_val=0.1, accumulate_grad_batches=2)
    t.fit(model, data())
    assert t.global_step == 4 and is_plain(model)
