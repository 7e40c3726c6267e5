"""Adapted weights that a training step reads by hand are named: a merge would change what the reader computes."""

import contextlib
import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_lora as ll
from lightning_lora.guards.read_by_hand.reads import ReadByHand
from lightning_lora.guards.read_by_hand.watched_weight import WatchedWeight
from tests.support.cases import StopError
from tests.support.models import WIDTH, WORDS, LitTiny, data, same, state, trainer

READS: dict[str, Any] = {
    "transposed": lambda x, weight: x @ weight.T,
    "multiplied": F.linear,
    "normalized": lambda x, weight: F.normalize(x, dim=-1) @ F.normalize(weight, dim=-1).T,
}
ROWS = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed": [1]}}


class Words(LitTiny):
    """A model that predicts the word that it reads, in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        if way not in (*READS, "all rows"):
            self.out = nn.Linear(WIDTH, WORDS, bias=False)
        if way == "a tied layer":
            self.out.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        x, weight = torch.tanh(self.q_proj(self.embed(index))), self.embed.weight
        if self.way == "all rows":  # with their updates
            return x @ self.embed(torch.arange(WORDS)).T
        if self.way == "looked at":  # for a size, and for a number that is logged
            x = x * weight.shape[1] ** 0.5
            self.log("norm", weight.norm())
        return READS[self.way](x, weight) if self.way in READS else self.out(x)


def said(folder: Path, model: Any, **options: Any) -> list[str]:
    """What a fit says of reads."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = ll.LoRACallback(**{"r": 2, "target_modules": "all", **options})
        trainer(folder, [callback], max_epochs=2).fit(Words(model) if isinstance(model, str) else model, data())
    return [str(each.message) for each in caught if "reads the weight" in str(each.message)]


@pytest.mark.parametrize("options", [{}, ROWS])
@pytest.mark.parametrize("way", READS)
def test_a_weight_that_is_read_by_hand_is_named(tmp_path: Path, way: str, options: Any) -> None:
    (message,) = said(tmp_path, way, **options)
    assert "the weight of 'embed' of Words itself" in message
    assert not said(tmp_path, way, target_modules="all", exclude_modules=["embed"])  # it is right there


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, ROWS])
@pytest.mark.parametrize("way", ["a tied layer", "a layer", "looked at", "all rows"])
def test_layers_and_looks_are_no_reads(tmp_path: Path, way: str, options: Any) -> None:
    assert not said(tmp_path, way, **options)


# Every kind of layer, and every way to read it


class Kinds(LitTiny):
    """Layers of several kinds, whose weights a step may read."""

    def __init__(self, read: Any = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
            self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.1)
            self.rnn = nn.LSTM(WIDTH, WIDTH)
        self.read = read

    def forward(self, index: Tensor) -> Tensor:
        x = torch.tanh(self.q_proj(self.embed(index))) + self.v_proj(self.embed(index))
        x = self.rnn(self.attention(x, x, x)[0])[0]
        return self.head(self.conv(x.T[None])[0].T)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        return loss if self.read is None else loss + self.read(self)


def orthogonal(weight: Tensor) -> Tensor:
    return (weight.T @ weight - torch.eye(weight.shape[1])).norm()


def recomputed(model: Kinds, reentrant: bool) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return F.linear(model.q_proj(x), model.q_proj.weight).mean()

    return checkpoint(inner, torch.ones(3, WIDTH), use_reentrant=reentrant)  # type: ignore[no-any-return]


