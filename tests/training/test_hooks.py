"""Hooks of modules that fill buffers from data, rebuild layers, or read files."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

import lightning_lora as ll
from lightning_lora.storage.offline.merge_files import merge_files
from lightning_lora.storage.stored import KEY, StoredAdapters
from tests.support.cases import files_hold_adapters_alone, held, tensors
from tests.support.compared import assert_same_tensors
from tests.support.faults import unchanged
from tests.support.fits import fit, resumes_to_the_bit
from tests.support.late import Normed
from tests.support.models import (
    TRAINED,
    LitTiny,
    TinyLM,
    X,
    data,
    is_plain,
    lora,
    state,
    trainer,
)
from tests.support.storage import fitted, goes_on, restores
from tests.support.versions import exact

in_one_process_and_two = pytest.mark.parametrize(
    ("save", "options"),
    [
        ("adapters", {}),
        ("model", {}),
        ("adapters", {"strategy": "ddp_fork", "devices": 2}),
    ],
)


def evaluates_any_file(folder: Path, **options: Any) -> Any:
    """A Trainer whose callback takes its arguments from the file."""
    return trainer(folder, [ll.LoRACallback()], **options)


def loads(model: Any, file: Path) -> Any:
    """The module, with the adapters of a file."""
    ll.load_adapter(model, file)
    return model


def evaluated(model: Any, file: Path) -> Any:
    """The module, with the adapters of a file that an evaluation has loaded."""
    ll.inject_adapters(model, lora().config)
    evaluates_any_file(file.parent).validate(
        model, data(), ckpt_path=file, verbose=False
    )
    evaluates_any_file(file.parent).test(model, data(), ckpt_path=file, verbose=False)
    return model


def as_trained_by_a_fit(file: Path, model: Any, **arguments: Any) -> Any:
    """The module after a fit whose adapters stay on it, and whose file is written."""
    return fitted(file, model, lora(merge=False, **arguments))


# Buffers that setup fills from data


class Scaled(LitTiny):
    """A module whose scale and whose classes' weights are taken from its data, which may be others later."""

    def __init__(self, value: float = 2.0) -> None:
        super().__init__()
        self.value = value
        self.register_buffer("scale", torch.zeros(4))
        self.weigh = nn.CrossEntropyLoss(weight=torch.ones(4))

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.scale = torch.full((4,), self.value)
            weights = torch.arange(1.0, 5.0) * self.value
            self.weigh.weight.copy_(weights)  # type: ignore[union-attr]

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) * self.scale

    def loss(self, batch: list[Tensor]) -> Tensor:
        return self.weigh(self(batch[0]), batch[1])


FILLED = ["scale", "weigh.weight"]


def by_an_evaluation(checkpoint: Path, adapters: Path) -> Scaled:
    return evaluated(Scaled(), checkpoint)


def by_load_from_checkpoint(checkpoint: Path, adapters: Path) -> Scaled:
    return ll.load_from_checkpoint(Scaled, checkpoint)


def by_load_adapter_of_the_checkpoint(checkpoint: Path, adapters: Path) -> Scaled:
    return loads(Scaled(), checkpoint)


def by_load_adapter(checkpoint: Path, adapters: Path) -> Scaled:
    return loads(Scaled(), adapters)


READERS = [
    by_an_evaluation,
    by_load_from_checkpoint,
    by_load_adapter_of_the_checkpoint,
    by_load_adapter,
]


@pytest.mark.parametrize(("save", "merge"), [("adapters", "last"), ("model", False)])
@pytest.mark.parametrize("read", READERS)
def test_what_setup_takes_from_data_is_in_every_file_and_restored(
    tmp_path: Path, save: str, merge: Any, read: Callable[[Path, Path], Scaled]
) -> None:
    model = fitted(tmp_path / "a.ckpt", Scaled(), lora(save=save, merge=merge))
    ll.save_adapter(model, tmp_path / "a.safetensors")
    again = read(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert again.get_buffer("scale").tolist() == [2.0, 2.0, 2.0, 2.0]
    assert again.get_buffer("weigh.weight").tolist() == [2.0, 4.0, 6.0, 8.0]
    torch.testing.assert_close(again(X), model(X))
    t = evaluates_any_file(tmp_path, enable_checkpointing=False)
    t.validate(again, data(), verbose=False)
    t.save_checkpoint(tmp_path / "b.ckpt")  # and in every file of what was loaded
    ll.save_adapter(again, tmp_path / "b.safetensors")
    from_checkpoint = loads(Scaled(3.0), tmp_path / "b.ckpt")
    torch.testing.assert_close(from_checkpoint(X), model(X))
    from_adapters = loads(Scaled(3.0), tmp_path / "b.safetensors")
    torch.testing.assert_close(from_adapters(X), model(X))


class Still(Scaled):
    """A module whose setup fills nothing."""

    setup = LitTiny.setup


def test_a_callback_does_not_take_them_to_another_module(tmp_path: Path) -> None:
    callback = lora()
    fitted(tmp_path / "a.ckpt", Scaled(), callback)
    still = Still()
    still.scale += 1
    fitted(tmp_path / "b.ckpt", still, callback)
    assert set(tensors(tmp_path / "b.ckpt")) == set(TRAINED)


class Registering(LitTiny):
    """A module whose buffer exists only after set-up."""

    def setup(self, stage: str) -> None:
        self.register_buffer("mean", torch.zeros(4))
        if stage == "fit":
            self.mean += 2.0

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) * self.mean


