"""Each stage computes with the right adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.model.record import find_record
from tests.support.cases import At, StopError, base_is_whole, files_hold_adapters_alone, same_parts, trained
from tests.support.fits import adam, by_hand, fit, loaded, outcome, trainable
from tests.support.late import BornInConfigureModel, BornInSetup, BuiltAnew, Normed
from tests.support.models import CLASSES, WIDTH, LitTiny, best, data, is_plain, lora, same, state, trainer


@pytest.mark.parametrize(
    ("stage", "merge"), [("validate", "last"), ("test", "best"), ("test", False), ("predict", "best")]
)
def test_each_file_gives_its_own_numbers_in_each_stage(tmp_path: Path, stage: str, merge: Any) -> None:
    def saves() -> ModelCheckpoint:
        return best(tmp_path, mode="max", save_top_k=-1, save_last=True)  # the worst: surely not the last

    first = saves()
    model, t = fit(tmp_path, lora(merge=merge), first, model=LitTiny(lr=0.5), max_epochs=4)
    files = {"best": first.best_model_path, "last": first.last_model_path, "path": str(tmp_path / "best-epoch=2.ckpt")}
    files["end"] = files["best" if merge == "best" else "last"]
    plain = trainer(tmp_path, enable_checkpointing=False)
    expected = {name: outcome(plain, stage, loaded(path)) for name, path in [*files.items(), ("base", None)]}
    assert len({tuple(value.flatten().tolist()) for value in expected.values()}) == 4

    def check(t: L.Trainer, model: LitTiny, now: str, asked: list[str]) -> None:
        known, shape = now != "base", is_plain(model)
        for name in (None, *asked, None):
            path = files["path"] if name == "path" else name
            now = name or now
            torch.testing.assert_close(outcome(t, stage, model, ckpt_path=path), expected[now])
            assert is_plain(model) is shape or not known
            torch.testing.assert_close(outcome(plain, stage, model), expected[now])  # without the callback too
        assert files_hold_adapters_alone(tmp_path)

    check(t, model, "end", ["last", "best", "path"])
    if stage == "test":
        (numbers,) = t.test(dataloaders=data(), verbose=False)  # no model means the best
        assert numbers["test_loss"] == pytest.approx(expected["best"].item())
        outcome(t, stage, model, ckpt_path=files["path"])
    new = trainer(tmp_path, [lora(merge=merge), saves()])
    check(new, model, "path", ["last", "path"])
    check(trainer(tmp_path, [lora(merge=merge), saves()]), LitTiny(), "base", ["path", "last"])
    assert base_is_whole(model)


@pytest.mark.parametrize(
    ("begin", "merge"), [("fit", "last"), ("fit", False), ("load", False), ("resume", "last"), ("safetensors", "last")]
)
def test_fit_goes_on_from_the_adapters_that_are_there(tmp_path: Path, begin: str, merge: Any) -> None:
    model, t = fit(tmp_path, lora(merge=merge), best(tmp_path / "1"), max_epochs=1)
    t.save_checkpoint(tmp_path / "first.ckpt", weights_only=begin == "load")
    ll.save_adapter(model, tmp_path / "first.safetensors")
    expected = loaded(tmp_path / "first.ckpt")
    by_hand(adam(trainable(expected)), expected)
    if begin != "fit":
        model = loaded(tmp_path / ("first.safetensors" if begin == "safetensors" else "first.ckpt"))
    if begin == "resume":
        trainer(tmp_path, [lora()]).validate(model, data(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    fit(tmp_path, lora(merge=merge), best(tmp_path / "2"), model=model, max_epochs=3)
    assert is_plain(model) is bool(merge) and files_hold_adapters_alone(tmp_path)
    assert same_parts(trained(model), trained(expected)) and base_is_whole(model)


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


class Broken(LitTiny):  # whose test fails
    def setup(self, stage: str) -> None:
        pass  # a hook that may load weights

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        raise StopError


def test_failed_stage_gives_the_module_back_as_it_came(tmp_path: Path) -> None:
    (tmp_path / "cut.ckpt").write_bytes(b"PK")
    model, t = Broken(), trainer(tmp_path, [lora()])
    wrong = trainer(tmp_path, [lora(target_modules=["nope"])])

    def fails(by: L.Trainer, stage: str, error: Any, file: str | None = None) -> None:
        before, now = state(model), flags(model)
        with pytest.raises(error):
            getattr(by, stage)(model, data(), ckpt_path=tmp_path / file if file else None)
        assert is_plain(model) and same(state(model), before) and flags(model) == now

    fails(t, "test", ll.AdapterFileError, "cut.ckpt")
    fails(t, "fit", ll.AdapterFileError, "cut.ckpt")
    fails(t, "test", StopError)
    t.fit(model.train(), data())  # Lightning leaves a module in eval mode when its test fails
    merged = state(model)
    t.save_checkpoint(tmp_path / "good.ckpt")
    fails(t, "test", ll.AdapterFileError, "cut.ckpt")
    fails(t, "test", StopError)
    fails(wrong, "test", ll.TargetError, "good.ckpt")
    model.load_state_dict(LitTiny().state_dict())
    with pytest.warns(ll.LoRAWarning, match="new base"):
        fails(t, "test", StopError)
    model.q_proj.weight.data.add_(1)
    with pytest.warns(UserWarning, match="taken as a new base"):
        fails(t, "test", ll.BaseMismatchError, "good.ckpt")
    model.load_state_dict(merged)
    ll.unmerge_adapters(model)
    assert torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)


class MakesNone(Normed):  # that raises where it should make its optimizer
    def configure_optimizers(self) -> Any:
        assert self.q_proj.weight.requires_grad and not self.embed.weight.requires_grad  # the base as it was
        raise StopError


@pytest.mark.parametrize("adapted", [True, False])
def test_flags_are_as_they_were_after_an_optimizer_that_could_not_be_made(tmp_path: Path, adapted: bool) -> None:
    model = MakesNone()
    model.embed.requires_grad_(False)
    if adapted:
        ll.inject_adapters(model, ll.LoRAConfig(r=2, modules_to_save=["head"]))
    before, statistics = flags(model), state(model.norm)
    assert before["q_proj.weight"] is not adapted and before["head.weight"]
    with pytest.raises(StopError):
        fit(tmp_path, lora(), model=model)
    assert flags(model) == before and is_plain(model) is not adapted
    model.train().norm(torch.ones(4, 8))
    assert same(state(model.norm), statistics) is adapted


def replace(model: LitTiny) -> None:
    model.q_proj = nn.Linear(8, 8)


def rename(model: LitTiny) -> None:
    model.other, model.v_proj = model.v_proj, nn.Identity()


def wrap(model: LitTiny) -> None:
    model.extra = nn.Sequential(nn.Linear(8, 8))


BIASES = {"modules_to_save": None, "bias": "all"}


@pytest.mark.parametrize(
    ("act", "named", "hook", "options"),
    [
        (replace, "'q_proj' of", "configure_optimizers", {}),
        (rename, "'v_proj' of", "on_fit_start", BIASES),
        (wrap, "'extra.0' of", "configure_optimizers", BIASES),
        (wrap, "'extra.0' of", "on_fit_start", {}),
    ],
)
def test_no_fit_starts_while_a_selected_layer_is_plain(
    tmp_path: Path, act: Any, named: str, hook: str, options: Any
) -> None:
    model = LitTiny()
    own = getattr(model, hook)
    setattr(model, hook, lambda: act(model) or own())
    with pytest.raises(ll.AdapterStateError, match=named):
        fit(tmp_path, lora(**options), model=model)
    assert is_plain(model) and model.trainer.global_step == 0
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith("other"))


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
@pytest.mark.parametrize("compute", [nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_no_step_is_taken_with_an_adapted_weight_that_is_computed(tmp_path: Path, compute: Any, hook: str) -> None:
    model = LitTiny()
    setattr(model, hook, lambda: compute(model.q_proj))
    with pytest.raises(ll.AdapterStateError, match=r"the weight of 'q_proj' of LitTiny is computed.*exclude_modules"):
        fit(tmp_path, lora(), model=model)
    assert model.trainer.global_step == 0 and not model.v_proj.lora_B.any()


@pytest.mark.parametrize(
    "compute",
    [nn.utils.parametrizations.spectral_norm, lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.5)],
)
def test_no_file_is_written_with_an_adapted_weight_that_is_computed(tmp_path: Path, compute: Any) -> None:
    """Code computes it in the middle of a fit, or in a loop of one's own."""
    model = LitTiny()
    model.on_train_epoch_end = lambda: compute(model.q_proj)  # type: ignore[method-assign]
    computed = pytest.raises(ll.AdapterStateError, match=r"the weight of 'q_proj' of LitTiny is computed")
    with computed:
        fit(tmp_path, lora(), best(tmp_path), model=model)
    ll.inject_adapters(by_own_loop := LitTiny(), ll.LoRAConfig(r=2))
    compute(by_own_loop.q_proj)
    with computed:
        ll.save_adapter(by_own_loop, tmp_path / "a.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))


class TrainsItsHead(LitTiny):  # whose adapters receive no gradient
    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        return self.head((torch.tanh(self.q_proj(x)) + self.v_proj(x)).detach())


def with_another_head(how: str, folder: Path) -> LitTiny:
    """A model whose head has changed beside fresh adapters: in a fit, by its file, or by other code."""
    model = TrainsItsHead()
    if how in ("fit", "merged", "loaded", "tested"):
        fitted, t = fit(folder, lora(merge="last" if how == "merged" else False), model=TrainsItsHead())
        t.save_checkpoint(folder / "a.ckpt")
        if how == "loaded":
            ll.load_adapter(model, folder / "a.ckpt")
        elif how == "tested":
            trainer(folder, [lora(merge=False)]).test(model, data(), ckpt_path=folder / "a.ckpt", verbose=False)
        return model if how in ("loaded", "tested") else fitted
    ll.inject_adapters(model, lora().config)
    if how == "replaced":
        model.head.weight = nn.Parameter(model.head.weight.detach() + 1)
    else:
        model.head.weight.data.add_(1)
    if how == "written and merged":
        ll.merge_adapters(model)
    return model


@pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")
@pytest.mark.parametrize(
    ("how", "stage"),
    [
        ("fit", "fit"),
        ("merged", "validate"),
        ("loaded", "fit"),
        ("tested", "validate"),
        ("written", "validate"),
        ("replaced", "fit"),
        ("written and merged", "fit"),
    ],
)
def test_a_head_that_changed_beside_fresh_adapters_is_not_the_next_base(tmp_path: Path, how: str, stage: str) -> None:
    model = with_another_head(how, tmp_path)
    head = model.head.weight.detach().clone()
    assert not trained(model)["q_proj.lora_B"].any() and not torch.equal(head, LitTiny().head.weight)
    for _ in range(2):
        getattr(trainer(tmp_path, [lora(merge=False)], max_epochs=1), stage)(model, data())
    assert torch.equal(head, model.head.weight) is (stage != "fit")
    ll.save_adapter(model, tmp_path / "b.safetensors")
    assert same(trained(loaded(tmp_path / "b.safetensors")), trained(model))
    ll.unmerge_adapters(model)
    with ll.disable_adapters(model):
        assert torch.equal(model.head.weight, LitTiny().head.weight)
    ll.remove_adapters(model)
    assert same(state(model), state(LitTiny()))


class LoadsItsHead(LitTiny):  # whose weights come in a hook
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(1))

    def setup(self, stage: str) -> None:
        with torch.no_grad():
            self.head.weight.fill_(0.5)
        self.scale = torch.ones(1)


