"""Files may lie wherever fsspec finds them."""

from io import BytesIO
from pathlib import Path
from uuid import uuid4

import fsspec
import lightning as L
import pytest

from lightning_lora import (
    AdapterFileError,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
)
from lightning_lora.storage.on_disk import places
from tests.support.cases import file_names
from tests.support.compared import assert_same_state
from tests.support.models import LitTiny, data, lora, trainer
from tests.support.storage import goes_on, refused, restores, trained


@pytest.fixture
def elsewhere() -> str:
    return f"memory://{uuid4()}"


def assert_read_and_written(folder: str, model: LitTiny, t: L.Trainer) -> None:
    """Expect files in this folder to restore the model, by their names or opened."""
    save_adapter(model, f"{folder}/a.safetensors")
    t.save_checkpoint(f"{folder}/a.ckpt")
    for path in (f"{folder}/a.safetensors", f"{folder}/a.ckpt"):
        restores(path, model)
        with fsspec.open(path, "rb") as file:
            restores(file, model)
    with fsspec.open(f"{folder}/a.ckpt", "rb") as file:
        content = BytesIO(file.read())
    assert_same_state(load_from_checkpoint(LitTiny, f"{folder}/a.ckpt"), model)
    assert_same_state(load_from_checkpoint(LitTiny, content), model)
    goes_on(f"{folder}/a.ckpt")


def test_adapters_are_written_and_read_wherever_fsspec_can(
    tmp_path: Path, elsewhere: str
) -> None:
    model = LitTiny()
    t = trainer(tmp_path, [lora(merge=False)], max_epochs=1, enable_checkpointing=False)
    t.fit(model, data())
    assert_read_and_written(elsewhere, model, t)
    assert_read_and_written(f"file://{tmp_path}", model, t)
    assert_read_and_written(str(tmp_path), model, t)
    assert file_names(tmp_path) == ["a.ckpt", "a.safetensors"]


def test_damage_elsewhere_is_refused_as_it_is_here(
    tmp_path: Path, elsewhere: str, checkpoint: Path
) -> None:
    content = bytearray(checkpoint.read_bytes())
    path = f"{elsewhere}/a.ckpt"
    content[content.index(b"state_dict")] ^= 1
    with fsspec.open(path, "wb") as file:
        file.write(bytes(content))
    model = LitTiny()
    with refused(model, AdapterFileError, "is damaged"):
        load_adapter(model, path)
    with refused(model, AdapterFileError, "is damaged"):
        load_adapter(model, BytesIO(content))
    with refused(model, AdapterFileError, "is damaged"):
        trainer(tmp_path, [lora()]).fit(model, data(), ckpt_path=path)


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error"),
        ImportError("Install s3fs"),
        MemoryError("large"),
    ],
)
def test_what_is_no_damage_is_told_as_what_it_is(
    file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(places, "opened", fail)
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


def test_a_file_is_written_into_a_folder_that_is_there(tmp_path: Path) -> None:
    places.check_output(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"missing does not exist\. Make it"):
        places.check_output(tmp_path / "missing" / "a.safetensors")
