"""An optimizer holds exactly what trains, in the group of the user's choice or of its weight."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    OptimizerError,
    inject_adapters,
    remove_adapters,
    unmerge_adapters,
)
from lightning_lora.model.view import view_of
from lightning_lora.training.optimizers.edits import take_out
from lightning_lora.training.optimizers.groups import held_by
from lightning_lora.training.optimizers.optimizer_states import refusing_other_states
from lightning_lora.training.optimizers.train_adapters import train_adapters
from lightning_lora.training.strategies.partitions import (
    Partition,
    gathered_state,
    scattered_state,
)
from tests.support.compared import assert_all_have_moved, assert_same_tensors
from tests.support.fits import adam, adapted, by_hand, fit, resumes_to_the_bit
from tests.support.models import (
    ADAPTERS,
    CLASSES,
    TRAINED,
    LitTiny,
    X,
    is_plain,
    lora,
    state,
)
from tests.support.parameters import is_base, names_of_parameters, values_of
from tests.support.ranks import join_group, run_ranks

A = ["q_proj.lora_A", "v_proj.lora_A"]
B = ["q_proj.lora_B", "v_proj.lora_B"]
Q = ["q_proj.lora_A", "q_proj.lora_B"]
V = ["v_proj.lora_A", "v_proj.lora_B"]
HEAD = ["head.weight", "head.bias"]

# What is in which group


def names_in_groups(model: nn.Module, optimizer: Any) -> list[list[str]]:
    """The names of the parameters in each group of an optimizer."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        groups.append([names[id(p)] for p in group["params"]])
    return groups


def names_in_group(model: nn.Module, optimizer: Any) -> list[str]:
    """The same, of an optimizer that has one group."""
    (names,) = names_in_groups(model, optimizer)
    return names


def parameters_named(
    model: nn.Module, choose: Callable[[str], bool]
) -> list[nn.Parameter]:
    """The parameters whose names are chosen."""
    return [p for name, p in model.named_parameters() if choose(name)]


def fit_with(
    tmp_path: Path, configure: Callable[[LitTiny], Any], **options: Any
) -> tuple[L.Trainer, LitTiny]:
    """Fit a module that gives out an optimizer: one that is made here, or by a function that is."""
    model = LitTiny()
    made = configure(model)
    if callable(made):
        model.configure_optimizers = made  # type: ignore[method-assign]
    else:
        model.configure_optimizers = lambda: made  # type: ignore[method-assign]
    fit(tmp_path, lora(merge=False, **options), model=model, max_epochs=1)
    return model.trainer, model


def over_a_filter(model: LitTiny) -> Any:
    return lambda: adam(filter(lambda p: p.requires_grad, model.parameters()))


def over_all(model: LitTiny) -> Any:
    return lambda: adam(model.parameters())


def only_of_the_head(model: LitTiny) -> Any:
    return lambda: adam(model.head.parameters())


def made_early(model: LitTiny) -> Any:
    return adam(model.parameters())


def lbfgs_made_early(model: LitTiny) -> Any:
    return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)


def made_early_by_name(model: LitTiny) -> Any:
    return adam(model.named_parameters())


ONE_GROUP = [over_a_filter, made_early, only_of_the_head, lbfgs_made_early]
if Version(torch.__version__) >= Version("2.6"):  # optimizers take names from there on
    ONE_GROUP.append(made_early_by_name)


@pytest.mark.parametrize("configure", ONE_GROUP)
def test_optimizer_holds_exactly_what_trains(tmp_path: Path, configure: Any) -> None:
    t, model = fit_with(tmp_path, configure)
    names = names_in_group(model, t.optimizers[0])
    assert sorted(names) == sorted(TRAINED)
    assert_all_have_moved(model, names_of_parameters(model, "lora_B"))
    (group,) = t.optimizers[0].param_groups
    assert group.get("param_names", names) == names


# Groups of the user's choice


