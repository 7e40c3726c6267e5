"""What the writers of other libraries' files share: the adapters to write, the update of each weight, the files."""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

from torch import Tensor, nn

from lightning_lora.errors import AdapterFileError, ConfigError, ExportError, listed, warn
from lightning_lora.functional.factors import Factors, with_rank
from lightning_lora.functional.update import wide
from lightning_lora.layers import LoRAParameters
from lightning_lora.layers.matrices import Role, Settings, weight_factors
from lightning_lora.model.view import view_of
from lightning_lora.storage.disk import save, write_errors, writing
from lightning_lora.storage.formats.peft_config import PEFT_CONFIG
from lightning_lora.storage.renaming import Renaming, is_inside
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.names import join, named_modules, starts_of, submodule


@dataclass(frozen=True)
class Source:
    """Adapters to write, and the model that they are from, or None for a file."""

    stored: StoredAdapters
    model: nn.Module | None = None

    def name_there(self, name: str) -> str:
        """Return a name in the module that the reader has: without the root's prefix."""
        return Renaming(self.stored.root, "").name_here(name)

    @cached_property
    def inner(self) -> nn.Module | None:
        """The module that the reader has. That of a file is not known."""
        return None if self.model is None else submodule(self.model, self.stored.root)

    @cached_property
    def modules(self) -> dict[str, nn.Module] | None:
        """The modules inside it, by their names there."""
        return None if self.inner is None else named_modules(self.inner, remove_duplicate=False)

    @cached_property
    def saved(self) -> dict[str, Tensor]:
        """All entries of modules that are trained whole, unchanged ones too."""
        present = dict(self.stored.state)
        if self.model is not None:
            view = view_of(self.model)
            present = {**view.parameters, **view.buffers, **present}
        names = list(chain.from_iterable(self.stored.saved.values()))
        if missing := [name for name in names if name not in present]:
            raise ExportError(
                f"{self.stored.source} does not hold {listed(missing)}, which have the base's values, and PEFT's "
                "format needs all of a module in modules_to_save. Load the file onto its model, and export the model."
            )
        return {name: present[name] for name in names}


def source_of(stored: StoredAdapters, model: nn.Module | None, root: str | None) -> Source:
    """Return what to write for a reader that has the module ``root``."""
    if root is not None:
        around = set(chain.from_iterable(map(starts_of, stored.layers)))
        if root and root not in around:
            raise ConfigError(
                f"root={root!r} holds no adapted layer. Expected the name of the module that the reader has, such as "
                f"{stored.root!r}; the adapted layers are {listed(stored.layers)}."
            )
        stored = replace(stored, root=root)
    if left := [name for name in stored.random if name not in stored.filled or is_inside(name, stored.root)]:
        warn(
            f"{listed(left)} may be untrained or were filled by setup, and PEFT's format has no place for them. If the "
            "reader's base has not these values: train them in full (modules_to_save), or use save_merged(model, path)."
        )
    state = {name: value for name, value in stored.state.items() if name not in stored.random}
    return Source(replace(stored, state=state), model)


@dataclass(frozen=True)
class WeightUpdate:
    """The update of one weight of a layer, which the reader has under ``name``: ``scaling`` times B @ A."""

    layer: StoredLayer
    name: str
    weight: str
    factors: Factors
    alpha: float
    scaling: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank of this weight's update."""
        return int(self.factors[0].shape[-2])


def weight_updates(source: Source) -> list[WeightUpdate]:
    """Return the updates of all weights, but not single rows that train."""
    found, config = list[WeightUpdate](), source.stored.config
    for layer in source.stored.layers.values():
        if layer.tokens:
            continue
        settings = layer.settings(config)

        def tensor(name: str, layer: StoredLayer = layer, settings: Settings = settings) -> Tensor:
            value: Tensor = source.stored.state[join(layer.name, name)].detach().cpu()
            return value.to(wide(value.dtype)) if settings.is_difference else value

        for weight in layer.shapes:
            factors = weight_factors(weight, layer.matrices, settings, tensor)
            parameter = join(layer.name, weight) if layer.adapter_class is LoRAParameters else ""
            alpha = config.alpha_of(layer.name, parameter, r=factors[0].shape[-2])
            scaling = next(matrix for matrix in layer.matrices if matrix.weight == weight).scale(layer.scaling)
            magnitude = tensor(layer.matrices[0].parameter(Role.MAGNITUDE)) if settings.use_dora else None
            found.append(WeightUpdate(layer, source.name_there(layer.name), weight, factors, alpha, scaling, magnitude))
    return found


def with_scaling(updates: list[WeightUpdate], scaling: float, rank: int = 0) -> list[WeightUpdate]:
    """Give all the same scaling: B takes over what differs. And at least this rank, with zeros."""
    found = list[WeightUpdate]()
    for update in updates:
        a, b = with_rank(update.factors, max(rank, update.rank))
        factors = a, b * (update.scaling / scaling)
        found.append(replace(update, factors=factors, alpha=scaling * a.shape[-2], scaling=scaling))
    return found


def write_files(
    directory: Path, name: str, tensors: Mapping[str, Tensor], header: Mapping[str, str], config: bytes = b""
) -> None:
    """Write one file of tensors, and with ``config`` PEFT's configuration beside it, or nothing."""
    contents = save(tensors, header)
    with write_errors(directory):
        is_new = not directory.exists()
        directory.mkdir(exist_ok=True)
    try:
        with ExitStack() as files:  # both are whole before one takes its place
            for file, held in ((PEFT_CONFIG, config), (name, contents)):
                if held:
                    files.enter_context(writing(directory / file)).write_bytes(held)
    except AdapterFileError:
        if is_new:
            with suppress(OSError):
                directory.rmdir()
        raise