WAYS: dict[str, tuple[Any, str]] = {  # what is read, and whose it is
    "a penalty": (lambda m: orthogonal(m.q_proj.weight), "'q_proj'"),
    "a decay by name": (
        lambda m: sum(p.square().sum() for name, p in m.named_parameters() if name.startswith("conv.w")), "'conv'"
    ),
    "a list of all": (lambda m: torch.cat([p.flatten() for p in m.parameters()]).norm(), "'q_proj', 'v_proj', 'head'"),
    "inside": (lambda m: m.attention.out_proj.weight.abs().sum() + m.rnn.weight_hh_l0.norm(), "'attention', 'rnn'"),
    "rows": (lambda m: sum(row.norm() for row in m.v_proj.weight), "'v_proj'"),
    "an embedding's row": (lambda m: m.embed.weight[2].norm(), "'embed'"),
    "recomputed": (lambda m: recomputed(m, reentrant=False), "'q_proj'"),
    "recomputed, reentrant": (lambda m: recomputed(m, reentrant=True), "'q_proj'"),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_read_a_weight_is_named_once(tmp_path: Path, way: str) -> None:
    read, names = WAYS[way]
    (message,) = said(tmp_path, Kinds(read))
    assert names in message and "modules_to_save=[" in message and "exclude_modules=[" in message


@pytest.mark.parametrize("advice", ["modules_to_save", "exclude_modules"])
def test_what_the_message_says_ends_it(tmp_path: Path, advice: str) -> None:
    assert not said(tmp_path, Kinds(WAYS["a penalty"][0]), **{advice: ["q_proj"]})


def test_a_forward_hook_that_reads_the_weight_of_its_layer_is_named(tmp_path: Path) -> None:
    model = Kinds()
    model.conv.register_forward_hook(lambda layer, _, output: output + layer.weight.mean())
    model.head.register_forward_hook(lambda layer, _, output: output + layer.weight.mean().detach())
    (message,) = said(tmp_path, model)
    assert "'conv' of Kinds" in message


def test_a_step_that_calls_backward_itself_is_looked_at_too(tmp_path: Path) -> None:
    class ByHand(Kinds):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            (optimizer,) = self.trainer.optimizers
            (self.loss(batch) + orthogonal(self.q_proj.weight)).backward()
            optimizer.step()

    (message,) = said(tmp_path, ByHand())
    assert "'q_proj' of ByHand" in message


LOOKS: dict[str, Any] = {
    "none": None,
    "logged": lambda m: m.log("norm", m.q_proj.weight.norm()) or 0.0,
    "without a gradient": lambda m: m.q_proj.weight.detach().norm() + m.conv.weight.data.sum(),
    "copied": lambda m: vars(m).update(kept=copy.deepcopy(m.conv)) or 0.0,
    "written": lambda m: m.embed.weight.data.clamp_(-9, 9) is None or 0.0,
    "in a set": lambda m: float(m.q_proj.weight in {p for p in m.parameters() if not p.requires_grad}),
    "with its update": lambda m: m.q_proj.lora_effective_weight("weight").norm(),
    "of a norm": lambda m: nn.functional.layer_norm(torch.ones(2, WIDTH), [WIDTH]).sum(),
}


@pytest.mark.parametrize("look", LOOKS)
def test_what_no_loss_depends_on_is_not_named(tmp_path: Path, look: str) -> None:
    model = Kinds(LOOKS[look])
    assert not said(tmp_path, model)
    if look == "copied":
        assert {type(p) for p in model.kept.parameters()} == {nn.Parameter}


def test_layers_that_nothing_calls_have_another_warning(tmp_path: Path) -> None:
    class ByHand(LitTiny):
        def forward(self, index: Tensor) -> Tensor:
            return self.head(F.linear(self.v_proj(self.embed(index)), self.q_proj.weight))

    with pytest.warns(ll.LoRAWarning) as caught:
        trainer(tmp_path, [ll.LoRACallback(r=2, target_modules=["q_proj", "v_proj"])]).fit(ByHand(), data())
    (message,) = {str(each.message) for each in caught if isinstance(each.message, ll.LoRAWarning)}
    assert "'q_proj' received no gradient" in message and "target_parameters" in message


# It changes nothing


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}], ids=["float32", "autocast"])
@pytest.mark.parametrize("arguments", [{"dropout": 0.2}, {"use_dora": True, "exclude_modules": ["rnn", "attention"]}])
@pytest.mark.filterwarnings("ignore:A training step reads", "ignore:Attribute 'read' removed from hparams")
@pytest.mark.parametrize("way", ["none", "a penalty", "recomputed"])
def test_a_fit_that_was_watched_has_the_bits_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, arguments: Any, options: Any
) -> None:
    states = []
    for watched in (True, False):
        if not watched:
            monkeypatch.setattr(ReadByHand, "first_batch_runs", lambda *_: contextlib.nullcontext())
        torch.manual_seed(4)
        callback = ll.LoRACallback(r=2, target_modules="all", merge=False, **arguments)
        trainer(tmp_path, [callback], **options).fit(model := Kinds(WAYS[way][0] if way in WAYS else None), data())
        states.append(state(model))
    assert same(*states)


