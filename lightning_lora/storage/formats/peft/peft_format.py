"""PEFT's format."""

from lightning_lora.storage.formats.format import Format
from lightning_lora.storage.formats.peft import peft_read, peft_write
from lightning_lora.storage.formats.peft.peft_names import PEFT_CONFIG, PEFT_WEIGHTS

PEFT = Format(
    name="peft",
    tool="PEFT",
    read=peft_read.read,
    write=peft_write.write,
    files=PEFT_WEIGHTS,
    expected_files=f"{PEFT_CONFIG} and {PEFT_WEIGHTS[0]}",
)