def test_a_buffer_that_setup_registers_belongs_to_the_run_too(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    model = fitted(file, Registering(), lora())
    again = evaluated(Registering(), file)
    torch.testing.assert_close(again(X), model(X))
    with pytest.raises(
        ll.AdapterMismatchError, match=r"call model.setup\('fit'\) first"
    ):
        ll.load_adapter(Registering(), file)


@in_one_process_and_two
@pytest.mark.processes
def test_a_resumed_run_goes_on_with_what_the_first_setup_took(
    tmp_path: Path, save: str, options: Any
) -> None:
    values = iter([2.0, 3.0])

    def build() -> Scaled:
        return Scaled(next(values))

    resumed = resumes_to_the_bit(
        tmp_path, build, partial(lora, save=save), max_epochs=2, **options
    )
    assert resumed.scale.tolist() == [2.0, 2.0, 2.0, 2.0]


def forget_what_was_filled(file: Path) -> None:
    """Write a file as earlier versions did, which took the buffers for a part of the base."""
    checkpoint = torch.load(file, weights_only=True)
    kept = held(checkpoint)
    for name in FILLED:
        del kept[name]
    stored = StoredAdapters.from_description(kept, checkpoint[KEY] | {"random": []}, "")
    checkpoint["state_dict"] = kept
    checkpoint[KEY] = stored.description()
    torch.save(checkpoint, file)


def test_a_file_without_them_loads_where_setup_fills_the_same(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    model = as_trained_by_a_fit(file, Scaled())
    forget_what_was_filled(file)
    again, t = fit(
        tmp_path, lora(merge=False), model=Scaled(), ckpt_path=file, max_epochs=2
    )
    t.save_checkpoint(tmp_path / "b.ckpt")
    restores(tmp_path / "b.ckpt", again, Scaled())
    says = r"2 of 6 frozen tensors .* 'scale', 'weigh.weight'"
    with pytest.raises(ll.BaseMismatchError, match=says):
        loads(Scaled(), file)
    with pytest.raises(ll.BaseMismatchError, match=says):
        fit(tmp_path, lora(), model=Scaled(3.0), ckpt_path=file)
    assert model.scale.tolist() == [2.0, 2.0, 2.0, 2.0]


class Statistics(LitTiny):
    """A module whose buffer has another shape and dtype until setup has filled it, as in schnetpack."""

    def __init__(self, value: float = 2 / 3) -> None:
        super().__init__()
        self.value = value
        self.register_buffer("mean", torch.zeros(1))

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.mean = torch.tensor(self.value, dtype=torch.float64)

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) + self.mean.to(torch.float32)


def test_they_have_the_shape_and_the_dtype_that_setup_gave_them(tmp_path: Path) -> None:
    through = resumes_to_the_bit(
        tmp_path, Statistics, partial(lora, merge=False), max_epochs=2
    )
    file = tmp_path / "through" / "epoch=1.ckpt"
    by_evaluation = evaluated(Statistics(), file)
    by_loading = ll.load_from_checkpoint(Statistics, file)
    for each in (by_evaluation, by_loading):
        assert each.mean.shape == ()
        assert each.mean.dtype == torch.float64
        assert torch.equal(each(X), through(X))
    half = Statistics().to(torch.bfloat16)
    with pytest.warns(ll.LoRAWarning, match="It is the same base, converted"):
        ll.load_adapter(half, file)
    assert half.mean.dtype == torch.bfloat16
    assert half.mean == torch.tensor(2 / 3).bfloat16()
    file.write_bytes(b"PK")
    new = Statistics()
    with unchanged(new), pytest.raises(ll.AdapterFileError):
        ll.load_adapter(new, file)


class LoadsStatistics(Normed):
    def setup(self, stage: str) -> None:
        self.norm.running_mean.fill_(0.5)  # type: ignore[union-attr]


def test_statistics_of_a_norm_that_setup_loads_are_the_base(tmp_path: Path) -> None:
    as_trained_by_a_fit(tmp_path / "a.ckpt", LoadsStatistics())
    assert files_hold_adapters_alone(tmp_path)


def tabled(value: float = 0.0) -> LitTiny:
    model = LitTiny()
    model.register_buffer("table", torch.full((8,), value))
    return model


def test_buffers_of_a_full_checkpoint_are_the_base(tmp_path: Path) -> None:
    file = tmp_path / "full.ckpt"
    fitted(file, tabled(3.0), plain=True)
    model = tabled()
    t = trainer(tmp_path / "new", [lora(merge=False)])
    t.validate(model, data(), ckpt_path=file, verbose=False)
    t.fit(model, data())
    fit(tmp_path / "new", lora(merge=False), model=tabled(), ckpt_path=file)
    assert files_hold_adapters_alone(tmp_path / "new")


class Always(Scaled):
    """A module whose setup fills them in each stage."""

    def setup(self, stage: str) -> None:
        super().setup("fit")


def test_they_are_known_when_a_later_setup_changes_nothing(tmp_path: Path) -> None:
    model = Always()
    t = trainer(tmp_path, [lora(merge=False)], max_epochs=1, enable_checkpointing=False)
    t.validate(model, data(), verbose=False)
    t.fit(model, data())
    ll.save_adapter(model, tmp_path / "a.safetensors")
    again = loads(Scaled(), tmp_path / "a.safetensors")
    assert torch.equal(again(X), model(X))


def test_the_base_alone_computes_with_them(tmp_path: Path) -> None:
    model = as_trained_by_a_fit(tmp_path / "a.ckpt", Scaled())
    again = loads(Scaled(), tmp_path / "a.ckpt")
    base = LitTiny()(X) * 2
    assert torch.equal(again(X), model(X))
    assert not torch.equal(model(X), base)
    first_rows_by_the_base = [None] * 10 + ["default"] * 10
    for each in (model, again):
        with ll.disable_adapters(each):
            assert torch.equal(each(X), base)
        with ll.adapter_names(each, first_rows_by_the_base):
            assert torch.equal(each(X)[:10], base[:10])
        torch.testing.assert_close(each(X), model(X))


def merged_with(base: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors of a base with the updates of a file, by the command for files."""
    folder = file.parent
    save_file(base, folder / "base.safetensors")
    merge_files(folder / "base.safetensors", file, folder / "merged.safetensors")
    return load_file(folder / "merged.safetensors")


def fitted_without_a_saved_head(file: Path, value: float = 2.0) -> Scaled:
    """A module after a fit with nothing that trains in full, whose file is written."""
    return as_trained_by_a_fit(file, Scaled(value), modules_to_save=None)


def test_they_are_merged_into_a_base_that_has_a_place_for_them(tmp_path: Path) -> None:
    model = fitted_without_a_saved_head(tmp_path / "a.ckpt")
    base = Scaled().state_dict()
    merged = merged_with(base, tmp_path / "a.ckpt")
    assert merged.keys() == base.keys()
    new = Scaled(3.0)
    new.load_state_dict(merged)
    torch.testing.assert_close(new(X), model(X))


def test_a_base_that_has_no_place_for_them_is_merged_without_them(
    tmp_path: Path,
) -> None:
    fitted_without_a_saved_head(tmp_path / "a.ckpt")
    base = {f"net.{name}": value for name, value in LitTiny().state_dict().items()}
    merged = merged_with(base, tmp_path / "a.ckpt")
    assert merged.keys() == base.keys()


class Around(Scaled):
    """A module whose network is a module inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyLM()
        del self.embed, self.q_proj, self.v_proj, self.head

    def forward(self, index: Tensor) -> Tensor:
        return self.net(index)[:, :4] * self.scale


def test_the_export_names_what_its_reader_would_lack(tmp_path: Path) -> None:
    callback = ll.LoRACallback(r=2, merge=False)
    model = fitted(tmp_path / "a.ckpt", Around(), callback)
    ll.export_peft(model, tmp_path / "inside", root="net")  # a warning is an error
    with pytest.warns(
        ll.LoRAWarning,
        match="'scale', 'weigh.weight' may be untrained or were filled by setup",
    ):
        ll.export_peft(model, tmp_path / "peft", root="")


# Layers that on_load_checkpoint makes anew


class Rebuilds(LitTiny):
    """A module whose setup makes layers and copies the old ones' state, and is called before a file is loaded."""

    def setup(self, stage: str | None = None) -> None:
        before = self.state_dict()
        self.q_proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)
        self.load_state_dict(before, strict=False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.setup()


@pytest.mark.processes
@in_one_process_and_two
def test_a_run_whose_layers_are_made_anew_resumes_to_the_same_bits(
    tmp_path: Path, save: str, options: Any
) -> None:
    model = resumes_to_the_bit(
        tmp_path, Rebuilds, partial(lora, save=save), max_epochs=2, **options
    )
    assert is_plain(model)


@pytest.mark.parametrize(
    ("save", "merge"), [("adapters", "last"), ("adapters", False), ("model", "last")]
)
def test_layers_that_a_hook_makes_anew_get_the_files_adapters(
    tmp_path: Path, save: str, merge: Any
) -> None:
    saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    model, t = fit(tmp_path, lora(save=save, merge=merge), saves, model=Rebuilds())
    for name in ("epoch=0.ckpt", "epoch=1.ckpt"):
        file = tmp_path / name
        expected = ll.load_from_checkpoint(Rebuilds, file)(X)
        t.test(model, data(), ckpt_path=file, verbose=False)
        torch.testing.assert_close(model(X), expected)
        new = Rebuilds()
        evaluates_any_file(tmp_path).test(new, data(), ckpt_path=file, verbose=False)
        torch.testing.assert_close(new(X), expected)
    assert is_plain(model) is bool(merge)


class Sized(LitTiny):
    """A module whose head has the size of the file's."""

    def __init__(self, classes: int = 9) -> None:
        super().__init__()
        self.head = nn.Linear(8, classes)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rows = len(checkpoint["state_dict"]["head.weight"])
        self.head = nn.Linear(8, rows)


@pytest.mark.parametrize("save", ["adapters", "model"])
def test_a_head_may_get_the_size_of_the_files(tmp_path: Path, save: str) -> None:
    file = tmp_path / "a.ckpt"
    model = as_trained_by_a_fit(file, Sized(4), save=save)
    tested = Sized()
    evaluates_any_file(tmp_path).test(tested, data(), ckpt_path=file, verbose=False)
    torch.testing.assert_close(tested(X), model(X))
    built = ll.load_from_checkpoint(Sized, file)  # of a whole file, the merged model
    torch.testing.assert_close(built(X), model(X))
    goes_on(file, Sized(), lora(save=save))


# What on_load_checkpoint reads


class Reads(LitTiny):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.shown = checkpoint["state_dict"]


def by_a_resumed_fit(folder: Path, file: Path, save: str) -> Reads:
    model, _ = fit(
        folder,
        lora(save=save, merge=False),
        model=Reads(),
        ckpt_path=file,
        max_epochs=1,
    )
    return model


def by_evaluating(folder: Path, file: Path, save: str) -> Reads:
    return evaluated(Reads(), file)


def by_building(folder: Path, file: Path, save: str) -> Reads:
    return ll.load_from_checkpoint(Reads, file)


@pytest.mark.parametrize(
    ("save", "read"),
    [
        ("adapters", by_a_resumed_fit),
        ("adapters", by_evaluating),
        ("adapters", by_building),
        ("model", by_a_resumed_fit),
    ],
)
def test_a_hook_reads_plain_names_and_nothing_is_copied(
    tmp_path: Path, save: str, read: Any
) -> None:
    file = tmp_path / "a.ckpt"
    model = as_trained_by_a_fit(file, Reads(), save=save)
    again = read(tmp_path, file, save)
    expected = model.state_dict()
    now = again.state_dict()
    assert again.shown.keys() == expected.keys()
    for name, value in again.shown.items():
        assert not value.requires_grad
        assert torch.equal(value, expected[name])
        is_shared = value.data_ptr() == now[name].data_ptr()
        assert is_shared is (name not in TRAINED), name
    assert_same_tensors(state(again), state(model))


# Streams


class Stream(IterableDataset[Any]):
    """Items that come once, wherever they are read."""

    def __init__(self) -> None:
        self.at = torch.zeros(1).share_memory_()
        self.begun = torch.zeros(1).share_memory_()

    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        while True:
            self.at += 1
            number = self.at[0].long()
            yield number % 20, number % 4


class Sees(LitTiny):
    """A module that keeps which items its steps see."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch[0], list):  # of several loaders
            batch = batch[0]
        self.items += batch[0].tolist()
        return super().training_step(batch, batch_idx)


class Asks(Sees):
    """A module that asks for the number of batches, so that Lightning begins the data early."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 4 * (
            self.trainer.max_epochs or 0
        )
        return super().configure_optimizers()


class Orders(RandomSampler):
    """With an order for each epoch, as DistributedSampler has."""

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(epoch)


def loaders_of(stream: Stream, workers: int, is_alone: bool) -> CombinedLoader:
    """What loads a stream, alone or beside a set that has an order for each epoch."""
    ahead = 2 if workers else None
    loaders: list[Any] = [
        DataLoader(stream, num_workers=workers, prefetch_factor=ahead)
    ]
    if not is_alone:
        loaders.append(DataLoader(range(16), sampler=Orders(range(16))))  # type: ignore[arg-type]
    return CombinedLoader(loaders, "min_size")


@exact
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cls", [Sees, Asks])
@pytest.mark.parametrize("is_alone", [True, False])
def test_a_resumed_fit_begins_a_stream_once(
    tmp_path: Path, cls: Callable[[], Sees], workers: int, is_alone: bool
) -> None:
    stream = Stream()
    file = tmp_path / "a.ckpt"

    def items_seen(ckpt_path: Path | None, epochs: int) -> list[int]:
        model, t = fit(
            tmp_path,
            lora(),
            model=cls(),
            train=loaders_of(stream, workers, is_alone),
            ckpt_path=ckpt_path,
            limit_train_batches=4,
            enable_checkpointing=False,
            max_epochs=epochs,
        )
        t.save_checkpoint(file)
        return model.items

    assert items_seen(None, 1) == [1, 2, 3, 4]
    items = items_seen(file, 2)
    assert stream.begun == 2
    if not workers:  # which take some ahead
        assert items == [5, 6, 7, 8]


# Buffers that on_load_checkpoint fills


class FilledByLoading(Scaled):
    """A module that fills its scale where a checkpoint is loaded, and perhaps in its set-up."""

    def __init__(self, value: float = 1.0, *, loaded: float) -> None:
        super().__init__(value)
        self.scale += 1
        self.loaded = loaded

    def setup(self, stage: str) -> None:
        self.scale.fill_(self.value)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.scale.fill_(self.loaded)


class Restoring(Callback):
    """Writes and restores a checkpoint before the first step, as tuners do after their trials."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        path = Path(trainer.default_root_dir) / "trial.ckpt"
        trainer.save_checkpoint(path)
        trainer._checkpoint_connector.restore(path)


def resumes(model: FilledByLoading, file: Path) -> None:
    fit(file.parent, lora(merge=False), model=model, ckpt_path=file, max_epochs=2)


def test_one_that_only_loading_fills_belongs_to_the_base(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    as_trained_by_a_fit(file, FilledByLoading(loaded=5.0))
    for reads in (resumes, evaluated):
        with pytest.raises(
            ll.BaseMismatchError,
            match=r"1 of 6 frozen tensors of FilledByLoading differ.*'scale'",
        ):
            reads(FilledByLoading(loaded=5.0), file)
        model = FilledByLoading(loaded=1.0)
        reads(model, file)
        ll.save_adapter(model, tmp_path / "b.safetensors")
        assert set(load_file(tmp_path / "b.safetensors")) == set(TRAINED)


def test_one_that_set_up_fills_too_is_the_files(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    as_trained_by_a_fit(file, FilledByLoading(2.0, loaded=5.0))
    for reads in (resumes, evaluated):
        model = FilledByLoading(2.0, loaded=5.0)
        reads(model, file)
        ll.save_adapter(model, tmp_path / "b.safetensors")
        assert model.scale.tolist() == [2.0, 2.0, 2.0, 2.0]
        assert set(load_file(tmp_path / "b.safetensors")) == {"scale", *TRAINED}


@pytest.mark.parametrize(("value", "filled"), [(1.0, set()), (2.0, {"scale"})])
def test_a_restore_within_a_fit_notes_no_more_of_them(
    tmp_path: Path, value: float, filled: set[str]
) -> None:
    model = FilledByLoading(value, loaded=value)
    t = trainer(
        tmp_path,
        [lora(merge=False), Restoring()],
        max_epochs=1,
        enable_checkpointing=False,
    )
    t.fit(model, data())
    ll.save_adapter(model, tmp_path / "a.safetensors")
    assert model.scale.tolist() == [value] * 4
    assert set(load_file(tmp_path / "a.safetensors")) == {*filled, *TRAINED}