@pytest.mark.parametrize("begin", ["plain", "adapted", "changed", "ckpt"])
@pytest.mark.parametrize("stage", ["validate", "fit"])
def test_what_hooks_load_in_a_stage_is_the_base(tmp_path: Path, stage: str, begin: str) -> None:
    model, t = LoadsItsHead(), trainer(tmp_path, [ll.LoRACallback(merge=False)], max_epochs=1)
    path = tmp_path / "a.ckpt" if begin == "ckpt" else None
    if path:
        fit(tmp_path, lora(merge=False), model=LoadsItsHead())[1].save_checkpoint(path)
        t = trainer(tmp_path, [ll.LoRACallback(merge=False)], max_epochs=3)
    if begin in ("adapted", "changed"):
        ll.inject_adapters(model, ll.LoRAConfig(r=2, modules_to_save=["head"]))
    if begin == "changed":
        model.head.weight.data.add_(1)
    getattr(t, stage)(model, data(), ckpt_path=path)
    if not is_plain(model):
        ll.remove_adapters(model)
    assert (begin, stage) == ("plain", "fit") or (model.head.weight == 0.5).all()
    assert (model.scale == 1).all()


class LoadsLate(LitTiny):  # in on_fit_start, all but its head by one of two ways
    def __init__(self, way: str = "load") -> None:
        super().__init__()
        self.way, self.norm = way, nn.BatchNorm1d(WIDTH)
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(0.5)

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) + self.norm(self.embed(index))[:, :CLASSES]

    def on_fit_start(self) -> None:
        late = late_base().state_dict()
        if self.way == "load":
            self.load_state_dict(late, strict=False)
        for name, value in {**dict(self.named_parameters()), **dict(self.named_buffers())}.items():
            if name in late and self.way == "data":
                value.data.copy_(late[name])


