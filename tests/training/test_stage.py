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
from lightning_lora.model.records import find_record
from lightning_lora.training.stages.stage import Stage
from tests.support.cases import (
    At,
    StopError,
    base_is_whole,
    files_hold_adapters_alone,
    same_parts,
    trained,
)
from tests.support.compared import assert_same_tensors
from tests.support.fits import adam, by_hand, fit, loaded, outcome
from tests.support.late import BornInConfigureModel, BornInSetup, BuiltAnew, Normed
from tests.support.models import (
    CLASSES,
    WIDTH,
    LitTiny,
    as_trained,
    best,
    data,
    is_plain,
    lora,
    same,
    state,
    trainer,
)
from tests.support.parameters import add_to, classes, flags_of, trainable


def run_stage(t: L.Trainer, stage: str, model: Any, **options: Any) -> None:
    """Call a stage of a Trainer by its name."""
    getattr(t, stage)(model, data(), **options)


# Each file has numbers of its own


class Numbers:
    """What each file gives in a stage, and whether a Trainer gives it too."""

    def __init__(self, folder: Path, stage: str, files: dict[str, str]) -> None:
        self.folder = folder
        self.stage = stage
        self.files = files
        self.plain = trainer(folder, enable_checkpointing=False)  # without the callback
        self.expected = {"base": outcome(self.plain, stage, loaded(None))}
        for name, path in files.items():
            self.expected[name] = outcome(self.plain, stage, loaded(path))

    def assert_all_differ(self, count: int) -> None:
        values = self.expected.values()
        different = {tuple(value.flatten().tolist()) for value in values}
        assert len(different) == count

    def check(
        self, t: L.Trainer, model: LitTiny, begins: str, asked: list[str]
    ) -> None:
        """A module that begins with a file's adapters gives what it should, whichever file is asked for, and after."""
        shape = None
        if begins != "base":
            shape = is_plain(model)
        now = begins
        self.check_one(t, model, now, shape)
        for name in asked:
            now = name
            path = self.files["path"] if name == "path" else name
            self.check_one(t, model, now, shape, ckpt_path=path)
        self.check_one(t, model, now, shape)
        assert files_hold_adapters_alone(self.folder)

    def check_one(
        self,
        t: L.Trainer,
        model: LitTiny,
        now: str,
        shape: bool | None,
        ckpt_path: str | None = None,
    ) -> None:
        found = outcome(t, self.stage, model, ckpt_path=ckpt_path)
        torch.testing.assert_close(found, self.expected[now])
        if shape is not None:
            assert is_plain(model) is shape
        without_the_callback = outcome(self.plain, self.stage, model)
        torch.testing.assert_close(without_the_callback, self.expected[now])


def saves_the_worst(folder: Path) -> ModelCheckpoint:
    """Its best file is surely not the last one."""
    return best(folder, mode="max", save_top_k=-1, save_last=True)


@pytest.mark.parametrize(
    ("stage", "merge", "end"),
    [
        ("validate", "last", "last"),
        ("test", "best", "best"),
        ("test", False, "last"),
        ("predict", "best", "best"),
    ],
)
def test_each_file_gives_its_own_numbers_in_each_stage(
    tmp_path: Path, stage: str, merge: Any, end: str
) -> None:
    first = saves_the_worst(tmp_path)
    model, t = fit(
        tmp_path, lora(merge=merge), first, model=LitTiny(lr=0.5), max_epochs=4
    )
    files = {
        "best": first.best_model_path,
        "last": first.last_model_path,
        "path": str(tmp_path / "best-epoch=2.ckpt"),
    }
    numbers = Numbers(tmp_path, stage, files)
    numbers.assert_all_differ(4)
    numbers.check(t, model, end, ["last", "best", "path"])
    if stage == "test":
        (result,) = t.test(dataloaders=data(), verbose=False)  # no model means the best
        assert result["test_loss"] == pytest.approx(numbers.expected["best"].item())
        outcome(t, stage, model, ckpt_path=files["path"])
    new = trainer(tmp_path, [lora(merge=merge), saves_the_worst(tmp_path)])
    numbers.check(new, model, "path", ["last", "path"])
    another = trainer(tmp_path, [lora(merge=merge), saves_the_worst(tmp_path)])
    numbers.check(another, LitTiny(), "base", ["path", "last"])
    assert base_is_whole(model)


