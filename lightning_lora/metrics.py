"""Metrics of adapters, for torchmetrics: what an update is, and what it does to the weight below it.

One rule for all: each adapted matrix is measured as it was at the last ``update``,
under the name of its layer, and of its part if there are several. A model stands for
its active adapter, ``(model, name)`` for any of them, a merged model for what it was
before. DoRA's update is the merged weight minus the base's. Of a stack (experts), norms
are of all of it, and other numbers are means. Processes have equal adapters, so each
computes the same and sends nothing; but sharded weights are gathered, so every process
must call ``update``.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.linalg import qr, vector_norm
from torchmetrics import Metric
from torchmetrics.utilities import plot

from lightning_lora.errors import AdapterStateError, ConfigError, listed
from lightning_lora.functional import subspace
from lightning_lora.functional.dtypes import precise
from lightning_lora.measured import MeasuredMatrix, Source, measured_matrices
from lightning_lora.tensors.dicts import only

_drawing: Any = plot  # untyped, because torchmetrics keeps most of its names private
_POOLED: dict[str, Any] = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}


def _check_choice(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        expected = " or ".join(map(repr, choices))
        raise ConfigError(f"{name}={value!r}. Expected {expected}.")


class _AdapterMetric(Metric):
    """Values of adapted matrices by name, or all of them pooled.

    There is no state to send.
    """

    full_state_update = False
    plot_lower_bound: float | None = 0.0

    def __init__(
        self,
        *,
        reduction: Literal["none", "mean", "max", "min"] = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_choice("reduction", reduction, "none", *_POOLED)
        self.reduction = reduction
        self.values = dict[str, Tensor]()

    def compute(self) -> dict[str, Tensor] | Tensor:
        """Return the numbers by matrix, or one for all of them.

        Grids are pooled as far as all matrices go.
        """
        if not self.values:
            raise AdapterStateError(
                "Nothing was measured. Call update(model) first, with a model that has "
                "adapters."
            )
        if self.reduction == "none":
            return dict(self.values)
        grids = _cut_to_common_size(list(self.values.values()))
        pooled: Tensor = _POOLED[self.reduction](torch.stack(grids), 0)
        return pooled

    def reset(self) -> None:
        """Forget what was measured."""
        super().reset()
        self.values = {}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the numbers, or a list of those of several steps.

        Return the figure and its axes. Needs matplotlib.
        """
        val = self.compute() if val is None else val
        figure, axes = cast(Any, self._plot(val, ax))
        names = axes.get_legend_handles_labels()[1]
        _color_by_depth(axes.lines)
        if isinstance(val, dict):
            _name_points(axes, names)
        elif names:
            _name_lines(axes, names)
        if figure is not None:
            figure.set(layout_engine="constrained", figwidth=max(6, len(names) / 3))
        return figure, axes


def _cut_to_common_size(grids: Sequence[Tensor]) -> list[Tensor]:
    """The beginning of each grid, as far as all of them go. Single numbers stay."""
    shapes = [grid.shape for grid in grids]
    common = list[slice]()  # none for single numbers
    for sizes in zip(*shapes, strict=True):
        common.append(slice(min(sizes)))
    return [grid[tuple(common)] for grid in grids]


def _name_points(axes: Any, names: Sequence[str]) -> None:
    """Write the name of each matrix below its point."""
    axes.get_legend().remove()
    axes.get_xaxis().set_visible(True)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")


def _name_lines(axes: Any, names: Sequence[str]) -> None:
    """Write the names of matrices, each of which has a line over several steps, beside the axes."""
    columns = 1 + len(names) // 25
    axes.legend(
        loc="upper left", bbox_to_anchor=(1, 1), fontsize="small", ncols=columns
    )


def _color_by_depth(lines: Sequence[Any]) -> None:
    """Color lines from dark to light, through the model."""
    for number, line in enumerate(lines):
        share = number / len(lines)
        line.set_color(_drawing.plt.cm.viridis(share))


class _NumberOfEachMatrix(_AdapterMetric):
    """One number of each adapted matrix of one adapter."""

    def update(self, model: Source) -> None:
        """Measure an adapter."""
        values = dict[str, Tensor]()
        for name, matrix in measured_matrices(model).items():
            values[name] = self._measure(name, matrix).float()
        self.values = values

    def _measure(self, name: str, matrix: MeasuredMatrix) -> Tensor:
        """Return the number of one matrix."""
        raise NotImplementedError


def _ratio(update: Tensor, other: Tensor) -> Tensor:
    """An update's norm over another norm.

    An update of zero gives 0, whatever the other is.
    """
    return torch.where(update == 0, 0, update / other.to(update.device))


