"""Folders of a base: all that the model needs is in the merged one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import AdapterFileError, merge_adapters
from lightning_lora.storage.offline.merge_files import merge_files
from lightning_lora.storage.offline.tensor_files import INDEX
from tests.support.compared import assert_same_tensors
from tests.support.faults import contents
from tests.support.models import state
from tests.support.storage import saved


def write_base(folder: Path, state: dict[str, Tensor], files: list[str]) -> None:
    """Write each tensor into its file, and an index."""
    places = dict(zip(state, files, strict=True))
    for file in set(files):
        held = {name: value for name, value in state.items() if places[name] == file}
        path = folder / file
        path.parent.mkdir(exist_ok=True, parents=True)
        save_file(held, path, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index))


def divided(folder: Path, files: list[str]) -> dict[str, Tensor]:
    """Write a base whose eight tensors are in these files, and adapters.

    Return the merged model's state.
    """
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    )
    write_base(folder / "base", base.state_dict(), files)
    saved(folder / "a.safetensors", base)
    merge_adapters(base)
    return state(base)


def read_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text())


def merged(folder: Path) -> dict[str, Tensor]:
    """All tensors that are written, after a look at the index."""
    out = folder / "out"
    merge_files(folder / "base", folder / "a.safetensors", out)
    tensors: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for path in out.rglob("*"):
        if path.suffix in (".safetensors", ".data"):
            found = load_file(path)
            tensors |= found
            places |= dict.fromkeys(found, str(path.relative_to(out)))
    if (out / INDEX).is_file():
        assert read_index(out)["weight_map"] == places
    return tensors


def assert_same_in_any_order(
    found: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    assert_same_tensors(dict(sorted(found.items())), dict(sorted(expected.items())))


def test_weights_stay_in_their_places_and_what_an_index_says_besides_is_kept(
    tmp_path: Path,
) -> None:
    files = ["w.safetensors"] * 2 + ["a/w.safetensors"] * 3 + ["a/b/w.data"] * 3
    expected = divided(tmp_path, files)
    index = read_index(tmp_path / "base")
    index["metadata"] = {"total_size": 1, "more": "x"}
    del index["weight_map"]["3.bias"]  # it is in a file all the same
    (tmp_path / "base" / INDEX).write_text(json.dumps(index))
    assert_same_in_any_order(merged(tmp_path), expected)
    assert set(contents(tmp_path / "out")) == {*files, INDEX}
    size = 4 * 4 * (8 * 8 + 8)
    assert read_index(tmp_path / "out")["metadata"] == {"total_size": size, "more": "x"}


KEPT = [
    "config.json",
    "tok/vocab.txt",
    "1_Pooling/config.json",
    ".gitattributes",
    "spiece.model",
]


LEFT = ["vision.safetensors", "q.GGUF", "pytorch_model.bin", "2_Dense/w.pt", ".cache/x"]


def write_beside(base: Path) -> None:
    """Files beside the weights, each of which holds its name."""
    for name in KEPT + LEFT:
        path = base / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)


def replace_by_link(base: Path, name: str) -> None:
    (base / name).rename(base.parent / name)
    (base / name).symlink_to(f"../{name}")


@pytest.mark.parametrize("has_index", [True, False])
def test_all_other_files_are_copied_but_other_weights(
    tmp_path: Path, has_index: bool
) -> None:
    expected = divided(tmp_path, ["model.safetensors"] * 8)
    base = tmp_path / "base"
    out = tmp_path / "out"
    if not has_index:
        (base / INDEX).unlink()
    write_beside(base)
    # the cache of the hub holds links to files
    replace_by_link(base, "model.safetensors")
    replace_by_link(base, "config.json")
    assert_same_in_any_order(merged(tmp_path), expected)
    found = contents(out)
    assert not (out / "config.json").is_symlink()
    assert found.keys() - {"model.safetensors", INDEX} == set(KEPT)
    for name in KEPT:
        assert found[name] == name.encode()


@pytest.mark.parametrize(
    "file",
    ["a/../../w.safetensors", str(Path(__file__).absolute()), "gone.safetensors"],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, file: str) -> None:
    divided(tmp_path, ["w.safetensors"] * 8)
    (tmp_path / "base" / INDEX).write_text(
        json.dumps({"weight_map": {"0.weight": file}})
    )
    with pytest.raises(
        AdapterFileError, match=rf"index\.json names {file!r}.*Get all files"
    ):
        merged(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["{}", '{"weight_map": []}', '{"weight_map": {"0.weight": 3}}']
)
def test_an_index_that_names_no_files_is_refused(tmp_path: Path, text: str) -> None:
    divided(tmp_path, ["w.safetensors"] * 8)
    (tmp_path / "base" / INDEX).write_text(text)
    with pytest.raises(
        AdapterFileError, match="has no 'weight_map' from tensors to files"
    ):
        merged(tmp_path)


def test_an_index_without_metadata_is_read(tmp_path: Path) -> None:
    divided(tmp_path, ["model-1.safetensors"] * 4 + ["model-2.safetensors"] * 4)
    index = read_index(tmp_path / "base") | {"metadata": None}
    (tmp_path / "base" / INDEX).write_text(json.dumps(index))
    merge_files(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    assert read_index(tmp_path / "out")["metadata"].keys() == {"total_size"}


def test_an_index_that_names_what_its_file_does_not_hold_is_refused(
    tmp_path: Path,
) -> None:
    divided(tmp_path, ["w.safetensors"] * 8)
    index = tmp_path / "base" / INDEX
    index.write_text(index.read_text().replace("3.bias", "3.bia"))
    with pytest.raises(
        AdapterFileError,
        match=r"names '3.bia' in w.safetensors, which does not hold them",
    ):
        merge_files(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
