"""Gradients of adapters and frozen weights, and dropout, in a run's steps."""

from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as recompute
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_lora.errors import AdapterStateError, DeadAdapterWarning, TargetError, listed, warn
from lightning_lora.layers import Step
from lightning_lora.model.attach import check_weights
from lightning_lora.model.record import find_record
from lightning_lora.model.settle import begin_alike, copies_among
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.names import is_in_any
from lightning_lora.tensors.shards import agreed, to_local
from lightning_lora.training.guards.asked import OwnCheckpoints
from lightning_lora.training.optimizers.peak_rates import peak_rates


class Gradients:
    """Watches the gradients of one run. With ``notes``, it notes which parameters get one: they may be given one later.

    ``copied`` are the parameters of which the optimizer trains copies; for those in ``joined``, DDP waits. DDP fails if
    a batch does not use a layer (an expert, an unused pooler). Here, unused parameters get a zero gradient, so
    ``find_unused_parameters``, which searches the graph in every step, is not needed.
    """

    def __init__(
        self,
        model: nn.Module,
        wrapped: Any,
        *,
        notes: bool = False,
        copied: list[nn.Parameter] | None = None,
        joined: Sequence[nn.Parameter] = (),
    ) -> None:
        waits = isinstance(wrapped, DistributedDataParallel)
        self.ddp = wrapped if waits and not (wrapped.find_unused_parameters or wrapped.static_graph) else None
        self.model, view = model, view_of(model)
        self.frozen = set(view.frozen.values())
        self.checkpoints = OwnCheckpoints(self.frozen)
        self.was_thawed = False
        self.random = view.adapter.random or ()
        self.has_begun = False
        self.begins = True  # whether its fit loaded no adapters
        self.reached: set[int] = set()
        self.ever_reached: set[int] = set()
        self.optimizers: list[Optimizer] = []
        self.copied = copied
        self.notes = notes or self.ddp is not None
        trained = [p for p in model.parameters() if p.requires_grad] if self.notes else []
        self.trained = {id(p): p for p in (*trained, *(joined if self.notes else ()))}
        self.hooks = [p.register_post_accumulate_grad_hook(lambda p: self.reached.add(id(p))) for p in trained]

    def begin_backward(self, loss: Tensor) -> None:
        """Let the module's own checkpoints work, if the first step shows one."""
        if self.checkpoints.were_found or not self.optimizers:
            self.checkpoints.prepare(loss)

    def end_backward(self) -> None:
        """Remove the gradients of frozen weights. Under DDP, give unused adapters a zero gradient."""
        self.has_begun = True
        self._keep_frozen()
        self.ever_reached |= self.reached
        if self.ddp is not None and self.ddp.require_backward_grad_sync:
            idle = [p for key, p in self.trained.items() if key not in self.reached]
            if idle:
                _give_zero_gradients(idle)
        self.reached.clear()

    def _keep_frozen(self) -> None:
        thawed = {p for p in self.frozen if p.requires_grad}  # a GAN's step may set it on a full network
        if thawed and not self.was_thawed:
            self.was_thawed = True
            names = [name for name, p in view_of(self.model).frozen.items() if p in thawed]
            rank_zero_info(
                f"requires_grad of {listed(names)} was set in training. LoRACallback keeps the base frozen: to train "
                "these too, name their modules in modules_to_save."
            )
        for p in thawed:
            p.requires_grad_(False)
        for p in self.frozen:
            if p.grad is not None:
                p.grad = None

    def check(self, optimizer: Optimizer) -> None:
        """Warn about adapters in ``optimizer`` that received no gradient, once, at its first step."""
        if not self.has_begun:
            self._keep_frozen()  # a step by hand may call loss.backward()
        if optimizer in self.optimizers:
            return
        held = self.copied or [p for group in optimizer.param_groups for p in group["params"]]
        reached = self.ever_reached | self.reached
        missed = {id(p) for p in held if not (id(p) in reached if self.notes else p.grad is not None)}
        if not self.has_begun and len(missed) == len(held):  # no backward pass yet
            return
        self.optimizers.append(optimizer)
        view = view_of(self.model)
        check_weights(view)  # hooks may compute them since training began
        idle = {name for name, layer in view.layers.items() if any(id(p) in missed for p in layer.lora_trained())}
        copies = self._copies(view, set(map(id, held)))
        dead = [name for name in view.layers if name in idle and not is_in_any(name, copies)]
        fresh = [name for name in dead if any(weight.startswith(f"{name}.") for weight in self.random)]
        if dead:
            warn(
                f"The adapters of {listed(dead)} received no gradient before the first optimizer step. Do they run "
                "under no_grad() or detach()? Do only other batches use them (as with experts)? Does other code freeze "
                "them (requires_grad), or read weights without calling the layers (name these in target_parameters)? "
                "If the loss does not depend on them, leave them out with exclude_modules."
                + f" {listed(fresh)} look untrained too: leave them out then, whatever FreshLayerWarning says."
                * bool(fresh),
                DeadAdapterWarning,
            )

    def _copies(self, view: View, held: Set[int]) -> dict[str, str]:
        """Networks that copy others, and have no gradient yet. In a fit that begins, they get the same adapters."""
        own = {name: layer.lora_trained() for name, layer in view.layers.items()}
        own = {name: parameters for name, parameters in own.items() if any(id(p) in held for p in parameters)}
        moved = [any(p.grad is not None and bool(to_local(p.grad).any()) for p in each) for each in own.values()]
        moved = agreed(moved, list(view.adapters.values()))  # in any process
        idle = {name for name, flag in zip(own, moved, strict=True) if not flag}
        if self.copied is not None or not self.begins:
            return copies_among(view, idle)
        copies = begin_alike(view, idle)
        if copies:
            pairs = ", ".join(f"{name!r} of {original!r}" for name, original in copies.items())
            rank_zero_info(
                f"Copies in {view.title} that have received no gradient yet: {pairs}. They begin with the same "
                "adapters, for other code to move, or to train in other batches."
            )
        return copies

    def close(self) -> None:
        """Remove the hooks."""
        self._keep_frozen()
        for hook in self.hooks:
            hook.remove()


