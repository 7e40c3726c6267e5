"""Merge adapters into files of the base."""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import AdapterFileError, AdapterMismatchError, listed
from lightning_lora.moments import Guards
from lightning_lora.storage.checksum import dict_or_empty
from lightning_lora.storage.formats.lightning import without_run_state
from lightning_lora.storage.offline.layers import layer_on, read_layers
from lightning_lora.storage.offline.merge_checks import check_plan, check_tensors_alone
from lightning_lora.storage.offline.merge_plan import AdaptedWeight, MergePlan
from lightning_lora.storage.offline.tensor_files import (
    INDEX,
    CheckpointFile,
    SafetensorsFolder,
    TensorFiles,
    moved_to_disk,
    tensor_files,
    write_tensors,
)
from lightning_lora.storage.on_disk.disk import check_output, folder_beside, path_here, writing, writing_folder
from lightning_lora.storage.on_disk.plain_pickles import unread_in


@dataclass(frozen=True)
class MergedNames:
    """Which tensors of a merged model are not the base's, by their names there."""

    updated: list[str]  # weights that got an update
    replaced: list[str]  # tensors that the adapters' file holds whole, such as those of a trained norm or head


Progress = Callable[[int], object]
"""What is called before each tensor, with the number of all."""


def merge_files(
    base: str | Path, adapter: str | Path, out: str | Path, progress: Progress | None = None
) -> MergedNames:
    """Merge adapters into files of a base, one tensor at a time.

    Args:
        base: A ``.safetensors`` file, a folder of them, or a checkpoint.
        adapter: The file of adapters.
        out: The merged model.
        progress: Called before each tensor.

    Returns:
        Which tensors were merged.
    """
    base = path_here(base)
    out = path_here(out)
    files = tensor_files(base)
    check_output(out, [base, adapter, *files.files])
    _check_no_adapters(out)
    merge = _Merge(files, adapter, progress)
    check_plan(merge.plan)
    _write_in_form_of_base(merge, files, out)
    merge.warn_of_rounding()
    return MergedNames(list(merge.plan.adapted), list(merge.plan.replaced))


def _write_in_form_of_base(merge: "_Merge", files: TensorFiles, out: Path) -> None:
    """Write the merged model as what the base is, or as one safetensors file."""
    if isinstance(files, SafetensorsFolder):
        _merge_into_folder(merge, files, out)
    elif out.suffix == ".safetensors":
        _merge_into_file(merge, out)
    elif not isinstance(files, CheckpointFile):
        raise _cannot_be_written(files.path, out, ".safetensors")
    elif out.suffix in (".ckpt", files.path.suffix):
        _merge_into_checkpoint(merge, files, out)
    else:
        raise _cannot_be_written(files.path, out, f".safetensors or {files.path.suffix}")


def _cannot_be_written(base: Path, out: Path, endings: str) -> AdapterFileError:
    """The error for a file that ends as no output can."""
    return AdapterFileError(f"{out} cannot be written from {base}. Name a file that ends in {endings}.")


def _check_no_adapters(out: Path) -> None:
    """Refuse to write over a file of adapters, which are hardly meant to be lost."""
    if not out.is_file():
        return
    try:
        read_layers(out)
    except AdapterFileError:  # it is something else
        return
    raise FileExistsError(f"{out} holds adapters. Name another file. To sum adapters: lightning-lora combine.")