def late_base() -> LitTiny:
    """What it is then."""
    model = LoadsLate()
    with torch.no_grad():
        for value in (*model.parameters(), model.norm.running_mean):
            value.add_(0.25)
    return model


@pytest.mark.parametrize(
    ("way", "init", "precision"),
    [("load", "pissa", "32-true"), ("data", "pissa", "32-true"), ("load", "kaiming", "bf16-true")],
)
def test_the_base_is_what_is_there_when_training_begins(tmp_path: Path, way: str, init: Any, precision: Any) -> None:
    begins, options = list[Any](), {"precision": precision, "max_epochs": 1}
    looks = At(0, lambda t, m: begins.append(state(m.q_proj)))
    model, t = fit(tmp_path, lora(init=init), looks, model=LoadsLate(way), **options)
    if init == "pissa":
        ll.inject_adapters(expected := late_base(), lora(init=init).config)
        assert same(begins[0], state(expected.q_proj))
    t.save_checkpoint(file := tmp_path / "a.ckpt")
    assert "embed.weight" not in torch.load(file, weights_only=True)["state_dict"]
    ll.load_adapter(other := late_base().to(model.dtype), file)
    ll.merge_adapters(other)
    assert same(state(other), state(model))
    with pytest.raises(ll.BaseMismatchError, match="in the module's __init__ or setup"):
        ll.load_adapter(LoadsLate().to(model.dtype), file)
    ll.remove_adapters(other)
    ll.unmerge_adapters(model)
    ll.remove_adapters(model)
    assert same(state(model), state(late_base().to(model.dtype)))