def by_names(model: nn.Module) -> Any:
    """A, B and the rest, as for LoRA+."""
    groups = [
        {"params": parameters_named(model, lambda name: "lora_A" in name)},
        {"params": parameters_named(model, lambda name: "lora_B" in name), "lr": 0.16},
        {"params": parameters_named(model, is_base), "lr": 0.02},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    scales = [lambda _: 1.0, lambda _: 0.5, lambda _: 0.1]
    return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, scales)]


def by_layers(model: LitTiny) -> Any:
    """A rate for each layer."""
    groups = [
        {"params": model.embed.parameters(), "lr": 0.1},
        {"params": model.q_proj.parameters(), "lr": 0.05},
        {"params": model.v_proj.parameters(), "lr": 0.025},
        {"params": model.head.parameters(), "lr": 0.0125},
    ]
    return adam(groups)


def first_half(model: nn.Module) -> Any:
    """Some adapters in one group, and all weights in another."""
    groups = [
        {"params": parameters_named(model, is_base)},
        {"params": parameters_named(model, lambda name: name == "v_proj.lora_B")},
    ]
    return adam(groups)


HABITS: dict[str, tuple[Any, list[list[str]]]] = {
    "by names": (by_names, [A, B, HEAD]),
    "by layers": (by_layers, [[], Q, V, HEAD]),
    "first half": (first_half, [[*Q, "v_proj.lora_A", *HEAD], ["v_proj.lora_B"]]),
}
"""What users write in configure_optimizers, and what each group trains."""


class Grouped(LitTiny):
    """A module whose groups the user has chosen."""

    def __init__(self, habit: str) -> None:
        super().__init__()
        self.habit = habit

    def configure_optimizers(self) -> Any:
        configure, _ = HABITS[self.habit]
        return configure(self)


@pytest.mark.processes
@pytest.mark.parametrize("habit", ["by names", "first half"])
def test_a_run_with_groups_resumes_to_the_bit(tmp_path: Path, habit: str) -> None:
    resumes_to_the_bit(
        tmp_path, partial(Grouped, habit), lora, strategy="ddp_fork", devices=2
    )


@pytest.mark.parametrize("habit", HABITS)
def test_an_adapter_stays_in_the_group_that_the_user_has_put_it_into(
    tmp_path: Path, habit: str
) -> None:
    configure, names_of_each = HABITS[habit]
    grouped = Grouped(habit)
    model, t = fit(tmp_path, lora(merge=False), model=grouped, max_epochs=3)
    assert names_in_groups(model, t.optimizers[0]) == names_of_each
    expected = adapted()
    optimizer = configure(expected)
    if isinstance(optimizer, tuple):  # beside a scheduler
        (optimizer,) = optimizer[0]
    for group, names in zip(optimizer.param_groups, names_of_each, strict=True):
        group["params"] = [expected.get_parameter(name) for name in names]
    by_hand(optimizer, expected)
    assert_same_tensors(state(model), state(expected))


def test_adapters_stand_where_their_weight_stood(tmp_path: Path) -> None:
    t, model = fit_with(tmp_path, over_all, use_dora=True, bias="all")
    names = names_in_groups(model, t.optimizers[0])[0]
    assert names == [  # files hold the optimizer's state in this order
        "q_proj.lora_A",
        "q_proj.lora_B",
        "q_proj.lora_magnitude",
        "q_proj.bias",
        "v_proj.lora_A",
        "v_proj.lora_B",
        "v_proj.lora_magnitude",
        "head.weight",
        "head.bias",
    ]


def first_network(name: str) -> bool:
    return name.startswith(("embed", "q_"))


def second_network(name: str) -> bool:
    return name.startswith(("v_", "head"))


def some_adapters_and_a_weight(name: str) -> bool:
    return name in V or name == "q_proj.weight"


class Chosen(LitTiny):
    """Manual optimization by two optimizers over what the user has chosen, each with a scheduler."""

    def __init__(self, *chosen: Callable[[str], bool]) -> None:
        super().__init__()
        self.chosen = chosen
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        schedulers: Any = self.lr_schedulers()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = []
        schedulers = []
        for choose in self.chosen:
            optimizer = adam(parameters_named(self, choose))
            optimizers.append(optimizer)
            schedulers.append(torch.optim.lr_scheduler.StepLR(optimizer, 1))
        return optimizers, schedulers