@pytest.mark.parametrize(
    ("begin", "merge"),
    [
        ("fit", "last"),
        ("fit", False),
        ("load", False),
        ("resume", "last"),
        ("safetensors", "last"),
    ],
)
def test_fit_goes_on_from_the_adapters_that_are_there(
    tmp_path: Path, begin: str, merge: Any
) -> None:
    file = tmp_path / "first.ckpt"
    model, t = fit(tmp_path, lora(merge=merge), best(tmp_path / "1"), max_epochs=1)
    t.save_checkpoint(file, weights_only=begin == "load")
    ll.save_adapter(model, tmp_path / "first.safetensors")
    expected = loaded(file)
    by_hand(adam(trainable(expected)), expected)
    if begin in ("load", "resume"):
        model = loaded(file)
    if begin == "safetensors":
        model = loaded(tmp_path / "first.safetensors")
    if begin == "resume":
        trainer(tmp_path, [lora()]).validate(
            model, data(), ckpt_path=file, verbose=False
        )
    fit(tmp_path, lora(merge=merge), best(tmp_path / "2"), model=model, max_epochs=3)
    assert is_plain(model) is bool(merge)
    assert files_hold_adapters_alone(tmp_path)
    assert same_parts(trained(model), trained(expected))
    assert base_is_whole(model)


# A stage that fails


class Broken(LitTiny):
    """A module whose test fails, with a hook that may load weights."""

    def setup(self, stage: str) -> None:
        pass

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        raise StopError


def assert_gives_back(
    model: LitTiny,
    t: L.Trainer,
    stage: str,
    error: type[Exception],
    file: Path | None = None,
) -> None:
    """The stage fails, and the module is what it was."""
    values = state(model)
    flags = flags_of(model)
    with pytest.raises(error):
        run_stage(t, stage, model, ckpt_path=file)
    assert is_plain(model)
    assert_same_tensors(state(model), values)
    assert flags_of(model) == flags


def test_failed_stage_gives_the_module_back_as_it_came(tmp_path: Path) -> None:
    cut = tmp_path / "cut.ckpt"
    good = tmp_path / "good.ckpt"
    cut.write_bytes(b"PK")
    model = Broken()
    t = trainer(tmp_path, [lora()])
    wrong = trainer(tmp_path, [lora(target_modules=["nope"])])
    assert_gives_back(model, t, "test", ll.AdapterFileError, cut)
    assert_gives_back(model, t, "fit", ll.AdapterFileError, cut)
    assert_gives_back(model, t, "test", StopError)
    model.train()  # Lightning leaves a module in eval mode when its test fails
    t.fit(model, data())
    merged = state(model)
    t.save_checkpoint(good)
    assert_gives_back(model, t, "test", ll.AdapterFileError, cut)
    assert_gives_back(model, t, "test", StopError)
    assert_gives_back(model, wrong, "test", ll.TargetError, good)
    model.load_state_dict(LitTiny().state_dict())
    with pytest.warns(ll.LoRAWarning, match="new base"):
        assert_gives_back(model, t, "test", StopError)
    model.q_proj.weight.data.add_(1)
    with pytest.warns(UserWarning, match="taken as a new base"):
        assert_gives_back(model, t, "test", ll.BaseMismatchError, good)
    model.load_state_dict(merged)
    ll.unmerge_adapters(model)
    assert torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)


class MakesNone(Normed):
    """A module that raises where it should make its optimizer."""

    def configure_optimizers(self) -> Any:
        assert self.q_proj.weight.requires_grad  # the base as it was
        assert not self.embed.weight.requires_grad
        raise StopError


@pytest.mark.parametrize("adapted", [True, False])
def test_flags_are_as_they_were_after_an_optimizer_that_could_not_be_made(
    tmp_path: Path, adapted: bool
) -> None:
    model = MakesNone()
    model.embed.requires_grad_(False)
    if adapted:
        ll.inject_adapters(model, ll.LoRAConfig(r=2, modules_to_save=["head"]))
    before = flags_of(model)
    statistics = state(model.norm)
    assert before["q_proj.weight"] is not adapted
    assert before["head.weight"]
    with pytest.raises(StopError):
        fit(tmp_path, lora(), model=model)
    assert flags_of(model) == before
    assert is_plain(model) is not adapted
    model.train()
    model.norm(torch.ones(4, 8))
    assert same(state(model.norm), statistics) is adapted


# Layers that are changed before the first step


def replace(model: LitTiny) -> None:
    model.q_proj = nn.Linear(8, 8)


def rename(model: LitTiny) -> None:
    model.other = model.v_proj
    model.v_proj = nn.Identity()


def wrap(model: LitTiny) -> None:
    model.extra = nn.Sequential(nn.Linear(8, 8))


