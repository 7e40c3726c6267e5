"""Merge adapters into files of the base."""

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.storage.formats.lightning import without_run_state
from lightning_lora.storage.offline.merge_checks import check_plan, check_tensors_alone
from lightning_lora.storage.offline.merge_plan import MergePlan
from lightning_lora.storage.offline.merged_tensors import MergedTensors, Progress
from lightning_lora.storage.offline.tensor_files import (
    INDEX,
    CheckpointFile,
    SafetensorsFolder,
    TensorFiles,
    tensor_files,
)
from lightning_lora.storage.offline.tensors_on_disk import moved_to_disk, write_tensors
from lightning_lora.storage.offline.without_model import read_without_model
from lightning_lora.storage.on_disk.places import check_output, path_here
from lightning_lora.storage.on_disk.plain_pickles import unread_in
from lightning_lora.storage.on_disk.whole_files import (
    folder_beside,
    writing,
    writing_folder,
)
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.dicts import dict_or_empty


@dataclass(frozen=True)
class MergedNames:
    """Which tensors of a merged model are not the base's, by their names there."""

    updated: list[str]  # the weights that got an update
    # the tensors that the adapters' file holds whole, such as those of a trained norm
    replaced: list[str]


def merge_files(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    progress: Progress | None = None,
) -> MergedNames:
    """Merge adapters into files of a base, one tensor at a time.

    Args:
        base: A ``.safetensors`` file, a folder of them, or a checkpoint.
        adapter: The file of adapters.
        out: Where the merged model is written.
        progress: Called before each tensor, with the number of all.

    Returns:
        The names of the tensors that are not the base's.
    """
    base = path_here(base)
    out = path_here(out)
    files = tensor_files(base)
    check_output(out, [base, adapter, *files.files])
    _check_no_adapters(out)
    plan = MergePlan(files, _read_adapters(adapter, base))
    check_plan(plan)
    merged = MergedTensors(plan, progress)
    _write_in_form_of_base(merged, files, out)
    merged.warn_of_rounding()
    return MergedNames(list(plan.adapted), list(plan.replaced))


def _write_in_form_of_base(
    merged: MergedTensors, files: TensorFiles, out: Path
) -> None:
    """Write the merged model as what the base is, or as one safetensors file."""
    of_checkpoints = (".ckpt", files.path.suffix)
    if isinstance(files, SafetensorsFolder):
        _write_folder(merged, files, out)
    elif out.suffix == ".safetensors":
        _write_file(merged, out)
    elif isinstance(files, CheckpointFile) and out.suffix in of_checkpoints:
        _write_checkpoint(merged, files, out)
    else:
        endings = dict.fromkeys((".safetensors", files.path.suffix))
        raise AdapterFileError(
            f"{out} cannot be written from {files.path}. Name a file that ends in "
            f"{' or '.join(endings)}."
        )


def _read_adapters(adapter: str | Path, base: Path) -> StoredAdapters:
    """Read the adapters. If the two files were given in the wrong order, say so."""
    try:
        return read_without_model(adapter)
    except AdapterFileError as error:
        if not _holds_adapters(base):
            raise
        raise AdapterFileError(
            f"{base} holds adapters, and {adapter} holds none. Give the base first, "
            "and then the adapters."
        ) from error


def _check_no_adapters(out: Path) -> None:
    """Refuse to write over a file of adapters, which are hardly meant to be lost."""
    if _holds_adapters(out):
        raise FileExistsError(
            f"{out} holds adapters. Name another file. To sum adapters: lightning-lora "
            "combine."
        )


def _holds_adapters(path: Path) -> bool:
    """Whether a path is a file of adapters."""
    if not path.is_file():
        return False
    try:
        read_without_model(path)
    except AdapterFileError:  # the file holds something else
        return False
    return True


# A file


def _write_file(merged: MergedTensors, out: Path) -> None:
    """Write the merged model as one safetensors file."""
    plan = merged.plan
    check_tensors_alone(plan)
    with writing(out) as part:
        _write_tensors(merged, plan.output_of, part, like=plan.base_path)