@pytest.mark.parametrize(
    ("first", "second", "of_first", "of_second"),
    [
        pytest.param(
            first_network, second_network, Q, [*V, *HEAD], id="a network each"
        ),
        pytest.param(is_base, is_base, TRAINED, TRAINED, id="both hold the base"),
        pytest.param(
            is_base,
            some_adapters_and_a_weight,
            [*Q, *HEAD],
            [*Q, *V],
            id="some with another weight",
        ),
    ],
)
def test_an_adapter_stays_in_the_optimizer_that_the_user_has_put_it_into(
    tmp_path: Path, first: Any, second: Any, of_first: list[str], of_second: list[str]
) -> None:
    chosen = Chosen(first, second)
    model, t = fit(tmp_path, lora(merge=False), model=chosen, max_epochs=1)
    assert names_in_group(model, t.optimizers[0]) == of_first
    assert names_in_group(model, t.optimizers[1]) == of_second
    assert_all_have_moved(model, B)


def test_an_optimizer_handed_out_again_trains_in_each_fit(tmp_path: Path) -> None:
    model = LitTiny()
    made = adam(
        [
            {"params": [model.v_proj.weight]},
            {"params": [model.q_proj.weight, *model.head.parameters()]},
        ]
    )
    model.configure_optimizers = lambda: made  # type: ignore[method-assign]
    for r in (2, 2, 3):  # with the same adapters, and with others
        if r == 3:
            remove_adapters(model)
        before = model(X)
        _, t = fit(tmp_path, lora(r=r), model=model, max_epochs=1)
        assert not torch.equal(model(X), before)
        unmerge_adapters(model)
        groups = names_in_groups(model, t.optimizers[0])
        assert groups == [V, [*Q, *HEAD]]


def test_a_filter_over_a_frozen_base_keeps_the_groups_apart(tmp_path: Path) -> None:
    def configure(model: LitTiny) -> Any:
        model.q_proj.requires_grad_(False)
        model.v_proj.requires_grad_(False)

        def make() -> Any:
            return adam(
                [{"params": that_train("weight")}, {"params": that_train("bias")}]
            )

        def that_train(ending: str) -> list[nn.Parameter]:
            chosen = parameters_named(model, lambda name: name.endswith(ending))
            return [p for p in chosen if p.requires_grad]

        return make

    t, model = fit_with(tmp_path, configure)
    groups = names_in_groups(model, t.optimizers[0])
    assert groups == [[*ADAPTERS, "head.weight"], ["head.bias"]]


# Optimizers that would not train what they should


def weight_and_bias_of_the_head(model: LitTiny) -> Any:
    groups = [{"params": model.head.weight}, {"params": model.head.bias}]
    return lambda: adam(groups)


def test_adapters_in_no_optimizer_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptimizerError, match=r"'q_proj.lora_A'.*2 parameter groups"):
        fit_with(tmp_path, weight_and_bias_of_the_head)


class StepsInBackward(LitTiny):
    """As in torch's tutorial: an optimizer for each parameter, which a hook steps."""

    def __init__(self) -> None:
        super().__init__()
        self.made = {p: adam([p]) for p in self.parameters()}
        for p in self.parameters():
            p.register_post_accumulate_grad_hook(lambda p: self.made[p].step())

    def configure_optimizers(self) -> None:
        return None


def test_optimizers_that_hooks_step_are_no_reason_to_exclude_layers(
    tmp_path: Path,
) -> None:
    says = r"No optimizer trains 'q_proj.lora_A', .*configure_optimizers of \w+ returns none.*hooks.*keep one"
    with (
        pytest.warns(UserWarning, match="no optimizer"),
        pytest.raises(OptimizerError, match=says) as error,
    ):
        fit(tmp_path, lora(), model=StepsInBackward())
    assert "exclude_modules" not in str(error.value)


