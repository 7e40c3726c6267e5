"""Files may lie wherever fsspec finds them."""

from io import BytesIO
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from lightning_lora import (
    AdapterFileError,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
)
from lightning_lora.storage import disk
from tests.support.compared import assert_same_state
from tests.support.models import LitTiny, data, lora, trainer
from tests.support.storage import goes_on, refused, restores, trained


@pytest.fixture
def elsewhere() -> str:
    return f"memory://{uuid4()}"


def test_adapters_are_written_and_read_wherever_fsspec_can(tmp_path: Path, elsewhere: str) -> None:
    model = LitTiny()
    t = trainer(tmp_path, [lora(merge=False)], max_epochs=1, enable_checkpointing=False)
    t.fit(model, data())
    for folder in (elsewhere, f"file://{tmp_path}", str(tmp_path)):
        save_adapter(model, f"{folder}/a.safetensors")
        t.save_checkpoint(f"{folder}/a.ckpt")
        for name in ("a.safetensors", "a.ckpt"):
            restores(f"{folder}/{name}", model)
            with fsspec.open(f"{folder}/{name}", "rb") as file:
                restores(file, model)
        for source in (
            f"{folder}/a.ckpt",
            BytesIO(fsspec.open(f"{folder}/a.ckpt", "rb").open().read()),
        ):
            assert_same_state(load_from_checkpoint(LitTiny, source), model)
        goes_on(f"{folder}/a.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "a.ckpt"}


def test_damage_elsewhere_is_refused_as_it_is_here(tmp_path: Path, elsewhere: str, checkpoint: Path) -> None:
    content = bytearray(checkpoint.read_bytes())
    path = f"{elsewhere}/a.ckpt"
    content[content.index(b"state_dict")] ^= 1
    with fsspec.open(path, "wb") as file:
        file.write(bytes(content))
    for source in (path, BytesIO(content)):
        with refused(model := LitTiny(), AdapterFileError, "is damaged"):
            load_adapter(model, source)
    with refused(model := LitTiny(), AdapterFileError, "is damaged"):
        trainer(tmp_path, [lora()]).fit(model, data(), ckpt_path=path)


@pytest.mark.parametrize(
    "error",
    [OSError(5, "Input/output error"), ImportError("Install s3fs"), MemoryError("large")],
)
def test_what_is_no_damage_is_told_as_what_it_is(file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(disk, "opened", fail)
    with pytest.raises(
        AdapterFileError,
        match=rf"{type(error).__name__}: .*{error.args[-1]}.*no sign of damage",
    ):
        load_adapter(LitTiny(), file)


def test_places_that_do_not_exist_are_told(elsewhere: str) -> None:
    with pytest.raises(FileNotFoundError):
        load_adapter(LitTiny(), f"{elsewhere}/none.ckpt")
    with pytest.raises(AdapterFileError, match="nowhere"):
        load_adapter(LitTiny(), "nowhere://a.ckpt")
    with pytest.raises(AdapterFileError, match="nowhere"):
        save_adapter(trained(), "nowhere://a.ckpt")
