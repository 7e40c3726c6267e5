"""Hooks of modules that fill buffers from data, rebuild layers, or read files."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

import lightning_lora as ll
from lightning_lora.storage.offline.combine_files import combine_files
from lightning_lora.storage.offline.merge_files import merge_files
from lightning_lora.storage.stored import KEY, StoredAdapters
from tests.support.cases import files_hold_adapters_alone, held, tensors
from tests.support.faults import unchanged
from tests.support.fits import fit, resumes_to_the_bit
from tests.support.late import Normed
from tests.support.models import TRAINED, LitTiny, TinyLM, X, data, is_plain, lora, same, state, trainer
from tests.support.storage import fitted, goes_on, restores
from tests.support.versions import exact

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
            self.weigh.weight.copy_(torch.arange(1.0, 5.0) * self.value)  # type: ignore[union-attr]

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) * self.scale

    def loss(self, batch: list[Tensor]) -> Tensor:
        return self.weigh(self(batch[0]), batch[1])


FILLED = ["scale", "weigh.weight"]


def evaluated(model: Any, file: Path) -> Any:  # with the adapters of a file that an evaluation has loaded
    ll.inject_adapters(model, lora().config)
    for stage in ("validate", "test"):
        getattr(trainer(file.parent, [ll.LoRACallback()]), stage)(model, data(), ckpt_path=file, verbose=False)
    return model


def loads(model: Scaled, file: Path) -> Scaled:
    ll.load_adapter(model, file)
    return model


READERS: list[Callable[[Path, Path], Scaled]] = [
    lambda file, _: evaluated(Scaled(), file),
    lambda file, _: ll.load_from_checkpoint(Scaled, file),
    lambda file, _: loads(Scaled(), file),
    lambda _, own: loads(Scaled(), own),
]


@pytest.mark.parametrize(("save", "merge"), [("adapters", "last"), ("model", False)])
def test_what_setup_takes_from_data_is_in_every_file_and_restored(tmp_path: Path, save: str, merge: Any) -> None:
    model = fitted(tmp_path / "a.ckpt", Scaled(), lora(save=save, merge=merge))
    ll.save_adapter(model, tmp_path / "a.safetensors")
    for read in READERS:
        again = read(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
        assert [again.get_buffer(name).tolist() for name in FILLED] == [[2.0] * 4, [2.0, 4.0, 6.0, 8.0]]
        torch.testing.assert_close(again(X), model(X))
        t = trainer(tmp_path, [ll.LoRACallback()], enable_checkpointing=False)
        t.validate(again, data(), verbose=False)
        t.save_checkpoint(tmp_path / "b.ckpt")  # and in every file of what was loaded
        ll.save_adapter(again, tmp_path / "b.safetensors")
        for file in ("b.ckpt", "b.safetensors"):
            torch.testing.assert_close(loads(Scaled(3.0), tmp_path / file)(X), model(X))


def test_a_callback_does_not_take_them_to_another_module(tmp_path: Path) -> None:
    class Still(Scaled):
        setup = LitTiny.setup  # which fills nothing

    fitted(tmp_path / "a.ckpt", Scaled(), callback := lora())
    still = Still()
    still.scale += 1
    fitted(tmp_path / "b.ckpt", still, callback)
    assert set(tensors(tmp_path / "b.ckpt")) == set(TRAINED)


class Registering(LitTiny):  # its buffer exists only after set-up
    def setup(self, stage: str) -> None:
        self.register_buffer("mean", torch.zeros(4))
        if stage == "fit":
            self.mean += 2.0

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) * self.mean


def test_a_buffer_that_setup_registers_belongs_to_the_run_too(tmp_path: Path) -> None:
    model = fitted(file := tmp_path / "a.ckpt", Registering(), lora())
    torch.testing.assert_close(evaluated(Registering(), file)(X), model(X))
    with pytest.raises(ll.AdapterMismatchError, match=r"call model.setup\('fit'\) first"):
        ll.load_adapter(Registering(), file)


one_or_two = pytest.mark.parametrize(
    ("save", "options"), [("adapters", {}), ("model", {}), ("adapters", {"strategy": "ddp_fork", "devices": 2})]
)


@one_or_two
@pytest.mark.processes
def test_a_resumed_run_goes_on_with_what_the_first_setup_took(tmp_path: Path, save: str, options: Any) -> None:
    values = iter([2.0, 3.0])
    builds, make = lambda: Scaled(next(values)), lambda: lora(save=save)
    resumed = resumes_to_the_bit(tmp_path, builds, make, max_epochs=2, **options)
    assert resumed.scale.tolist() == [2.0] * 4


def test_a_file_without_them_loads_where_setup_fills_the_same(tmp_path: Path) -> None:
    model = fitted(file := tmp_path / "a.ckpt", Scaled(), lora(merge=False))
    checkpoint = torch.load(file, weights_only=True)  # earlier versions took the buffers for a part of the base
    kept = {name: value for name, value in held(checkpoint).items() if name not in FILLED}
    stored = StoredAdapters.from_file(kept, checkpoint[KEY] | {"random": []}, "")
    torch.save(checkpoint | {"state_dict": kept, KEY: stored.description()}, file)
    again, t = fit(tmp_path, lora(merge=False), model=Scaled(), ckpt_path=file, max_epochs=2)
    t.save_checkpoint(tmp_path / "b.ckpt")
    restores(tmp_path / "b.ckpt", again, Scaled())
    says = r"2 of 6 frozen tensors .* 'scale', 'weigh.weight'"
    with pytest.raises(ll.BaseMismatchError, match=says):
        loads(Scaled(), file)
    with pytest.raises(ll.BaseMismatchError, match=says):
        fit(tmp_path, lora(), model=Scaled(3.0), ckpt_path=file)
    assert model.scale.tolist() == [2.0] * 4


class Statistics(LitTiny):  # whose buffer has another shape and dtype until setup has filled it, as in schnetpack
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
    through = resumes_to_the_bit(tmp_path, Statistics, lambda: lora(merge=False), max_epochs=2)
    file = tmp_path / "through" / "epoch=1.ckpt"
    for each in (evaluated(Statistics(), file), ll.load_from_checkpoint(Statistics, file)):
        assert each.mean.shape == () and each.mean.dtype == torch.float64 and torch.equal(each(X), through(X))
    with pytest.warns(ll.LoRAWarning, match="It is the same base, converted"):
        ll.load_adapter(half := Statistics().to(torch.bfloat16), file)
    assert half.mean.dtype == torch.bfloat16 and half.mean == torch.tensor(2 / 3).bfloat16()
    file.write_bytes(b"PK")
    with unchanged(new := Statistics()), pytest.raises(ll.AdapterFileError):
        ll.load_adapter(new, file)


class LoadsStatistics(Normed):
    def setup(self, stage: str) -> None:
        self.norm.running_mean.fill_(0.5)  # type: ignore[union-attr]


def test_statistics_of_a_norm_that_setup_loads_are_the_base(tmp_path: Path) -> None:
    fitted(tmp_path / "a.ckpt", LoadsStatistics(), lora(merge=False))
    assert files_hold_adapters_alone(tmp_path)


def tabled(value: float = 0.0) -> LitTiny:
    model = LitTiny()
    model.register_buffer("table", torch.full((8,), value))
    return model


def test_buffers_of_a_full_checkpoint_are_the_base(tmp_path: Path) -> None:
    fitted(tmp_path / "full.ckpt", tabled(3.0), plain=True)
    t = trainer(tmp_path / "new", [lora(merge=False)])
    t.validate(model := tabled(), data(), ckpt_path=tmp_path / "full.ckpt", verbose=False)
    t.fit(model, data())
    fit(tmp_path / "new", lora(merge=False), model=tabled(), ckpt_path=tmp_path / "full.ckpt")
    assert files_hold_adapters_alone(tmp_path / "new")


class Always(Scaled):  # whose setup fills them in each stage
    def setup(self, stage: str) -> None:
        super().setup("fit")


def test_they_are_known_when_a_later_setup_changes_nothing(tmp_path: Path) -> None:
    t = trainer(tmp_path, [lora(merge=False)], max_epochs=1, enable_checkpointing=False)
    t.validate(model := Always(), data(), verbose=False)
    t.fit(model, data())
    ll.save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(loads(Scaled(), tmp_path / "a.safetensors")(X), model(X))


def test_the_base_alone_computes_with_them(tmp_path: Path) -> None:
    model = fitted(tmp_path / "a.ckpt", Scaled(), lora(merge=False))
    again, base = loads(Scaled(), tmp_path / "a.ckpt"), LitTiny()(X) * 2
    assert torch.equal(again(X), model(X)) and not torch.equal(model(X), base)
    for each in (model, again):
        with ll.disable_adapters(each):
            assert torch.equal(each(X), base)
        with ll.adapter_names(each, [None] * 10 + ["default"] * 10):
            assert torch.equal(each(X)[:10], base[:10])
        torch.testing.assert_close(each(X), model(X))


@pytest.mark.parametrize("inner", [False, True])
def test_they_are_merged_combined_and_exported_where_they_have_a_place(tmp_path: Path, inner: bool) -> None:
    model = fitted(file := tmp_path / "a.ckpt", Scaled(), lora(merge=False, modules_to_save=None))
    combine_files([file] * 2, tmp_path / "both.safetensors", (0.25, 0.75))
    torch.testing.assert_close(loads(Scaled(3.0), tmp_path / "both.safetensors")(X), model(X))
    base = Scaled().state_dict()
    if inner:
        base = {f"net.{name}": value for name, value in LitTiny().state_dict().items()}  # has no place for them
    save_file(base, tmp_path / "base.safetensors")
    merge_files(tmp_path / "base.safetensors", file, tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged.keys() == base.keys()
    if not inner:
        new = Scaled(3.0)
        new.load_state_dict(merged)
        torch.testing.assert_close(new(X), model(X))
    fitted(other := tmp_path / "b.ckpt", Scaled(5.0), lora(merge=False, modules_to_save=None))
    with pytest.raises(ll.BaseMismatchError, match="different bases"):
        combine_files([file, other], tmp_path / "c.safetensors", (1, 1))


class Around(Scaled):  # whose network is a module inside it
    def __init__(self) -> None:
        super().__init__()
        self.net = TinyLM()
        del self.embed, self.q_proj, self.v_proj, self.head

    def forward(self, index: Tensor) -> Tensor:
        return self.net(index)[:, :4] * self.scale


def test_the_export_names_what_its_reader_would_lack(tmp_path: Path) -> None:
    model = fitted(tmp_path / "a.ckpt", Around(), ll.LoRACallback(r=2, merge=False))
    ll.export_peft(model, tmp_path / "inside", root="net")  # a warning is an error
    with pytest.warns(ll.LoRAWarning, match="'scale', 'weigh.weight' may be untrained or were filled by setup"):
        ll.export_peft(model, tmp_path / "peft", root="")


# Layers that on_load_checkpoint makes anew


class Rebuilds(LitTiny):
    """A module whose setup makes layers and copies the old ones' state, and is called before a file is loaded."""

    def setup(self, stage: str | None = None) -> None:
        before = self.state_dict()
        self.q_proj, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.load_state_dict(before, strict=False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.setup()


@pytest.mark.processes
@one_or_two
def test_a_run_whose_layers_are_made_anew_resumes_to_the_same_bits(tmp_path: Path, save: str, options: Any) -> None:
    assert is_plain(resumes_to_the_bit(tmp_path, Rebuilds, lambda: lora(save=save), max_epochs=2, **options))


@pytest.mark.parametrize(("save", "merge"), [("adapters", "last"), ("adapters", False), ("model", "last")])
def test_layers_that_a_hook_makes_anew_get_the_files_adapters(tmp_path: Path, save: str, merge: Any) -> None:
    saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    model, t = fit(tmp_path, lora(save=save, merge=merge), saves, model=Rebuilds())
    for epoch in (0, 1):
        file = tmp_path / f"epoch={epoch}.ckpt"
        expected = ll.load_from_checkpoint(Rebuilds, file)(X)
        for each, by in ((model, t), (Rebuilds(), trainer(tmp_path, [ll.LoRACallback()]))):
            by.test(each, data(), ckpt_path=file, verbose=False)
            torch.testing.assert_close(each(X), expected)
    assert is_plain(model) is bool(merge)


class Sized(LitTiny):  # whose head has the size of the file's
    def __init__(self, classes: int = 9) -> None:
        super().__init__()
        self.head = nn.Linear(8, classes)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.head = nn.Linear(8, len(checkpoint["state_dict"]["head.weight"]))


@pytest.mark.parametrize("save", ["adapters", "model"])
def test_a_head_may_get_the_size_of_the_files(tmp_path: Path, save: str) -> None:
    model = fitted(file := tmp_path / "a.ckpt", Sized(4), lora(save=save, merge=False))
    trainer(tmp_path, [ll.LoRACallback()]).test(again := Sized(), data(), ckpt_path=file, verbose=False)
    for each in (again, ll.load_from_checkpoint(Sized, file)):  # of a whole file, the merged model
        torch.testing.assert_close(each(X), model(X))
    goes_on(file, Sized(), lora(save=save))


# What on_load_checkpoint reads


class Reads(LitTiny):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.shown = checkpoint["state_dict"]


def resumes(folder: Path, file: Path, save: str) -> Reads:
    model, _ = fit(folder, lora(save=save, merge=False), model=Reads(), ckpt_path=file, max_epochs=1)
    return model


@pytest.mark.parametrize(
    ("save", "read"),
    [
        ("adapters", resumes),
        ("adapters", lambda _, file, __: evaluated(Reads(), file)),
        ("adapters", lambda _, file, __: ll.load_from_checkpoint(Reads, file)),
        ("model", resumes),
    ],
)
def test_a_hook_reads_plain_names_and_nothing_is_copied(tmp_path: Path, save: str, read: Any) -> None:
    model = fitted(file := tmp_path / "a.ckpt", Reads(), lora(save=save, merge=False))
    again = read(tmp_path, file, save)
    assert again.shown.keys() == model.state_dict().keys()
    for name, value in again.shown.items():
        assert not value.requires_grad
        assert torch.equal(value, model.state_dict()[name])
        assert (value.data_ptr() == again.state_dict()[name].data_ptr()) is (name not in TRAINED), name
    assert same(state(again), state(model))


# Streams


class Stream(IterableDataset[Any]):  # items that come once, wherever they are read
    def __init__(self) -> None:
        self.at, self.begun = torch.zeros(1).share_memory_(), torch.zeros(1).share_memory_()

    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        while True:
            self.at += 1
            yield self.at[0].long() % 20, self.at[0].long() % 4


class Sees(LitTiny):  # a module that keeps which items its steps see
    def __init__(self) -> None:
        super().__init__()
        self.items: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch, *_ = batch if isinstance(batch[0], list) else [batch]
        self.items += batch[0].tolist()
        return super().training_step(batch, batch_idx)


class Asks(Sees):  # that asks for the number of batches, so that Lightning begins the data early
    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 4 * (self.trainer.max_epochs or 0)
        return super().configure_optimizers()


class Orders(RandomSampler):  # with an order for each epoch, as DistributedSampler has
    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(epoch)


@exact
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cls", [Sees, Asks])
@pytest.mark.parametrize("is_alone", [True, False])
def test_a_resumed_fit_begins_a_stream_once(tmp_path: Path, cls: type[Sees], workers: int, is_alone: bool) -> None:
    def run(file: Path | None, epochs: int) -> list[int]:
        options = {"limit_train_batches": 4, "enable_checkpointing": False, "max_epochs": epochs}
        loader = DataLoader(stream, num_workers=workers, prefetch_factor=2 if workers else None)
        others = [] if is_alone else [DataLoader(range(16), sampler=Orders(range(16)))]
        train = CombinedLoader([loader, *others], "min_size")
        model, t = fit(tmp_path, lora(), model=cls(), train=train, ckpt_path=file, **options)
        t.save_checkpoint(tmp_path / "a.ckpt")
        return model.items

    stream = Stream()
    assert run(None, 1) == [1, 2, 3, 4]
    items = run(tmp_path / "a.ckpt", 2)
    assert stream.begun == 2
    if not workers:  # which take some ahead
        assert items == [5, 6, 7, 8]
