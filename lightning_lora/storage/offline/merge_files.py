"""Merge adapters into files of the base."""

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import (
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    MergePrecisionWarning,
    listed,
    warn,
)
from lightning_lora.model.merged import lost_to_rounding
from lightning_lora.model.record import HALVES
from lightning_lora.storage.disk import check_output, path_here, unread_in, writing, writing_folder
from lightning_lora.storage.fingerprint import BaseTensor, Comparison, compare
from lightning_lora.storage.formats.lightning import as_base
from lightning_lora.storage.offline.layers import besides, layer_on, read_layers
from lightning_lora.storage.offline.tensor_files import INDEX, TensorFiles, write_tensors
from lightning_lora.storage.renaming import Renaming, find_renamings, is_inside
from lightning_lora.storage.stored import StoredAdapters, is_dense
from lightning_lora.tensors.digests import digest, digests_as
from lightning_lora.tensors.names import join


def merge_files(base: str | Path, adapter: str | Path, out: str | Path, progress: Callable[[int], object] = int) -> int:
    """Merge adapters into a base. Return how many weights. Only a checkpoint is in memory as a whole."""
    base, out = path_here(base), path_here(out)
    files = TensorFiles(base)
    check_output(out, [base, adapter, *dict.fromkeys(files.file_of.values())])
    if out.is_file():
        with suppress(AdapterFileError):
            read_layers(out)
            raise FileExistsError(f"{out} holds adapters. Name another file. To sum adapters: lightning-lora combine.")
    job = _Merge(files, read_layers(adapter), progress)
    job.check()
    if base.is_dir() or out.suffix == ".safetensors":
        job.check_tensors_alone()
    if base.is_dir():
        _write_folder(job, out)
    elif out.suffix == ".safetensors":
        with writing(out) as place:
            job.write(place, job.places, files.metadata(base))
    elif out.suffix in (".ckpt", base.suffix) and files.checkpoint is not None:
        _write_checkpoint(job, files.checkpoint, out)
    else:
        kinds = ".safetensors" if files.checkpoint is None else f".safetensors or {base.suffix}"
        raise AdapterFileError(f"{out} cannot be written from {base}. Name a file that ends in {kinds}.")
    if loss := lost_to_rounding(job.lost, str(base)):
        warn(
            f"{loss} Merge into the base in float32, or keep the adapters in their own file (load_adapter).",
            MergePrecisionWarning,
        )
    return len(job.weights)


class _Merge:
    """The adapters of one file, and the weights that they change. All have their names in the base."""

    def __init__(self, files: TensorFiles, stored: StoredAdapters, progress: Callable[[int], object]) -> None:
        self.files, self.stored, self.progress = files, stored, progress
        self.lost: dict[str, float] = {}  # the share of each layer's update that rounding took, as far as written
        self.name_in_base = _renaming(stored, files)
        self.weights: dict[str, tuple[str, str]] = {}  # the layer, and the name of the weight in it
        for name, layer in stored.layers.items():
            for weight in layer.shapes:
                self.weights[self.name_in_base(join(name, weight))] = name, weight
            for place in map(self.name_in_base, layer.tied.get("weight", ()) if layer.tokens else ()):
                if place in files.file_of:
                    self.weights[place] = name, "weight"
        self.beside = {self.name_in_base(name): value for name, value in besides(stored).items()}
        for name in stored.filled:
            if (place := self.name_in_base(name)) in files.file_of:
                self.beside[place] = stored.state[name]
        self.places, last = dict(files.file_of), list(files.file_of.values())[-1]
        for name in self.beside:
            self.places.setdefault(name, last)

    def check(self) -> None:
        """Refuse what does not fit, before anything is written."""
        wrong, tied = [], []
        for name, (owner, weight) in self.weights.items():
            layer = self.stored.layers[owner]
            shape, value = layer.shapes[weight], self.files.get(name) if name in self.files.file_of else None
            if not is_dense(value) or not value.is_floating_point() or value.shape != shape:
                found = "absent" if value is None else f"{value.dtype} {list(value.shape)}"
                wrong.append(f"{name} {list(shape)}, {found}")
            if weight in layer.tied and not layer.tokens:
                tied.append(name)
        if wrong:
            raise AdapterMismatchError(
                f"{self.files.path} lacks weights that {self.stored.source} adapts, or has them in another shape or "
                f"dtype: {listed(wrong)}. Pass the base of the training, in float32, bfloat16 or float16."
            )
        if tied:
            raise AdapterMismatchError(
                f"{listed(tied)} are tied to other layers, which a file cannot show: whoever loads it would tie them "
                "again. Merge in memory: load_adapter(model, path), then merge_adapters(model)."
            )
        self._check_base()

    def check_tensors_alone(self) -> None:
        """Refuse what modules keep besides tensors (``get_extra_state``): only a checkpoint has a place for it."""
        odd = [name for name, value in self.beside.items() if not isinstance(value, Tensor)]
        if odd:
            raise AdapterFileError(
                f"{listed(odd)} in {self.stored.source} are not tensors (get_extra_state), and safetensors holds no "
                "others. Merge into a checkpoint (.ckpt); or in memory: load_adapter(model, path), then save_merged."
            )

    def _check_base(self) -> None:
        """Compare every frozen tensor that both sides have. The same values in another precision are accepted."""
        compared = [compare(each, self._compared(each["rounded"])) for each in self.stored.base if "rounded" in each]
        found = min(compared, key=lambda each: len(each.differ), default=Comparison())
        if not found.is_same:
            raise BaseMismatchError(
                f"The adapters in {self.stored.source} were trained on another base: {len(found.differ)} "
                f"frozen tensors in {self.files.path} differ, such as {listed(found.differ)}. Pass the same weights."
            )
        if found.converted:
            warn(
                f"{len(found.converted)} tensors in {self.files.path} have another precision than those that the "
                f"adapters were trained on, such as {listed(found.converted)}. It is the same base, converted."
            )

    def _compared(self, halves: Mapping[str, Any]) -> Iterator[BaseTensor]:
        """The base's tensors that a fingerprint knows, one by one. Rows that others replace are zero."""
        left_out = {*self.stored.changed, *self.stored.random}
        for name, known in halves.items():
            place = self.name_in_base(name)
            if known is None or name in left_out or place not in self.files.file_of:  # None: it was quantised
                continue
            value = self.files.get(place)
            if place in self.weights and (tokens := self.stored.layers[self.weights[place][0]].tokens):
                value = value.index_fill(0, torch.tensor(tokens), 0)
            yield BaseTensor(name, place, value, digest(value), partial(digests_as, value, HALVES))

    def write(self, path: Path, names: Collection[str], metadata: dict[str, str]) -> int:
        """Write these tensors of the merged model into a file. Return their size."""
        return write_tensors(path, names, self._value, self.merged, metadata)

    def _value(self, name: str) -> Tensor:
        """A tensor without updates: that of the training, or of the base."""
        value: Tensor = self.beside[name] if name in self.beside else self.files.get(name)
        return value

    def merged(self, name: str) -> Tensor:
        """Return a tensor of the merged model."""
        self.progress(len(self.places))
        base = self._value(name)
        if name not in self.weights:
            return base
        layer, weight = self.weights[name]
        with torch.no_grad():
            merged, lost = layer_on(self.stored, layer, {weight: base}).lora_merged_weight(weight)
        if not merged.isfinite().all() and base.isfinite().all():
            raise AdapterMismatchError(
                f"{name} with its update does not fit {base.dtype}: values overflow. Use a base of a wider dtype."
            )
        self.lost[layer] = max(lost, self.lost.get(layer, 0.0))
        return merged


