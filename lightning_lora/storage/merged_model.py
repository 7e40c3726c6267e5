"""Save the whole merged model, for code that does not know adapters."""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import Parameter, signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from lightning_lora.errors import AdapterFileError, AdapterStateError, listed, warn
from lightning_lora.functional.update import wide
from lightning_lora.layers import HAS_UPDATE
from lightning_lora.model.attach import check_weights
from lightning_lora.model.merge import check_mergeable, tied_weights
from lightning_lora.model.merged import check_as_merged
from lightning_lora.model.view import View, root_of, view_of
from lightning_lora.moments import Guards
from lightning_lora.private import HPARAMS_NAME, STATE_NOTES
from lightning_lora.storage.disk import check_output, path_here, writing, writing_folder
from lightning_lora.storage.state import check_not_diverged
from lightning_lora.tensors.names import join, own_parameter, plain_module, plain_name, set_parameter, submodule
from lightning_lora.tensors.shards import is_dtensor, reshard
from lightning_lora.tensors.values import replace_values


def save_merged(model: nn.Module, path: str | Path) -> None:
    """Write the whole model with merged weights.

    The file has nothing of this package: whoever reads it does not need it. ``model`` does not change: its adapters
    stay on their layers, or merged, as they are. The weights are those of ``merge_adapters``. Only the merged weights
    are held in memory a second time.

    Args:
        model: A model with adapters: on its layers, or merged by ``merge_adapters`` or a finished fit.
        path: The name says what is written. ``.ckpt``: a Lightning checkpoint for ``MyModule.load_from_checkpoint``,
            with the hyperparameters. ``.safetensors``: all tensors, for ``safetensors.torch.load_model``. A name
            without ending: a new folder, by the ``save_pretrained`` of the model or of the one model inside, for
            ``from_pretrained``. All are written under another name and then moved, so they are never incomplete.

    Raises:
        AdapterStateError: ``model`` has no adapters, or they are disabled or hold NaN or infinite values, or its
            weights are quantised, have no values, or cannot hold the sum.
        AdapterFileError: ``model`` cannot be written so, or the file cannot be written.
        FileNotFoundError: the folder of the file does not exist.

    Warns:
        LoRAWarning: a weight is no longer tied.
        MergePrecisionWarning: rounding lost much of an update.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_model
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> plain = nn.Sequential(nn.Linear(4, 4))
        >>> names = inject_adapters(model, LoRAConfig(r=2))
        >>> _ = nn.init.ones_(model[0].lora_B)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_merged(model, f"{folder}/merged.safetensors")
        ...     load_model(plain, f"{folder}/merged.safetensors")
        (set(), [])
        >>> torch.allclose(plain(torch.ones(4)), model(torch.ones(4)), atol=1e-5)
        True
    """
    check_output(path)
    path = path_here(path)
    if path.suffix == ".ckpt":
        _write_checkpoint(view_of(model), path)
    elif path.suffix == ".safetensors":
        _write_safetensors(view_of(model), path)
    elif path.suffix[1:].isalpha():  # a folder may have dots in its name, as in "llama-3.1"
        raise AdapterFileError(
            f"{path} has an unknown ending. Use .ckpt for a Lightning checkpoint, .safetensors for all tensors, or a "
            "name without ending for a folder by save_pretrained."
        )
    else:
        _write_folder(view_of(model), path)


def _merged(view: View, given: Mapping[str, Any] | None = None, *, is_folder: bool = False) -> dict[str, Any]:
    """The merged state, after checks. Adapters must be finite, and no weight may be tied again."""
    untied = [weight.layer for weight in view.merged if isinstance(weight.base, nn.Parameter)]
    untied += tied_weights(view)
    config = getattr(submodule(view.model, root_of(view.model)), "config", None)
    if is_folder and untied and getattr(config, "tie_word_embeddings", False):
        raise AdapterFileError(
            f"The weight of {listed(untied)} in {view.title} is tied to another layer's and has its own "
            "update, and from_pretrained would tie it again. Set config.tie_word_embeddings = False before saving."
        )
    state, lost = merged_state(view, given)
    check_not_diverged(view)
    weights = set(view.adapted_weights)
    for name, value in state.items():
        if plain_name(name) in weights and not value.isfinite().all():
            raise AdapterStateError(
                f"Merged, {plain_name(name)!r} would hold values that {value.dtype} cannot. Convert the model first: "
                "model.to(torch.float32)."
            )
    Guards().merged(view.title, lost, untied)
    return state


# A file


