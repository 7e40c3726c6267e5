"""Metrics of adapters, for torchmetrics: what an update is, and what it does to the weight below it.

One rule for all: each adapted matrix is measured as it was at the last ``update``. It has the name of its layer, and of
its part if there are several, as in ``attention.q``. A merged model counts as before its merge, a quantised weight as
dequantised, a convolution as the matrix that its adapter has, and DoRA's update is the merged weight minus the base's.
Of a stack (experts), norms are those of the whole stack, and other numbers are means. Processes have equal adapters, so
each computes the same number, and nothing is sent. Sharded weights are gathered: call ``update`` in every process.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import plot

from lightning_lora.errors import AdapterStateError, ConfigError, listed
from lightning_lora.functional import subspace
from lightning_lora.functional.combine import Factors
from lightning_lora.functional.subspace import precise
from lightning_lora.functional.update import magnitude_scale, wide
from lightning_lora.layers import AdaptedMatrix, Adapter, Role, matrix_factors
from lightning_lora.model.view import view_of
from lightning_lora.storage.offline.layers import layer_on, read_layers
from lightning_lora.tensors.names import join, own_parameter
from lightning_lora.tensors.shards import full_tensor

Source = nn.Module | str | Path
"""A model with adapters, or a file of them."""

_drawing: Any = plot  # with matplotlib or without
_POOLED: dict[str, Any] = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}


class Measured(NamedTuple):
    """An adapted matrix. Its numbers are tensors without gradients."""

    layer: nn.Module
    adapter: Adapter
    matrix: AdaptedMatrix

    def factors(self) -> Factors:
        """Return A and B in float64, with the scaling in B."""
        a, b = matrix_factors(self.matrix, self.adapter.settings, self._parameter)
        return a, b * self.matrix.scale(self.adapter.settings.scaling)

    def _parameter(self, name: str) -> Tensor:
        return precise(full_tensor(self.adapter.parameters[name]))

    def weight(self) -> Tensor:
        """Return the base's weight as a matrix, in float32 or wider."""
        kind, held = self.adapter.kind, self.adapter.bases.get(self.matrix.weight)
        weight = full_tensor(own_parameter(self.layer, self.matrix.weight) if held is None else held)
        if not weight.numel():
            raise AdapterStateError("A file of adapters has no weights of the base. Pass the model after load_adapter.")
        values: Tensor = kind.lora_as_matrix(kind.lora_values(self.layer, weight)).detach()
        return values.narrow(-2, self.matrix.first, self.matrix.writes).to(wide(values.dtype))

    def _dora(self) -> Tensor:
        """DoRA's update, which has any rank."""
        (a, b), weight = self.factors(), precise(self.weight())
        magnitude, total = self._parameter(self.matrix.parameter(Role.MAGNITUDE)), weight.to(a.device) + b @ a
        return total * magnitude_scale(magnitude, total).unsqueeze(-1) - weight.to(a.device)

    def update_norm(self) -> Tensor:
        """Return the norm of the update, from products of r x r."""
        update = self._dora() if self.adapter.settings.use_dora else subspace.norm(self.factors())
        norm: Tensor = torch.linalg.vector_norm(update)
        return norm

    def directions(self) -> subspace.Directions:
        """Return the singular values and vectors of the update."""
        is_dense = self.adapter.settings.use_dora
        return subspace.directions(self._dora()) if is_dense else subspace.update_directions(self.factors())