def _write_tensors(
    merged: MergedTensors, names: Collection[str], path: Path, *, like: Path
) -> int:
    """Write merged tensors into a safetensors file, with the metadata of ``like``, a file of the base.

    Return their size.
    """
    metadata = merged.plan.files.metadata(like)
    return write_tensors(
        path,
        names,
        template_of=merged.before_update,
        value_of=merged.get,
        metadata=metadata,
    )


def _write_checkpoint(merged: MergedTensors, base: CheckpointFile, out: Path) -> None:
    """Write the merged model as a checkpoint, with what the base's checkpoint holds beside its state."""
    unread = unread_in(base.checkpoint)
    if unread:
        kinds = dict.fromkeys(unread)
        raise AdapterFileError(
            f"{base.path} holds objects of {listed(kinds)}, which would be lost in "
            f"{out}. Name a file that ends in .safetensors, or merge in memory: "
            "load_adapter(model, path), then save_merged."
        )
    with writing(out) as part, folder_beside(out) as folder:
        state = _merged_state(merged, base, folder)
        contents = state
        is_state_alone = base.checkpoint.keys() <= state.keys()
        if not is_state_alone:
            contents = {**without_run_state(base.checkpoint), "state_dict": state}
        torch.save(contents, part)


def _merged_state(
    merged: MergedTensors, base: CheckpointFile, folder: Path
) -> dict[str, Any]:
    """The merged state, whose values stay on disk, because ``torch.save`` takes it whole.

    Those of the base are in its file, and each weight with an update goes to a file of
    its own in ``folder``.
    """
    plan = merged.plan
    state = dict(base.entries)
    for number, name in enumerate(plan.output_of):
        value = merged.get(name)
        if name in plan.adapted:
            value = moved_to_disk(value, folder / str(number))
        state[name] = value
    return state


# A folder


def _write_folder(merged: MergedTensors, base: SafetensorsFolder, out: Path) -> None:
    """Write the merged model into a folder, divided into files as the base is.

    The base's other files are copied.
    """
    plan = merged.plan
    check_tensors_alone(plan)
    files_of_base = list(dict.fromkeys(plan.output_of.values()))
    with writing_folder(out) as folder:
        folder.mkdir()
        size = 0
        for file in files_of_base:
            place = _make_folder_of(folder / file.relative_to(base.path))
            names = plan.names_written_for(file)
            size += _write_tensors(merged, names, place, like=file)
        if base.index:
            index = _new_index(plan, base.index, size)
            (folder / INDEX).write_text(json.dumps(index, indent=2))
        _copy_others(base.path, folder, files_of_base)


def _new_index(plan: MergePlan, index: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The index of the merged folder: that of the base, with the new tensors and their size."""
    weight_map = dict[str, str]()
    for name, file in plan.output_of.items():
        weight_map[name] = file.relative_to(plan.base_path).as_posix()
    metadata = dict_or_empty(index.get("metadata"))
    return {
        **index,
        "weight_map": weight_map,
        "metadata": {**metadata, "total_size": size},
    }


def _copy_others(base: Path, folder: Path, written: Collection[Path]) -> None:
    """Copy all files of the base but those ``written`` anew, and what is left behind."""
    for path in base.rglob("*"):
        place = path.relative_to(base)
        if path.is_file() and path not in written and not _is_left_behind(place):
            shutil.copy2(path, _make_folder_of(folder / place))


def _is_left_behind(place: Path) -> bool:
    """Whether a file of the base holds weights, which lack the update, or lies in a hidden folder."""
    *folders, _ = place.parts
    is_hidden = any(folder.startswith(".") for folder in folders)
    return is_hidden or place.name.lower().endswith(_WEIGHTS)


_WEIGHTS = (  # the endings of files that hold weights, in any format
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".gguf", ".msgpack", ".onnx", ".onnx_data",
    ".npz", ".keras", ".tflite", ".pb", ".ot", ".nemo",
)  # fmt: skip


def _make_folder_of(path: Path) -> Path:
    """Make the folder of a file to be written. Return the file's path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