def _write_checkpoint(view: View, path: Path) -> None:
    model: Any = plain_module(view.model)
    package = _package_of_lightning(model)
    if package is None:
        raise AdapterFileError(
            f"{type(model).__name__} is not a LightningModule, so there is no checkpoint of it. Use a name that ends "
            "in .safetensors, or, if it has save_pretrained, one without ending."
        )
    is_dict = isinstance(model.hparams, dict)  # otherwise omegaconf's
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": sys.modules[package].__version__,
        "state_dict": _merged(view),
        model.CHECKPOINT_HYPER_PARAMS_KEY: dict(model.hparams) if is_dict else model.hparams,
        model.CHECKPOINT_HYPER_PARAMS_TYPE: None if is_dict else type(model.hparams),
        model.CHECKPOINT_HYPER_PARAMS_NAME: getattr(model, HPARAMS_NAME, None),
    }
    model.on_save_checkpoint(checkpoint)
    with writing(path) as part:
        torch.save(checkpoint, part)


def _package_of_lightning(model: nn.Module) -> str | None:
    """The package that a LightningModule comes from: ``lightning`` or ``pytorch_lightning``. None: it is none."""
    for kind in type(model).__mro__:
        if kind.__name__ == "LightningModule":
            package, _, _ = kind.__module__.partition(".")
            return package
    return None


def _write_safetensors(view: View, path: Path) -> None:
    state = _merged(view)
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise AdapterFileError(
            f"{listed(odd)} are not tensors, which is all that safetensors holds. Use a name that ends in .ckpt, or "
            "one without ending."
        )
    with writing(path) as part:
        part.touch()
        mode = part.stat().st_mode
        model: Any = SimpleNamespace(state_dict=lambda: dict(state))  # all that it asks of a model
        save_model(model, str(part), metadata={"format": "pt"})
        part.chmod(mode)  # as any file: safetensors lets nobody else read its own


# A folder


def _write_folder(view: View, path: Path) -> None:
    root = root_of(view.model)
    inner = submodule(view.model, root)
    title = view.title
    save = getattr(inner, "save_pretrained", None)
    if save is None:
        raise AdapterFileError(
            f"{title} has no save_pretrained, nor has one model inside it. Use a name that ends in .ckpt for a "
            "LightningModule, or in .safetensors."
        )
    prefix = f"{root}." if root else ""
    outside = [name for name in (*view.adapters, *view.trained) if not name.startswith(prefix)]
    if outside:
        raise AdapterFileError(
            f"save_pretrained writes {root!r} of {title} alone, and {listed(outside)} were trained outside of it. Use "
            "a name that ends in .ckpt or .safetensors."
        )
    state = _merged(view, is_folder=True)
    with writing_folder(path) as part, _answering(view.model, state):
        save(part)


def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Let an adapted model's ``save_pretrained`` write what the model computes, whoever calls it."""
    reshard(model)
    save = type(model).save_pretrained
    view = View(model)
    args, kwargs = _by_name(save, args, kwargs)
    given = kwargs.get("state_dict")
    adapters = view.adapters  # those without effect too: none is written
    has_no_adapters = given is not None and adapters.keys().isdisjoint(map(plain_name, given))
    if has_no_adapters or "state_dict" in vars(model):  # the caller's own values, or inside another save
        return save(model, *args, **kwargs)
    view.layers = {name: layer for name, layer in view.layers.items() if layer.lora_enabled}  # of a shown base, none
    state = _merged(view, given, is_folder=True)
    if view.layers:
        warn(
            f"save_pretrained of {type(model).__name__} writes merged weights, which are what the model computes. For "
            "the adapters alone, call save_adapter(model, path), or export_peft(model, folder)."
        )
    if given:
        kwargs = {**kwargs, "state_dict": state}
    with _answering(model, state):
        return save(model, *args, **kwargs)


