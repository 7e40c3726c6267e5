"""What PEFT does to a file when it loads it onto a model of transformers.

It converts what was written for transformers 4: it renames tensors, and takes layers
for matrices of experts. Names of transformers 5 may look like the older ones. PEFT's
own code is asked what becomes of them, so it has to be installed.
"""

from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from lightning_lora.base.fingerprints import names_in
from lightning_lora.errors import warn
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.peft.naming.shells import shell_of
from lightning_lora.storage.formats.peft.reasons import Reason
from lightning_lora.storage.formats.peft_names import PREFIX
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.names import last_component, names_not_in


class PeftLoading:
    """How PEFT loads a file onto a model.

    This class is for a model that is not of transformers, for which PEFT changes
    nothing.
    """

    model_type = ""  # what transformers calls the architecture

    def warn_if_unsure(self) -> None:
        """Warn if it is not known what PEFT does."""

    def why_refused(self, layer: str) -> Reason:
        """Return why PEFT refuses a layer with this name."""
        return ""

    def is_taken_for_experts(self, layer: str) -> bool:
        """Return whether PEFT takes a layer for a matrix of experts, if ``target_modules`` names it."""
        return False

    def names_in_file(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the names under which tensors have to be written to arrive.

        What cannot arrive has none. If PEFT renames ``block_sparse_moe`` to ``mlp``,
        this has ``{"mlp.gate.lora_A.weight": "block_sparse_moe.gate.lora_A.weight"}``.
        """
        return dict(zip(tensors, tensors, strict=True))


def loading_of(export: Export) -> PeftLoading:
    """Return how PEFT loads these adapters onto the reader's model.

    PEFT is asked with the model. If a file is exported, it is asked with a shell, which
    has only the types of the models that the file describes. It does not depend on which
    layers are left out of an export.
    """
    if export.inner is not None:
        leaves = set(map(last_component, export.modules_for_reader))
        # Mamba's models have a layer of this name
        return _loading_onto(export.inner, may_be_mamba="conv1d" in leaves)
    if not export.stored_modules:
        return _OntoUnknownModel(export.stored)
    try:
        shell = shell_of(export.stored_modules)
    except ImportError:
        return _WithoutPeft(export.stored_inner.class_name)
    return _loading_onto(shell, may_be_mamba=True)


def _loading_onto(model: nn.Module, *, may_be_mamba: bool) -> PeftLoading:
    """How PEFT loads a file onto a model, or onto what its shell stands for.

    PEFT is imported, which takes seconds, only if it may change something.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not model_type:
        return PeftLoading()
    kind: type[_OntoModel]
    if _is_converted(model_type):
        kind = _OntoConvertedModel
    elif may_be_mamba:
        kind = _OntoModel
    else:
        return PeftLoading()
    try:
        return kind(model, model_type)
    except ImportError:
        return _WithoutPeft(model_type)


def _is_converted(model_type: str) -> bool:
    """Whether PEFT converts files for this type of model."""
    try:
        mapping = import_module("transformers.conversion_mapping")
    except ImportError:  # before transformers 5
        return False
    return mapping.get_checkpoint_conversion_mapping(model_type) is not None


# A model of transformers


class _OntoModel(PeftLoading):
    """How PEFT loads a file onto a model of transformers: it refuses some layers of Mamba."""

    def __init__(self, model: nn.Module, model_type: str) -> None:
        self.model = model
        self.model_type = model_type
        self.peft: Any = import_module("peft")

    def why_refused(self, layer: str) -> Reason:
        """Return why PEFT refuses a layer with this name."""
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check

        leaf = last_component(layer)
        with suppress(ValueError):
            check(self.peft.LoraConfig(), self.model, leaf)
            return ""
        return (
            f"PEFT refuses {leaf!r} in a model of type {self.model_type!r} (leave out: "
            f"exclude_modules={[leaf]})."
        )


class _OntoConvertedModel(_OntoModel):
    """How PEFT loads a file onto a model whose files it converts."""

    @cached_property
    def _convert(self) -> Any:
        """PEFT's module that converts files."""
        return import_module("peft.utils.transformers_weight_conversion")

    def is_taken_for_experts(self, layer: str) -> bool:
        """Return whether PEFT takes a layer for a matrix of experts, if ``target_modules`` names it."""
        config = self.peft.LoraConfig(target_modules=[layer])
        try:
            self._convert.convert_peft_config_for_transformers(config, self.model, None)
        # PEFT fuses this matrix of experts with another one, which this configuration
        # of one layer does not name
        except ValueError:
            return True
        return layer not in config.target_modules

    def names_in_file(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the names under which tensors have to be written to arrive. What cannot arrive has none.

        All are tried with their own names. Those that do not arrive so are tried with
        the names that transformers writes.
        """
        names = dict(zip(tensors, tensors, strict=True))
        arriving = self._arriving(tensors, names)
        renamed = names_not_in(tensors, arriving)
        if not renamed:
            return arriving
        for name in renamed:
            names[name] = self._name_in_checkpoint(name)
        return self._arriving(tensors, names)

    def _arriving(
        self, tensors: Mapping[str, Tensor], names: Mapping[str, str]
    ) -> dict[str, str]:
        """Those of these names in a file under which tensors arrive where they belong, and as they are.

        PEFT's own code converts a file with these names. Then each tensor must be the
        same object under its name in the model.
        """
        written = dict[str, Tensor]()
        for name, in_file in names.items():
            # some tensors may be one object: detach makes another of each
            written[f"{PREFIX}.{in_file}"] = tensors[name].detach()
        convert = self._convert.convert_peft_adapter_state_dict_for_transformers
        loaded = convert(self.model, self.peft.LoraConfig(), written)
        arriving = dict[str, str]()
        for name, in_file in names.items():
            if loaded.get(f"{PREFIX}.{name}") is written[f"{PREFIX}.{in_file}"]:
                arriving[name] = in_file
        return arriving

    def _name_in_checkpoint(self, name: str) -> str:
        """The name that transformers writes for something with this name in the model."""
        loading = import_module("transformers.core_model_loading")
        in_checkpoint: str = loading.apply_renamings(name, self._renamings_back)
        return in_checkpoint

    @cached_property
    def _renamings_back(self) -> list[Any]:
        """How transformers renames a model's tensors to write them, the last renaming of its reading first."""
        mapping = import_module("transformers.conversion_mapping")
        loading = import_module("transformers.core_model_loading")
        back = list[Any]()
        for conversion in mapping.get_model_conversion_mapping(
            self.model, add_legacy=False
        ):
            if isinstance(conversion, loading.WeightRenaming):
                back.append(conversion.reverse_transform())
        back.reverse()
        return back


# Where PEFT cannot be asked


class _WithoutPeft(PeftLoading):
    """How a PEFT that is not installed here loads a file onto a model of transformers: it is not known."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type

    def warn_if_unsure(self) -> None:
        """Warn that PEFT may change something."""
        warn(
            "PEFT may rename or refuse something when it loads this onto a "
            f"{self.model_type}. PEFT is not installed here, so that was not checked. "
            "Install peft and transformers, and export again."
        )


class _OntoUnknownModel(PeftLoading):
    """How PEFT loads a file of 0.2.0, which does not say its model: one of experts, if the file names some."""

    def __init__(self, stored: StoredAdapters) -> None:
        self.stored = stored

    def warn_if_unsure(self) -> None:
        """Warn that PEFT renames tensors of some types."""
        if self._has_experts:
            warn(
                f"{self.stored.source} does not say for which type of model it is, and "
                "PEFT renames tensors of some mixtures of experts when it loads them. "
                "Load the file onto its model, and export that."
            )

    def is_taken_for_experts(self, layer: str) -> bool:
        """Return whether PEFT may take a layer for a matrix of experts, if ``target_modules`` names it."""
        return self._has_experts and last_component(layer) in _OFTEN_OF_EXPERTS

    @cached_property
    def _has_experts(self) -> bool:
        """Whether the base has experts, by its tensors' names, if the file says these."""
        names = list[str]()
        for fingerprint in self.stored.base:
            names += names_in(fingerprint)
        return any(".experts." in name for name in names)


_OFTEN_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj")
"""The last names of layers that PEFT takes for experts in many types of models."""
