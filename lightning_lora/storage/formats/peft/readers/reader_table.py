"""What each reader of PEFT's folders does with each kind of training."""

from collections.abc import Mapping
from dataclasses import dataclass

# What a reader does

TAKES = "takes"
REFUSES = "refuses"
IGNORES = "ignores"
DIFFERS = "differs"
NOT_KNOWN = "not known"

MEANINGS = {
    TAKES: "it computes what was trained",
    REFUSES: "it ends in an error",
    IGNORES: "it leaves this out, without a word",
    DIFFERS: "it scales the update otherwise, without a word",
    NOT_KNOWN: "neither run nor read",
}

# With which kind of training

RANKS = "ranks of single layers"
ALPHAS = "alphas of single layers"
RSLORA = "rsLoRA"
DORA = "DoRA"
EMBEDDINGS = "adapted embeddings"
ROWS = "trained rows"
HEADS = "whole heads"
NORMS = "whole norms"
BIASES = "biases"
EXPERTS = "experts"

SCALINGS = (RANKS, ALPHAS, RSLORA, DORA)
PARTS = (EMBEDDINGS, ROWS, HEADS, NORMS, BIASES, EXPERTS)
COLUMNS = (*SCALINGS, *PARTS)
"""All kinds of training.

In PEFT's words: ``rank_pattern``, ``alpha_pattern``, rows in
``trainable_token_indices``, whole modules in ``modules_to_save``, experts in
``target_parameters``.
"""


@dataclass(frozen=True)
class Reader:
    """A program that reads the folder, and how its row is known."""

    name: str
    known_from: str
    # what it does (TAKES, ...) with each kind of training (RANKS, ...)
    cells: Mapping[str, str]
    note: str = ""


_ALL_TAKEN = dict.fromkeys(COLUMNS, TAKES)
_ONE_SCALING_AND_LINEAR_LAYERS = {
    RANKS: DIFFERS,
    ALPHAS: DIFFERS,
    RSLORA: TAKES,
    DORA: IGNORES,
    EMBEDDINGS: IGNORES,
    ROWS: IGNORES,
    HEADS: IGNORES,
    NORMS: IGNORES,
    BIASES: IGNORES,
    EXPERTS: IGNORES,
}

_PEFT = Reader("PEFT", "tests, peft 0.21", _ALL_TAKEN)

_TRANSFORMERS = Reader("transformers", "tests, transformers 5.24", _ALL_TAKEN)

_VLLM = Reader(
    "vLLM",
    "source, e745baff and 0306474e",
    {
        RANKS: DIFFERS,
        ALPHAS: DIFFERS,
        RSLORA: TAKES,
        DORA: REFUSES,
        EMBEDDINGS: TAKES,
        ROWS: REFUSES,
        HEADS: REFUSES,
        NORMS: REFUSES,
        BIASES: REFUSES,
        EXPERTS: NOT_KNOWN,
    },
    "Versions after 0.30 read the scalings of single layers. Late versions take a head "
    "called 'score'. Of experts, gate_up_proj alone is down_proj to it.",
)

_SGLANG = Reader(
    "SGLang",
    "source, 002c60aa and 0ceb81fe",
    {
        RANKS: DIFFERS,
        ALPHAS: DIFFERS,
        RSLORA: DIFFERS,
        DORA: REFUSES,
        EMBEDDINGS: NOT_KNOWN,
        ROWS: NOT_KNOWN,
        HEADS: IGNORES,
        NORMS: IGNORES,
        BIASES: NOT_KNOWN,
        EXPERTS: NOT_KNOWN,
    },
    "Late versions refuse ranks and alphas of single layers. All refuse a "
    "target_modules that is an expression.",
)

_TGI = Reader(
    "TGI",
    "source, db931fcf",
    _ONE_SCALING_AND_LINEAR_LAYERS,
    "If a kind of layer lacks adapters in one block, it leaves out that kind in all "
    "blocks.",
)

_LORAX = Reader(
    "LoRAX",
    "source, a7394ba3",
    _ONE_SCALING_AND_LINEAR_LAYERS,
    "As TGI, from which it shares this code.",
)

_LLAMA_CPP = Reader(
    "llama.cpp",
    "source, 0b03adaa and 0650ea8c",
    {
        RANKS: TAKES,
        ALPHAS: DIFFERS,
        RSLORA: DIFFERS,
        DORA: REFUSES,
        EMBEDDINGS: TAKES,
        ROWS: REFUSES,
        HEADS: REFUSES,
        NORMS: IGNORES,
        BIASES: REFUSES,
        EXPERTS: NOT_KNOWN,
    },
    "Ollama uses it. An adapted embedding that is tied with the head ends it while it "
    "loads (merge for it).",
)

_DIFFUSERS = Reader(
    "diffusers",
    "tests, diffusers 0.42",
    {
        RANKS: TAKES,
        ALPHAS: TAKES,
        RSLORA: TAKES,
        DORA: TAKES,
        EMBEDDINGS: NOT_KNOWN,
        ROWS: REFUSES,
        HEADS: REFUSES,
        NORMS: REFUSES,
        BIASES: REFUSES,
        EXPERTS: NOT_KNOWN,
    },
    "Where it refuses, so does the export, before anything is written.",
)

SERVERS = (_VLLM, _SGLANG, _TGI, _LORAX, _LLAMA_CPP)
"""Those with code of their own for each model: of others, they run none."""

PEFT_READERS = (_PEFT, _TRANSFORMERS, *SERVERS)
"""Those that read the folder of PEFT's format. diffusers has one of its own."""

READERS = (*PEFT_READERS, _DIFFUSERS)


def readers_that(does: str, kind: str) -> list[str]:
    """Return the names of the readers that do this with a kind of training: ``readers_that(IGNORES, HEADS)``."""
    names = list[str]()
    for reader in READERS:
        if reader.cells[kind] == does:
            names.append(reader.name)
    return names
