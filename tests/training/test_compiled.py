"""Compiled models train as plain ones, with plain keys."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_lora as ll
from tests.support.cases import held, three
from tests.support.fits import fit, loaded
from tests.support.models import LitTiny, X, data, lora, state, trainer
from tests.support.parameters import trainable


class Compiled(LitTiny):
    """A module whose q_proj was compiled before it met any adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.compile(self.q_proj, backend="eager", fullgraph=True)


# of torch, as it compiles any linear layer
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_submodule_is_adapted_and_its_keys_are_plain(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, _ = fit(tmp_path, lora(target_modules=["q_proj"]), model=LitTiny())
    model = Compiled()
    model(X)  # so that there is a graph without an adapter
    _, t = fit(tmp_path, lora(target_modules=["q_proj"]), model=model)
    torch.testing.assert_close(model(X), plain(X))
    assert type(model.q_proj._orig_mod) is nn.Linear
    path = t.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    stored = held(torch.load(path, weights_only=True))
    assert set(stored) == {"q_proj.lora_A", "q_proj.lora_B", "head.weight", "head.bias"}
    for other in (LitTiny(), Compiled()):
        ll.load_adapter(other, path)
        torch.testing.assert_close(other(X), plain(X))
        ll.load_adapter_state_dict(other, ll.adapter_state_dict(other))
    ll.save_adapter(model, tmp_path / "a.safetensors")
    from_file = loaded(tmp_path / "a.safetensors")
    torch.testing.assert_close(from_file(X), plain(X))


def counted() -> tuple[Any, list[int]]:
    """A backend of torch.compile that counts the graphs it is given."""
    graphs: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    return count, graphs


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all"])
def test_compiled_module_trains_as_the_plain_one_and_compiles_once(
    tmp_path: Path, targets: Any
) -> None:
    def trainer_of_three_epochs() -> Any:
        torch.manual_seed(0)
        adapters = lora(merge=False, target_modules=targets)
        return trainer(tmp_path, [adapters], max_epochs=3, enable_checkpointing=False)

    plain = LitTiny()
    trainer_of_three_epochs().fit(plain, data())
    backend, graphs = counted()
    model = LitTiny()
    t = trainer_of_three_epochs()
    t.fit(torch.compile(model, backend=backend), data())
    # a compiled graph may round otherwise
    torch.testing.assert_close(state(model), state(plain))
    seen = len(graphs)
    assert seen > 0
    t.fit_loop.max_epochs = 6
    t.fit(torch.compile(model, backend=backend), data())
    assert len(graphs) <= 2 * seen


@pytest.mark.parametrize("trains", [False, True])
def test_no_step_compiles_again(trains: bool) -> None:
    torch._dynamo.reset()
    backend, graphs = counted()
    model = three(dropout=0.1).train(trains)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for _ in range(4):
        compiled(X).sum().backward()
        optimizer.step()
    assert len(graphs) == 1
