"""Merge adapters into files of the base."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.errors import (
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    LoRAWarning,
    MergePrecisionWarning,
    listed,
)
from lightning_lora.model.merged import lost_to_rounding
from lightning_lora.storage.base import is_converted
from lightning_lora.storage.checkpoint import as_base
from lightning_lora.storage.disk import unread_in, writing
from lightning_lora.storage.names import common_lead
from lightning_lora.storage.offline.stored import StoredAdapters
from lightning_lora.storage.offline.tensor_files import INDEX, Entry, TensorFiles, write_tensors
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import join

Progress = Callable[[str], object]
"""Called with the name of each tensor before it is written."""


def merge_files(base: Path, adapter: Path, out: Path, progress: Progress = str) -> int:
    """Merge adapters into a file, one tensor at a time.

    Args:
        base: The base: a ``.safetensors`` file, a folder with such files, or a checkpoint.
        adapter: The file with the adapters.
        out: The merged model: a ``.safetensors`` file; a folder, if the base is one; or a ``.ckpt`` file, if the base
            is a checkpoint (then the merged weights are held in memory). It appears when it is complete.
        progress: Called with the name of each tensor before it is written.

    Returns:
        The number of merged weights.

    Raises:
        FileNotFoundError: a file does not exist.
        AdapterFileError: a file cannot be read or written, or ``out`` is of another kind or exists.
        AdapterMismatchError: the base lacks weights, or they have other shapes, or are tied.
        BaseMismatchError: the adapters were trained on another base.

    Warns:
        LoRAWarning: the base has another precision than that of the training.
        MergePrecisionWarning: rounding lost much of an update.
    """
    if not out.parent.is_dir():
        raise FileNotFoundError(f"The folder {out.parent} does not exist. Make it first.")
    files, stored = TensorFiles(base), StoredAdapters(adapter)
    job = _Merge(files, stored)
    job.check()
    if base.is_dir():
        with _whole_folder(out) as folder:
            _write_folder(job, folder, progress)
    elif out.suffix == ".safetensors":
        with writing(out) as part:
            write_tensors(part, job.entries(job.names, progress, new=True), files.metadata(base))
    elif out.suffix == ".ckpt" and files.checkpoint is not None:
        if unread := unread_in(as_base(files.checkpoint)):
            raise AdapterFileError(
                f"{base} holds objects of {listed(dict.fromkeys(unread))}, which are not read, and would be lost in "
                f"{out}. Name a file that ends in .safetensors, or merge in memory: load_adapter(model, path), then "
                "save_merged."
            )
        state = {entry.name: entry.make() for entry in job.entries(job.names, progress, new=True)}
        with writing(out) as part:
            torch.save({**as_base(files.checkpoint), "state_dict": state}, part)
    else:
        kinds = ".safetensors" if files.checkpoint is None else ".safetensors or .ckpt"
        raise AdapterFileError(f"{out} cannot be written from {base}. Name a file that ends in {kinds}.")
    if loss := lost_to_rounding(job.lost, str(base)):
        warnings.warn(
            f"{loss} Merge into the base in float32, or keep the adapters in their own file (load_adapter).",
            MergePrecisionWarning,
            stacklevel=2,
        )
    return len(job.weights)


class _Merge:
    """The adapters of one file, and the weights of the base that they change."""

    def __init__(self, files: TensorFiles, stored: StoredAdapters) -> None:
        self.files, self.stored = files, stored
        self.names = list(files.file_of)
        self.lost: dict[str, float] = {}  # the share of each layer's update that rounding took, as far as written
        weights = [(name, weight) for name, layer in stored.layers.items() for weight in layer.shapes]
        self.name_in_base = _renaming(stored, [join(*each) for each in weights], files)
        self.weights = {self.name_in_base(join(*each)): each for each in weights}
        self.beside = {self.name_in_base(name): value for name, value in stored.beside().items() if _is_tensor(value)}

    def check(self) -> None:
        """Refuse what does not fit, before anything is written."""
        broken = [name for name, value in self.stored.state.items() if _is_tensor(value) and not value.isfinite().all()]
        if broken:
            raise AdapterFileError(
                f"{listed(broken)} in {self.stored.path} hold NaN or infinite values: the training diverged. Use an "
                "earlier file."
            )
        odd = [name for name, value in self.stored.beside().items() if not _is_tensor(value)]
        if odd:
            raise AdapterFileError(
                f"{listed(odd)} in {self.stored.path} are not tensors (get_extra_state), and would be lost. Merge in "
                "memory: load_adapter(model, path), then save_merged."
            )
        wrong, tied = [], []
        for name, (layer, weight) in self.weights.items():
            shape = self.stored.layers[layer].shapes[weight]
            if name not in self.files.file_of or tuple(self.files.get(name).shape) != shape:
                wrong.append(f"{name} {list(shape)}")
            tied += [name] if weight in self.stored.layers[layer].tied else []
        if wrong:
            raise AdapterMismatchError(
                f"{self.files.path} lacks weights that {self.stored.path} adapts, or has them in another shape: "
                f"{listed(wrong)}. Its names are such as {listed(self.names)}. Pass the base that the adapters were "
                "trained on, not quantised."
            )
        if tied:
            raise AdapterMismatchError(
                f"{listed(tied)} are tied to other layers, which a file cannot show: whoever loads it would tie them "
                "again. Merge in memory: load_adapter(model, path), then merge_adapters(model)."
            )
        self._check_base()

    def _check_base(self) -> None:
        """Compare every frozen tensor that both sides have.

        The same values in another precision are accepted.
        """
        changed, forms = set(self.stored.description["changed"]), self.stored.description["base"]
        compared = [self._compare(form, changed) for form in forms if "rounded" in form]
        found = min(compared, key=lambda each: len(each.differ), default=_Comparison([], [], 0))
        if found.differ or not found.equal:
            raise BaseMismatchError(
                f"The adapters in {self.stored.path} were trained on another base: {len(found.differ)} frozen tensors "
                f"in {self.files.path} differ, such as {listed(found.differ)}, and {found.equal} are the same. Pass "
                "the weights that they were trained on."
            )
        if found.converted:
            warnings.warn(
                f"{len(found.converted)} tensors in {self.files.path} have another precision than those that the "
                f"adapters were trained on, such as {listed(found.converted)}. It is the same base, converted.",
                LoRAWarning,
                stacklevel=4,
            )

    def _compare(self, form: dict[str, Any], changed: set[str]) -> "_Comparison":
        """Compare the base with one form of it that the training has seen."""
        dtypes = [getattr(torch, dtype) for dtype in form["dtypes"]]
        differ, converted, equal = [], [], 0
        for (name, halves), exact in zip(form["rounded"].items(), form["digests"], strict=True):
            place = self.name_in_base(name)
            if name in changed or halves is None or place not in self.files.file_of:  # None: it was quantised
                continue
            tensor = self.files.get(place)
            if digest(tensor) == exact:
                equal += 1
            elif is_converted(tensor, exact, halves, dtypes):
                converted.append(place)
                equal += 1
            else:
                differ.append(place)
        return _Comparison(differ, converted, equal)

    def entries(self, names: list[str], progress: Progress, *, new: bool) -> Iterator[Entry]:
        """Yield the tensors of a file of the merged model.

        Args:
            names: The tensors of the base that belong to it.
            progress: Called with the name of each tensor before it is made.
            new: Whether to add the tensors that the base does not have.
        """
        more = [name for name in self.beside if name not in self.files.file_of] if new else []
        for name in [*names, *more]:
            like = self.beside.get(name)
            if like is None:
                like = self.files.get(name)
            yield Entry(name, like.dtype, tuple(like.shape), lambda name=name: self._values(name, progress))  # type: ignore[misc]

    def _values(self, name: str, progress: Progress) -> Tensor:
        progress(name)
        base = self.beside[name] if name in self.beside else self.files.get(name)
        if name not in self.weights:
            return base
        layer, weight = self.weights[name]
        with torch.no_grad():
            merged, lost = self.stored.adapted(layer, {weight: base}).lora_merged_weight(weight)
        self.lost[layer] = max(lost, self.lost.get(layer, 0.0))
        if not merged.isfinite().all() and base.isfinite().all():
            raise AdapterMismatchError(
                f"{name} with its update does not fit {base.dtype}: values overflow. Use a base of a wider dtype."
            )
        return merged


class _Comparison(NamedTuple):
    """The names of tensors that differ, and of those that were converted, and how many are the same."""

    differ: list[str]
    converted: list[str]
    equal: int


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _renaming(stored: StoredAdapters, weights: list[str], files: TensorFiles) -> Callable[[str], str]:
    """Return how names in the adapters' file become names in the base: one prefix may come off, or be added."""
    root = stored.description.get("root", "")
    inside = f"{root}." if root and all(name.startswith(f"{root}.") for name in weights) else ""
    endings = ("." + weights[0].removeprefix(inside), "." + weights[0])
    prefixes = [name.removesuffix(end) + "." for end in endings for name in files.file_of if name.endswith(end)]
    off = ["", inside, *(f"{lead}." for lead in common_lead(list(stored.layers)) if lead)]
    added = [(cut, prefix) for cut in ("", inside) for prefix in prefixes]
    for ways in (*([(cut, "")] for cut in off), added):
        fitting = {way for way in ways if all(way[1] + name.removeprefix(way[0]) in files.file_of for name in weights)}
        places = {tuple(add + name.removeprefix(strip) for name in weights) for strip, add in fitting}
        if len(places) > 1:
            raise AdapterMismatchError(
                f"The weights that {stored.path} adapts are in {files.path} in several places: "
                f"{listed(place[0] for place in sorted(places))}. Pass a base that holds the model once."
            )
        for strip, add in fitting:
            outside = [name for name in stored.beside() if not name.startswith(strip)]
            if outside:
                raise AdapterMismatchError(
                    f"{stored.path} also holds {listed(outside)}, trained outside of {strip[:-1]!r}, for which "
                    f"{files.path} has no place. Merge in memory: load_adapter(model, path), then save_merged."
                )
            return lambda name: add + name.removeprefix(strip) if name.startswith(strip) else f" outside: {name}"
    return lambda name: name


def _write_folder(job: _Merge, folder: Path, progress: Progress) -> None:
    """Write the merged model into an empty folder, divided as the base is, with the base's other files."""
    base, sizes, places = job.files.path, 0, dict[str, str]()
    files = list(dict.fromkeys(job.files.file_of.values()))
    for file in files:
        names = [name for name, place in job.files.file_of.items() if place == file]
        entries = list(job.entries(names, progress, new=file == files[-1]))
        write_tensors(folder / file.name, entries, job.files.metadata(file))
        places |= {entry.name: file.name for entry in entries}
        sizes += sum(torch.Size(entry.shape).numel() * entry.dtype.itemsize for entry in entries)
    if (base / INDEX).is_file():
        index: dict[str, Any] = json.loads((base / INDEX).read_text())
        index["weight_map"] = places
        index["metadata"] = {**index.get("metadata", {}), "total_size": sizes}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    for other in base.iterdir():
        if other.is_file() and not other.name.endswith(
            (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".h5")
        ):
            shutil.copy2(other, folder / other.name)


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out`` that becomes ``out`` when all is written."""
    if out.exists():
        raise AdapterFileError(f"{out} exists already. Choose another name.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"The folder {out.parent} does not exist. Make it first.")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        yield part
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
