"""What EVA and LoRA-GA note of a layer in some batches, and the factors that they take from it."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject_adapters
from lightning_lora.layers.inits.data import observe_gradients, observe_inputs

IN, OUT, R = 6, 5, 2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def adapted(layer: nn.Module, **config: Any) -> Any:
    inject_adapters(nn.Sequential(layer), LoRAConfig(**{"r": R, **config}))
    return layer


def factors(
    observe: Callable[[Any, ExitStack], Any],
    layer: Any,
    look: Callable[[], None],
    r: int = R,
) -> Any:
    """The factors after a look at data, when nothing is watched any more."""
    with ExitStack() as undo:
        found = observe(layer, undo)
        look()
    return found(layer.lora_matrices[0], r)


def inputs_of(
    directions: int, rows: int = 50, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows around a mean, which differ from it in some directions: by less in each."""
    sizes = 10.0 ** -torch.arange(directions)
    orthogonal, _ = torch.linalg.qr(torch.randn(IN, directions))
    spread = torch.randn(rows, directions) * sizes
    return (spread @ orthogonal.T + 3).to(dtype)


def principal(x: Tensor, r: int) -> Tensor:
    """The projection on the r strongest directions of centred rows."""
    centred = (x - x.mean(0)).double()
    _, _, v = torch.linalg.svd(centred, full_matrices=False)
    return v[:r].T @ v[:r]


def projection(a: Tensor) -> Tensor:
    return a.double().T @ a.double()


def assert_same_directions(rows: Tensor, projection_on_others: Tensor) -> None:
    torch.testing.assert_close(
        projection(rows), projection_on_others, atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_eva_has_the_principal_directions_of_all_batches(batches: int) -> None:
    layer = adapted(nn.Linear(IN, OUT))
    x = inputs_of(3)

    def look() -> None:
        for batch in x.chunk(batches):
            is_even = len(batch) % 2 == 0
            layer(batch.reshape(-1, 2, IN) if is_even else batch)

    a, b = factors(observe_inputs, layer, look)
    assert (a.shape, b.shape) == ((R, IN), (OUT, R))
    assert not b.any()
    assert_same_directions(a, principal(x, R))


def test_eva_reads_inputs_that_are_passed_by_name_and_skips_rows_with_nan() -> None:
    layer = adapted(nn.Linear(IN, OUT))
    x = inputs_of(3)
    bad = torch.full((1, IN), torch.nan)
    a, _ = factors(observe_inputs, layer, lambda: layer(input=torch.cat([x, bad])))
    assert_same_directions(a, principal(x, R))


def test_eva_has_fewer_rows_than_the_rank_if_the_inputs_have_fewer_directions() -> None:
    layer = adapted(nn.Linear(IN, OUT))
    a, b = factors(observe_inputs, layer, lambda: layer(inputs_of(1)))
    assert (a.shape, b.shape) == ((1, IN), (OUT, R))


@pytest.mark.parametrize(
    "x", [torch.empty(0, IN), torch.full((4, IN), torch.nan), torch.ones(4, IN)]
)
def test_eva_takes_nothing_from_inputs_without_a_direction(x: Tensor) -> None:
    layer = adapted(nn.Linear(IN, OUT))
    assert factors(observe_inputs, layer, lambda: layer(x)) is None


def test_eva_computes_in_float32_where_inputs_are_rounded() -> None:
    layer = adapted(nn.Linear(IN, OUT)).bfloat16()
    a, _ = factors(
        observe_inputs, layer, lambda: layer(inputs_of(3, dtype=torch.bfloat16))
    )
    assert a.dtype == torch.float32


def test_eva_does_not_look_at_layers_that_read_indices() -> None:
    with ExitStack() as undo:
        assert (
            observe_inputs(adapted(nn.Embedding(9, IN), target_modules="all"), undo)
            is None
        )


def test_after_the_look_a_layer_is_as_it_was() -> None:
    layer = adapted(nn.Linear(IN, OUT))
    factors(observe_inputs, layer, lambda: layer(inputs_of(3)))
    factors(observe_gradients, layer, lambda: layer(inputs_of(3)).sum().backward())
    assert not layer._forward_pre_hooks
    assert not layer.weight.requires_grad
    assert layer.weight.grad is None
    layer(inputs_of(3)).sum().backward()
    assert layer.weight.grad is None


@pytest.mark.parametrize("r", [1, 2])
def test_lora_ga_has_the_directions_of_the_summed_gradient(r: int) -> None:
    layer = adapted(nn.Linear(IN, OUT))
    xs = [torch.randn(4, IN) for _ in range(2)]
    upstream = torch.randn(4, OUT)

    def look() -> None:
        for x in xs:
            (layer(x) * upstream).sum().backward()

    a, b = factors(observe_gradients, layer, look, r)
    assert (a.shape, b.shape) == ((r, IN), (OUT, r))
    gradient = upstream.T @ (xs[0] + xs[1])
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    scale = OUT**0.25 / 16**0.5
    assert_same_directions(a / scale, projection(v[:r]))
    next_directions = u[:, r : 2 * r]
    assert_same_directions(b.T / scale, projection(next_directions.T))


@pytest.mark.parametrize("upstream", [0.0, torch.nan])
def test_lora_ga_takes_nothing_from_no_gradient(upstream: float) -> None:
    layer = adapted(nn.Linear(IN, OUT))
    assert factors(observe_gradients, layer, lambda: None) is None
    assert (
        factors(
            observe_gradients,
            layer,
            lambda: (layer(inputs_of(3)) * upstream).sum().backward(),
        )
        is None
    )


def test_lora_ga_does_not_look_at_rows_of_tokens_nor_at_embeddings() -> None:
    embedding = adapted(nn.Embedding(9, IN), target_modules="all")
    tokens = adapted(
        nn.Embedding(9, IN), target_modules=[], trainable_token_indices={"0": [1, 2]}
    )
    with ExitStack() as undo:
        assert observe_gradients(embedding, undo) is None
        assert observe_gradients(tokens, undo) is None