def check_loss(model: LightningModule, loss: object) -> None:
    """Refuse a loss that depends on nothing that trains."""
    if not isinstance(loss, Tensor) or loss.requires_grad:
        return
    if not model.trainer.training:
        raise AdapterStateError(
            f"The loss of {type(model).__name__} has no graph to go back through: outside of training, a Trainer "
            "computes without gradients. Set Trainer(inference_mode=False), and put the forward pass and the loss "
            "into a block of torch.enable_grad()."
        )
    view = view_of(model)
    raise TargetError(
        f"The loss of {view.title} depends on no adapter: {listed(view.layers)} have them, and are not called, or "
        "run without gradients (torch.no_grad, detach). Adapt others (target_modules), or set modules_to_save."
    )


def warn_if_base_is_shown(model: nn.Module) -> None:
    """Warn of a backward pass while the base is shown: what trains in full gets no gradient there."""
    record = find_record(model)
    if record is None or not record.is_disabled:
        return
    trained = View(model).trained
    if trained:
        warn(
            f"A backward pass in a block of disable_adapters: {listed(trained)} of {type(model).__name__} hold the "
            "base's values there, and get no gradient. Call it after the block, in which only the base's outputs are "
            "computed."
        )


def check_learned(model: nn.Module, optimizers: Iterable[Optimizer], steps: int) -> None:
    """Warn of a fit that trained no adapter."""
    view = View(model)
    if steps > 1 and view.layers and view.is_fresh() and any(rate > 0 for rate in peak_rates(view, optimizers)[0]):
        warn(
            f"After {steps} steps, all updates of {view.title} are still zero. If no other warning says why, the "
            "optimizer may keep a list of parameters of its own, without the adapters: use another one. Or an average "
            "that has not begun took their place. Or the scaler of 16-mixed has skipped each step: train more.",
            DeadAdapterWarning,
        )


