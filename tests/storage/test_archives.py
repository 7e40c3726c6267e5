"""Files that are cut, damaged where no checksum is, or no archive of torch are refused, and by what they are."""

import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lightning_lora as ll
from lightning_lora.cli.main import main
from lightning_lora.storage.on_disk import archives
from tests.support.faults import adapted
from tests.support.models import LitTiny, data, lora, state, trainer
from tests.support.storage import fitted, goes_on
from tests.support.storage import refused as leaves_alone


def with_a_trainer(stage: str, path: Path | str) -> None:
    t = trainer(".", [lora(merge=False)], max_epochs=2, enable_checkpointing=False)
    getattr(t, stage)(LitTiny(), data(), ckpt_path=path)


def command(name: str, path: Path) -> None:
    """Run a command, whose errors are a line and a code."""
    arguments = {
        "inspect": [path],
        "export": [path, path.with_name("peft")],
        "combine": [
            path,
            path.with_name("good.safetensors"),
            "--out",
            path.with_name("sum.safetensors"),
        ],
        "merge": [
            path.with_name("base.safetensors"),
            path,
            path.with_name("merged.safetensors"),
        ],
        "merge into": [
            path,
            path.with_name("good.safetensors"),
            path.with_name("merged.safetensors"),
        ],
    }
    main([name.partition(" ")[0], *map(str, arguments[name])])


READERS: dict[str, Callable[[Path], object]] = {
    "fit": partial(with_a_trainer, "fit"),
    "validate": partial(with_a_trainer, "validate"),
    "test": partial(with_a_trainer, "test"),
    "load_adapter": lambda path: ll.load_adapter(LitTiny(), path),
    "load_from_checkpoint": partial(ll.load_from_checkpoint, LitTiny),
    **{
        name: partial(command, name)
        for name in ("inspect", "export", "combine", "merge", "merge into")
    },
}
OF_TRAINERS = ("fit", "validate", "test")


def refused(reader: str, path: Path, capsys: Any, says: str) -> None:
    """Expect a reader to refuse a file, with these words."""
    message = ""
    try:
        READERS[reader](path)
    except ll.AdapterFileError as error:
        message = str(error)
    assert says in (message or " ".join(capsys.readouterr().err.split()))


@pytest.fixture(autouse=True)
def others(tmp_path: Path) -> None:
    """What the commands need beside the file."""
    ll.save_adapter(adapted(), tmp_path / "good.safetensors")
    save_file(LitTiny().state_dict(), tmp_path / "base.safetensors")


@pytest.fixture(scope="module", params=["adapters", "model"])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run's file of each kind."""
    file = tmp_path_factory.mktemp("whole") / "whole.ckpt"
    fitted(file, LitTiny(), lora(merge=False, save=request.param))
    return file


@pytest.mark.parametrize("reader", READERS)
def test_a_record_that_claims_to_be_a_folder_is_refused_by_every_reader(
    tmp_path: Path, whole: Path, reader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Torch reads nothing of it, and gives memory as it happens to be."""
    contents = whole.read_bytes()
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(whole) as archive:
        names = archive.namelist()
        start = archive.start_dir
    for name in names:
        changed = bytearray(contents)
        # in the attributes, which stand before the name
        changed[contents.index(name.encode(), start) - 8] ^= 0x10
        path.write_bytes(changed)
        refused(
            reader,
            path,
            capsys,
            f"{path} is damaged: {name} cannot be what was written",
        )


CUT: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda whole: whole[: len(whole) // 2],
    "all but one byte": lambda whole: whole[:-1],
    "last block zero": lambda whole: whole[:-512] + bytes(512),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("cut", CUT.values(), ids=CUT)
def test_a_file_that_was_cut_short_is_called_damaged(
    tmp_path: Path, whole: Path, cut: Any, reader: str, capsys: Any
) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(cut(whole.read_bytes()))
    refused(
        reader,
        path,
        capsys,
        f"{path} is damaged: its end is missing or is not what was written",
    )


NO_ARCHIVES: dict[str, tuple[bytes, str]] = {
    "a web page": (
        b"\n<!DOCTYPE html><html>Sign in</html>",
        "it is a web page. Download the file itself",
    ),
    "a pointer of git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid "
        b"sha256:4d7a214614ab2935c9\nsize 1234\n",
        "it is a pointer of git-lfs, which stands for the file. Get the file itself: "
        "git lfs pull",
    ),
    "three bytes": (b"abc", "it begins with b'abc'"),
    "nothing": (b"", "it is empty"),
    "a pickle that takes 1.8 GB": (  # a bytearray of as many bytes
        b"\x80\x02c__builtin__\nbytearray\nJ"
        + (1_800_000_000).to_bytes(4, "little")
        + b"\x85R.",
        r"it begins with b'\x80\x02c__builtin__",
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("contents", "says"), NO_ARCHIVES.values(), ids=NO_ARCHIVES)
def test_what_is_no_archive_of_torch_is_refused_before_anybody_reads_it(
    tmp_path: Path,
    contents: bytes,
    says: str,
    reader: str,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*_: object, **__: object) -> None:
        pytest.fail("torch reads it")

    monkeypatch.setattr(torch, "load", read)
    (tmp_path / "a.ckpt").write_bytes(contents)
    refused(reader, tmp_path / "a.ckpt", capsys, "is no archive of torch")
    refused(reader, tmp_path / "a.ckpt", capsys, says)


def test_a_file_that_is_trusted_must_be_an_archive_too(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"<html>")
    t = trainer(tmp_path, [lora()])
    with pytest.raises(ll.AdapterFileError, match="is a web page"):
        t.fit(LitTiny(), data(), ckpt_path=tmp_path / "a.ckpt", weights_only=False)


def test_a_pointer_of_git_lfs_is_named_where_adapters_are_expected(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.safetensors").write_bytes(NO_ARCHIVES["a pointer of git-lfs"][0])
    model = LitTiny()
    with leaves_alone(model, ll.AdapterFileError, "git lfs pull"):
        ll.load_adapter(model, tmp_path / "a.safetensors")


# The format of torch before 1.6


def test_a_run_goes_on_from_its_file_in_the_old_format_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fitted(path)
    torch.save(
        torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False
    )
    goes_on(path)


@pytest.mark.parametrize(
    "reader", [name for name in READERS if name not in OF_TRAINERS]
)
def test_other_readers_say_how_to_write_an_old_file_again(
    tmp_path: Path, reader: str, capsys: Any
) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(LitTiny().state_dict(), path, _use_new_zipfile_serialization=False)
    refused(
        reader,
        path,
        capsys,
        "Write it again: torch.save(torch.load(path, weights_only=True), path)",
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_old_files_are_recognised_whatever_pickle_wrote_them(
    tmp_path: Path, protocol: int
) -> None:
    torch.save(
        state(LitTiny()),
        path := tmp_path / "a.pt",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=False,
    )
    with path.open("rb") as file:
        assert archives.kind_of(file) is archives.Kind.OLD


# Elsewhere


def test_a_damaged_file_of_the_web_is_refused_with_the_place_where_torch_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        torch.hub,
        "download_url_to_file",
        lambda url, file: Path(file).write_bytes(b"<html>"),
    )
    with pytest.raises(
        ll.AdapterFileError,
        match=rf"\(kept in {tmp_path}/hub/checkpoints/a.ckpt\) .*a web page",
    ):
        with_a_trainer("fit", "http://127.0.0.1:9/a.ckpt")
