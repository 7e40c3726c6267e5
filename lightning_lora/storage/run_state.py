"""Checksums and checks of a run's state in its checkpoint.

The state of a run is everything in a checkpoint except the model's own state: optimizers, schedulers, loops, callbacks,
random numbers, hyperparameters, and what users add.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.tensors.digests import digest

VERSION = "pytorch-lightning_version"
"""Lightning's entry with the version that wrote a checkpoint."""

_RESUMED: dict[str, type[Any]] = {"optimizer_states": list, "lr_schedulers": list, "loops": Mapping}
"""The entries without which a fit cannot go on."""

_TYPES: dict[str, type[Any]] = {
    **_RESUMED,
    "callbacks": Mapping,
    "hyper_parameters": Mapping,
    "epoch": int,
    "global_step": int,
}
"""Lightning's entries, and their types."""


# Checksums


def run_checksums(entries: Mapping[Any, Any]) -> dict[str, int]:
    """Return a checksum for each entry, by its name.

    Plain values, containers and tensors are read whole. Of other objects, only the type is known.
    """
    contents = _Contents()
    return {_name(key): int.from_bytes(contents.of(value), "big") >> 1 for key, value in entries.items()}


def is_checksums(value: object) -> bool:
    """Whether ``value`` has the form of :func:`run_checksums`'s result."""
    return isinstance(value, dict) and all(type(k) is str and type(v) is int for k, v in value.items())


def check_run(entries: Mapping[Any, Any], known: Mapping[str, int], path: object, *, whole: bool) -> None:
    """Refuse entries that are not as they were written.

    Entries that were added are not looked at: nothing of the run is lost, and a CheckpointIO may add its own.

    Args:
        entries: The entries of a checkpoint.
        known: The checksums that were written with them.
        path: The file.
        whole: Also refuse a file without some of the entries.

    Raises:
        AdapterFileError: an entry was changed or removed.
    """
    now = run_checksums({key: value for key, value in entries.items() if _name(key) in known})
    wrong = {
        "was changed": [name for name in now if now[name] != known[name]],
        "is missing": [name for name in known if whole and name not in now],
    }
    found = " and ".join(f"{listed(names)} {what}" for what, names in wrong.items() if names)
    if found:
        raise AdapterFileError(
            f"{path} is not as it was written: {found}. The file is damaged or was changed. Use another checkpoint, or "
            "load only the adapters of this one: load_adapter(model, path)."
        )


def _name(key: object) -> str:
    return key if isinstance(key, str) else repr(key)


_PLAIN = (bool, float, complex, str, bytes)
_NAMED = (torch.dtype, torch.device, torch.layout)
_DEEPEST = 100
"""A value further inside others than this is known by its type."""


class _Contents:
    """Hashes of values.

    A value that is held many times is read once, so a small file costs little, even if its values hold each other.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, bytes]] = {}

    def of(self, value: Any, depth: int = 0) -> bytes:
        """Return the hash of a value."""
        for kind in _PLAIN:
            if isinstance(value, kind):
                return _hash(kind.__name__, kind.__repr__(value))
        if isinstance(value, int):
            return _hash("int", hex(value))
        if isinstance(value, Tensor):
            return _hash("tensor", *_tensor(value))
        if id(value) not in self._known:
            self._known[id(value)] = value, _hash("inside itself")  # held, or its id may become another's
            self._known[id(value)] = value, self._of_other(value, depth + 1)
        return self._known[id(value)][1]

    def _of_other(self, value: Any, depth: int) -> bytes:
        if value is None or isinstance(value, _NAMED):
            return _hash("named", str(value))
        if depth > _DEEPEST:
            return _hash("deep", type(value).__name__)
        if isinstance(value, dict):
            return _hash("dict", *(self.of(key, depth) + self.of(inner, depth) for key, inner in value.items()))
        if isinstance(value, list | tuple):
            return _hash("tuple" if isinstance(value, tuple) else "list", *(self.of(inner, depth) for inner in value))
        if isinstance(value, set | frozenset):
            return _hash("set", *sorted(self.of(inner, depth) for inner in value))
        return _hash("other", type(value).__name__, _buffer(value))


def _hash(*parts: str | bytes) -> bytes:
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        total.update(len(content).to_bytes(8, "big") + content)
    return total.digest()


def _tensor(value: Tensor) -> tuple[str, ...]:
    """A tensor's form and bits. A tensor that repeats its memory is known by that memory, which may be far smaller."""
    try:
        form = (str(value.dtype), str(value.layout), str(tuple(value.shape)))
        if value.is_meta or value.is_quantized or value.is_nested:
            return form
        if value.layout is torch.strided and not hasattr(value, "__tensor_flatten__"):
            memory = value.untyped_storage()
            if value.numel() * value.element_size() > memory.nbytes():
                held = torch.empty(0, dtype=torch.uint8, device=value.device).set_(memory)
                return (*form, str(value.stride()), str(value.storage_offset()), str(digest(held)))
        return (*form, str(digest(value)))
    except (RuntimeError, NotImplementedError, TypeError):  # no digest for such a tensor
        return (str(value.dtype), str(value.layout))