class _Merge:
    """Computes the tensors of a merged model, one by one."""

    def __init__(self, files: TensorFiles, adapter: str | Path, progress: Progress | None) -> None:
        self.plan = MergePlan(files, read_layers(adapter))
        self.progress = progress
        self.lost_share: dict[str, float] = {}  # of each layer's update, to rounding; of the layers computed so far

    def merged(self, name: str) -> Tensor:
        """Return a tensor of the merged model."""
        if self.progress is not None:
            self.progress(len(self.plan.output_of))
        value = self.without_update(name)
        if name not in self.plan.adapted:
            return value
        return self._with_update(name, value, self.plan.adapted[name])

    def without_update(self, name: str) -> Tensor:
        """Return a tensor as it is before an update: that of the training, or of the base."""
        if name in self.plan.replaced:
            value: Tensor = self.plan.replaced[name]
            return value
        return self.plan.files.get(name)

    def _with_update(self, name: str, base: Tensor, adapted: AdaptedWeight) -> Tensor:
        """The sum of a weight and its update. It must fit into the dtype of the base."""
        layer_name = adapted.layer.name
        layer = layer_on(self.plan.stored, layer_name, {adapted.weight: base})
        with torch.no_grad():
            merged, lost_share = layer.lora_merged_weight(adapted.weight)
        if not merged.isfinite().all() and base.isfinite().all():
            raise AdapterMismatchError(
                f"{name} with its update does not fit {base.dtype}: values overflow. Use a base of a wider dtype."
            )
        lost_before = self.lost_share.get(layer_name, 0.0)
        self.lost_share[layer_name] = max(lost_share, lost_before)
        return merged

    def warn_of_rounding(self) -> None:
        """Warn if rounding took much of the updates."""
        Guards().merged_offline(str(self.plan.base), self.lost_share)

    def write(self, path: Path, names: Collection[str], source: Path) -> int:
        """Write these tensors into a safetensors file, with the metadata of the base's file. Return their size."""
        metadata = self.plan.files.metadata(source)
        return write_tensors(path, names, self.without_update, self.merged, metadata)


# A file


def _merge_into_file(merge: _Merge, out: Path) -> None:
    """Write the merged model as one safetensors file."""
    check_tensors_alone(merge.plan)
    with writing(out) as part:
        merge.write(part, merge.plan.output_of, merge.plan.base)


def _merge_into_checkpoint(merge: _Merge, base: CheckpointFile, out: Path) -> None:
    """Write the merged model as a checkpoint, with what the base's holds beside it."""
    unread = unread_in(base.checkpoint)
    if unread:
        kinds = dict.fromkeys(unread)
        raise AdapterFileError(
            f"{base.path} holds objects of {listed(kinds)}, which would be lost in {out}. Name a "
            "file that ends in .safetensors, or merge in memory: load_adapter(model, path), then save_merged."
        )
    with writing(out) as part, folder_beside(out) as folder:
        state = _merged_state(merge, base, folder)
        is_state_alone = base.checkpoint.keys() <= state.keys()
        contents = state if is_state_alone else {**without_run_state(base.checkpoint), "state_dict": state}
        torch.save(contents, part)


def _merged_state(merge: _Merge, base: CheckpointFile, folder: Path) -> dict[str, Any]:
    """The merged state. ``torch.save`` takes it whole, so its values stay in files: the base, and those in a folder."""
    state = dict(base.entries)
    for number, name in enumerate(merge.plan.output_of):
        value = merge.merged(name)
        if name in merge.plan.adapted:
            value = moved_to_disk(value, folder / str(number))
        state[name] = value
    return state


# A folder


def _merge_into_folder(merge: _Merge, base: SafetensorsFolder, out: Path) -> None:
    """Write the merged model into a folder, divided as the base is. The base's other files are copied."""
    check_tensors_alone(merge.plan)
    sources = list(dict.fromkeys(merge.plan.output_of.values()))
    with writing_folder(out) as folder:
        folder.mkdir()
        size = 0
        for source in sources:
            names = merge.plan.names_in(source)
            place = _make_folder_of(folder / source.relative_to(base.path))
            size += merge.write(place, names, source)
        if base.index:
            index = _new_index(merge.plan, base.index, size)
            (folder / INDEX).write_text(json.dumps(index, indent=2))
        _copy_others(base.path, folder, sources)


def _new_index(plan: MergePlan, index: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The index of the merged folder: that of the base, with the new tensors and their size."""
    weight_map = dict[str, str]()
    for name, file in plan.output_of.items():
        weight_map[name] = file.relative_to(plan.base).as_posix()
    metadata = dict_or_empty(index.get("metadata"))
    return {**index, "weight_map": weight_map, "metadata": {**metadata, "total_size": size}}


def _copy_others(base: Path, folder: Path, written: Collection[Path]) -> None:
    """Copy all files of the base but those ``written`` anew, weights without the update, and hidden folders."""
    for path in base.rglob("*"):
        place = path.relative_to(base)
        if path.is_file() and path not in written and not _is_left_behind(place):
            shutil.copy2(path, _make_folder_of(folder / place))


def _is_left_behind(place: Path) -> bool:
    """Whether a file of the base holds weights, in any format, or lies in a hidden folder."""
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