def act_in(model: LitTiny, hook: str, act: Callable[[LitTiny], object]) -> None:
    """Let a module's hook do something first."""
    usual = getattr(model, hook)

    def hooked() -> Any:
        act(model)
        return usual()

    setattr(model, hook, hooked)


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
    act_in(model, hook, act)
    with pytest.raises(ll.AdapterStateError, match=named):
        fit(tmp_path, lora(**options), model=model)
    assert is_plain(model)
    assert model.trainer.global_step == 0
    frozen = [name for name, trains in flags_of(model).items() if not trains]
    assert set(frozen) <= {"other.weight"}


def spectral_norm(model: LitTiny) -> None:
    nn.utils.parametrizations.spectral_norm(model.q_proj)


def weight_norm(model: LitTiny) -> None:
    nn.utils.weight_norm(model.q_proj)


def prune(model: LitTiny) -> None:
    nn.utils.prune.random_unstructured(model.q_proj, "weight", 0.5)


COMPUTED = "the weight of 'q_proj' of LitTiny is computed"


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
@pytest.mark.parametrize("compute", [spectral_norm, weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_no_step_is_taken_with_an_adapted_weight_that_is_computed(
    tmp_path: Path, compute: Any, hook: str
) -> None:
    model = LitTiny()
    act_in(model, hook, compute)
    with pytest.raises(ll.AdapterStateError, match=f"{COMPUTED}.*exclude_modules"):
        fit(tmp_path, lora(), model=model)
    assert model.trainer.global_step == 0
    assert not model.v_proj.lora_B.any()


@pytest.mark.parametrize("compute", [spectral_norm, prune])
def test_no_file_is_written_with_an_adapted_weight_that_is_computed(
    tmp_path: Path, compute: Any
) -> None:
    """Code computes it in the middle of a fit, or in a loop of one's own."""
    model = LitTiny()
    act_in(model, "on_train_epoch_end", compute)
    with pytest.raises(ll.AdapterStateError, match=COMPUTED):
        fit(tmp_path, lora(), best(tmp_path), model=model)
    by_own_loop = LitTiny()
    ll.inject_adapters(by_own_loop, ll.LoRAConfig(r=2))
    compute(by_own_loop)
    with pytest.raises(ll.AdapterStateError, match=COMPUTED):
        ll.save_adapter(by_own_loop, tmp_path / "a.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))


# A head that changed beside adapters that learned nothing


class TrainsItsHead(LitTiny):
    """A module whose adapters receive no gradient."""

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        features = torch.tanh(self.q_proj(x)) + self.v_proj(x)
        return self.head(features.detach())


def head_changed_by_a_fit(folder: Path) -> LitTiny:
    model, _ = fit(folder, lora(merge=False), model=TrainsItsHead())
    return model


def head_changed_by_a_fit_and_merged(folder: Path) -> LitTiny:
    model, _ = fit(folder, lora(merge="last"), model=TrainsItsHead())
    return model


def file_of_a_fit(folder: Path) -> Path:
    file = folder / "a.ckpt"
    _, t = fit(folder, lora(merge=False), model=TrainsItsHead())
    t.save_checkpoint(file)
    return file


def head_loaded_from_a_file(folder: Path) -> LitTiny:
    model = TrainsItsHead()
    ll.load_adapter(model, file_of_a_fit(folder))
    return model


def head_tested_from_a_file(folder: Path) -> LitTiny:
    model = TrainsItsHead()
    t = trainer(folder, [lora(merge=False)])
    t.test(model, data(), ckpt_path=file_of_a_fit(folder), verbose=False)
    return model


def head_written(folder: Path) -> LitTiny:
    model = TrainsItsHead()
    ll.inject_adapters(model, lora().config)
    model.head.weight.data.add_(1)
    return model


def head_written_and_merged(folder: Path) -> LitTiny:
    model = head_written(folder)
    ll.merge_adapters(model)
    return model


def head_replaced(folder: Path) -> LitTiny:
    model = TrainsItsHead()
    ll.inject_adapters(model, lora().config)
    model.head.weight = nn.Parameter(model.head.weight.detach() + 1)
    return model


@pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")
@pytest.mark.parametrize(
    ("build", "stage"),
    [
        (head_changed_by_a_fit, "fit"),
        (head_changed_by_a_fit_and_merged, "validate"),
        (head_loaded_from_a_file, "fit"),
        (head_tested_from_a_file, "validate"),
        (head_written, "validate"),
        (head_replaced, "fit"),
        (head_written_and_merged, "fit"),
    ],
)
def test_a_head_that_changed_beside_fresh_adapters_is_not_the_next_base(
    tmp_path: Path, build: Callable[[Path], LitTiny], stage: str
) -> None:
    model = build(tmp_path)
    head = model.head.weight.detach().clone()
    assert not trained(model)["q_proj.lora_B"].any()
    assert not torch.equal(head, LitTiny().head.weight)
    for _ in range(2):
        t = trainer(tmp_path, [lora(merge=False)], max_epochs=1)
        run_stage(t, stage, model)
    assert torch.equal(head, model.head.weight) is (stage != "fit")
    ll.save_adapter(model, tmp_path / "b.safetensors")
    again = loaded(tmp_path / "b.safetensors")
    assert_same_tensors(trained(again), trained(model))
    ll.unmerge_adapters(model)
    with ll.disable_adapters(model):
        assert torch.equal(model.head.weight, LitTiny().head.weight)
    ll.remove_adapters(model)
    assert_same_tensors(state(model), state(LitTiny()))


# Weights that come in a hook


class LoadsItsHead(LitTiny):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(1))

    def setup(self, stage: str) -> None:
        nn.init.constant_(self.head.weight, 0.5)
        self.scale = torch.ones(1)


@pytest.mark.parametrize("begin", ["plain", "adapted", "changed", "ckpt"])
@pytest.mark.parametrize("stage", ["validate", "fit"])
def test_what_hooks_load_in_a_stage_is_the_base(
    tmp_path: Path, stage: str, begin: str
) -> None:
    model = LoadsItsHead()
    path = None
    epochs = 1
    if begin == "ckpt":
        path = tmp_path / "a.ckpt"
        epochs = 3
        _, t = fit(tmp_path, lora(merge=False), model=LoadsItsHead())
        t.save_checkpoint(path)
    if begin in ("adapted", "changed"):
        ll.inject_adapters(model, ll.LoRAConfig(r=2, modules_to_save=["head"]))
    if begin == "changed":
        model.head.weight.data.add_(1)
    t = trainer(tmp_path, [ll.LoRACallback(merge=False)], max_epochs=epochs)
    run_stage(t, stage, model, ckpt_path=path)
    if not is_plain(model):
        ll.remove_adapters(model)
    head_is_adapted = begin == "plain" and stage == "fit"
    assert head_is_adapted or (model.head.weight == 0.5).all()
    assert (model.scale == 1).all()


class LoadsLate(LitTiny):
    """A module that gets all weights but its head's in on_fit_start, by ``load_state_dict`` or by ``data``."""

    def __init__(self, way: str = "load") -> None:
        super().__init__()
        self.way = way
        self.norm = nn.BatchNorm1d(WIDTH)
        for p in self.parameters():
            p.data.mul_(0.5)

    def forward(self, index: Tensor) -> Tensor:
        normed = self.norm(self.embed(index))
        return super().forward(index) + normed[:, :CLASSES]

    def on_fit_start(self) -> None:
        late = late_base().state_dict()
        if self.way == "load":
            self.load_state_dict(late, strict=False)
            return
        held = dict(self.named_parameters()) | dict(self.named_buffers())
        for name in held.keys() & late.keys():
            held[name].data.copy_(late[name])


def late_base() -> LitTiny:
    """What it is then."""
    model = LoadsLate()
    for value in (*model.parameters(), model.norm.running_mean):
        assert value is not None
        value.data.add_(0.25)
    return model


@pytest.mark.parametrize(
    ("way", "init", "precision"),
    [
        ("load", "pissa", "32-true"),
        ("data", "pissa", "32-true"),
        ("load", "kaiming", "bf16-true"),
    ],
)
def test_the_base_is_what_is_there_when_training_begins(
    tmp_path: Path, way: str, init: Any, precision: Any
) -> None:
    begins: list[Any] = []

    def look(_: L.Trainer, module: Any) -> None:
        begins.append(state(module.q_proj))

    model, t = fit(
        tmp_path,
        lora(init=init),
        At(0, look),
        model=LoadsLate(way),
        precision=precision,
        max_epochs=1,
    )
    if init == "pissa":
        expected = late_base()
        ll.inject_adapters(expected, lora(init=init).config)
        assert_same_tensors(begins[0], state(expected.q_proj))
    file = tmp_path / "a.ckpt"
    t.save_checkpoint(file)
    assert "embed.weight" not in torch.load(file, weights_only=True)["state_dict"]
    other = late_base().to(model.dtype)
    ll.load_adapter(other, file)
    ll.merge_adapters(other)
    assert_same_tensors(state(other), state(model))
    before_its_hook = LoadsLate().to(model.dtype)
    with pytest.raises(ll.BaseMismatchError, match="in the module's __init__ or setup"):
        ll.load_adapter(before_its_hook, file)
    ll.remove_adapters(other)
    ll.unmerge_adapters(model)
    ll.remove_adapters(model)
    base = late_base().to(model.dtype)
    assert_same_tensors(state(model), state(base))


# An evaluation with nothing to load adds nothing


def half_frozen() -> LitTiny:
    model = LitTiny()
    model.q_proj.requires_grad_(False)
    return model


def looks(model: nn.Module) -> list[Any]:
    """All that one sees of a model."""
    return [
        classes(model),
        flags_of(model),
        len(model._load_state_dict_pre_hooks),
        len(model._state_dict_hooks),
        len(model._forward_hooks),
    ]


@pytest.mark.parametrize(
    ("stage", "trial"), [("validate", 1), ("test", False), ("predict", False)]
)
# which are a matter of fits and files
@pytest.mark.parametrize("targets", ["all-linear", ["nowhere"]])
def test_a_plain_model_stays_plain(
    tmp_path: Path, stage: str, trial: Any, targets: Any
) -> None:
    model = half_frozen()
    plain = trainer(tmp_path, fast_dev_run=trial)
    expected = outcome(plain, stage, LitTiny())
    before = looks(model)
    values = state(model)
    t = trainer(tmp_path, [lora(target_modules=targets)], fast_dev_run=trial)
    for _ in range(2):
        assert torch.equal(outcome(t, stage, model), expected)
    assert looks(model) == before
    assert_same_tensors(state(model), values)
    assert find_record(model) is None


@pytest.mark.parametrize("build", [BornInSetup, BornInConfigureModel, BuiltAnew])
def test_layers_that_are_made_late_stay_plain_too(
    tmp_path: Path, build: Callable[[], LitTiny]
) -> None:
    model = build()
    t = trainer(tmp_path, [lora()])
    for stage in ("validate", "test", "predict"):
        outcome(t, stage, model)
        assert is_plain(model)
        assert find_record(model) is None
        assert all(flags_of(model).values())
    t.fit(model, data())
    assert is_plain(model)
    assert find_record(model) is not None


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_a_full_checkpoint_is_loaded_as_lightning_does(
    tmp_path: Path, stage: str
) -> None:
    file = tmp_path / "full.ckpt"
    other, t = fit(tmp_path, max_epochs=1)
    t.save_checkpoint(file)
    expected = outcome(trainer(tmp_path), stage, other)
    model = half_frozen()
    before = looks(model)
    t = trainer(tmp_path, [lora()])
    assert torch.equal(outcome(t, stage, model, ckpt_path=file), expected)
    assert looks(model) == before
    assert_same_tensors(state(model), state(other))
    assert find_record(model) is None


@pytest.mark.parametrize("part", [False, True])
def test_adapters_that_are_there_are_evaluated(tmp_path: Path, part: bool) -> None:
    model = LitTiny()
    model.body = nn.ModuleDict({"q": model.q_proj, "head": model.head})
    if part:
        ll.inject_adapters(model.body, lora(target_modules=["q"]).config)
    else:
        ll.inject_adapters(model, lora(target_modules=["q_proj"]).config)
    model.q_proj.lora_B.data.fill_(0.1)  # type: ignore[union-attr,operator]
    model.head.weight.data.add_(1)
    expected = outcome(trainer(tmp_path), "predict", model)
    t = trainer(tmp_path, [lora(target_modules=["q_proj"])])
    assert torch.equal(outcome(t, "predict", model), expected)
    assert not is_plain(model)
    ll.remove_adapters(model)
    assert torch.equal(model.head.weight, LitTiny().head.weight)


class LoadsTrained(LitTiny):
    """A module whose hook loads what another training has made of its adapters and its head."""

    values: Any

    def on_fit_start(self) -> None:
        self.load_state_dict(self.values)


def test_what_a_hook_loads_with_trained_adapters_is_no_base(tmp_path: Path) -> None:
    other = as_trained(LitTiny(), **lora().config.to_dict())
    add_to(other.head.weight, 1)
    model = LoadsTrained()
    model.values = state(other)
    fit(tmp_path, lora(merge=False), model=model, max_epochs=1)
    with ll.disable_adapters(model):
        assert torch.equal(model.head.weight, LitTiny().head.weight)


@pytest.mark.parametrize("others_may_be_missing", [False, True])
def test_after_an_error_a_module_is_merged_again_only_where_no_other_process_is_needed(
    tmp_path: Path, others_may_be_missing: bool
) -> None:
    model, _ = fit(tmp_path, lora(), max_epochs=1)
    stage = Stage(lora().config)
    stage.begin(model)
    assert not is_plain(model)
    stage.end_after_error(model, others_may_be_missing=others_may_be_missing)
    assert is_plain(model) is not others_may_be_missing