def _buffer(value: Any) -> bytes:
    """The bytes of an array, or nothing."""
    try:
        view = memoryview(value)
        return b"" if "O" in view.format else view.tobytes()  # pointers to objects differ in each process
    except (TypeError, ValueError, BufferError):
        return b""


# Checks


def check_version(checkpoint: Mapping[Any, Any], path: object) -> None:
    """Refuse a checkpoint without Lightning's version.

    Raises:
        AdapterFileError: there is none, or it cannot be read.
    """
    if VERSION not in checkpoint:
        raise AdapterFileError(
            f"{path} is not a Lightning checkpoint: it has no version. Pass one that a Trainer wrote."
        )
    try:
        Version(checkpoint[VERSION])
    except (InvalidVersion, TypeError) as error:
        raise AdapterFileError(
            f"{path} is damaged or was changed: {str(checkpoint[VERSION])[:50]!r} is no version of Lightning. Use "
            "another checkpoint."
        ) from error


def check_types(checkpoint: Mapping[Any, Any], path: object) -> None:
    """Refuse a checkpoint in which entries have wrong types.

    Raises:
        AdapterFileError: an entry of Lightning's own is of another type than Lightning writes.
    """
    wrong = [name for name, kind in _TYPES.items() if name in checkpoint and not isinstance(checkpoint[name], kind)]
    if "loops" not in wrong and not all(isinstance(state, Mapping) for state in checkpoint.get("loops", {}).values()):
        wrong.append("loops")
    if wrong:
        raise AdapterFileError(
            f"{path} is damaged or was changed: Lightning did not write its {listed(wrong)}. Use another checkpoint."
        )


def has_run(checkpoint: Mapping[Any, Any]) -> bool:
    """Whether a checkpoint holds the state of a run."""
    return all(name in checkpoint for name in _RESUMED)


def check_resumable(checkpoint: Mapping[Any, Any], path: object) -> None:
    """Refuse a checkpoint from which a fit cannot go on.

    Raises:
        AdapterFileError: it holds no state of a run, or an optimizer's state is NaN or infinite.
    """
    if not has_run(checkpoint):
        missing = [name for name in _RESUMED if name not in checkpoint]
        raise AdapterFileError(
            f"{path} has no {listed(missing)}, so a fit cannot go on from it: it may have been written with "
            "save_weights_only=True. Load its adapters with load_adapter(model, path), and call fit without ckpt_path."
        )
    for state in checkpoint["optimizer_states"]:
        if not isinstance(state, Mapping) or not isinstance(state.get("param_groups"), list):
            raise AdapterFileError(f"{path} is damaged or was changed: it has no state of an optimizer where one was.")
        if not all(_is_finite(value) for value in _tensors_in(state.get("state"))):
            raise AdapterFileError(
                f"The optimizer's state in {path} holds NaN or infinite values: the training that wrote it had "
                "diverged. Use an earlier checkpoint, or train again with a lower learning rate."
            )


def _tensors_in(state: object) -> Iterable[Tensor]:
    """The tensors in an optimizer's state: of each parameter, or lists of them, as LBFGS has."""
    for named in state.values() if isinstance(state, Mapping) else ():
        for value in named.values() if isinstance(named, Mapping) else ():
            for each in value if isinstance(value, list | tuple) else (value,):
                if isinstance(each, Tensor):
                    yield each


def _is_finite(value: Tensor) -> bool:
    return value.is_meta or not value.is_floating_point() or bool(value.isfinite().all())