class Gan(LitTiny):
    """Two networks, each with an optimizer and a loss of its own."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        judge = nn.Sequential(nn.Linear(CLASSES, 4), nn.Linear(4, 1))
        self.nets = nn.ModuleDict({"judge": judge})
        self.nets.requires_grad_(not frozen)

    def judged(self, made: Tensor) -> Tensor:
        return self.nets["judge"](made)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        makes, judges = self.optimizers()  # type: ignore[misc]
        made = self(batch[0])
        loss = self.judged(made)
        loss_of_judge = -self.judged(made.detach())
        self.step(makes, loss)
        self.step(judges, loss_of_judge)

    def step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        if loss.requires_grad:
            self.manual_backward(loss.mean())
        optimizer.step()

    def configure_optimizers(self) -> Any:
        maker = [
            *self.embed.parameters(),
            *self.q_proj.parameters(),
            *self.v_proj.parameters(),
        ]
        judge = self.nets["judge"].parameters()
        return [adam(maker), torch.optim.RMSprop(judge)]


def ids_of(parameters: Iterable[Tensor]) -> list[int]:
    return [id(p) for p in parameters]


def test_optimizer_that_would_train_nothing_is_an_error(tmp_path: Path) -> None:
    model = Gan()
    before = list(model.state_dict())
    makes, judges = model.configure_optimizers()
    model.configure_optimizers = lambda: [makes, judges]  # type: ignore[method-assign]
    of_maker = ids_of(makes.param_groups[0]["params"])
    of_judge = ids_of(judges.param_groups[0]["params"])
    match = r"Optimizer 1 of Gan \(RMSprop\).*'nets\.judge'.*target_modules.*modules_to_save=\['nets\.judge'\]"
    adapters = lora(target_modules=["q_proj", "v_proj"], modules_to_save=None)
    with pytest.raises(OptimizerError, match=match):
        fit(tmp_path, adapters, model=model)
    assert is_plain(model)
    assert list(model.state_dict()) == before
    assert ids_of(makes.param_groups[0]["params"]) == of_maker
    assert ids_of(judges.param_groups[0]["params"]) == of_judge


def moved_parts_of_the_judge(
    folder: Path, model: Gan, saved: list[str] | None
) -> list[bool]:
    """Of each parameter, whether a fit has changed it."""
    before = values_of(model.nets)
    adapters = lora(target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    fit(folder, adapters, model=model, max_epochs=1)
    moved = []
    for name, value in values_of(model.nets).items():
        moved.append(not torch.equal(value, before[name]))
    return moved


def test_networks_that_are_saved_are_no_error(tmp_path: Path) -> None:
    moved = moved_parts_of_the_judge(tmp_path, Gan(), ["nets.judge"])
    assert moved == [True, True, True, True]


def test_networks_that_the_user_froze_are_no_error(tmp_path: Path) -> None:
    moved = moved_parts_of_the_judge(tmp_path, Gan(frozen=True), None)
    assert moved == [False, False, False, False]


# Groups that are added, and optimizers of another class


class Unfreezes(LitTiny):
    """Gradually, as fastai's recipe does: a group for one more layer in each epoch."""

    adds = True

    def on_train_epoch_start(self) -> None:
        layer = (self.v_proj, self.q_proj)[self.current_epoch]
        layer.requires_grad_(True)
        if self.adds:
            optimizer: Any = self.optimizers()
            optimizer.add_param_group({"params": layer.parameters(), "lr": 0.01})


class UnfreezesWithoutGroups(Unfreezes):
    adds = False


def test_a_fit_goes_on_where_groups_of_what_trains_already_are_added(
    tmp_path: Path, caplog: Any
) -> None:
    model, t = fit(tmp_path, lora(), model=Unfreezes())
    (optimizer,) = t.optimizers
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    assert sizes == [len(TRAINED), 0, 0]
    assert "What trains in 'v_proj' has its group already" in caplog.text
    assert "What trains in 'q_proj' has its group already" in caplog.text
    plain, _ = fit(tmp_path, lora(), model=UnfreezesWithoutGroups())
    assert_same_tensors(state(model), state(plain))
    # the method is torch's own again
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": optimizer.param_groups[0]["params"]})


