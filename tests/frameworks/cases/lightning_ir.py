"""lightning-ir: whenever a file is saved, its module writes a folder with save_pretrained too."""

from pathlib import Path
from typing import Any

import torch
from lightning_ir import CrossEncoderModule, RankNet, TrainBatch
from lightning_ir.models import MonoConfig
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, BertTokenizerFast

from tests.frameworks.case import Case, Way

WORDS = [
    "red",
    "green",
    "blue",
    "small",
    "large",
    "round",
    "flat",
    "old",
    "new",
    "cold",
    "warm",
    "fast",
]
QUERIES = WORDS[:8]
DOCS = [(" ".join(WORDS[i : i + 3]), " ".join(WORDS[i + 2 : i + 5])) for i in range(8)]


def pairs(batch: list[int]) -> TrainBatch:
    targets = torch.tensor([1.0, 0.0]).repeat(len(batch))
    names = list(map(str, batch))
    return TrainBatch(
        [QUERIES[i] for i in batch],
        [DOCS[i] for i in batch],
        names,
        names,
        targets=targets,
    )


def backbone(folder: Path) -> Path:
    """Write a small BERT, with a tokenizer of these words."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    )
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    BertModel(BertConfig(vocab_size=5 + len(WORDS), **size)).save_pretrained(folder)
    return folder


class CrossEncoder(Case):
    def new(self) -> CrossEncoderModule:
        return self.load(backbone(Path("new")), MonoConfig())

    def save(self, model: CrossEncoderModule, path: Path) -> None:
        model.save_pretrained(path)

    def load(self, path: Path, *config: Any) -> CrossEncoderModule:
        return CrossEncoderModule(str(path), *config, loss_functions=[RankNet()])

    def train(
        self, model: Any, callbacks: list[Any], folder: Path, **options: Any
    ) -> CrossEncoderModule:
        model.set_optimizer(torch.optim.AdamW, lr=0.001)
        return super().train(model, callbacks, folder, **options)

    def data(self) -> Any:
        return DataLoader(range(8), batch_size=2, shuffle=True, collate_fn=pairs)

    def predict(self, model: CrossEncoderModule) -> Tensor:
        return model.score(QUERIES, DOCS).scores

    def ways(self) -> dict[str, Way]:
        return {
            "huggingface_checkpoint of the last file": lambda run: self.load(
                run.folder / "huggingface_checkpoint"
            ),
            "save_pretrained": self.saved,
            "load_state_dict": self.from_state,
        }


CASES = {"CrossEncoder": CrossEncoder}
