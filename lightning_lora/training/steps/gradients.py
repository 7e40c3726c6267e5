"""Gradients of adapters and frozen weights in a run's steps."""

from collections.abc import Sequence, Set
from itertools import compress
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lora.errors import AdapterStateError, TargetError, listed, pairs_of
from lightning_lora.model.as_adapted import check_weights
from lightning_lora.model.settle import begin_alike, copies_among
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.named import outside, with_values
from lightning_lora.tensors.shards import agreed, to_local
from lightning_lora.training.optimizers.groups import held_by
from lightning_lora.training.steps.asked import OwnCheckpoints


class Gradients:
    """Watches the gradients of one run. With ``notes``, it notes which parameters get one: they may be given one later.

    ``copied`` are the parameters of which the optimizer trains copies; for those in ``joined``, DDP waits. DDP fails if
    a batch does not use a layer (an expert, an unused pooler). Here, unused parameters get a zero gradient, so
    ``find_unused_parameters``, which searches the graph in every step, is not needed.
    """

    def __init__(
        self,
        model: nn.Module,
        wrapped: object,
        *,
        notes: bool = False,
        copied: list[nn.Parameter] | None = None,
        joined: Sequence[nn.Parameter] = (),
    ) -> None:
        self.model = model
        self.wrapped: Any = wrapped
        self.fills_gradients = _waits_for_all_gradients(wrapped)
        self.frozen = set(view_of(model).frozen.values())
        self.checkpoints = OwnCheckpoints(self.frozen)
        self.was_thawed = False
        self.has_begun = False
        self.begins = True  # whether its fit loaded no adapters
        self.optimizers: list[Optimizer] = []  # those that have made a step
        self.copied = copied
        self.notes = notes or self.fills_gradients
        self.trained: dict[int, nn.Parameter] = {}  # by their ids
        self.reached: set[int] = set()  # those with a gradient since the last backward pass
        self.ever_reached: set[int] = set()
        self.hooks: list[RemovableHandle] = []
        if self.notes:
            self._note_gradients(joined)

    def _note_gradients(self, joined: Sequence[nn.Parameter]) -> None:
        """Begin to note which parameters get a gradient."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                self.trained[id(parameter)] = parameter
                self.hooks.append(parameter.register_post_accumulate_grad_hook(self._note_gradient))
        for parameter in joined:
            self.trained[id(parameter)] = parameter

    def _note_gradient(self, parameter: Tensor) -> None:
        self.reached.add(id(parameter))

    # Each backward pass

    def begin_backward(self, loss: Tensor) -> None:
        """Let the module's own checkpoints work, if the first step shows one."""
        if self.checkpoints.were_found or not self.optimizers:
            self.checkpoints.prepare(loss)

    def end_backward(self) -> None:
        """Remove the gradients of frozen weights. Under DDP, give unused adapters a zero gradient."""
        self.has_begun = True
        self._keep_frozen()
        self.ever_reached |= self.reached
        if self.fills_gradients and self.wrapped.require_backward_grad_sync:
            idle = [p for key, p in self.trained.items() if key not in self.reached]
            if idle:
                _give_zero_gradients(idle)
        self.reached.clear()

    def _keep_frozen(self) -> None:
        """Freeze again what code has thawed, and remove gradients."""
        thawed = {p for p in self.frozen if p.requires_grad}  # a GAN's step may set it on a full network
        if thawed and not self.was_thawed:
            self.was_thawed = True
            self._tell_of_thawed(thawed)
        for p in thawed:
            p.requires_grad_(False)
        for p in self.frozen:
            if p.grad is not None:
                p.grad = None

    def _tell_of_thawed(self, thawed: Set[nn.Parameter]) -> None:
        names = with_values(view_of(self.model).frozen, thawed)
        rank_zero_info(
            f"requires_grad of {listed(names)} was set in training. LoRACallback keeps the base frozen: to train "
            "these too, name their modules in modules_to_save."
        )

    # The first step of each optimizer

    def check(self, optimizer: Optimizer) -> list[str]:
        """At the first step of an optimizer, return the layers whose adapters in it have received no gradient.

        Among them, copies of networks with a gradient are meant to follow: they begin with the same adapters.
        """
        if not self.has_begun:
            self._keep_frozen()  # a step by hand may call loss.backward()
        if optimizer in self.optimizers:
            return []
        held = self._held_by(optimizer)
        missed = self._without_gradient(held)
        if not self.has_begun and len(missed) == len(held):  # no backward pass yet
            return []
        self.optimizers.append(optimizer)
        view = view_of(self.model)
        check_weights(view)  # hooks may compute them since training began
        unreached = _layers_with(view, missed)
        copies = self._copies(view, held.keys())
        return outside(unreached, copies)

    def _held_by(self, optimizer: Optimizer) -> dict[int, nn.Parameter]:
        """The parameters that an optimizer trains, perhaps copies of them, by their ids."""
        held = self.copied or held_by([optimizer])
        return {id(p): p for p in held}

    def _without_gradient(self, parameters: dict[int, nn.Parameter]) -> set[int]:
        """Those of these parameters, by their ids, that have received no gradient."""
        if self.notes:
            return parameters.keys() - self.ever_reached - self.reached
        return {key for key, p in parameters.items() if p.grad is None}

    def _copies(self, view: View, held: Set[int]) -> dict[str, str]:
        """Networks that copy others, and have no gradient yet. In a fit that begins, they get the same adapters."""
        idle = _layers_that_stay(view, _layers_with(view, held))
        if self.copied is not None or not self.begins:
            return copies_among(view, idle)
        copies = begin_alike(view, idle)
        if copies:
            rank_zero_info(
                f"Copies in {view.title} that have received no gradient yet: {pairs_of(copies)}. They begin with the "
                "same adapters, for other code to move, or to train in other batches."
            )
        return copies

    def close(self) -> None:
        """Remove the hooks."""
        self._keep_frozen()
        for hook in self.hooks:
            hook.remove()


def _waits_for_all_gradients(wrapped: object) -> bool:
    """Whether a module is one of DDP's, which waits for a gradient of each parameter."""
    if not isinstance(wrapped, DistributedDataParallel):
        return False
    return not (wrapped.find_unused_parameters or wrapped.static_graph)


def _layers_with(view: View, parameters: Set[int]) -> list[str]:
    """The layers with a trained parameter among these, which are given by their ids."""
    layers = []
    for name, layer in view.layers.items():
        if not parameters.isdisjoint(map(id, layer.lora_trained())):
            layers.append(name)
    return layers


def _layers_that_stay(view: View, layers: Sequence[str]) -> set[str]:
    """Those of these layers whose gradients are zero in all processes. Collective."""
    move = [any(map(_moves, view.layers[name].lora_trained())) for name in layers]
    move_anywhere = agreed(move, list(view.adapters.values()))
    return set(layers).difference(compress(layers, move_anywhere))


def _moves(parameter: nn.Parameter) -> bool:
    """Whether a parameter has a gradient other than zero in this process."""
    if parameter.grad is None:
        return False
    return bool(to_local(parameter.grad).any())


def _give_zero_gradients(parameters: list[nn.Parameter]) -> None:
    """Add zero gradients for DDP to count. Parameters that the user froze in the run keep the gradient they have."""
    frozen = {p: p.grad for p in parameters if not p.requires_grad}
    for p in frozen:
        p.requires_grad_()
    torch.autograd.backward(parameters, list(map(torch.zeros_like, parameters)))
    for p, grad in frozen.items():
        p.requires_grad_(False)
        p.grad = grad


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