def settings_of(optimizer: Any) -> dict[str, Any]:
    """What an optimizer's first group says, besides its parameters."""
    settings = dict(optimizer.param_groups[0])
    del settings["params"]
    return settings


sgd = partial(torch.optim.SGD, lr=0.1)
sgd_with_momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
rmsprop = partial(torch.optim.RMSprop, lr=0.1)


@pytest.mark.parametrize(
    ("was", "now", "names"),
    [
        pytest.param(
            adam, sgd, "Adam or AdamW, .* returns SGD", id="a setting is missing"
        ),
        pytest.param(
            sgd_with_momentum, adam, "SGD, .* returns AdamW", id="a state is missing"
        ),
        pytest.param(
            rmsprop, adam, "RMSprop, .* returns AdamW", id="another setting is missing"
        ),
    ],
)
def test_a_run_that_goes_on_with_an_optimizer_of_another_class_is_told_both(
    tmp_path: Path, was: Any, now: Any, names: str
) -> None:
    first = LitTiny()
    first.configure_optimizers = lambda: was(first.parameters())  # type: ignore[method-assign]
    _, t = fit(tmp_path, lora(), model=first)
    file = tmp_path / "first.ckpt"
    t.save_checkpoint(file)
    second = LitTiny()
    made = now(second.parameters())
    second.configure_optimizers = lambda: made  # type: ignore[method-assign]
    settings = settings_of(made)
    with pytest.raises(OptimizerError, match=rf"it has the state of {names}\)"):
        fit(tmp_path, lora(), model=second, ckpt_path=file, max_epochs=3)
    assert is_plain(second)
    assert not made.state
    assert settings_of(made) == settings


# Parts of parameter groups make up what an optimizer of the whole parameters has


VALUES = [
    torch.tensor([[0.5, -0.0, math.nan], [2.0, -3.0, 4.0]]),
    torch.tensor(7.0),
    torch.tensor([8.0]),
]
"""Of 8 numbers: the first process has 4 of them, and 4 are left for the second."""

PLACES = [[(0, 0, 4), (0, 0, 0), (0, 0, 0)], [(4, 0, 2), (0, 2, 1), (0, 3, 1)]]


def whole_parameters() -> list[nn.Parameter]:
    return [nn.Parameter(value.clone()) for value in VALUES]


def partition_of(rank: int) -> Partition:
    numbers = torch.cat([value.reshape(-1) for value in VALUES])
    part = numbers.view(2, 4)[rank]
    return Partition(whole_parameters(), part.clone(), PLACES[rank])


def bits(values: list[Tensor]) -> list[list[int]]:
    return [value.reshape(-1).view(torch.int32).tolist() for value in values]


def full() -> tuple[list[list[int]], dict[str, Any]]:
    """The parameters, and the optimizer's state after a step; both come back."""
    join_group()
    partition = partition_of(dist.get_rank())
    empty = Partition([], torch.zeros(2), [])
    values = partition.gather(partition.shard, torch.device("cpu"))
    by_parameter = dict(zip(partition.parameters, values, strict=True))
    assert bits([partition.scatter(by_parameter)]) == bits([partition.shard])
    partition.shard = nn.Parameter(partition.shard)
    empty.shard = nn.Parameter(empty.shard)
    groups = [
        {"params": [partition.shard], "lr": 0.0},
        {"params": [empty.shard], "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    partition.shard.grad = torch.ones(4)
    optimizer.step()
    whole = gathered_state([partition, empty], optimizer, torch.device("cpu"))
    found = scattered_state([partition, empty], whole)
    expected = optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"])
    return bits(values), whole


@pytest.mark.processes
def test_parts_make_up_the_parameters_and_their_optimizers_state() -> None:
    parameters = whole_parameters()
    groups = [
        {"params": parameters, "lr": 0.0},
        {"params": [nn.Parameter(torch.ones(1))], "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    optimizer.param_groups[1]["params"].clear()
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    expected = optimizer.state_dict()
    for values, found in run_ranks(full):
        assert values == bits(VALUES)
        assert found["param_groups"] == expected["param_groups"]
        torch.testing.assert_close(found["state"], expected["state"])


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (
            {"state": {}, "param_groups": [{"params": [0, 1]}]},
            r"its groups have \[2\] parameters, .* have \[3\]",
        ),
        (
            {
                "state": {0: {"rows": torch.ones(2)}},
                "param_groups": [{"params": [0, 1, 2]}],
            },
            "'rows' has other shapes",
        ),
    ],
)
def test_state_of_other_parameters_is_refused(state: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        scattered_state([partition_of(0)], state)


def test_a_part_follows_what_is_not_itself_rounded() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 3.0], dtype=torch.bfloat16))
    part = torch.tensor([1.001, 9.0])
    Partition([parameter], part, [(0, 0, 2)]).copy_parameters()
    assert torch.equal(part, torch.tensor([1.001, 3.0]))


