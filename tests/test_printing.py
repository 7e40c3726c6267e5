"""What is printed reaches any terminal and any file, whatever its encoding is, and ends no fit."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelSummary
from rich.console import Console
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.cli.main import main
from tests.support.models import LitTiny, data, lora, trainer
from tests.support.storage import saved

ENCODINGS = ["ascii", "latin-1", "cp1251", "cp1253", "cp932", "utf-8"]


class Blocks(LitTiny):
    """A module whose table has a range of ranks, a number of equal layers, and a name that few encodings hold."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.ModuleDict({"größe": nn.LSTM(1, 8, bidirectional=True)})
        self.chain = nn.ModuleList(
            nn.ModuleDict({"part": nn.Linear(8, 8)}) for _ in range(3)
        )

    def forward(self, index: Tensor) -> Tensor:
        x = super().forward(index)
        for block in self.chain:
            x = x + block["part"](self.lstm["größe"](x[:, :1])[0][:, :8])[:, :4]
        return x


class Tee:
    """A stream in front of another, which says nothing of its encoding."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return int(self.stream.write(text))

    def flush(self) -> None:
        self.stream.flush()


class Written:
    """Standard output in an encoding, and its text."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, encoding: str, tee: bool = False
    ) -> None:
        self.bytes = io.BytesIO()
        self.encoding = encoding
        stream = io.TextIOWrapper(self.bytes, encoding=encoding, write_through=True)
        monkeypatch.setattr(sys, "stdout", Tee(stream) if tee else stream)

    def text(self) -> str:
        return self.bytes.getvalue().decode(self.encoding)


@pytest.mark.parametrize("tee", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_encoding_ends_a_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, tee: bool
) -> None:
    written = Written(monkeypatch, encoding, tee)
    # rich's own would fail
    callbacks = [
        lora(r=4, target_modules="all", exclude_modules=["embed"]),
        ModelSummary(),
    ]
    trainer(tmp_path, callbacks, max_epochs=1, enable_model_summary=True).fit(
        Blocks(), data()
    )
    shown = written.text()
    assert "LoRA: Blocks trains" in shown
    assert "Total" in shown
    if encoding == "ascii":
        assert "chain.*.part (x3)" in shown
        assert r"lstm.gr\xf6\xdfe" in shown
        assert "1-4" in shown
    if encoding == "utf-8":
        assert "chain.*.part (×3)" in shown
        assert "lstm.größe" in shown
        assert "1–4" in shown


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_summary_prints_in_any_encoding(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    written = Written(monkeypatch, encoding)
    model = Blocks()
    ll.inject_adapters(model, ll.LoRAConfig(r=4, target_modules="all"))
    print(ll.summarize(model))
    first = written.text()
    Console(width=120).print(ll.summarize(model))
    second = written.text().removeprefix(first)
    assert first.split() == second.split()
    assert "Total" in first


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_encoding_ends_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    file = tmp_path / "größe.safetensors"
    saved(file, Blocks(), target_modules="all")
    written = Written(monkeypatch, encoding)
    assert main(["inspect", str(file)]) == 0
    assert main(["inspect", str(file), "--json"]) == 0
    assert (
        main(
            [
                "combine",
                str(file),
                str(file),
                "--out",
                str(tmp_path / "größer.safetensors"),
            ]
        )
        == 0
    )
    shown = written.text()
    assert "Combined 2 files" in shown
    assert ("of ΔW" in shown) is (encoding in ("utf-8", "cp932", "cp1253"))


def test_no_encoding_ends_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Written(monkeypatch, "ascii")

    def fit(callback: Any, ckpt_path: Any) -> None:
        model = LitTiny()
        trainer(tmp_path, [callback], max_epochs=1).fit(
            model, data(), data(), ckpt_path=ckpt_path
        )

    ll.LoRASweep(
        name=["größe", "klein"], modules_to_save=["head"], directory=tmp_path / "files"
    ).run(fit)
    assert r"gr\xf6\xdfe" in written.text()


def test_a_reader_that_has_seen_enough_ends_no_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as head does
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        t = trainer(tmp_path, [lora()], max_epochs=1, enable_model_summary=True)
        t.fit(LitTiny(), data())
        assert t.state.finished
        monkeypatch.undo()
