"""What is stored of an adapted model, in which file, and how it is checked before anything is written back."""

import difflib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora.adapted import (
    adapted_layers,
    adapter_parameters,
    find_record,
    fold,
    keep_originals,
    persistent_buffers,
    record_of,
    restore_originals,
    trained_base_parameters,
    unfold,
)
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, AdapterStateError, BaseMismatchError, ConfigError
from lightning_lora.fingerprint import check_base, fingerprint
from lightning_lora.functional import digest
from lightning_lora.inject import inject_adapters, remove_adapters
from lightning_lora.merge import merge_adapters, unmerge_adapters

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    Module = TypeVar("Module", bound=LightningModule)

KEY = "lightning_lora"
"""Where a Lightning checkpoint, or a safetensors file's metadata, says what its adapters are."""

FORMAT = 1
"""The version of what is stored there."""


# What is stored


def adapter_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return all that training changed, and nothing else.

    That is: the adapters, biases and modules that are trained beside them, buffers that no longer have the base's
    values, and whatever a module adds to its state dict by itself.

    Args:
        model: A model with adapters: adapted, merged, or made plain again by a finished fit.

    Returns:
        Tensors by the names they have in ``model.state_dict()``.

    Raises:
        AdapterStateError: ``model`` has no adapters.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> names = inject_adapters(model, LoRAConfig(r=2))
        >>> list(adapter_state_dict(model))
        ['0.lora_A', '0.lora_B']
    """
    off = {name: p.detach() for name, p in adapter_parameters(model).items()} if record_of(model).folded else {}
    return {**off, **without_base(model, model.state_dict())}


def without_base(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Drop from a state of ``model`` what the base has already: frozen parameters, and buffers with the same values."""
    record = record_of(model)
    stored = {**adapter_parameters(model), **trained_base_parameters(model, record.config)}
    ids = {id(p) for p in stored.values()}
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) not in ids}
    aliases = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in ids} - set(stored)
    buffers = set(persistent_buffers(model)) & set(record.originals)
    return {
        name: value
        for name, value in state.items()
        if name not in frozen | aliases and not (name in buffers and _same(value, record.originals[name]))
    }