def test_states_of_another_class_leave_all_optimizers_as_they_were() -> None:
    first = nn.Linear(2, 2)
    second = nn.Linear(2, 2)
    adamw = torch.optim.AdamW(first.parameters())
    sgd = torch.optim.SGD(second.parameters(), lr=0.1)
    stored = [
        torch.optim.SGD(each.parameters(), lr=0.5).state_dict()
        for each in (first, second)
    ]

    def load() -> None:
        with refusing_other_states([adamw, sgd], stored):
            adamw.load_state_dict(stored[0])
            sgd.load_state_dict(stored[1])

    with pytest.raises(
        ValueError,
        match="it has the state of SGD, and configure_optimizers returns AdamW",
    ):
        load()
    assert adamw.param_groups[0]["lr"] == 1e-3
    assert sgd.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("lr_scale", [1, 4, {"A": 2, "B": 8}])
def test_an_optimizer_from_which_adapters_were_taken_out_trains_those_of_the_next_fit(
    lr_scale: Any,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        inject_adapters(model, LoRAConfig(r=2))
        train_adapters(model, [optimizer], lr_scale)
        assert held_by([optimizer]) == {
            p for p in model.parameters() if p.requires_grad
        }
        take_out(view_of(model), optimizer, set(model[0].parameters()))
        remove_adapters(model)


def test_an_adapter_of_a_weight_in_two_groups_is_in_the_first() -> None:
    model = adapted()
    optimizer = torch.optim.SGD([model.q_proj.weight, *model.head.parameters()], lr=0.1)
    again = {
        **optimizer.param_groups[0],
        "params": [model.q_proj.weight, model.v_proj.weight],
    }
    optimizer.param_groups.append(again)  # add_param_group refuses it
    train_adapters(model, [optimizer])
    first, second = names_in_groups(model, optimizer)
    assert first[:2] == Q
    assert second[:2] == V


class Parts(nn.Module):
    """Three layers and a head inside of one module, and a layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        names = ("encoder", "left", "right", "head")
        self.net = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
        self.beside = nn.Linear(4, 4)


def second_fit_of(*names: str) -> None:
    """Two of three layers have learned. Then an optimizer holds these modules alone."""
    model = Parts()
    saved = ["net.head", "net.left.bias"]
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=saved))
    train_adapters(model, [torch.optim.AdamW(model.parameters())])
    for layer in view_of(model).layers.values():
        nn.init.ones_(layer.lora_B)
    groups = [{"params": model.get_submodule(name).parameters()} for name in names]
    train_adapters(model, [torch.optim.AdamW(groups)])


def test_a_head_beside_paused_layers_needs_a_place_in_an_optimizer() -> None:
    with pytest.raises(OptimizerError, match=r"No optimizer trains 'net.head.weight'"):
        second_fit_of("net.encoder", "beside")


def test_what_is_in_a_paused_layer_needs_none() -> None:
    second_fit_of("net.encoder", "net.head", "beside")