def tell_of_unmoved(model: nn.Module) -> None:
    """Name copies that no code has moved after originals that have learned: an average should have followed."""
    view = view_of(model)
    moved, unmoved = {name for name, layer in view.layers.items() if not layer.lora_is_fresh()}, list[str]()
    for name, original in view.adapter.networks.copies.items():
        if any(is_in_any(each, [original]) for each in moved) and not any(is_in_any(each, [name]) for each in moved):
            unmoved.append(f"{name!r} of {original!r}")
    if unmoved:
        rank_zero_info(
            f"Copies in {view.title} that no code has moved: {', '.join(unmoved)}. They compute what they did before. "
            "If one is an average that has begun, its code may look for parameters by the names they had before the "
            "fit, as ema_pytorch does: make it in on_fit_start."
        )


def _give_zero_gradients(parameters: list[nn.Parameter]) -> None:
    """Add zero gradients for DDP to count. Parameters that the user froze in the run keep the gradient they have."""
    frozen = [(p, p.grad) for p in parameters if not p.requires_grad]
    for p, _ in frozen:
        p.requires_grad_()
    torch.autograd.backward(parameters, list(map(torch.zeros_like, parameters)))
    for p, grad in frozen:
        p.requires_grad_(False)
        p.grad = grad


@contextmanager
def gradients_pass(model: nn.Module) -> Iterator[None]:
    """In a training step, let gradients pass reentrant checkpoints with inputs that require none.

    torch offers no hook there: its function finds no input that requires a gradient, and keeps nothing of the call. So
    for a step, another function takes its place, unless other code has put its own there.
    """
    _RUNNING.append(model)
    if recompute.CheckpointFunction is CHECKPOINT_FUNCTION:
        recompute.CheckpointFunction = _RequiringGradients  # type: ignore[misc]
    try:
        yield
    finally:
        _RUNNING.remove(model)
        if not _RUNNING and recompute.CheckpointFunction is _RequiringGradients:
            recompute.CheckpointFunction = CHECKPOINT_FUNCTION  # type: ignore[misc]


CHECKPOINT_FUNCTION = recompute.CheckpointFunction
"""torch's own."""

_RUNNING: list[nn.Module] = []
"""The models whose steps run. A step may run a fit of another model."""


class _RequiringGradients(CHECKPOINT_FUNCTION):
    """The same function, but if no input requires a gradient, all floating-point inputs do.

    Not while adapters are disabled: the backward pass would compute the layers with them.
    """

    @classmethod
    def apply(cls, function: Any, preserve_rng_state: bool, *inputs: Any) -> Any:
        requires_grad = any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
        records = map(find_record, _RUNNING)
        is_disabled = any(record is not None and record.is_disabled for record in records)
        if torch.is_grad_enabled() and not requires_grad and not is_disabled:
            inputs = tuple(
                value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
                for value in inputs
            )
        return super().apply(function, preserve_rng_state, *inputs)  # type: ignore[no-untyped-call]  # torch's own


class Dropout:
    """Lets dropout act in the training steps of a fit."""

    def __init__(self) -> None:
        self._steps: list[Step] | None = None

    def begin_step(self, model: nn.Module) -> None:
        """Let it act in ``model``. It ends with the step, or where ``eval()`` is called."""
        if self._steps is None:
            self._steps = [layer.lora_step for layer in View(model).layers.values() if layer.lora_settings.dropout]
        for step in self._steps:
            step.runs = True

    def end_step(self) -> None:
        """End a step. Its backward pass, which may compute layers again, is over too."""
        for step in self._steps or ():
            step.runs = False

    def close(self) -> None:
        """End the last step, also one that failed."""
        self.end_step()
        self._steps = None
