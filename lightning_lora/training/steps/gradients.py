"""Gradients of adapters and frozen weights in a run's steps."""

from collections.abc import Mapping, Set
from itertools import compress

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.errors import AdapterStateError, TargetError, listed
from lightning_lora.layers import LoRALayer
from lightning_lora.model.changed_since_adapted import refuse_computed_weights
from lightning_lora.model.still.follow import begin_as_originals, copies_among
from lightning_lora.model.view import View, view_of
from lightning_lora.networks.copies import pairs_of
from lightning_lora.tensors.dicts import with_values
from lightning_lora.tensors.names import names_outside
from lightning_lora.tensors.shards import to_local, true_anywhere
from lightning_lora.training.optimizers.groups import held_by, layers_trained_by
from lightning_lora.training.steps.own_checkpoints import OwnCheckpoints
from lightning_lora.training.steps.received import Received


class Gradients:
    """Watches the gradients of one run.

    Frozen weights get none. The first step of each optimizer shows which of its layers
    have some, and which networks copy others. With ``begins_copies``, the copies begin
    with the originals' adapters.
    """

    def __init__(
        self, model: nn.Module, received: Received, *, begins_copies: bool
    ) -> None:
        self.model = model
        self.received = received
        self.begins_copies = begins_copies
        self.frozen = set(view_of(model).frozen_base.values())
        self.own_checkpoints = OwnCheckpoints(self.frozen)
        self.has_told_of_thawed = False
        # stays False where a step by hand calls loss.backward() itself
        self.had_trainers_backward = False
        # those whose first step with gradients has begun
        self.begun_optimizers: list[Optimizer] = []

    # Each backward pass

    def begin_backward(self, loss: Tensor) -> None:
        """Let the module's own activation checkpoints work.

        They are looked for until a first step begins, and later only if some were
        found.
        """
        if self.own_checkpoints.were_found or not self.begun_optimizers:
            self.own_checkpoints.prepare(loss)

    def end_backward(self) -> None:
        """Remove the gradients of frozen weights.

        Under DDP, give unused adapters a zero gradient.
        """
        self.had_trainers_backward = True
        self._keep_frozen()
        self.received.end_backward()

    def _keep_frozen(self) -> None:
        """Freeze again what code has thawed, and remove gradients."""
        thawed = set[nn.Parameter]()
        for p in self.frozen:
            if p.requires_grad:  # a GAN's step may set it on a full network
                p.requires_grad_(False)
                thawed.add(p)
            p.grad = None
        if thawed and not self.has_told_of_thawed:
            self.has_told_of_thawed = True
            self._tell_of_thawed(thawed)

    def _tell_of_thawed(self, thawed: Set[nn.Parameter]) -> None:
        names = with_values(view_of(self.model).frozen_base, thawed)
        rank_zero_info(
            f"requires_grad of {listed(names)} was set in training. LoRACallback keeps "
            "the base frozen: to train these too, name their modules in "
            "modules_to_save."
        )

    # The first step of each optimizer

    def begin_optimizer_step(self, optimizer: Optimizer) -> list[str]:
        """Begin an optimizer's step.

        In its first one, return the layers that no gradient has reached. Layers of
        copies are not among them: other code may move these, or they train later.
        """
        if not self.had_trainers_backward:
            # end_backward, which does this otherwise, has not run
            self._keep_frozen()
        if optimizer in self.begun_optimizers:
            return []
        held = self.held_by(optimizer)
        unreached = self.received.unreached(held)
        # A step of the module's own code may come before any gradient: it is no first
        # step. After a backward pass of the Trainer's, missing gradients are a mistake.
        has_any_gradient = self.had_trainers_backward or unreached != held
        if not has_any_gradient:
            return []
        self.begun_optimizers.append(optimizer)
        return self._begin_first_step(held, unreached)

    def held_by(self, optimizer: Optimizer) -> Set[nn.Parameter]:
        """Return the module's parameters that an optimizer trains.

        A method, because DeepSpeed's optimizers hold others in their place.
        """
        return held_by([optimizer])

    def _begin_first_step(
        self, held: Set[nn.Parameter], unreached: Set[nn.Parameter]
    ) -> list[str]:
        """Check the weights, and let copies begin as their originals.

        Return the layers of other networks that no gradient has reached in this
        process.
        """
        view = view_of(self.model)
        # hooks may compute weights since the training began
        refuse_computed_weights(view)
        copies = self._begin_copies(view, layers_trained_by(held, view))
        return names_outside(layers_trained_by(unreached, view), copies)

    def _begin_copies(
        self, view: View, layers: Mapping[str, LoRALayer]
    ) -> dict[str, str]:
        """Let copies among these layers' networks begin as their originals, if no process has a gradient for them.

        Return these copies, each with its original.
        """
        without_gradient = _layers_without_gradient(view, layers)
        copies = copies_among(view, without_gradient)
        # in a fit that goes on, copies have adapters of their own from the file
        if copies and self.begins_copies:
            begin_as_originals(view, copies, without_gradient)
            _tell_of_copies(view, copies)
        return copies

    def close(self) -> None:
        """Leave nothing thawed, and remove the hooks."""
        self._keep_frozen()
        self.received.close()


def _tell_of_copies(view: View, copies: Mapping[str, str]) -> None:
    """Say that copies begin with the adapters of their originals."""
    rank_zero_info(
        f"Copies in {view.title} that have received no gradient yet: "
        f"{pairs_of(copies)}. They begin with the same adapters, for other "
        "code to move, or to train in other batches."
    )


def _layers_without_gradient(view: View, layers: Mapping[str, LoRALayer]) -> set[str]:
    """Those of these layers whose gradients are zero or missing in all processes.

    Under DDP, all processes have the same gradients. With shards, this is collective:
    all processes come here, because FSDP2 lets none run a backward pass alone.
    """
    here = list(map(_has_gradient, layers.values()))
    in_any_process = true_anywhere(here, list(view.adapter_parameters.values()))
    return set(layers).difference(compress(layers, in_any_process))


def _has_gradient(layer: LoRALayer) -> bool:
    """Whether a layer's adapter has a gradient other than zero in this process."""
    return any(map(_has_nonzero_gradient, layer.lora_trainable()))


def _has_nonzero_gradient(p: nn.Parameter) -> bool:
    """Whether this process's part of a gradient is other than zero."""
    if p.grad is None:
        return False
    return bool(to_local(p.grad).any())


def check_loss(model: LightningModule, loss: object) -> None:
    """Refuse a loss that depends on nothing that trains."""
    if not isinstance(loss, Tensor) or loss.requires_grad:
        return
    if not model.trainer.training:
        raise AdapterStateError(
            f"The loss of {type(model).__name__} has no graph to go back through: "
            "outside of training, a Trainer computes without gradients. Set "
            "Trainer(inference_mode=False), and put the forward pass and the loss into "
            "a block of torch.enable_grad()."
        )
    view = view_of(model)
    raise TargetError(
        f"The loss of {view.title} depends on no adapter: {listed(view.layers)} have "
        "them, and are not called, or run without gradients (torch.no_grad, detach). "
        "Adapt others (target_modules), or set modules_to_save."
    )
