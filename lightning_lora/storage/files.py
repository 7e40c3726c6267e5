"""Save, export and load adapters without a Trainer."""

from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from lightning_lora.config import Slices
from lightning_lora.errors import AdapterStateError, ConfigError, listed, warn
from lightning_lora.model.merge import merge_adapters
from lightning_lora.model.remove import remove_adapters
from lightning_lora.model.view import View, view_of
from lightning_lora.storage.formats import own
from lightning_lora.storage.formats.contents import (
    check_computable,
    read_checkpoint,
    read_contents,
)
from lightning_lora.storage.formats.export import Export, ModelExport, for_reader
from lightning_lora.storage.formats.format import LoadArguments
from lightning_lora.storage.formats.lightning import check_is_lightning
from lightning_lora.storage.formats.registry import (
    WRITTEN,
    adapter_file_at,
    find_format,
)
from lightning_lora.storage.load.built_modules import built_module
from lightning_lora.storage.load.other_names import with_names_of
from lightning_lora.storage.load.put import adapt_and_put
from lightning_lora.storage.on_disk.place_of_model import PlaceOfModel
from lightning_lora.storage.on_disk.places import check_output, local_path, path_here
from lightning_lora.storage.same_base.stored_fingerprints import fingerprints_to_store
from lightning_lora.storage.state import (
    adapter_state,
    check_not_diverged,
    without_unchanged_extra,
)
from lightning_lora.storage.stored import ReadFor, StoredAdapters
from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.plain_states import StateDict
from lightning_lora.tensors.values import is_tensor

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    Module = TypeVar("Module", bound=LightningModule)


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write everything that training changed into one ``.safetensors`` file.

    If the model is spread over processes (FSDP2), each process must call it. The first
    one writes.

    Args:
        model: A model with adapters: on its layers, or merged by ``merge_adapters`` or
            a finished fit.
        path: The file, with a name that ends in ``.safetensors``, or a URL that fsspec
            can write, such as ``"s3://..."``. A file on this machine is written under
            another name and then moved, so it is never incomplete.

    Raises:
        AdapterStateError: ``model`` has no adapters, or they are on the meta device, or
            hold NaN or infinite values, or come from another model with another rank or
            scaling.
        AdapterFileError: ``path`` has another ending, or the file cannot be written
            (the disk is full, for example).
        FileNotFoundError: the folder does not exist.

    Warns:
        LoRAWarning: training changed what modules keep besides tensors
            (``get_extra_state``): no file has a place.
    """
    own.check_place(path)
    view = view_of(model)
    state = _tensors_in_state(_state_of(view), view.title)
    check_not_diverged(view)
    stored = StoredAdapters.from_view(view, state, fingerprints_to_store(view))
    if view.is_sharded:
        _write_in_first_process(path, stored)
    else:
        own.write_adapter_file(path, stored)


def _tensors_in_state(state: StateDict, title: str) -> dict[str, Tensor]:
    """The tensors in a state. Warn of what else is in it."""
    tensors = where(state, is_tensor)
    odd = state.keys() - tensors.keys()
    if odd:
        warn(
            f"{listed(sorted(odd))} of {title} changed in training (get_extra_state) "
            "and are not tensors, which is all that safetensors holds: the file is "
            "without them. A Trainer's checkpoint holds them."
        )
    return tensors


def _write_in_first_process(path: str | Path, stored: StoredAdapters) -> None:
    """Write a file in the first process. All wait for it, and know if there is none."""
    failed: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            own.write_adapter_file(path, stored)
        except Exception as error:
            failed = [error]
    dist.broadcast_object_list(failed)
    if failed[0]:
        raise failed[0]


def export_peft(
    model_or_file: nn.Module | str | Path,
    directory: str | Path,
    *,
    root: str | None = None,
    uniform: bool = False,
    format: Literal["peft", "diffusers", "kohya"] = "peft",
    base_name: str | Path | None = None,
) -> None:
    """Write adapters in PEFT's format, or in that of diffusers or kohya, into a directory.

    ``peft``, ``transformers`` and, with ``uniform=True``, vLLM and llama.cpp read it
    unchanged, and compute what the adapted model computes here. What they would compute
    otherwise is refused, and nothing is written.

    Args:
        model_or_file: A model with adapters (on its layers, or merged), or a file that
            ``save_adapter`` or a Trainer with ``LoRACallback`` wrote.
        directory: The directory for PEFT's two files, for
            ``pytorch_lora_weights.safetensors`` of diffusers, or for
            ``kohya_lora.safetensors``. It is made if only the last folder is missing.
            Other files in it stay. The first two get a ``README.md``, a model card,
            unless there is one that this package did not write, or that was changed
            since. That of a Trainer's checkpoint shows the metrics that were logged
            last before it.
        root: The name of the module that the reader has, such as ``"model"`` for the
            model inside a LightningModule; ``""`` is the whole module. By default it is
            the one model inside, if there is one.
        uniform: Write one rank and one alpha for all layers, without rsLoRA, for
            readers that know no others: vLLM, llama.cpp, and PEFT's hotswap (all
            files). The factors are padded with zeros.
        format: ``"diffusers"`` writes what ``pipe.load_lora_weights(directory)`` reads:
            a pipeline's adapted models in the module. Each name begins with the model:
            by its own name if a pipeline knows it (``text_encoder_2``), else ``unet``,
            ``transformer`` or ``text_encoder``, by the class of the model. ``"kohya"``
            writes one file that ComfyUI, A1111, kohya's sd-scripts and diffusers read:
            for Stable Diffusion, SDXL and Flux.
        base_name: The repository or folder of the reader's model, such as
            ``"HuggingFaceTB/SmolLM2-135M"``. By default it is the one that the model
            came from, by ``from_pretrained``; ``""`` leaves the name out.

    Raises:
        ExportError: PEFT has no counterpart for a layer, or would compute something
            else, or something was trained outside of ``root``, or the pipeline would
            refuse it.
        AdapterStateError: the model has no adapters, or they have no values, or come
            from another model with another rank or scaling.
        AdapterFileError: the file cannot be read or does not say enough, or the
            directory cannot be written.
        ConfigError: ``root`` holds no adapted layer, or ``format`` is another word.
        FileNotFoundError: the file, or the folder of ``directory``, does not exist.

    Warns:
        LoRAWarning: a PeftModel, or its merge, would compute otherwise (an
            nn.TransformerEncoder in eval mode, a tied weight); or frozen layers look
            untrained, which the format cannot hold; or servers of language models would
            scale the adapters otherwise, or drop modules that train whole; or a changed
            ``README.md`` stays.

    Example:
        >>> import json, tempfile
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> names = inject_adapters(model, LoRAConfig(r=2, alpha=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_peft(model, folder)
        ...     config = json.loads((Path(folder) / "adapter_config.json").read_text())
        >>> config["r"], config["lora_alpha"], config["target_modules"]
        (2, 4, ['0', '2'])
    """
    if isinstance(base_name, Path):
        base_name = str(base_name)
    if format not in WRITTEN:
        raise ConfigError(
            f"format={format!r} is not known. Expected "
            f"{' or '.join(map(repr, WRITTEN))}."
        )
    export = for_reader(_export_of(model_or_file, base_name), root)
    chosen = WRITTEN[format]
    written_file, *_ = chosen.files
    check_output(directory, [model_or_file], [written_file])
    chosen.write(export, path_here(directory), uniform=uniform)


def _export_of(model_or_file: nn.Module | str | Path, base_name: str | None) -> Export:
    """The adapters of a model or a file, for a reader whose model is loaded from ``base_name``."""
    if isinstance(model_or_file, nn.Module):
        view = view_of(model_or_file)
        stored = StoredAdapters.from_view(view, _state_of(view), [])
        return ModelExport(stored, model_or_file, base_name=base_name)
    return Export(own.read_adapter_file(model_or_file), base_name=base_name)


def _state_of(view: View) -> dict[str, Any]:
    """All that training changed, if it has values."""
    state = without_unchanged_extra(view, adapter_state(view))
    tensors = where(state, is_tensor)
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise AdapterStateError(
            f"{listed(empty)} of {view.title} are on the meta device and have no "
            "values. Load the base, which moves them, or call "
            "model.to_empty(device=...) and initialise them first."
        )
    return state


def load_adapter(
    model: nn.Module,
    path: str | Path | IO[bytes],
    *,
    name: str = "default",
    check_base: bool = True,
    alpha: float | None = None,
    target_slices: Slices | None = None,
) -> None:
    """Load the adapters of a file into ``model``.

    Files of other libraries do not say which base they were trained on, so it cannot be
    checked: load the right weights first. After an error, the model is as it was
    before. Only tensors are read, and no code in a file is run.

    Args:
        model: The base model that the adapters were trained on. If it has no adapters
            yet, it is adapted as the file says. A model that a finished fit has merged
            gets its base back first. It may also be the model inside the module that
            was saved, or a module around the model that was saved, if that module has
            no other weights.
        path: A file that ``save_adapter`` or a Trainer with ``LoRACallback`` wrote: its
            path, a URL that fsspec can read, or the open file, in binary mode. Or
            PEFT's folder, or its file, with ``adapter_config.json`` beside it. Or a
            folder or file of diffusers: a model gets those of its place in the
            pipeline, a module around several gets all. Likewise a file of kohya's
            sd-scripts, for Stable Diffusion and SDXL. Or a repository of the Hugging
            Face hub, if it is in the cache. Or what loralib's ``lora_state_dict``
            returned, saved with ``torch.save``.
        name: The adapter's name. If ``model`` has others, this one is loaded beside
            them, or into the one of this name, and the active one stays active.
        check_base: Refuse another base than the one that the adapters were trained on.
            The same weights in another precision are accepted. If False, names and
            shapes of what was trained must fit, and a warning counts the frozen tensors
            that differ.
        alpha: Only for a file of loralib: the ``lora_alpha`` that it was trained with.
            It is in no file.
        target_slices: Only for a file of loralib with ``MergedLinear`` layers: the
            parts that they adapted (``enable_lora``), as in ``LoRAConfig``:
            ``{"c_attn": ["q", "v"]}``.

    Raises:
        FileNotFoundError: the file does not exist.
        AdapterFileError: the file is truncated, was changed, or holds what this package
            does not have.
        BaseMismatchError: the adapters were trained on another base.
        AdapterMismatchError: the adapters do not fit ``model``, or it is already
            adapted in another way.
        TargetError: layers that were adapted cannot be adapted in ``model``.
        AdapterStateError: ``model`` has no adapters, and the file does not say which
            ones it needs.
        ConfigError: ``alpha`` is missing for a file of loralib, or given for another
            file.

    Warns:
        LoRAWarning: the base has another precision, or is another one with
            ``check_base=False``.

    Example:
        >>> import copy, tempfile, torch
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> base = nn.Sequential(nn.Linear(4, 4))
        >>> names = inject_adapters(trained := copy.deepcopy(base), LoRAConfig(r=2))
        >>> _ = nn.init.ones_(trained[0].lora_B)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(trained, f"{folder}/adapter.safetensors")
        ...     load_adapter(base, f"{folder}/adapter.safetensors")
        >>> torch.equal(base(torch.ones(4)), trained(torch.ones(4)))
        True
    """
    read_for = _read_file(path, LoadArguments(alpha, target_slices))
    adapt_and_put(model, read_for, name=name, refuses_other_base=check_base)


def _read_file(path: Any, arguments: LoadArguments) -> ReadFor:
    """Read a file of any format, and return a function that makes stored adapters of its contents for a model."""
    local = local_path(path)
    file = path if local is None else adapter_file_at(local)
    contents = read_contents(file)
    found = find_format(contents, file, arguments)
    if found is None:
        _refuse_arguments(arguments, path)
        return partial(with_names_of, stored=own.stored_adapters(contents, path))
    format, read_for = found
    if not format.takes_arguments:
        _refuse_arguments(arguments, path)
    check_computable(contents, path)
    return read_for


def _refuse_arguments(arguments: LoadArguments, path: Any) -> None:
    """Refuse arguments for loralib's files beside a file that says these things itself."""
    if arguments != LoadArguments():
        raise ConfigError(
            f"alpha and target_slices are for files of loralib, and {path} is none: it "
            "says itself how it was trained. Leave them out."
        )


def load_from_checkpoint(
    cls: "type[Module]",
    path: str | Path | IO[bytes],
    *,
    merge: bool = False,
    check_base: bool = True,
    map_location: Any = None,
    weights_only: bool = True,
    **kwargs: Any,
) -> "Module":
    """Lightning's ``load_from_checkpoint``, for adapter-only checkpoints.

    A Trainer with ``LoRACallback`` writes such checkpoints.

    Args:
        cls: The LightningModule's class. It is built from the stored hyperparameters,
            so its own code must load the pretrained weights.
        path: The ``.ckpt`` file: its path, a URL that fsspec can read, or the open
            file, in binary mode.
        merge: Return a plain model with the updates merged, instead of an adapted
            model.
        check_base: Refuse another base, as in ``load_adapter``.
        map_location: The device of the model; or a dict or a function that says it, as
            in Lightning's method. By default it stays where ``cls`` has built it.
        weights_only: Set this to False for a file that you trust, if its
            hyperparameters are not plain types.
        **kwargs: Hyperparameters to override, as in Lightning's method. Loading is
            always strict.

    Raises:
        AdapterFileError: the file is truncated, was changed, or is of another kind.
        BaseMismatchError: the model that ``cls`` builds is not the base that the
            adapters were trained on.
        ConfigError: ``cls`` is no class, or ``map_location`` is none of these.
    """
    if not isinstance(cls, type):
        raise ConfigError(
            f"Pass the class {type(cls).__name__}. For a module of it, call "
            "load_adapter(model, path)."
        )
    place = PlaceOfModel(map_location)
    checkpoint = read_checkpoint(
        path, weights_only=weights_only, map_location=place.for_reading()
    )
    stored = own.stored_adapters(checkpoint, path)
    check_is_lightning(checkpoint, path)
    kwargs.pop("strict", None)  # loading is always strict
    if not weights_only:
        kwargs["weights_only"] = False
    model, stored = built_module(cls, checkpoint, stored, kwargs)
    read_for = partial(with_names_of, stored=stored)
    adapt_and_put(model, read_for, refuses_other_base=check_base)
    if merge:
        merge_adapters(model)
        remove_adapters(model)
    place.move(model)
    return model
