"""Folders of a base: all that the model needs is in the merged one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import AdapterFileError, merge_adapters
from lightning_lora.storage.offline.merge_files import merge_files
from lightning_lora.storage.offline.tensor_files import INDEX
from tests.support.faults import contents
from tests.support.models import same, state
from tests.support.storage import saved


def divided(folder: Path, files: list[str]) -> dict[str, Tensor]:
    """Write a base whose eight tensors are in these files, and adapters. Return the merged model's state."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    places = dict(zip(base.state_dict(), files, strict=True))
    for file in places.values():
        path = folder / "base" / file
        path.parent.mkdir(exist_ok=True, parents=True)
        held = {name: value for name, value in base.state_dict().items() if places[name] == file}
        save_file(held, path, metadata={"format": "pt"})
    (folder / "base" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    merge_adapters(saved(folder / "a.safetensors", base))
    return state(base)


def merged(folder: Path) -> dict[str, Tensor]:
    """All tensors that are written, after a look at the index."""
    merge_files(folder / "base", folder / "a.safetensors", folder / "out")
    files = [path for path in (folder / "out").rglob("*") if path.suffix in (".safetensors", ".data")]
    found = {str(path.relative_to(folder / "out")): load_file(path) for path in files}
    if (folder / "out" / INDEX).is_file():
        places = json.loads((folder / "out" / INDEX).read_text())["weight_map"]
        assert places == {name: file for file, tensors in found.items() for name in tensors}
    return {name: value for tensors in found.values() for name, value in tensors.items()}


def same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return same(dict(sorted(found.items())), dict(sorted(expected.items())))


def test_weights_stay_in_their_places_and_what_an_index_says_besides_is_kept(tmp_path: Path) -> None:
    files = ["w.safetensors"] * 2 + ["a/w.safetensors"] * 3 + ["a/b/w.data"] * 3
    expected = divided(tmp_path, files)
    path = tmp_path / "base" / INDEX
    index = json.loads(path.read_text()) | {"metadata": {"total_size": 1, "more": "x"}}
    del index["weight_map"]["3.bias"]  # it is in a file all the same
    path.write_text(json.dumps(index))
    assert same_tensors(merged(tmp_path), expected)
    assert set(contents(tmp_path / "out")) == {*files, INDEX}
    size = sum(value.nbytes for value in expected.values())
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"] == {
        "total_size": size,
        "more": "x",
    }


@pytest.mark.parametrize("has_index", [True, False])
def test_all_other_files_are_copied_but_other_weights(tmp_path: Path, has_index: bool) -> None:
    expected = divided(tmp_path, ["model.safetensors"] * 8)
    base = tmp_path / "base"
    if not has_index:
        (base / INDEX).unlink()
    kept = [
        "config.json",
        "tok/vocab.txt",
        "1_Pooling/config.json",
        ".gitattributes",
        "spiece.model",
    ]
    left = ["vision.safetensors", "q.GGUF", "pytorch_model.bin", "2_Dense/w.pt"]
    for name in (*kept, *left, ".cache/x"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    for name in (
        "model.safetensors",
        "config.json",
    ):  # the cache of the hub holds links to files
        (base / name).rename(tmp_path / name)
        (base / name).symlink_to(f"../{name}")
    assert same_tensors(merged(tmp_path), expected)
    found = contents(tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").is_symlink()
    assert found.keys() - {"model.safetensors", INDEX} == {*kept}
    assert all(found[name] == name.encode() for name in kept)


@pytest.mark.parametrize("file", ["a/../../w.safetensors", str(Path(__file__).absolute()), "gone.safetensors"])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, file: str) -> None:
    divided(tmp_path, ["w.safetensors"] * 8)
    (tmp_path / "base" / INDEX).write_text(json.dumps({"weight_map": {"0.weight": file}}))
    with pytest.raises(AdapterFileError, match=rf"index\.json names {file!r}.*Get all files"):
        merged(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"0.weight": 3}}'])
def test_an_index_that_names_no_files_is_refused(tmp_path: Path, text: str) -> None:
    divided(tmp_path, ["w.safetensors"] * 8)
    (tmp_path / "base" / INDEX).write_text(text)
    with pytest.raises(AdapterFileError, match="has no 'weight_map' from tensors to files"):
        merged(tmp_path)


def test_an_index_without_metadata_is_read(tmp_path: Path) -> None:
    divided(tmp_path, ["model-1.safetensors"] * 4 + ["model-2.safetensors"] * 4)
    index = tmp_path / "base" / INDEX
    index.write_text(json.dumps({**json.loads(index.read_text()), "metadata": None}))
    merge_files(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"].keys() == {"total_size"}


def test_an_index_that_names_what_its_file_does_not_hold_is_refused(tmp_path: Path) -> None:
    divided(tmp_path, ["w.safetensors"] * 8)
    index = tmp_path / "base" / INDEX
    index.write_text(index.read_text().replace("3.bias", "3.bia"))
    with pytest.raises(AdapterFileError, match=r"names '3.bia' in w.safetensors, which does not hold them"):
        merge_files(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
