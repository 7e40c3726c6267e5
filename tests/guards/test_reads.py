"""Adapted weights that a training step reads by hand are named: a merge would change what the reader computes."""

import contextlib
import copy
from functools import partial
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
from tests.support.compared import assert_same_tensors
from tests.support.messages import lines_with, messages_of, warned_by
from tests.support.models import WIDTH, WORDS, LitTiny, data, state, trainer

ROWS = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed": [1]}}


class Words(LitTiny):
    """A model that predicts the word that it reads, by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WORDS, bias=False)

    def features(self, index: Tensor) -> Tensor:
        return torch.tanh(self.q_proj(self.embed(index)))

    def forward(self, index: Tensor) -> Tensor:
        return self.out(self.features(index))


class Transposed(Words):
    """It reads the weight of its embedding by hand."""

    def __init__(self) -> None:
        super().__init__()
        del self.out

    def forward(self, index: Tensor) -> Tensor:
        return self.words_of(self.features(index), self.embed.weight)

    def words_of(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T


class Multiplied(Transposed):
    def words_of(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


class Normalized(Transposed):
    def words_of(self, x: Tensor, weight: Tensor) -> Tensor:
        directions = F.normalize(weight, dim=-1)
        return F.normalize(x, dim=-1) @ directions.T


class TiedLayer(Words):
    def __init__(self) -> None:
        super().__init__()
        self.out.weight = self.embed.weight


class LooksAt(Words):
    """It reads a weight for a size, and for a number that is logged."""

    def forward(self, index: Tensor) -> Tensor:
        weight = self.embed.weight
        self.log("norm", weight.norm())
        scale = weight.shape[1] ** 0.5
        return self.out(self.features(index) * scale)


class AllRows(Transposed):
    """It reads all rows with their updates."""

    def forward(self, index: Tensor) -> Tensor:
        rows = self.embed(torch.arange(WORDS))
        return self.features(index) @ rows.T


def said(folder: Path, model: Any, **options: Any) -> list[str]:
    """What a fit says of reads."""
    callback = ll.LoRACallback(**{"r": 2, "target_modules": "all", **options})
    caught = warned_by(trainer(folder, [callback], max_epochs=2).fit, model, data())
    return lines_with("reads the weight", messages_of(caught))


@pytest.mark.parametrize("options", [{}, ROWS])
@pytest.mark.parametrize("kind", [Transposed, Multiplied, Normalized])
def test_a_weight_that_is_read_by_hand_is_named(
    tmp_path: Path, kind: Any, options: Any
) -> None:
    (message,) = said(tmp_path, kind(), **options)
    assert f"the weight of 'embed' of {kind.__name__} itself" in message
    # it is right there
    assert said(tmp_path, kind(), target_modules="all", exclude_modules=["embed"]) == []


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, ROWS])
@pytest.mark.parametrize("kind", [TiedLayer, Words, LooksAt, AllRows])
def test_layers_and_looks_are_no_reads(tmp_path: Path, kind: Any, options: Any) -> None:
    assert said(tmp_path, kind(), **options) == []


@pytest.mark.parametrize("adapted", ["embed", "out"])
def test_the_other_layer_of_a_tied_pair_reads_a_weight_of_its_own(
    tmp_path: Path, adapted: str
) -> None:
    assert said(tmp_path, TiedLayer(), target_modules=[adapted]) == []


class ScriptedHead(Words):
    """Its head is compiled, and has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.jit.script(self.out)
        self.out.weight = self.embed.weight


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_a_scripted_layer_reads_a_weight_of_its_own(tmp_path: Path) -> None:
    assert said(tmp_path, ScriptedHead(), target_modules=["embed"]) == []


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
        x = self.embed(index)
        x = torch.tanh(self.q_proj(x)) + self.v_proj(x)
        attended, _ = self.attention(x, x, x)
        x, _ = self.rnn(attended)
        convolved = self.conv(x.T[None])[0].T
        return self.head(convolved)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.read is None:
            return loss
        return loss + self.read(self)


def orthogonal(weight: Tensor) -> Tensor:
    identity = torch.eye(weight.shape[1])
    return (weight.T @ weight - identity).norm()


def a_penalty(model: Kinds) -> Tensor:
    return orthogonal(model.q_proj.weight)


def a_decay_by_name(model: Kinds) -> Any:
    decayed = dict(model.named_parameters())["conv.weight"]
    return decayed.square().sum()


def a_list_of_all(model: Kinds) -> Tensor:
    return torch.cat([p.flatten() for p in model.parameters()]).norm()


def inside(model: Kinds) -> Any:
    of_attention = model.attention.out_proj.weight.abs().sum()
    return of_attention + model.rnn.weight_hh_l0.norm()  # type: ignore[operator]


def rows(model: Kinds) -> Any:
    return sum(row.norm() for row in model.v_proj.weight)


