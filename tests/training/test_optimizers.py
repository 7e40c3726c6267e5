"""An optimizer holds exactly what trains, in the group of the user's choice or of its weight."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn

from lightning_lora import OptimizerError, remove_adapters, unmerge_adapters
from lightning_lora.training.strategies.deepspeed import Partition, full_state, local_state
from tests.support.fits import adam, adapted, by_hand, fit, resumes_to_the_bit
from tests.support.models import ADAPTERS, CLASSES, TRAINED, LitTiny, X, is_plain, lora, same, state
from tests.support.ranks import join_group, run_ranks


def optimizer_of(t: L.Trainer, number: int = 0) -> list[list[nn.Parameter]]:
    return [group["params"] for group in t.optimizers[number].param_groups]


def names_in(model: nn.Module, group: list[nn.Parameter]) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in group]


def fit_with(tmp_path: Path, configure: Callable[[LitTiny], Any], **options: Any) -> tuple[L.Trainer, LitTiny]:
    model = LitTiny()
    made = configure(model)
    model.configure_optimizers = made if callable(made) else lambda: made  # type: ignore[method-assign]
    fit(tmp_path, lora(merge=False, **options), model=model, max_epochs=1)
    return model.trainer, model


ONE_GROUP: dict[str, Callable[[LitTiny], Any]] = {
    "over a filter": lambda m: lambda: adam(filter(lambda p: p.requires_grad, m.parameters())),
    "made early": lambda m: adam(m.parameters()),
    "only of the head": lambda m: lambda: adam(m.head.parameters()),
    "lbfgs made early": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2),
}
if Version(torch.__version__) >= Version("2.6"):  # optimizers take names from there on
    ONE_GROUP["made early by name"] = lambda m: adam(m.named_parameters())


@pytest.mark.parametrize("configure", ONE_GROUP.values(), ids=ONE_GROUP)
def test_optimizer_holds_exactly_what_trains(tmp_path: Path, configure: Any) -> None:
    t, model = fit_with(tmp_path, configure)
    (group,) = optimizer_of(t)
    assert sorted(names_in(model, group)) == sorted(TRAINED)
    assert all(p.any() for name, p in model.named_parameters() if name.endswith("lora_B"))
    held = t.optimizers[0].param_groups[0]
    assert "param_names" not in held or held["param_names"] == names_in(model, group)


class Grouped(LitTiny):  # whose groups the user has chosen
    def __init__(self, habit: str) -> None:
        super().__init__()
        self.habit = habit

    def configure_optimizers(self) -> Any:
        return HABITS[self.habit][0](self)


def by_names(model: nn.Module) -> Any:
    """A, B and the rest, as for LoRA+."""
    a = [p for name, p in model.named_parameters() if "lora_A" in name]
    b = [p for name, p in model.named_parameters() if "lora_B" in name]
    rest = [p for name, p in model.named_parameters() if "lora_" not in name]
    optimizer = torch.optim.AdamW([{"params": a}, {"params": b, "lr": 0.16}, {"params": rest, "lr": 0.02}], lr=0.01)
    rates = [lambda _: 1.0, lambda _: 0.5, lambda _: 0.1]
    return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, rates)]


def by_layers(model: LitTiny) -> Any:
    """A rate for each layer."""
    layers = [model.embed, model.q_proj, model.v_proj, model.head]
    return adam([{"params": layer.parameters(), "lr": 0.1 * 0.5**number} for number, layer in enumerate(layers)])


def first_half(model: nn.Module) -> Any:
    """Some adapters in one group, and all weights in another."""
    weights = [p for name, p in model.named_parameters() if "lora_" not in name]
    return adam([{"params": weights}, {"params": [p for n, p in model.named_parameters() if n == "v_proj.lora_B"]}])


A, B = ADAPTERS[::2], ADAPTERS[1::2]
HABITS: dict[str, tuple[Callable[[Any], Any], list[list[str]]]] = {
    "by names": (by_names, [A, B, ["head.weight", "head.bias"]]),
    "by layers": (by_layers, [[], ADAPTERS[:2], ADAPTERS[2:], ["head.weight", "head.bias"]]),
    "first half": (first_half, [[*ADAPTERS[:3], "head.weight", "head.bias"], ["v_proj.lora_B"]]),
}
"""What users write in configure_optimizers, and what each group trains."""


@pytest.mark.processes
@pytest.mark.parametrize("habit", ["by names", "first half"])
def test_a_run_with_groups_resumes_to_the_bit(tmp_path: Path, habit: str) -> None:
    resumes_to_the_bit(tmp_path, lambda: Grouped(habit), lora, strategy="ddp_fork", devices=2)


@pytest.mark.parametrize("habit", HABITS)
def test_an_adapter_stays_in_the_group_that_the_user_has_put_it_into(tmp_path: Path, habit: str) -> None:
    model, t = fit(tmp_path, lora(merge=False), model=Grouped(habit), max_epochs=3)
    assert [names_in(model, group) for group in optimizer_of(t)] == HABITS[habit][1]
    expected = adapted()
    made = HABITS[habit][0](expected)
    optimizer = made[0][0] if isinstance(made, tuple) else made
    for group, names in zip(optimizer.param_groups, HABITS[habit][1], strict=True):
        group["params"] = [expected.get_parameter(name) for name in names]
    by_hand(optimizer, expected)
    assert same(state(model), state(expected))


def test_adapters_stand_where_their_weight_stood(tmp_path: Path) -> None:
    t, model = fit_with(tmp_path, lambda m: lambda: adam(m.parameters()), use_dora=True, bias="all")
    q_proj, v_proj = ([f"{layer}.lora_{name}" for name in ("A", "B", "magnitude")] for layer in ("q_proj", "v_proj"))
    order = [*q_proj, "q_proj.bias", *v_proj, "head.weight", "head.bias"]
    assert names_in(model, optimizer_of(t)[0]) == order  # files hold the optimizer's state in this order


class Chosen(LitTiny):  # manual optimization by two optimizers over what the user has chosen, each with a scheduler
    def __init__(self, *chosen: Callable[[str], bool]) -> None:
        super().__init__()
        self.chosen = chosen
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            scheduler.step()

    def configure_optimizers(self) -> Any:
        made = [adam([p for name, p in self.named_parameters() if choose(name)]) for choose in self.chosen]
        return made, [torch.optim.lr_scheduler.StepLR(each, 1) for each in made]


def is_base(name: str) -> bool:
    return "lora_" not in name


Q, V = ADAPTERS[:2], ADAPTERS[2:]
CHOICES: dict[str, tuple[tuple[Callable[[str], bool], ...], list[list[str]]]] = {
    "a network each": (
        (lambda n: n.startswith(("embed", "q_")), lambda n: n.startswith(("v_", "head"))),
        [Q, [*V, *TRAINED[4:]]],
    ),
    "both hold the base": ((is_base, is_base), [TRAINED, TRAINED]),
    "some with another weight": ((is_base, lambda n: n in V or n == "q_proj.weight"), [[*Q, *TRAINED[4:]], [*Q, *V]]),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_an_adapter_stays_in_the_optimizer_that_the_user_has_put_it_into(tmp_path: Path, choice: str) -> None:
    chosen, expected = CHOICES[choice]
    model, t = fit(tmp_path, lora(merge=False), model=Chosen(*chosen), max_epochs=1)
    assert [names_in(model, *optimizer_of(t, number)) for number in range(2)] == expected
    assert model.q_proj.lora_B.any() and model.v_proj.lora_B.any()


def test_an_optimizer_handed_out_again_trains_in_each_fit(tmp_path: Path) -> None:
    model = LitTiny()
    rest = [model.q_proj.weight, *model.head.parameters()]
    made = adam([{"params": [model.v_proj.weight]}, {"params": rest}])
    model.configure_optimizers = lambda: made  # type: ignore[method-assign]
    expected = [ADAPTERS[2:], [*ADAPTERS[:2], *TRAINED[4:]]]
    for r in (2, 2, 3):  # with the same adapters, and with others
        if r == 3:
            remove_adapters(model)
        before = model(X)
        _, t = fit(tmp_path, lora(r=r), model=model, max_epochs=1)
        assert not torch.equal(model(X), before)
        unmerge_adapters(model)
        assert [names_in(model, group) for group in optimizer_of(t)] == expected


def test_a_filter_over_a_frozen_base_keeps_the_groups_apart(tmp_path: Path) -> None:
    def configure(m: LitTiny) -> Any:
        m.q_proj.requires_grad_(False)
        m.v_proj.requires_grad_(False)

        def make() -> Any:
            trains = [(name, p) for name, p in m.named_parameters() if p.requires_grad]
            return adam([{"params": [p for name, p in trains if name.endswith(end)]} for end in ("weight", "bias")])

        return make

    t, model = fit_with(tmp_path, configure)
    assert [names_in(model, group) for group in optimizer_of(t)] == [[*ADAPTERS, "head.weight"], ["head.bias"]]


def test_adapters_in_no_optimizer_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptimizerError, match=r"'q_proj.lora_A'.*2 parameter groups"):
        fit_with(tmp_path, lambda m: lambda: adam([{"params": m.head.weight}, {"params": m.head.bias}]))


class StepsInBackward(LitTiny):  # as in torch's tutorial: an optimizer for each parameter, which a hook steps
    def __init__(self) -> None:
        super().__init__()
        self.made = {p: adam([p]) for p in self.parameters()}
        for p in self.parameters():
            p.register_post_accumulate_grad_hook(lambda p: self.made[p].step())

    def configure_optimizers(self) -> None:
        return None


def test_optimizers_that_hooks_step_are_no_reason_to_exclude_layers(tmp_path: Path) -> None:
    says = r"No optimizer trains 'q_proj.lora_A', .*configure_optimizers of \w+ returns none.*hooks.*keep one"
    with pytest.warns(UserWarning, match="no optimizer"), pytest.raises(OptimizerError, match=says) as error:
        fit(tmp_path, lora(), model=StepsInBackward())
    assert "exclude_modules" not in str(error.value)


class Gan(LitTiny):  # two networks, each with an optimizer and a loss of its own
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
        fit(tmp_path, lora(target_modules=targets, modules_to_save=None), model=model)
    assert is_plain(model) and list(model.state_dict()) == before
    assert [[id(p) for p in each.param_groups[0]["params"]] for each in optimizers] == [list(map(id, h)) for h in held]


def test_networks_that_are_saved_or_that_the_user_froze_are_no_error(tmp_path: Path) -> None:
    for model, saved in ((Gan(), ["nets.judge"]), (Gan(frozen=True), None)):
        before = [p.clone() for p in model.nets.parameters()]
        options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": saved}
        fit(tmp_path, lora(**options), model=model, max_epochs=1)
        moved = [not torch.equal(p, was) for p, was in zip(model.nets.parameters(), before, strict=True)]
        assert all(moved) if saved else not any(moved)


class Unfreezes(LitTiny):  # gradually, as fastai's recipe does: a group for one more layer in each epoch
    adds = True

    def on_train_epoch_start(self) -> None:
        layer = (self.v_proj, self.q_proj)[self.current_epoch]
        layer.requires_grad_(True)
        if self.adds:
            self.optimizers().add_param_group({"params": layer.parameters(), "lr": 0.01})  # type: ignore[union-attr]


def test_a_fit_goes_on_where_groups_of_what_trains_already_are_added(tmp_path: Path, caplog: Any) -> None:
    model, t = fit(tmp_path, lora(), model=Unfreezes())
    assert [len(group["params"]) for group in t.optimizers[0].param_groups] == [len(TRAINED), 0, 0]
    for name in ("v_proj", "q_proj"):
        assert f"What trains in '{name}' has its group already" in caplog.text
    plain = Unfreezes()
    plain.adds = False
    assert same(state(model), state(fit(tmp_path, lora(), model=plain)[0]))
    with pytest.raises(ValueError, match="more than one parameter group"):  # the method is torch's own again
        t.optimizers[0].add_param_group({"params": t.optimizers[0].param_groups[0]["params"]})


OTHERS: dict[str, tuple[Any, Any, str]] = {
    "a setting is missing": (adam, partial(torch.optim.SGD, lr=0.1), "Adam or AdamW, .* returns SGD"),
    "a state is missing": (partial(torch.optim.SGD, lr=0.1, momentum=0.9), adam, "SGD, .* returns AdamW"),
    "another setting is missing": (partial(torch.optim.RMSprop, lr=0.1), adam, "RMSprop, .* returns AdamW"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_run_that_goes_on_with_an_optimizer_of_another_class_is_told_both(tmp_path: Path, case: str) -> None:
    was, now, names = OTHERS[case]
    first, second = LitTiny(), LitTiny()
    first.configure_optimizers = lambda: was(first.parameters())  # type: ignore[method-assign]
    fit(tmp_path, lora(), model=first)[1].save_checkpoint(file := tmp_path / "first.ckpt")
    made = now(second.parameters())
    second.configure_optimizers = lambda: made  # type: ignore[method-assign]
    settings = dict(made.param_groups[0])
    with pytest.raises(OptimizerError, match=rf"it has the state of {names}\)"):
        fit(tmp_path, lora(), model=second, ckpt_path=file, max_epochs=3)
    assert is_plain(second) and not made.state
    assert {**made.param_groups[0], "params": 0} == {**settings, "params": 0}


# Parts of parameter groups make up what an optimizer of the whole parameters has


VALUES = [torch.tensor([[0.5, -0.0, math.nan], [2.0, -3.0, 4.0]]), torch.tensor(7.0), torch.tensor([8.0])]
"""Of 8 numbers: the first process has 4 of them, and 4 are left for the second."""

PLACES = [[(0, 0, 4), (0, 0, 0), (0, 0, 0)], [(4, 0, 2), (0, 2, 1), (0, 3, 1)]]


def partition_of(rank: int) -> Partition:
    flat = torch.cat([value.reshape(-1) for value in VALUES]).view(2, 4)[rank]
    return Partition([nn.Parameter(value.clone()) for value in VALUES], flat.clone(), PLACES[rank])


def bits(values: list[Tensor]) -> list[list[int]]:
    return [value.reshape(-1).view(torch.int32).tolist() for value in values]


def full() -> tuple[list[list[int]], dict[str, Any]]:
    """The parameters, and the optimizer's state after a step; both come back."""
    join_group()
    partitions = [partition_of(dist.get_rank()), Partition([], torch.zeros(2), [])]
    values = partitions[0].full(partitions[0].local, torch.device("cpu"))
    assert bits([partitions[0].local_of(values)]) == bits([partitions[0].local])
    for partition in partitions:
        partition.local = nn.Parameter(partition.local)
    groups = [{"params": [partition.local], "lr": 0.1 * n} for n, partition in enumerate(partitions)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    partitions[0].local.grad = torch.ones(4)
    optimizer.step()
    state = full_state(partitions, optimizer, torch.device("cpu"))
    found, expected = local_state(partitions, state), optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"])
    return bits(values), state


@pytest.mark.processes
def test_parts_make_up_the_parameters_and_their_optimizers_state() -> None:
    parameters = [nn.Parameter(value) for value in VALUES]
    groups = [{"params": parameters, "lr": 0.0}, {"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    optimizer.param_groups[1]["params"].clear()
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for values, found in run_ranks(full):
        assert values == bits(VALUES) and found["param_groups"] == optimizer.state_dict()["param_groups"]
        torch.testing.assert_close(found["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"state": {}, "param_groups": [{"params": [0, 1]}]}, r"its groups have \[2\] parameters, .* have \[3\]"),
        ({"state": {0: {"rows": torch.ones(2)}}, "param_groups": [{"params": [0, 1, 2]}]}, "'rows' has other shapes"),
    ],
)
def test_state_of_other_parameters_is_refused(state: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        local_state([partition_of(0)], state)


def test_a_part_follows_what_is_not_itself_rounded() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 3.0], dtype=torch.bfloat16))
    part = torch.tensor([1.001, 9.0])
    Partition([parameter], part, [(0, 0, 2)]).follow()
    assert torch.equal(part, torch.tensor([1.001, 3.0]))