def _by_name(
    save: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with their names, but for the folder. One given by its position may be a state."""
    about = signature(save).parameters.values()
    names = [each.name for each in about if each.kind is Parameter.POSITIONAL_OR_KEYWORD]
    named = dict(zip(names[2:], args[1:], strict=False))  # the first two are self and the folder
    if len(named) < len(args) - 1 or not named.keys().isdisjoint(kwargs):  # an error of the caller's
        return args, kwargs
    return args[:1], {**named, **kwargs}


@contextmanager
def _answering(model: nn.Module, state: Mapping[str, Any]) -> Iterator[None]:
    """Let the state dict of a model hold these values. Those of modules in it do too."""
    with ExitStack() as undo:
        for name, module in model.named_modules():
            start = f"{name}." if name else ""
            own = vars(module)
            if "state_dict" in own:  # somebody's
                undo.callback(own.update, state_dict=own["state_dict"])
            undo.callback(own.pop, "state_dict")
            own["state_dict"] = lambda *_, start=start, **__: {
                key.removeprefix(start): value for key, value in state.items() if key.startswith(start)
            }
        yield


# The state


def merged_state(view: View, changed: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the state dict that a model has after ``merge_adapters``. Merged weights are in the host's memory."""
    model = plain_module(view.model)
    if view.is_merged:
        check_as_merged(view)
        return _noted(view, model.state_dict()), {}
    changed = {plain_name(name): value for name, value in (changed or {}).items()}
    if any(is_dtensor(changed.get(name, p)) for name, p in view.parameters.items()):
        raise AdapterStateError(
            f"{type(model).__name__} is spread over processes. Call save_adapter(model, path) in each, then "
            "lightning-lora merge BASE FILE OUT. Or gather its state for save_pretrained(folder, state_dict=state)."
        )
    check_weights(view)
    check_mergeable(view)
    with _showing(view, changed):
        merged, lost = _merged_weights(view)
    new_values = {name: value for name, value in {**changed, **merged}.items() if name not in view.adapters}
    adapters = {id(parameter) for parameter in view.adapters.values()}  # a hook may have given them other names
    state: Any = model.state_dict(keep_vars=True)
    for name, value in list(state.items()):
        new_value = new_values.pop(plain_name(name), value)
        state[name] = new_value.detach() if isinstance(new_value, Tensor) else new_value
        if id(value) in adapters:
            del state[name]
    absent = merged.keys() & new_values.keys()
    if absent:
        raise AdapterStateError(
            f"The state dict of {type(model).__name__} does not hold {listed(sorted(absent))} under their own names, "
            "so that no update can be put there. Call merge_adapters(model) and save its state dict."
        )
    state.update(new_values)
    return _noted(view, state), lost


def _noted(view: View, state: Any) -> dict[str, Any]:
    """Note each merged layer, and the model, in torch's notes of a state dict."""
    noted: Any = OrderedDict(state)
    merged, notes = {"", *view.matrices}, dict(getattr(state, STATE_NOTES, {}))
    for name, note in list(notes.items()):
        if plain_name(name) in merged:
            notes[name] = {**note, HAS_UPDATE: True}
    setattr(noted, STATE_NOTES, notes)
    return noted  # type: ignore[no-any-return]  # a dict


@contextmanager
def _showing(view: View, changed: Mapping[str, Any]) -> Iterator[None]:
    """Give the adapters and their weights other values, and their own ones back."""
    with ExitStack() as undo, torch.no_grad():
        for name, layer in view.layers.items():
            first = join(name, layer.lora_weights()[0])
            device = changed.get(first, view.parameters[first]).device
            for leaf in (*layer.lora_weights(), *layer.lora_roles()):
                parameter = own_parameter(layer, leaf)
                value = changed.get(join(name, leaf), parameter).to(device, parameter.dtype)
                if value is not parameter:
                    undo.callback(set_parameter, layer, leaf, parameter)
                    set_parameter(layer, leaf, nn.Parameter(value, requires_grad=False))
        yield


def _merged_weights(view: View) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The merged weights under all of their names. Also the share of each layer's update that is lost to rounding."""
    merged, lost = dict[str, Tensor](), dict[str, float]()
    names: dict[nn.Module, list[str]] = {}
    for name, module in view.modules.items():
        owner = vars(module).get("lora_tied_to", (module,))[0]
        names.setdefault(owner, []).append(name)
    with torch.inference_mode(False), torch.no_grad():
        for first, layer in view.layers.items():
            for weight in layer.lora_weights():
                values, share = layer.lora_merged_weight(weight)
                lost[first] = max(share, lost.get(first, 0.0))
                host = values.detach().cpu()
                merged |= {join(name, weight): host for name in names[layer]}
    return merged, lost


# The base again


def take_updates_out(view: View, merged: Mapping[str, Any], changed: Mapping[str, Any]) -> bool:
    """Take a file's updates out of its merged weights. The weights are the base's then, up to rounding."""
    merged = {plain_name(name): value for name, value in merged.items()}
    if not _fit(view, changed) or not _can_be_taken_out(view) or not view.is_fresh():
        return False
    if not _has_weights(view, merged):
        return False
    with _showing(view, {name: changed[name] for name in view.adapters}), torch.no_grad():
        for layer in view.layers.values():
            for name in layer.lora_weights():
                weight = own_parameter(layer, name)
                update = layer.lora_effective_weight(name).sub_(weight)
                base = weight.to(wide(weight.dtype)) - update
                replace_values(weight, base.to(weight.dtype))
            layer.lora_weights_changed()
    return True


def _fit(view: View, changed: Mapping[str, Any]) -> bool:
    """Whether a file has all adapters, in the shapes of the model's."""
    if not changed.keys() >= view.adapters.keys():
        return False
    return all(changed[name].shape == parameter.shape for name, parameter in view.adapters.items())


def _can_be_taken_out(view: View) -> bool:
    """Whether an update can be subtracted again: not from a scaled, rounded or sharded sum."""
    if any(layer.lora_settings.use_dora for layer in view.layers.values()):
        return False
    return not any(is_dtensor(parameter) or _is_narrow(parameter) for parameter in view.base.values())


def _is_narrow(parameter: Tensor) -> bool:
    """Whether it is less precise than float32."""
    return parameter.is_floating_point() and parameter.element_size() < 4


def _has_weights(view: View, merged: Mapping[str, Any]) -> bool:
    """Whether all weights of the model are those of a file."""
    for name, parameter in view.base.items():
        if name not in merged or not torch.equal(parameter.cpu(), merged[name].cpu()):
            return False
    return True
