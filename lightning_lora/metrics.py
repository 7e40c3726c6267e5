"""Metrics of adapters, for torchmetrics: what an update is, and what it does to the weight below it.

One rule for all: each adapted matrix is measured as it was at the last ``update``, under the name of its layer, and of
its part if there are several. A model stands for its active adapter, ``(model, name)`` for any of them, a merged model
for what it was before. DoRA's update is the merged weight minus the base's. Of a stack (experts), norms are of all of
it, and other numbers are means. Processes have equal adapters, so each computes the same and sends nothing; but sharded
weights are gathered, so every process must call ``update``.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.linalg import qr, vector_norm
from torchmetrics import Metric
from torchmetrics.utilities import plot

from lightning_lora.errors import AdapterStateError, ConfigError, listed
from lightning_lora.functional import subspace
from lightning_lora.functional.factors import Factors
from lightning_lora.functional.subspace import precise
from lightning_lora.functional.update import magnitude_scale, wide
from lightning_lora.layers import AdaptedMatrix, Adapter, Role, matrix_factors
from lightning_lora.model.switch import adapters_of
from lightning_lora.model.view import view_of
from lightning_lora.storage.offline.layers import layer_on, read_layers
from lightning_lora.tensors.names import join, own_parameter
from lightning_lora.tensors.shards import full_tensor

Source = nn.Module | tuple[nn.Module, str] | str | Path  # a model, one of its adapters, or a file

_drawing: Any = plot  # with matplotlib or without
_POOLED: dict[str, Any] = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}


class Measured(NamedTuple):
    """An adapted matrix. Its numbers are tensors without gradients."""

    layer: nn.Module
    adapter: Adapter
    matrix: AdaptedMatrix
    bases: dict[str, Tensor]  # the base's weights, where those of the layer are merged

    def factors(self) -> Factors:
        """Return A and B in float64, with the scaling in B."""
        a, b = matrix_factors(self.matrix, self.adapter.settings, self._parameter)
        return a, b * self.matrix.scale(self.adapter.settings.scaling)

    def _parameter(self, name: str) -> Tensor:
        return precise(full_tensor(self.adapter.parameters[name]))

    def update(self) -> Factors | Tensor:
        """Return the update: A and B, or DoRA's as one matrix."""
        a, b = self.factors()
        if not self.adapter.settings.use_dora:
            return a, b
        weight, magnitude = precise(self.weight()).to(a.device), self._parameter(self.matrix.parameter(Role.MAGNITUDE))
        total = weight + b @ a
        return total * magnitude_scale(magnitude, total).unsqueeze(-1) - weight

    def weight(self) -> Tensor:
        """Return the base's weight as a matrix, in float32 or wider."""
        name, kind = self.matrix.weight, self.adapter.kind
        weight = full_tensor(self.bases[name] if name in self.bases else own_parameter(self.layer, name))
        if not weight.numel():
            raise AdapterStateError("A file of adapters has no weights of the base. Pass the model after load_adapter.")
        values: Tensor = kind.lora_as_matrix(kind.lora_values(self.layer, weight)).detach()
        return values.narrow(-2, self.matrix.first, self.matrix.writes).to(wide(values.dtype))


def measured(source: Source) -> dict[str, Measured]:
    """Return the adapted matrices of a model or a file, by name."""
    merged, found = dict[str, Any](), dict[str, Measured]()
    if isinstance(source, str | Path):
        stored = read_layers(source)
        layers: dict[str, Any] = {name: layer_on(stored, name, {}) for name in stored.layers}
        adapters = {name: layer.lora_adapter() for name, layer in layers.items()}
    else:
        model, adapter_name = source if isinstance(source, tuple) else (source, None)
        view = view_of(model)
        layers, merged = {**view.modules}, view.record.merged
        adapters = adapters_of(model, adapter_name or view.adapter.name)
    for name, adapter in adapters.items():
        bases = merged[name].bases if name in merged else {}
        for matrix in adapter.matrices:
            if not matrix.tokens:  # rows have no A and B
                found[join(name, matrix.name)] = Measured(layers[name], adapter, matrix, bases)
    return found


def ratio(update: Tensor, other: Tensor) -> Tensor:
    """Return an update's norm over another norm. An update of zero gives 0."""
    return torch.where(update == 0, 0, update / other.to(update.device))


def _known(name: str, value: str, *known: str) -> str:
    if value not in known:
        raise ConfigError(f"{name}={value!r}. Expected {' or '.join(map(repr, known))}.")
    return value