def a_row_of_an_embedding(model: Kinds) -> Tensor:
    return model.embed.weight[2].norm()


def recomputed(model: Kinds, reentrant: bool = False) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return F.linear(model.q_proj(x), model.q_proj.weight).mean()

    return checkpoint(inner, torch.ones(3, WIDTH), use_reentrant=reentrant)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("read", "names"),
    [
        (a_penalty, "'q_proj'"),
        (a_decay_by_name, "'conv'"),
        (a_list_of_all, "'q_proj', 'v_proj', 'head'"),
        (inside, "'attention', 'rnn'"),
        (rows, "'v_proj'"),
        (a_row_of_an_embedding, "'embed'"),
        (recomputed, "'q_proj'"),
        pytest.param(
            partial(recomputed, reentrant=True), "'q_proj'", id="recomputed, reentrant"
        ),
    ],
)
def test_every_way_to_read_a_weight_is_named_once(
    tmp_path: Path, read: Any, names: str
) -> None:
    (message,) = said(tmp_path, Kinds(read))
    assert names in message
    assert "modules_to_save=[" in message
    assert "exclude_modules=[" in message


@pytest.mark.parametrize("advice", ["modules_to_save", "exclude_modules"])
def test_what_the_message_says_ends_it(tmp_path: Path, advice: str) -> None:
    assert said(tmp_path, Kinds(a_penalty), **{advice: ["q_proj"]}) == []


def add_the_mean(layer: nn.Module, _: Any, output: Tensor) -> Any:
    return output + layer.weight.mean()  # type: ignore[operator,union-attr]


def add_the_mean_without_gradient(layer: nn.Module, _: Any, output: Tensor) -> Any:
    return output + layer.weight.mean().detach()  # type: ignore[operator,union-attr]


def test_a_forward_hook_that_reads_the_weight_of_its_layer_is_named(
    tmp_path: Path,
) -> None:
    model = Kinds()
    model.conv.register_forward_hook(add_the_mean)
    model.head.register_forward_hook(add_the_mean_without_gradient)
    (message,) = said(tmp_path, model)
    assert "'conv' of Kinds" in message


class CallsBackward(Kinds):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        (optimizer,) = self.trainer.optimizers
        loss = self.loss(batch) + orthogonal(self.q_proj.weight)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def test_a_step_that_calls_backward_itself_is_looked_at_too(tmp_path: Path) -> None:
    (message,) = said(tmp_path, CallsBackward())
    assert "'q_proj' of CallsBackward" in message


# What is no read


def logged(model: Kinds) -> float:
    model.log("norm", model.q_proj.weight.norm())
    return 0.0


def without_a_gradient(model: Kinds) -> Tensor:
    return model.q_proj.weight.detach().norm() + model.conv.weight.data.sum()


def written(model: Kinds) -> float:
    model.embed.weight.data.clamp_(-9, 9)
    return 0.0


def in_a_set(model: Kinds) -> float:
    frozen = {p for p in model.parameters() if not p.requires_grad}
    return float(model.q_proj.weight in frozen)


def with_its_update(model: Any) -> Any:
    return model.q_proj.lora_effective_weight("weight").norm()


def of_a_norm(model: Kinds) -> Tensor:
    return nn.functional.layer_norm(torch.ones(2, WIDTH), [WIDTH]).sum()


@pytest.mark.parametrize(
    "look",
    [None, logged, without_a_gradient, written, in_a_set, with_its_update, of_a_norm],
)
def test_what_no_loss_depends_on_is_not_named(tmp_path: Path, look: Any) -> None:
    assert said(tmp_path, Kinds(look)) == []


def test_a_copy_of_a_layer_is_no_read_and_has_parameters_of_torch(
    tmp_path: Path,
) -> None:
    def copied(model: Kinds) -> float:
        vars(model)["kept"] = copy.deepcopy(model.conv)
        return 0.0

    model = Kinds(copied)
    assert said(tmp_path, model) == []
    kinds = {type(p) for p in vars(model)["kept"].parameters()}
    assert kinds == {nn.Parameter}


def test_a_copy_that_runs_in_the_first_batch_computes_as_its_layer_and_keeps_nothing(
    tmp_path: Path,
) -> None:
    def run_copy(model: Kinds) -> float:
        copied = copy.deepcopy(model.conv)
        x = torch.ones(1, WIDTH, 4)
        assert torch.equal(copied(x), model.conv(x))
        assert vars(copied).keys().isdisjoint(["forward", "weight"])
        return 0.0

    assert said(tmp_path, Kinds(run_copy)) == []


class Wrapped(Words):
    """Other code has wrapped the forward of a layer when training begins."""

    def on_train_start(self) -> None:
        self.calls = 0
        original = self.out.forward

        def counting(x: Tensor) -> Tensor:
            self.calls += 1
            return original(x)

        vars(self.out)["forward"] = self.counting = counting

    def on_train_end(self) -> None:
        assert vars(self.out)["forward"] is self.counting


