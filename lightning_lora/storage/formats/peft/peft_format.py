"""PEFT's format."""

from lightning_lora.storage.formats.format import WrittenFormat
from lightning_lora.storage.formats.peft.reading import read_peft
from lightning_lora.storage.formats.peft.writing import write_peft
from lightning_lora.storage.formats.peft_names import PEFT_CONFIG, PEFT_WEIGHTS

PEFT = WrittenFormat(
    name="peft",
    tool="PEFT",
    recognise=read_peft.recognise,
    write=write_peft.write,
    files=PEFT_WEIGHTS,
    expected_files=f"{PEFT_CONFIG} and {PEFT_WEIGHTS[0]}",
)