class UpdateNorm(_NumberOfEachMatrix):
    r"""The size of each update, relative to its weight.

    It is :math:`\lVert \Delta W \rVert_F / \lVert W \rVert_F`. 0.01 means that the
    update is a hundredth of the weight. A fresh adapter has 0.

    Args:
        reduction: ``"none"`` for a dictionary by matrix, or ``"mean"``, ``"max"`` or
            ``"min"`` for one number.
        **kwargs: Those of ``torchmetrics.Metric``.

    Raises:
        AdapterStateError: (``update``) the model has no adapters, or none of this name.

    Source:
        Hu et al. 2021, section 7.3, table 7 (the two norms).

    Example:
        >>> from torch import nn
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> names = inject_adapters(model, LoRAConfig(r=2, alpha=2))
        >>> _ = [nn.init.eye_(model[0].get_parameter(name)) for name in ("weight", "lora_A", "lora_B")]
        >>> UpdateNorm()(model)
        {'0': tensor(0.7071)}
    """

    def _measure(self, name: str, matrix: MeasuredMatrix) -> Tensor:
        norms = subspace.norm(matrix.update())  # one for each matrix of a stack
        return _ratio(vector_norm(norms), vector_norm(matrix.weight()))


class EffectiveRank(_NumberOfEachMatrix):
    r"""How many directions of each update count.

    It is :math:`\exp` of the entropy of its singular values: r if all r directions have
    one size, and near 1 if one outweighs the others. A fresh adapter has 0. ``update``
    also takes files of adapters (not of DoRA). Arguments and errors are those of
    ``UpdateNorm``.

    Source:
        Roy and Vetterli 2007, "The effective rank: a measure of effective
        dimensionality", section 2.
    """

    def _measure(self, name: str, matrix: MeasuredMatrix) -> Tensor:
        _, sizes, _ = subspace.directions(matrix.update())
        return subspace.effective_rank(sizes).mean()