def measured(source: Source) -> dict[str, Measured]:
    """Return the adapted matrices of a model, merged or not, or of a file, by name."""
    layers, found = dict[str, Any](), dict[str, Measured]()
    if isinstance(source, nn.Module):
        view = view_of(source)
        layers, adapters = {**view.modules}, {name: layer._lora_adapter() for name, layer in view.layers.items()}
        adapters |= view.record.merged
    else:
        stored = read_layers(source)
        layers = {name: layer_on(stored, name, {}) for name in stored.layers}
        adapters = {name: layer._lora_adapter() for name, layer in layers.items()}
    for name, adapter in adapters.items():
        for matrix in adapter.matrices:
            found[join(name, matrix.name)] = Measured(layers[name], adapter, matrix)
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

    def update(self, model: nn.Module) -> None:
        """Measure the adapters of a model."""
        self.values = {name: self._number(name, matrix).float() for name, matrix in measured(model).items()}

    def _number(self, name: str, matrix: Measured) -> Tensor:
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor] | Tensor:
        """Return the numbers by matrix, or one for all of them. Grids are pooled as far as all matrices go."""
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
        drawn: Any = self._plot(val, ax)
        figure, axes = drawn
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
    r"""The size of each update beside its weight: :math:`\lVert \Delta W \rVert_F / \lVert W \rVert_F`.

    0.01 means that the update is a hundredth of the weight. A fresh adapter has 0.

    Args:
        reduction: ``"none"`` for a dictionary by matrix, or ``"mean"``, ``"max"`` or ``"min"`` for one number.
        **kwargs: Those of ``torchmetrics.Metric``.

    Raises:
        AdapterStateError: (``update``) the model has no adapters.

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
        return ratio(matrix.update_norm(), torch.linalg.vector_norm(matrix.weight()))


class EffectiveRank(_OfAdapters):
    r"""How many directions of each update count: :math:`\exp` of the entropy of its singular values.

    It is r if all r directions have one size, and near 1 if one outweighs the others. A fresh adapter has 0. Arguments
    and errors are those of ``UpdateNorm``.

    Source:
        Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", section 2.
    """

    def _number(self, name: str, matrix: Measured) -> Tensor:
        return subspace.effective_rank(matrix.directions()[1]).mean()


class Amplification(_OfAdapters):
    r"""How much each update amplifies its directions: :math:`\lVert \Delta W \rVert_F / \lVert U^T W V \rVert_F`.

    U and V are the top r left and right singular vectors of the update: the norm below is what the base has in these
    directions. A large factor means that the base hardly uses them. A fresh adapter has 0. After ``update``, ``norms``
    holds the norms of the update, of :math:`U^T W V` and of W. Errors are those of ``UpdateNorm``.

    Args:
        directions: ``"update"``, or for the other columns of table 7 ``"weight"`` (the top r singular vectors of W) or
            ``"random"`` (those of a Gaussian matrix, the same ones each time).
        **kwargs: ``reduction``, and those of ``torchmetrics.Metric``.

    Source:
        Hu et al. 2021, section 7.3, table 7, and appendix H.4. The V of the paper has the vectors as rows.
    """

    def __init__(self, directions: Literal["update", "weight", "random"] = "update", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.of, self.norms = _known("directions", directions, "update", "weight", "random"), dict[str, Any]()

    def _number(self, name: str, matrix: Measured) -> Tensor:
        weight, r = precise(matrix.weight()), matrix.matrix.rank(matrix.adapter.settings.r)
        u, sizes, v = matrix.directions()
        if self.of == "weight":
            u, _, v = subspace.directions(weight)
        u, v = (vectors[..., :r].to(weight.device) for vectors in (u, v))
        if self.of == "random":  # the singular vectors of a Gaussian matrix have any direction
            noise = torch.Generator(weight.device).manual_seed(0)
            u, v = (torch.linalg.qr(each.clone().normal_(generator=noise)).Q for each in (u, v))
        norms = self.norms[name] = tuple(map(torch.linalg.vector_norm, (sizes, u.mT @ weight @ v, weight)))
        return ratio(*norms[:2])


class SubspaceSimilarity(_OfAdapters):
    r"""How much the top i directions of one adapter are among the top j of another: from 0 to 1, for each matrix.

    It is :math:`\phi(i, j) = \lVert U_1^{i\,T} U_2^j \rVert_F^2 / \min(i, j)`, where the columns of :math:`U^i` are the
    right singular vectors of A with the i largest singular values. ``update(one, other)`` takes models or files of
    adapters; matrices that only one has are left out. A factor of zeros has no directions: 0.

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
        self.i, self.j, self.side = i, i if j is None else j, _known("side", side, "A", "B")

    def update(self, one: Source, other: Source) -> None:  # type: ignore[override]
        """Compare the adapters of two models or files."""
        first, second = measured(one), measured(other)
        if first.keys().isdisjoint(second):
            raise AdapterStateError(
                f"They adapt no matrix in common: one {listed(first)}, the other {listed(second)}. Compare adapters of "
                "the same model."
            )
        self.values = {}
        for name in filter(second.__contains__, first):
            (a, b), (a2, b2) = first[name].factors(), second[name].factors()
            one_side, other_side = (a, a2) if self.side == "A" else (b.mT, b2.mT)
            grid = subspace.subspace_similarity(one_side, other_side.to(a.device)).float()
            grid = grid.flatten(0, -3).mean(0) if grid.dim() > 2 else grid
            self.values[name] = grid if self.i is None else grid[: self.i, : self.j][-1, -1]

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the numbers, or a grid for each matrix as in figure 3 (into ``ax``: that of the first)."""
        val = self.compute() if val is None else val
        if self.i is not None:
            return super().plot(val, ax)
        _drawing._error_on_missing_matplotlib()
        grids = val if isinstance(val, dict) else {self.reduction: val}
        rows, columns = _drawing._get_col_row_split(len(grids))
        size, figure, axes = (3.2 * columns + 1, 2.8 * rows), None, np.array([ax])
        if ax is None:
            figure, axes = _drawing.plt.subplots(rows, columns, squeeze=False, layout="constrained", figsize=size)
        shown = _drawing.trim_axs(axes, len(grids))
        for each, (name, grid) in zip(shown, grids.items(), strict=False):
            ends = (0.5, grid.shape[1] + 0.5, grid.shape[0] + 0.5, 0.5)
            image = each.imshow(grid.cpu().numpy(), vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=ends)
            each.set(xlabel="j", ylabel="i")
            each.set_title(name, fontsize="small")
        shown[0].figure.colorbar(image, ax=list(shown), aspect=30)
        return figure, axes