def left(model: nn.Module) -> list[str]:
    """What a look at the first batch has left behind."""
    found = [name for name, p in model.named_parameters() if type(p) is not nn.Parameter]
    found += [name for name, p in model.named_parameters() if any("lora" in key for key in vars(p))]
    return found + [name for name, each in model.named_modules() if vars(each).keys() & {"forward", "weight"}]


class Looks(Kinds):
    """Notes in which of its hooks something of a look is there, and fails in one of them."""

    def __init__(self, fails: str = "") -> None:
        super().__init__()
        self.fails, self.seen = fails, dict[str, bool]()

    def note(self, hook: str) -> None:
        self.seen.setdefault(hook, bool(left(self)))
        if hook == self.fails:
            raise StopError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.note(f"training_step {batch_idx}")
        return super().training_step(batch, batch_idx)

    def on_before_backward(self, *_: Any) -> None:
        self.note("on_before_backward")

    def on_before_zero_grad(self, *_: Any) -> None:
        self.note("on_before_zero_grad")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.note("on_before_optimizer_step")

    def on_train_batch_end(self, *_: Any) -> None:
        self.note("on_train_batch_end")


def test_nothing_of_a_look_is_there_outside_of_the_first_step(tmp_path: Path) -> None:
    trainer(tmp_path, [ll.LoRACallback(r=2, target_modules="all", merge=False)]).fit(model := Looks(), data())
    there = {hook for hook, is_there in model.seen.items() if is_there}
    assert there == {"training_step 0", "on_before_backward"} and "training_step 1" in model.seen and not left(model)


@pytest.mark.parametrize("fails", ["training_step 0", "on_before_backward"])
def test_nothing_of_a_look_is_left_by_a_step_that_fails(tmp_path: Path, fails: str) -> None:
    with pytest.raises(StopError):
        trainer(tmp_path, [ll.LoRACallback(r=2, target_modules="all")]).fit(model := Looks(fails), data())
    assert model.seen[fails] and not left(model)


def test_a_model_is_looked_at_after_another_one_of_its_file_was_compiled(tmp_path: Path) -> None:
    """torch leaves what it compiles among the names of that file."""
    torch.compile(Passes(), backend="eager")(torch.ones(2))
    assert any(name.startswith("__compiled_fn") for name in globals())
    assert said(tmp_path, "transposed")


class Passes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@pytest.mark.parametrize("fullgraph", [False, True])
def test_what_a_step_compiles_sees_nothing_of_a_look(tmp_path: Path, fullgraph: bool) -> None:
    graphs, types = list[Any](), set[type]()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        types.update(map(type, inputs))
        return graph.forward

    class Compiles(LitTiny):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.own = vars(self).get("own") or torch.compile(self.loss, backend=backend, fullgraph=fullgraph)
            return self.own(batch)

    torch._dynamo.reset()
    fitted = Compiles()
    vars(fitted)["own"] = None
    assert not said(tmp_path, fitted)
    assert len(graphs) == 1 and WatchedWeight not in types