class Amplification(_NumberOfEachMatrix):
    r"""How much each update amplifies its directions.

    It is :math:`\lVert \Delta W \rVert_F / \lVert U^T W V \rVert_F`. U and V are the
    top r left and right singular vectors of the update. A large factor means that the
    base hardly uses these directions. A fresh adapter has 0. ``norms`` has the norms of
    the update, of :math:`U^T W V` and of W. Errors are those of ``UpdateNorm``.

    Args:
        directions: ``"update"``, or for the other columns of table 7 ``"weight"`` (the
            top r singular vectors of W) or ``"random"`` (those of a Gaussian matrix,
            the same ones each time).
        **kwargs: ``reduction``, and those of ``torchmetrics.Metric``.

    Source:
        Hu et al. 2021, section 7.3, table 7, and appendix H.4. The V of the paper has
        the vectors as rows.
    """

    def __init__(
        self,
        directions: Literal["update", "weight", "random"] = "update",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_choice("directions", directions, "update", "weight", "random")
        self.of = directions
        self._norms = dict[str, tuple[Tensor, Tensor, Tensor]]()

    @property
    def norms(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """The norms of what was measured last."""
        # an earlier update may have measured other matrices
        return only(self._norms, self.values)

    def _measure(self, name: str, matrix: MeasuredMatrix) -> Tensor:
        weight = precise(matrix.weight())
        u, sizes, v = subspace.directions(matrix.update())
        if self.of == "weight":
            u, _, v = subspace.directions(weight)
        # as many directions of a weight as the update has
        rank = matrix.rank()
        u = u[..., :rank].to(weight.device)
        v = v[..., :rank].to(weight.device)
        if self.of == "random":
            # of the shapes of u and v
            noise = torch.Generator(weight.device).manual_seed(0)
            u = _random_directions(u, noise)
            v = _random_directions(v, noise)
        update_norm = vector_norm(sizes)
        norm_along_directions = vector_norm(u.mT @ weight @ v)
        self._norms[name] = (update_norm, norm_along_directions, vector_norm(weight))
        return _ratio(update_norm, norm_along_directions)


def _random_directions(vectors: Tensor, noise: torch.Generator) -> Tensor:
    """Overwrite vectors with random ones: the singular vectors of a Gaussian matrix have any direction."""
    random: Tensor = qr(vectors.normal_(generator=noise)).Q
    return random


class SubspaceSimilarity(_AdapterMetric):
    r"""How alike the directions of two adapters are, from 0 to 1.

    For each matrix, how much the top i directions of one are among the top j of the
    other: :math:`\phi(i, j) = \lVert U_1^{i\,T} U_2^j \rVert_F^2 / \min(i, j)`, where
    the columns of :math:`U^i` are the right singular vectors of A with the i largest
    singular values. ``update(one, other)`` takes models, ``(model, name)`` or files.
    Matrices that only one has are left out. A factor of zeros has no directions: 0.

    Args:
        i: How many directions of the first, or all that it has. None: the grid of all i
            and j, as in figure 3.
        j: How many of the second. None: i.
        side: ``"A"``, what the layers read, or ``"B"``, what they write (left singular
            vectors of B).
        **kwargs: ``reduction``, and those of ``torchmetrics.Metric``.

    Raises:
        AdapterStateError: (``update``) a model has no adapters, or the two have no
            matrix in common.

    Source:
        Hu et al. 2021, section 7.2, equation 4, figures 3 and 4, and appendix G.
    """

    plot_upper_bound: float | None = 1.0

    def __init__(
        self,
        i: int | None = None,
        j: int | None = None,
        *,
        side: str = "A",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not _are_sizes(i, j):
            raise ConfigError(
                f"i={i!r}, j={j!r}. Expected numbers from 1 on, and j only with i."
            )
        _check_choice("side", side, "A", "B")
        self.i = i
        self.j = i if j is None else j
        self.side = side

    def update(self, one: Source, other: Source) -> None:  # type: ignore[override]
        """Compare two adapters."""
        first, second = measured_matrices(one), measured_matrices(other)
        common = only(first, second)
        if not common:
            raise AdapterStateError(
                f"They adapt no matrix in common: one {listed(first)}, the other "
                f"{listed(second)}. Compare adapters of the same model."
            )
        self.values = {}
        for name, matrix in common.items():
            self.values[name] = self._similarity(matrix, second[name])

    def _similarity(self, one: MeasuredMatrix, other: MeasuredMatrix) -> Tensor:
        """A number of two matrices, or their grid."""
        first, second = self._factor(one), self._factor(other)
        grids = subspace.subspace_similarity(first, second.to(first.device)).float()
        grid = grids.view(-1, *grids.shape[-2:]).mean(0)
        if self.i is None or self.j is None:
            return grid
        rows, columns = grid.shape  # how many directions there are
        return grid[min(self.i, rows) - 1, min(self.j, columns) - 1]

    def _factor(self, matrix: MeasuredMatrix) -> Tensor:
        """The factor to compare.

        Its rows are directions that the layer reads, or writes.
        """
        a, b = matrix.factors()
        return a if self.side == "A" else b.mT

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the numbers, or a grid for each matrix as in figure 3 (into ``ax``: that of the first)."""
        if self.i is not None:
            return super().plot(val, ax)
        _drawing._error_on_missing_matplotlib()
        val = self.compute() if val is None else val
        grids = val if isinstance(val, dict) else {self.reduction: val}
        if ax is not None:
            name, grid = next(iter(grids.items()))
            _draw_grids([ax], {name: grid})
            return None, ax
        figure, axes, panels = _make_panels(len(grids))
        _draw_grids(panels, grids)
        return figure, axes


def _are_sizes(i: int | None, j: int | None) -> bool:
    """Whether these are two sizes of sets of directions, or one for both, or none."""
    if i is None:
        return j is None
    return i >= 1 and (j is None or j >= 1)


def _make_panels(number: int) -> tuple[Any, Any, list[Any]]:
    """A figure, all of its axes, and those that are drawn into."""
    rows, columns = _drawing._get_col_row_split(number)
    size = (3.2 * columns + 1, 2.8 * rows)
    figure, axes = _drawing.plt.subplots(
        rows, columns, squeeze=False, layout="constrained", figsize=size
    )
    return figure, axes, list(_drawing.trim_axs(axes, number))


def _draw_grids(panels: list[Any], grids: dict[str, Tensor]) -> None:
    """Draw a grid into each panel, and one colour bar beside them: all have the same colours."""
    images = [
        _draw_grid(panel, name, grid)
        for panel, (name, grid) in zip(panels, grids.items(), strict=True)
    ]
    panels[0].figure.colorbar(images[0], ax=panels, aspect=30)


def _draw_grid(panel: Any, name: str, grid: Tensor) -> Any:
    """Draw a grid of similarities, from 1 on. Return its image."""
    rows, columns = grid.shape
    ends = (0.5, columns + 0.5, rows + 0.5, 0.5)
    values = grid.cpu().numpy()
    image = panel.imshow(
        values, vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=ends
    )
    panel.set(xlabel="j", ylabel="i")
    panel.set_title(name, fontsize="small")
    return image
