"""Every private name of torch, Lightning and DeepSpeed that this package reads.

Beside each stands what breaks without it. ``tests/test_private.py`` asks for those whose absence is no error.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["NormBase", "tree_flatten", "tree_leaves", "tree_map", "tree_unflatten"]  # norms with running statistics

# Names of attributes and entries, and what would go wrong without them

COMPILED = "_orig_mod"  # the module inside torch.compile's wrapper: its files would have other names
COMPILED_CALL = "_compiled_call_impl"  # of a module that was compiled in place: the first batch would compile it again
COMPILED_FUNCTION = "_torchdynamo_orig_callable"  # the function inside a compiled one, likewise
COMPILED_RESULT = "__compiled_fn"  # how names begin that torch.compile leaves in a file: its models would seem compiled
CHECKPOINTED = "_checkpoint_wrapped_module"  # that inside checkpoint_wrapper's, likewise
FABRIC_WRAPPED, FABRIC_OWN = "_forward_module", "_original_module"  # in Fabric's: it would seem to have no adapters
EXTRA_STATE = "_extra_state"  # the end of the names of get_extra_state: a state dict would not match them
STATE_NOTES = "_metadata"  # torch's notes on a state dict: a merged file would be taken for a base
NOT_STORED = "_non_persistent_buffers_set"  # the buffers that a state dict leaves out: files would hold them
STORAGE_BYTES = "_untyped_storage"  # of a storage as torch.load builds it: the public method warns
INPUTS_OF_GRAD = "t_inputs"  # in torch.autograd.grad: unused weights that it got from a generator would have no names
NODE_FUNCTION = "_forward_cls"  # the autograd.Function of a node: what a reentrant checkpoint read would look unused
LOAD_HOOKS = "_load_state_dict_pre_hooks"  # those of a copied module have no handles: they would stay
CONVOLVES = "_conv_forward"  # what a convolution runs: a class that overrides it would not be noticed
RECURRENT_NAMES = "_flat_weights_names"  # a recurrent layer's weights, even computed ones: it would get no adapters
RECURRENT_LISTS = ("_flat_weights", "_flat_weight_refs")  # of these weights: a merge would leave the old ones there
START_METHOD = "_start_method"  # of a strategy's processes: adapters that do not come back would not be refused
HPARAMS_NAME = "_hparams_name"  # the argument with the hyperparameters: Lightning could not build a file's module
LOADER_STATE = "_iterator"  # where a loader keeps workers that stay: those of a copy would be the same
SUMMARY_DEPTH = "_max_depth"  # of a ModelSummary, 0 for no table: a line would speak of one that is not there
LOGS_HPARAMS = "_log_hyperparams"  # whether Lightning logs them: TensorBoard would show ours alone
CLI_CLASS = "_class_path"  # LightningCLI's entry in them: load_from_checkpoint would build the wrong class
AVERAGE, AVERAGES_WITH = "_average_model", "_avg_fn"  # of SWA and EMA: they would not know adapters and frozen weights

# Functions of torch, without a call around them: they run in each forward pass

tracing: Callable[[], object] = torch._C._get_tracing_state  # torch.jit.trace would not see explicit gradients,
is_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active  # nor would torch.func,
count_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack  # nor would modes that watch single operations
is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled  # asking for one device takes longer


def is_forward_differentiating() -> bool:
    """Whether forward-mode differentiation runs: explicit gradients would leave out its tangents."""
    return forward_ad._current_level >= 0


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written in place: without it, changes of the base could be missed."""
    return tensor._version


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Whether code has put hooks on a parameter's gradient: without it, masks that no longer act would go unnoticed."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)  # type: ignore[attr-defined]


def local_offsets(tensor: Any) -> tuple[Any, Any]:
    """Return the shape of a DTensor's local shard and where it begins: without it, there are no digests of shards."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def convolve(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Convolve with another weight, and a layer's padding: without it, we would need each of torch's paddings."""
    output: Tensor = layer._conv_forward(x, weight, None)
    return output


@contextmanager
def before_compiling(call: Callable[[], None]) -> Iterator[None]:
    """Call this before torch.compile traces code: without it, what is there for one batch would be compiled in."""
    module: Any = sys.modules.get("torch._dynamo.callback")  # not there: nothing was compiled yet
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
    """The classes that start processes: without them, records do not come back from forked and spawned ones."""
    for package in ("lightning.pytorch", "pytorch_lightning"):
        module: Any = sys.modules.get(f"{package}.strategies.launchers.multiprocessing")
        if module is not None:
            yield module._MultiProcessingLauncher


def loader_states(fit_loop: Any) -> Any:
    """Return the states that the loaders of a resumed run wait for: those that began without them begin again."""
    return fit_loop._combined_loader_states_to_load


def begin_loaders_again(fit_loop: Any, states: Any) -> None:
    """Begin the loaders of a fit again, with their states: another order of batches is another run."""
    fit_loop._combined_loader_states_to_load = fit_loop._combined_loader_states_to_load or states
    fit_loop._load_combined_loader_states()
    iter(fit_loop._data_fetcher)


def loader_of(fit_loop: Any) -> Any:
    """Return the loader of a fit, of all its data loaders: starts from data would see other batches."""
    return fit_loop._combined_loader


def before_transfer(pl_module: Any, batch: Any) -> Any:
    """Return a batch as hooks change it before it moves: starts from data would see others."""
    return pl_module._on_before_batch_transfer(batch)


# DeepSpeed


class OwnRun(NamedTuple):
    """The run of numbers that a parameter shares with this process's shard of its group."""

    first: int  # in the parameter
    first_in_shard: int
    length: int


def own_run(parameter: Any) -> OwnRun:
    """Return what a parameter shares with this process's shard: files would lack states without it."""
    shared = parameter._hp_mapping
    if shared is None:
        return OwnRun(0, 0, 0)
    in_shard = shared.hp_fragment_address
    return OwnRun(shared.lp_fragment_address.start, in_shard.start, in_shard.numel)