def test_a_forward_that_other_code_has_set_runs_and_comes_back(tmp_path: Path) -> None:
    model = Wrapped()
    assert said(tmp_path, model) == []
    assert model.calls == model.trainer.global_step


class CallsNoLayer(LitTiny):
    def forward(self, index: Tensor) -> Tensor:
        x = self.v_proj(self.embed(index))
        return self.head(F.linear(x, self.q_proj.weight))


def test_layers_that_nothing_calls_have_another_warning(tmp_path: Path) -> None:
    callback = ll.LoRACallback(r=2, target_modules=["q_proj", "v_proj"])
    with pytest.warns(ll.LoRAWarning) as caught:
        trainer(tmp_path, [callback]).fit(CallsNoLayer(), data())
    (message,) = set(messages_of(caught, ll.LoRAWarning))
    assert "'q_proj' received no gradient" in message
    assert "target_parameters" in message


# It changes nothing


def state_after_a_fit(
    folder: Path, read: Any, arguments: Any, options: Any
) -> dict[str, Tensor]:
    torch.manual_seed(4)
    callback = ll.LoRACallback(r=2, target_modules="all", merge=False, **arguments)
    model = Kinds(read)
    trainer(folder, [callback], **options).fit(model, data())
    return state(model)


@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16-mixed"}], ids=["float32", "autocast"]
)
@pytest.mark.parametrize(
    "arguments",
    [{"dropout": 0.2}, {"use_dora": True, "exclude_modules": ["rnn", "attention"]}],
)
@pytest.mark.filterwarnings(
    "ignore:A training step reads", "ignore:Attribute 'read' removed from hparams"
)
@pytest.mark.parametrize("read", [None, a_penalty, recomputed])
def test_a_fit_that_was_watched_has_the_bits_of_one_that_was_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Any,
    arguments: Any,
    options: Any,
) -> None:
    watched = state_after_a_fit(tmp_path, read, arguments, options)
    monkeypatch.setattr(
        ReadByHand, "first_batch_runs", lambda *_: contextlib.nullcontext()
    )
    unwatched = state_after_a_fit(tmp_path, read, arguments, options)
    assert_same_tensors(watched, unwatched)


def left_behind(model: nn.Module) -> list[str]:
    """What a look at the first batch has left."""
    found = []
    for name, p in model.named_parameters():
        if type(p) is not nn.Parameter or lines_with("lora", vars(p)):
            found.append(name)
    for name, module in model.named_modules():
        if vars(module).keys() & {"forward", "weight"}:
            found.append(name)
    return found


class Looks(Kinds):
    """Notes in which of its hooks something of a look is there, and fails in one of them."""

    def __init__(self, fails: str = "") -> None:
        super().__init__()
        self.fails = fails
        self.seen: dict[str, bool] = {}

    def note(self, hook: str) -> None:
        if hook not in self.seen:
            self.seen[hook] = bool(left_behind(self))
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
    model = Looks()
    callback = ll.LoRACallback(r=2, target_modules="all", merge=False)
    trainer(tmp_path, [callback]).fit(model, data())
    there = {hook for hook, is_there in model.seen.items() if is_there}
    assert there == {"training_step 0", "on_before_backward"}
    assert "training_step 1" in model.seen
    assert left_behind(model) == []


@pytest.mark.parametrize("fails", ["training_step 0", "on_before_backward"])
def test_nothing_of_a_look_is_left_by_a_step_that_fails(
    tmp_path: Path, fails: str
) -> None:
    model = Looks(fails)
    callback = ll.LoRACallback(r=2, target_modules="all")
    with pytest.raises(StopError):
        trainer(tmp_path, [callback]).fit(model, data())
    assert model.seen[fails]
    assert left_behind(model) == []


# What is compiled


class Passes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_a_model_is_looked_at_after_another_one_of_its_file_was_compiled(
    tmp_path: Path,
) -> None:
    """torch leaves what it compiles among the names of that file."""
    torch.compile(Passes(), backend="eager")(torch.ones(2))
    assert lines_with("__compiled_fn", globals())
    assert said(tmp_path, Transposed())


@pytest.mark.parametrize("fullgraph", [False, True])
def test_what_a_step_compiles_sees_nothing_of_a_look(
    tmp_path: Path, fullgraph: bool
) -> None:
    graphs: list[Any] = []
    types: set[type] = set()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        types.update(map(type, inputs))
        return graph.forward

    class Compiles(LitTiny):
        compiled: Any = None

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.compiled is None:
                self.compiled = torch.compile(
                    self.loss, backend=backend, fullgraph=fullgraph
                )
            return self.compiled(batch)

    torch._dynamo.reset()
    assert said(tmp_path, Compiles()) == []
    assert len(graphs) == 1
    assert WatchedWeight not in types
