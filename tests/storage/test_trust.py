"""Code in files runs only if the user says so."""

import inspect
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import Strategy

from lightning_lora import AdapterFileError, load_from_checkpoint, save_adapter
from tests.support.faults import Runs, adapted
from tests.support.models import LitTiny, data, lora, trainer
from tests.support.storage import Holds, fitted, goes_on

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
TRUST = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A run's file with a hyperparameter that is no plain type, after one epoch."""
    fitted(tmp_path / "half.ckpt", Holds(path=tmp_path))
    return tmp_path / "half.ckpt"


def test_a_file_of_other_types_is_refused_without_a_word_of_trust(
    tmp_path: Path, half: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv(TRUST, "0")
    with pytest.raises(
        AdapterFileError, match=r"such as 'pathlib.*': .*(weights_only=False|LOAD=1)"
    ):
        trainer(tmp_path, [lora(merge=False)]).fit(
            Holds(path=tmp_path), data(), ckpt_path=half
        )


@pytest.mark.skipif(
    "weights_only" not in inspect.signature(L.Trainer.fit).parameters,
    reason="this Lightning's stages take no such word",
)
def test_a_trusted_file_of_other_types_is_resumed(tmp_path: Path, half: Path) -> None:
    goes_on(half, Holds(path=tmp_path), weights_only=False)
    trusted: dict[str, Any] = {
        "ckpt_path": half,
        "weights_only": False,
        "verbose": False,
    }
    assert (
        trainer(tmp_path, [lora()]).test(Holds(path=tmp_path), data(), **trusted)[0][
            "test_loss"
        ]
        > 0
    )


# torch says that it does
@pytest.mark.filterwarnings(
    "ignore:.*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected:UserWarning"
)
def test_the_environment_may_say_that_files_are_trusted(
    tmp_path: Path, half: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv(TRUST, "1")
    goes_on(half, Holds(path=tmp_path))
    assert os.environ[TRUST] == "1"
    assert FORCE not in os.environ


def test_code_does_not_run_where_lightning_cannot_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 2.6, Lightning's strategies take no word of trust, and read files of any types."""
    path = tmp_path / "a.ckpt"
    fitted(path)

    def load_checkpoint(self: Any, checkpoint_path: Any) -> Any:
        return torch.load(checkpoint_path, weights_only=False)

    monkeypatch.setattr(Strategy, "load_checkpoint", load_checkpoint)
    assert "weights_only" not in inspect.signature(Strategy.load_checkpoint).parameters
    goes_on(path)
    torch.save(
        torch.load(path, weights_only=True) | {"more": Runs(tmp_path / "ran")}, path
    )
    with pytest.raises(AdapterFileError, match="more than plain types"):
        goes_on(path)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a folder on a web server of this machine; torch keeps what it loads from there in another."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    with ThreadingHTTPServer(
        ("127.0.0.1", 0),
        partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served")),
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_code_in_a_file_of_the_web_does_not_run(tmp_path: Path, served: str) -> None:
    fitted(tmp_path / "served" / "good.ckpt")
    goes_on(f"{served}/good.ckpt")
    checkpoint = torch.load(tmp_path / "served" / "good.ckpt", weights_only=True)
    torch.save(
        checkpoint | {"more": Runs(tmp_path / "ran")}, tmp_path / "served" / "bad.ckpt"
    )
    with pytest.raises(AdapterFileError, match="more than plain types"):
        trainer(tmp_path, [lora()]).fit(
            LitTiny(), data(), ckpt_path=f"{served}/bad.ckpt"
        )
    assert not (tmp_path / "ran").exists()


def test_load_from_checkpoint_of_other_files_says_what_to_do(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path / "lora.safetensors")
    with pytest.raises(AdapterFileError, match="call load_adapter"):
        load_from_checkpoint(LitTiny, tmp_path / "lora.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "bare.ckpt")
    with pytest.raises(AdapterFileError, match="is not a Lightning checkpoint"):
        trainer(tmp_path, [lora()]).validate(
            LitTiny(), data(), ckpt_path=tmp_path / "bare.ckpt"
        )