def describe(model: nn.Module, state: Mapping[str, Any], base: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return, in plain types, what must be known to use ``state`` rightly: format, configuration, base, checksum.

    Args:
        model: The adapted model.
        state: What of it is stored.
        base: The forms of its base, if known; else they are computed.
    """
    about = {"format": FORMAT, "config": record_of(model).config.to_dict(), "base": base or [fingerprint(model)]}
    return {**about, "checksum": _checksum(state, about)}


def _same(value: Any, original: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dtype == original.dtype and torch.equal(value.to(original.device), original)


def _checksum(state: Mapping[str, Any], about: Mapping[str, Any]) -> int:
    """One number for the names and contents of all tensors, and for what is said about them."""
    said = {name: value for name, value in about.items() if name != "checksum"}
    names = sorted(name for name, value in state.items() if isinstance(value, Tensor) and not value.is_meta)
    text = json.dumps([said, names], sort_keys=True).encode()
    total = digest(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    for name in names:
        total = (total * 1_000_003 + digest(state[name])) % (1 << 63)
    return total


# What may be written back


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Write back what :func:`adapter_state_dict` returned: everything is checked, then everything is written.

    Buffers that ``state`` does not hold get the base's values. A merged model is merged again with the new adapters.

    Args:
        model: A model adapted as the one that ``state`` is of.
        state: Tensors by name.

    Raises:
        AdapterMismatchError: a name is missing, unexpected, or of another shape or kind. Nothing was written then.
        AdapterStateError: ``model`` has no adapters.
    """
    record = record_of(model)
    _check_names(model, state)
    _check_tensors(model, state)
    with _adapters_live(model):
        buffers = set(persistent_buffers(model)) & set(record.originals)
        restore_originals(model, buffers - set(state))
        model.load_state_dict(dict(state), strict=False)


@contextmanager
def _adapters_live(model: nn.Module) -> Iterator[None]:
    """Un-merge for a while."""
    folded = unfold(model)
    merged = any(layer.lora_base is not None for layer in adapted_layers(model).values())
    unmerge_adapters(model)
    try:
        yield
    finally:
        if folded:
            fold(model)
        elif merged:
            merge_adapters(model)


def _required(model: nn.Module) -> dict[str, Tensor]:
    """What a stored state of ``model`` must hold."""
    return {**adapter_parameters(model), **trained_base_parameters(model, record_of(model).config)}


def _optional(model: nn.Module) -> dict[str, Any]:
    """What it may hold besides: buffers, and what a module adds to its state dict by itself."""
    return {**without_base(model, model.state_dict()), **persistent_buffers(model)}


def _check_names(model: nn.Module, state: Mapping[str, Any]) -> None:
    required, optional = _required(model), _optional(model)
    missing = [name for name in required if name not in state]
    unexpected = [name for name in state if name not in required and name not in optional]
    if missing or unexpected:
        near = {name: difflib.get_close_matches(name, missing or required, n=1) for name in unexpected[:3]}
        hint = "".join(f" {name!r} is close to {match[0]!r}." for name, match in near.items() if match)
        found = " and ".join(filter(None, (_listed("missing", missing), _listed("unexpected", unexpected))))
        raise AdapterMismatchError(
            f"These adapters do not fit {type(model).__name__}: {found}.{hint} Adapt the model with the targets, "
            "modules_to_save and bias that they were trained with."
        )


def _check_tensors(model: nn.Module, state: Mapping[str, Any]) -> None:
    known = {**_optional(model), **_required(model)}
    for name, value in state.items():
        if isinstance(known[name], Tensor):
            _check_tensor(name, value, known[name])


def _check_tensor(name: str, value: object, expected: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != expected.shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise AdapterMismatchError(
            f"{name!r} is {found}, but this model has {tuple(expected.shape)}. Adapt it with the r that the adapters were "
            "trained with."
        )
    if value.is_floating_point() != expected.is_floating_point() or value.is_complex() != expected.is_complex():
        raise AdapterMismatchError(f"{name!r} is {value.dtype}, but this model has {expected.dtype}.")


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{what} {', '.join(map(repr, names[:5]))}{more}" if names else ""


def check_fits(model: nn.Module, state: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Refuse stored adapters that do not fit an adapted model, whether in shape or in meaning.

    Raises:
        AdapterFileError: the description cannot be read.
        AdapterMismatchError: a tensor does not fit, or the same factors would give another update here.
        BaseMismatchError: they were trained on another base.
    """
    config = _stored_config(description)
    for name, layer in adapted_layers(model).items():
        theirs = (config.rank(name), config.scaling(name))
        ours = (layer.lora_A.shape[0], layer.lora_scaling)
        if theirs != ours:
            raise AdapterMismatchError(
                f"These adapters were trained with r={theirs[0]} and a scaling of {theirs[1]:g} in {name!r}; here it has "
                f"r={ours[0]} and {ours[1]:g}. Adapt the model as they were trained: r={config.r}, alpha={config.alpha}, "
                f"use_rslora={config.use_rslora}, rank_pattern={config.rank_pattern}, alpha_pattern={config.alpha_pattern}."
            )
    _check_names(model, state)
    check_base(model, description["base"])
    _check_tensors(model, state)


def _stored_config(description: object) -> LoRAConfig:
    if not isinstance(description, Mapping) or not {"format", "config", "base", "checksum"} <= set(description):
        raise AdapterFileError(f"The file's {KEY!r} entry is not one this package wrote. It is damaged, or foreign.")
    if description["format"] != FORMAT:
        raise AdapterFileError(
            f"The file has format {description['format']!r}, and this version reads {FORMAT}. Use the version that wrote it."
        )
    try:
        return LoRAConfig.from_dict(description["config"])
    except (ConfigError, TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"The file's configuration cannot be used: {error}") from error


# A Trainer's checkpoints


def adapter_only(model: nn.Module, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return ``checkpoint`` as it is to be written: what training changed of ``model``, and its description."""
    state = without_base(model, checkpoint["state_dict"])
    return {**checkpoint, "state_dict": state, KEY: describe(model, state, record_of(model).fingerprints)}


def check_readable(checkpoint: object, path: object) -> None:
    """Refuse what is no Lightning checkpoint, or one whose adapters are not as they were written.

    Raises:
        AdapterFileError: it is one of these.
    """
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise AdapterFileError(f"{path} is no Lightning checkpoint: it has no 'state_dict'. Pass one that a Trainer wrote.")
    if KEY in checkpoint:
        _stored_config(checkpoint[KEY])
        _check_checksum(checkpoint["state_dict"], checkpoint[KEY], path)


def as_base(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a full checkpoint as the start of a fine-tune: its weights, and nothing of the run that made it."""
    run = {"callbacks", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step"}
    kept = {key: value for key, value in checkpoint.items() if key not in run}
    return {**kept, "epoch": 0, "global_step": 0, "optimizer_states": [], "lr_schedulers": []}


def load_checkpoint_state(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Write a Trainer checkpoint into an adapted model: adapters, or the weights of a full one as its base.

    Raises:
        AdapterMismatchError, BaseMismatchError, AdapterFileError: it does not fit. Nothing was written then.
    """
    state = checkpoint["state_dict"]
    if KEY in checkpoint:
        check_fits(model, state, checkpoint[KEY])
        load_adapter_state_dict(model, state)
        return
    record, adapters = record_of(model), adapter_parameters(model)
    expected = {name: value for name, value in model.state_dict().items() if name not in adapters}
    missing, unexpected = [n for n in expected if n not in state], [n for n in state if n not in expected]
    shapes = [n for n in expected if n in state and getattr(state[n], "shape", None) != getattr(expected[n], "shape", None)]
    if missing or unexpected or shapes:
        found = ", ".join(filter(None, map(_listed, ("missing", "unexpected", "of another shape"), (missing, unexpected, shapes))))
        raise BaseMismatchError(
            f"This checkpoint has no adapters of this package, and as a base it does not fit {type(model).__name__}: "
            f"{found}. Pass a checkpoint of the same model, trained with or without LoRACallback."
        )
    with _adapters_live(model):
        model.load_state_dict(dict(state), strict=False)
        for layer in adapted_layers(model).values():
            layer.start(layer.lora_A, layer.lora_B, layer.lora_init)
        record.originals = {}
        keep_originals(model, record)
    record.fingerprints = [fingerprint(model)]


# Files without a Trainer


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write all that training changed into one ``.safetensors`` file.

    Args:
        model: A model with adapters: adapted, merged, or made plain again by a finished fit.
        path: The file. It is written beside and moved into place, so that it is never half there.

    Raises:
        AdapterStateError: ``model`` has no adapters, or they are on the meta device.
        AdapterFileError: something in its state is no tensor.
    """
    path, state = Path(path), adapter_state_dict(model)
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise AdapterFileError(f"{odd[:3]} are not tensors, which is all that safetensors holds. Save with the Trainer instead.")
    if any(value.is_meta for value in state.values()):
        raise AdapterStateError("The adapters are on the meta device and have no values. Call model.to_empty first.")
    description = describe(model, state, record_of(model).fingerprints or None)
    beside = path.with_name(f".{path.name}.part")
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
    try:
        save_file(tensors, beside, metadata={"format": "pt", KEY: json.dumps(description)})
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Put the adapters of a file on ``model``: all of them, or an error and the model as it was.

    Args:
        model: The base they were trained on; it is adapted as the file says, if it is not yet. A model that a finished
            fit has merged gets its base back first.
        path: A file that :func:`save_adapter` or a Trainer with ``LoRACallback`` wrote.

    Raises:
        AdapterFileError: the file is truncated, foreign or was tampered with.
        BaseMismatchError: the adapters were trained on another base.
        AdapterMismatchError: ``model`` is adapted already, in another way.

    Example:
        >>> import tempfile
        >>> base = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
        >>> trained = nn.Sequential(nn.Linear(4, 4))
        >>> _ = trained.load_state_dict(base.state_dict())
        >>> names = inject_adapters(trained, LoRAConfig(r=2))
        >>> _ = nn.init.ones_(trained[0].lora_B)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(trained, f"{folder}/adapter.safetensors")
        ...     load_adapter(base, f"{folder}/adapter.safetensors")
        >>> torch.equal(base(torch.ones(4)), trained(torch.ones(4)))
        True
    """
    state, description = read_adapter_file(path)
    config = _stored_config(description)
    folded = unfold(model)
    injected = find_record(model) is None
    try:
        inject_adapters(model, config) if injected else None
        check_fits(model, state, description)
        load_adapter_state_dict(model, state)
    except BaseException:
        if injected and find_record(model):
            remove_adapters(model)
        if folded:
            fold(model)
        raise


def read_adapter_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state and the description that a file holds; no code in it is run.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: it is truncated, foreign, or was tampered with.
    """
    path = Path(path)
    if path.is_dir():
        raise AdapterFileError(f"{path} is a folder. Pass a .safetensors file or a Trainer's .ckpt file.")
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        if is_zip:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            state, description = checkpoint["state_dict"], checkpoint.get(KEY)
        else:
            with safe_open(path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
                description = json.loads((file.metadata() or {}).get(KEY, "null"))
    except Exception as error:
        raise AdapterFileError(
            f"{path} cannot be read as adapters: it is truncated, damaged or of another kind ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no more is known'}). Pass a file that save_adapter or a "
            "Trainer with LoRACallback wrote."
        ) from error
    if description is None:
        raise AdapterFileError(
            f"{path} holds no adapters of this package. A full checkpoint is a base: load it with "
            "model.load_state_dict, or give it to Trainer.fit(ckpt_path=...)."
        )
    _stored_config(description)
    _check_checksum(state, description, path)
    return state, description


def _check_checksum(state: Mapping[str, Any], description: Mapping[str, Any], path: object) -> None:
    if _checksum(state, description) != description["checksum"]:
        raise AdapterFileError(f"The adapters in {path} are not as they were written: the file is damaged or was changed.")


def load_from_checkpoint(
    cls: "type[Module]", path: str | Path, *, merge: bool = False, map_location: Any = None, **kwargs: Any
) -> "Module":
    """Lightning's ``load_from_checkpoint`` for the adapter-only files of a Trainer with ``LoRACallback``.

    Args:
        cls: The LightningModule; it is built from the stored hyperparameters, so it loads its pretrained weights itself.
        path: The ``.ckpt`` file.
        merge: Return a plain model with the updates merged, instead of an adapted one.
        map_location: Where the model goes, as for Lightning's own.
        **kwargs: Hyperparameters to override, as for Lightning's own.

    Raises:
        AdapterFileError: the file is truncated, foreign or was tampered with.
        BaseMismatchError: the model that ``cls`` builds is not the base that the adapters were trained on.
    """
    read_adapter_file(path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    shell = BytesIO()  # the same file without the run and the weights, for Lightning to build the model from
    torch.save({**as_base(checkpoint), "state_dict": {}}, shell)
    shell.seek(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Found keys|The state dict)")
        model = cls.load_from_checkpoint(shell, map_location="cpu", **{"strict": False, **kwargs})
    load_adapter(model, path)
    if merge:
        fold(model)
        remove_adapters(model)
    return model.to(map_location) if isinstance(map_location, str | torch.device) else model