def _renaming(stored: StoredAdapters, files: TensorFiles) -> Callable[[str], str]:
    """Return how names in the adapters' file become names in the base: one prefix may come off, or be added."""
    weights = [join(name, weight) for name, layer in stored.layers.items() for weight in layer.shapes]
    found = find_renamings(weights, files.file_of, root_there=stored.root)
    if len(found) > 1:
        raise AdapterMismatchError(
            f"The weights that {stored.source} adapts are in {files.path} in several places: "
            f"{listed(sorted(way.name_here(weights[0]) for way in found))}. Pass a base that holds the model once."
        )
    renaming = found[0] if found else Renaming()
    if outside := [name for name in besides(stored) if not is_inside(name, renaming.there)]:
        raise AdapterMismatchError(
            f"{stored.source} also holds {listed(outside)}, trained outside of {renaming.there!r}, for which "
            f"{files.path} has no place. Merge in memory: load_adapter(model, path), then save_merged."
        )
    return lambda name: renaming.name_here(name) if is_inside(name, renaming.there) else f" outside: {name}"


def _write_checkpoint(job: _Merge, checkpoint: dict[str, Any], out: Path) -> None:
    """Write the merged model as a checkpoint, with what the base's holds beside it."""
    if unread := unread_in(checkpoint):
        raise AdapterFileError(
            f"{job.files.path} holds objects of {listed(dict.fromkeys(unread))}, which would be lost in {out}. Name a "
            "file that ends in .safetensors, or merge in memory: load_adapter(model, path), then save_merged."
        )
    state = dict(job.files.entries)
    for name in job.places:
        state[name] = job.merged(name)
    is_alone = state.keys() >= checkpoint.keys()
    with writing(out) as place:
        torch.save(state if is_alone else {**as_base(checkpoint), "state_dict": state}, place)


def _write_folder(job: _Merge, out: Path) -> None:
    """Write the merged model into a folder, divided as the base is. The base's other files are copied."""
    base, index, size = job.files.path, job.files.index, 0
    with writing_folder(out) as folder:
        folder.mkdir()
        for file in dict.fromkeys(job.places.values()):
            names = [name for name, place in job.places.items() if place == file]
            size += job.write(_place(folder / file.relative_to(base)), names, job.files.metadata(file))
        if index is not None:
            places = {name: file.relative_to(base).as_posix() for name, file in job.places.items()}
            known = index.get("metadata")
            metadata = {**(known if isinstance(known, dict) else {}), "total_size": size}
            index = {**index, "weight_map": places, "metadata": metadata}
            (folder / INDEX).write_text(json.dumps(index, indent=2))
        _copy_others(base, folder, set(job.places.values()))


def _copy_others(base: Path, folder: Path, known: Collection[Path]) -> None:
    """Copy all files of the base but ``known`` ones, weights without the update, and hidden folders."""
    for path in base.rglob("*"):
        place = path.relative_to(base)
        is_hidden = any(each.startswith(".") for each in place.parts[:-1])
        if path.is_file() and path not in known and not is_hidden and not path.name.lower().endswith(_WEIGHTS):
            shutil.copy2(path, _place(folder / place))


_WEIGHTS = (  # the endings of files that hold weights, in any format
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".gguf", ".msgpack", ".onnx", ".onnx_data",
    ".npz", ".keras", ".tflite", ".pb", ".ot", ".nemo",
)  # fmt: skip


def _place(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