# An evaluation with nothing to load adds nothing


def half_frozen() -> LitTiny:
    model = LitTiny()
    model.q_proj.requires_grad_(False)
    return model


def looks(model: nn.Module) -> list[Any]:
    """All that one sees of a model."""
    hooks = [model._load_state_dict_pre_hooks, model._state_dict_hooks, model._forward_hooks]
    return [[type(module) for module in model.modules()], flags(model), [len(each) for each in hooks]]


@pytest.mark.parametrize(("stage", "trial"), [("validate", 1), ("test", False), ("predict", False)])
def test_a_plain_model_stays_plain(tmp_path: Path, stage: str, trial: Any) -> None:
    model, expected = half_frozen(), outcome(trainer(tmp_path, fast_dev_run=trial), stage, LitTiny())
    before, values = looks(model), state(model)
    for targets in ("all-linear", ["nowhere"]):  # which are a matter of fits and files
        t = trainer(tmp_path, [lora(target_modules=targets)], fast_dev_run=trial)
        assert torch.equal(outcome(t, stage, model), expected) and torch.equal(outcome(t, stage, model), expected)
        assert looks(model) == before and same(state(model), values) and find_record(model) is None


@pytest.mark.parametrize("build", [BornInSetup, BornInConfigureModel, BuiltAnew])
def test_layers_that_are_made_late_stay_plain_too(tmp_path: Path, build: Callable[[], LitTiny]) -> None:
    model, t = build(), trainer(tmp_path, [lora()])
    for stage in ("validate", "test", "predict"):
        outcome(t, stage, model)
        assert is_plain(model) and find_record(model) is None and all(flags(model).values())
    t.fit(model, data())
    assert is_plain(model) and find_record(model) is not None


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_a_full_checkpoint_is_loaded_as_lightning_does(tmp_path: Path, stage: str) -> None:
    other, t = fit(tmp_path, max_epochs=1)
    t.save_checkpoint(tmp_path / "full.ckpt")
    expected = outcome(trainer(tmp_path), stage, other)
    model, t = half_frozen(), trainer(tmp_path, [lora()])
    before = looks(model)
    assert torch.equal(outcome(t, stage, model, ckpt_path=tmp_path / "full.ckpt"), expected)
    assert looks(model) == before and same(state(model), state(other)) and find_record(model) is None


@pytest.mark.parametrize("part", [False, True])
def test_adapters_that_are_there_are_evaluated(tmp_path: Path, part: bool) -> None:
    model = LitTiny()
    model.body = nn.ModuleDict({"q": model.q_proj, "head": model.head})
    config = lora(target_modules=["q"] if part else ["q_proj"]).config
    ll.inject_adapters(model.body if part else model, config)
    model.q_proj.lora_B.data.fill_(0.1)  # type: ignore[union-attr,operator]
    model.head.weight.data.add_(1)
    expected = outcome(trainer(tmp_path), "predict", model)
    t = trainer(tmp_path, [lora(target_modules=["q_proj"])])
    assert torch.equal(outcome(t, "predict", model), expected) and not is_plain(model)
    ll.remove_adapters(model)
    assert torch.equal(model.head.weight, LitTiny().head.weight)
