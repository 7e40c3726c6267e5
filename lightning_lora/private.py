"""Every private name of torch, Lightning and DeepSpeed that this package reads, and what breaks without it.

If a release renames one, most tests fail. ``tests/test_private.py`` asks for those
whose absence would be no error.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

# the class of norms with running statistics
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["NormBase", "tree_flatten", "tree_leaves", "tree_map", "tree_unflatten"]


# Names of attributes and entries: what each is, and what would be wrong without it

# Modules inside wrappers
# the module in torch.compile's wrapper. Without it: other names in files
COMPILED = "_orig_mod"
# the module in the wrapper of checkpoint_wrapper. Without it: other names in files
CHECKPOINTED = "_checkpoint_wrapped_module"
# the module in Fabric's wrapper, with Fabric's precision. Without it: no adapters are
# found
FABRIC_WRAPPED = "_forward_module"
# the module in Fabric's wrapper, as the user made it. Without it: no adapters are found
FABRIC_OWN = "_original_module"

# torch.compile
# the call of a module compiled in place. Without it: the first batch compiles it twice
COMPILED_CALL = "_compiled_call_impl"
# the plain function, on a compiled one. Without it: the first batch compiles it twice
COMPILED_FUNCTION = "_torchdynamo_orig_callable"
# how names begin that torch.compile adds to a Python file. Without it: all models of that
# file seem compiled
COMPILED_RESULT = "__compiled_fn"

# Modules, their state and their hooks
# how entries of get_extra_state end. Without it: a state dict does not match them
EXTRA_STATE = "_extra_state"
# torch's notes on a state dict. Without it: a merged file is taken for a base
STATE_NOTES = "_metadata"
# buffers that a state dict leaves out. Without it: files hold them
NOT_STORED = "_non_persistent_buffers_set"
# a module's hooks before it loads a state dict. Without it: ours stays on copies
LOAD_HOOKS = "_load_state_dict_pre_hooks"
# the bytes of a storage as torch.load builds it. Without it: the public method warns
STORAGE_BYTES = "_untyped_storage"

# Layers
# the method that a convolution runs. Without it: subclasses with their own are wrong
CONVOLVES = "_conv_forward"
# the names of a recurrent layer's weights, even computed ones. Without it: no adapters
RECURRENT_NAMES = "_flat_weights_names"
# its own lists of these weights. Without them: merges leave the old ones there
RECURRENT_LISTS = ("_flat_weights", "_flat_weight_refs")

# Gradients
# a local variable of torch.autograd.grad. Without it: an error cannot name weights that
# come from a generator
INPUTS_OF_GRAD = "t_inputs"
# the Function of an autograd node. Without it: what reentrant checkpoints use looks
# unused
NODE_FUNCTION = "_forward_cls"

# Lightning
# how a strategy starts processes. Without it: adapters that do not come back are not
# refused
START_METHOD = "_start_method"
# the argument with all hyperparameters. Without it: no module is built of a file
HPARAMS_NAME = "_hparams_name"
# whether Lightning logs hyperparameters. Without it: TensorBoard shows ours alone
LOGS_HPARAMS = "_log_hyperparams"
# LightningCLI's entry in hyperparameters. Without it: load_from_checkpoint builds the
# wrong class
CLI_CLASS = "_class_path"
# the depth of a ModelSummary, 0 for no table. Without it: we speak of a table that is not
# shown
SUMMARY_DEPTH = "_max_depth"
# the iterator of a loader whose workers stay. Without it: a copied loader shares them
LOADER_STATE = "_iterator"
# the averaged model of SWA and EMA. Without it: adapters are not averaged
AVERAGE = "_average_model"
# how they average. Without it: frozen weights are averaged too
AVERAGES_WITH = "_avg_fn"

# Functions of torch, without a function of ours around them, because they run in each
# forward pass: is other code looking at single operations? Explicit gradients would
# hide these from it.

tracing: Callable[[], object] = torch._C._get_tracing_state  # torch.jit.trace
# whether torch.func transforms what runs
is_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active
# how many modes see each operation, such as one that counts them
count_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

# whether autocast is on for some device: to ask for one device takes longer
is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled


def is_forward_differentiating() -> bool:
    """Whether forward-mode differentiation runs.

    Without it: explicit gradients leave out its tangents.
    """
    return forward_ad._current_level >= 0


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written in place.

    Without it: changes of the base can be missed.
    """
    return tensor._version


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Whether code has put hooks on a parameter's gradient.

    Without it: masks that no longer act go unnoticed.
    """
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)  # type: ignore[attr-defined]


def forward_hooks_of(module: Any) -> list[Any]:
    """Return the hooks around a module's forward.

    Without it: PEFT runs these elsewhere, and nothing says so.
    """
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def local_offsets(tensor: Any) -> tuple[Any, Any]:
    """Return the shape of a DTensor's local shard, and where it begins.

    Without it: no digests of shards.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )


def convolve(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Convolve with another weight, and a layer's padding.

    Without it: each of torch's paddings is written again.
    """
    output: Tensor = layer._conv_forward(x, weight, None)
    return output


@contextmanager
def before_compiling(call: Callable[[], None]) -> Iterator[None]:
    """Call this before torch.compile traces code.

    Without it: what is there for one batch alone is compiled in.
    """
    # where the module is not there, nothing was compiled yet
    module: Any = sys.modules.get("torch._dynamo.callback")
    starts = [] if module is None else module.callback_handler.start_callbacks

    def called(*_: Any) -> None:
        call()

    starts.append(called)
    try:
        yield
    finally:
        if called in starts:  # other code may have cleared them
            starts.remove(called)


# Lightning


def multiprocessing_launchers() -> Iterator[Any]:
    """The classes that start processes.

    Without them: records do not come back from forked and spawned ones.
    """
    for package in ("lightning.pytorch", "pytorch_lightning"):
        module: Any = sys.modules.get(f"{package}.strategies.launchers.multiprocessing")
        if module is not None:
            yield module._MultiProcessingLauncher


def loader_states(fit_loop: Any) -> Any:
    """Return the states that the loaders of a resumed run wait for.

    Without it: those that began too early stay so.
    """
    return fit_loop._combined_loader_states_to_load


def begin_loaders_again(fit_loop: Any, states: Any) -> None:
    """Begin the loaders of a fit again, with their states.

    Without it: a resumed run has another order of batches.
    """
    fit_loop._combined_loader_states_to_load = (
        fit_loop._combined_loader_states_to_load or states
    )
    fit_loop._load_combined_loader_states()
    iter(fit_loop._data_fetcher)


def loader_of(fit_loop: Any) -> Any:
    """Return the loader that combines all of a fit.

    Without it: adapters that start from data see other batches.
    """
    return fit_loop._combined_loader


def before_transfer(pl_module: Any, batch: Any) -> Any:
    """Return a batch as hooks change it before it moves.

    Without it: adapters that start from data see other values.
    """
    return pl_module._on_before_batch_transfer(batch)


# DeepSpeed


class OwnSpan(NamedTuple):
    """The elements of a parameter that are in this process's shard of its group."""

    first: int  # in the parameter
    first_in_shard: int
    length: int


def own_span(parameter: Any) -> OwnSpan:
    """Return which elements of a parameter this process's shard holds.

    Without it: files lack optimizer states. DeepSpeed calls the shard hp, of high
    precision, and the parameter lp, of low precision.
    """
    shared = parameter._hp_mapping
    if shared is None:
        return OwnSpan(0, 0, 0)
    in_shard = shared.hp_fragment_address
    return OwnSpan(shared.lp_fragment_address.start, in_shard.start, in_shard.numel)