class _OfAdapters(Metric):
    """One number of each adapted matrix, or all of them pooled. There is no state to send."""

    full_state_update = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, *, reduction: Literal["none", "mean", "max", "min"] = "none", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reduction, self.values = _known("reduction", reduction, "none", *_POOLED), dict[str, Tensor]()

    def update(self, model: Source) -> None:
        """Measure an adapter."""
        self.values = {name: self._number(name, matrix).float() for name, matrix in measured(model).items()}

    def _number(self, name: str, matrix: Measured) -> Tensor:
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor] | Tensor:
        """Return the numbers by matrix, or one for all of them. Grids are pooled as far as all matrices go."""
        if not self.values:
            raise AdapterStateError("Nothing was measured. Call update(model) first, with a model that has adapters.")
        if self.reduction == "none":
            return dict(self.values)
        values = list(self.values.values())
        common = tuple(map(slice, torch.tensor([value.shape for value in values]).amin(0).tolist()))
        pooled: Tensor = _POOLED[self.reduction](torch.stack([value[common] for value in values]), 0)
        return pooled

    def reset(self) -> None:
        """Forget what was measured."""
        super().reset()
        self.values = {}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the numbers, or a list of those of several steps. Return the figure and its axes. Needs matplotlib."""
        val = self.compute() if val is None else val
        figure, axes = cast(Any, self._plot(val, ax))
        _, names = axes.get_legend_handles_labels()
        for number, line in enumerate(axes.lines):  # from dark to light, through the model
            line.set_color(_drawing.plt.cm.viridis(number / len(axes.lines)))
        if isinstance(val, dict):
            axes.get_legend().remove()
            axes.get_xaxis().set_visible(True)
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
        elif names:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small", ncols=1 + len(names) // 25)
        if figure is not None:
            figure.set(layout_engine="constrained", figwidth=max(6, len(names) / 3))
        return figure, axes


class UpdateNorm(_OfAdapters):
    r"""The size of each update beside its weight.

    It is :math:`\lVert \Delta W \rVert_F / \lVert W \rVert_F`. 0.01 means that the update is a hundredth of the weight.
    A fresh adapter has 0.

    Args:
        reduction: ``"none"`` for a dictionary by matrix, or ``"mean"``, ``"max"`` or ``"min"`` for one number.
        **kwargs: Those of ``torchmetrics.Metric``.

    Raises:
        AdapterStateError: (``update``) the model has no adapters, or none of this name.

    Source:
        Hu et al. 2021, section 7.3, table 7 (the two norms).

    Example:
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> names = inject_adapters(model, LoRAConfig(r=2, alpha=2))
        >>> _ = [nn.init.eye_(model[0].get_parameter(name)) for name in ("weight", "lora_A", "lora_B")]
        >>> UpdateNorm()(model)
        {'0': tensor(0.7071)}
    """

    def _number(self, name: str, matrix: Measured) -> Tensor:
        return ratio(vector_norm(subspace.norm(matrix.update())), vector_norm(matrix.weight()))


class EffectiveRank(_OfAdapters):
    r"""How many directions of each update count.

    It is :math:`\exp` of the entropy of its singular values: r if all r directions have one size, and near 1 if one
    outweighs the others. A fresh adapter has 0. ``update`` also takes files of adapters (not of DoRA). Arguments and
    errors are those of ``UpdateNorm``.

    Source:
        Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", section 2.
    """

    def _number(self, name: str, matrix: Measured) -> Tensor:
        return subspace.effective_rank(subspace.directions(matrix.update())[1]).mean()


class Amplification(_OfAdapters):
    r"""How much each update amplifies its directions.

    It is :math:`\lVert \Delta W \rVert_F / \lVert U^T W V \rVert_F`. U and V are the top r left and right singular
    vectors of the update. A large factor means that the base hardly uses these directions. A fresh adapter has 0.
    ``norms`` has the norms of the update, of :math:`U^T W V` and of W. Errors are those of ``UpdateNorm``.

    Args:
        directions: ``"update"``, or for the other columns of table 7 ``"weight"`` (the top r singular vectors of W) or
            ``"random"`` (those of a Gaussian matrix, the same ones each time).
        **kwargs: ``reduction``, and those of ``torchmetrics.Metric``.

    Source:
        Hu et al. 2021, section 7.3, table 7, and appendix H.4. The V of the paper has the vectors as rows.
    """

    def __init__(self, directions: Literal["update", "weight", "random"] = "update", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.of, self._norms = _known("directions", directions, "update", "weight", "random"), dict[str, Any]()

    @property
    def norms(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """The norms of what was measured last."""
        return {name: self._norms[name] for name in self.values}

    def _number(self, name: str, matrix: Measured) -> Tensor:
        weight, r = precise(matrix.weight()), matrix.matrix.rank(matrix.adapter.settings.r)
        u, sizes, v = subspace.directions(matrix.update())
        if self.of == "weight":
            u, _, v = subspace.directions(weight)
        u, v = (vectors[..., :r].to(weight.device) for vectors in (u, v))
        if self.of == "random":  # the singular vectors of a Gaussian matrix have any direction
            noise = torch.Generator(weight.device).manual_seed(0)
            u, v = (qr(vectors.normal_(generator=noise)).Q for vectors in (u, v))
        norms = self._norms[name] = tuple(map(vector_norm, (sizes, u.mT @ weight @ v, weight)))
        return ratio(*norms[:2])


class SubspaceSimilarity(_OfAdapters):
    r"""How alike the directions of two adapters are, from 0 to 1.

    For each matrix, how much the top i directions of one are among the top j of the other:
    :math:`\phi(i, j) = \lVert U_1^{i\,T} U_2^j \rVert_F^2 / \min(i, j)`, where the columns of :math:`U^i` are the
    right singular vectors of A with the i largest singular values. ``update(one, other)`` takes models, ``(model,
    name)`` or files. Matrices that only one has are left out. A factor of zeros has no directions: 0.

    Args:
        i: How many directions of the first, or all that it has. None: the grid of all i and j, as in figure 3.
        j: How many of the second. None: i.
        side: ``"A"``, what the layers read, or ``"B"``, what they write (left singular vectors of B).
        **kwargs: ``reduction``, and those of ``torchmetrics.Metric``.

    Raises:
        AdapterStateError: (``update``) a model has no adapters, or the two have no matrix in common.

    Source:
        Hu et al. 2021, section 7.2, equation 4, figures 3 and 4, and appendix G.
    """

    plot_upper_bound: float | None = 1.0

    def __init__(self, i: int | None = None, j: int | None = None, *, side: str = "A", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if (i is None and j is not None) or any(each is not None and each < 1 for each in (i, j)):
            raise ConfigError(f"i={i!r}, j={j!r}. Expected numbers from 1 on, and j only with i.")
        self.i, self.j, self.side = i, i if j is None else j, _known("side", side, "A", "B")

    def update(self, one: Source, other: Source) -> None:  # type: ignore[override]
        """Compare two adapters."""
        first, second = measured(one), measured(other)
        if first.keys().isdisjoint(second):
            raise AdapterStateError(
                f"They adapt no matrix in common: one {listed(first)}, the other {listed(second)}. Compare adapters of "
                "the same model."
            )
        self.values = {}
        for name in filter(second.__contains__, first):
            (a, b), (a2, b2) = first[name].factors(), second[name].factors()
            pair = (a, a2.to(a.device)) if self.side == "A" else (b.mT, b2.mT.to(b.device))
            grids = subspace.subspace_similarity(*pair).float()
            grid = grids.view(-1, *grids.shape[-2:]).mean(0)
            self.values[name] = grid if self.i is None else grid[: self.i, : self.j][-1, -1]

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the numbers, or a grid for each matrix as in figure 3 (into ``ax``: that of the first)."""
        if self.i is not None:
            return super().plot(val, ax)
        _drawing._error_on_missing_matplotlib()
        val = self.compute() if val is None else val
        grids = val if isinstance(val, dict) else {self.reduction: val}
        figure, axes, shown = None, ax, [ax]
        if ax is None:
            rows, columns = _drawing._get_col_row_split(len(grids))
            size = 3.2 * columns + 1, 2.8 * rows
            figure, axes = _drawing.plt.subplots(rows, columns, squeeze=False, layout="constrained", figsize=size)
            shown = list(_drawing.trim_axs(axes, len(grids)))
        for each, (name, grid) in zip(shown, grids.items(), strict=False):
            ends = (0.5, grid.shape[1] + 0.5, grid.shape[0] + 0.5, 0.5)
            image = each.imshow(grid.cpu().numpy(), vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=ends)
            each.set(xlabel="j", ylabel="i")
            each.set_title(name, fontsize="small")
        shown[0].figure.colorbar(image, ax=shown, aspect=30)
        return figure, axes
