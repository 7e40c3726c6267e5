"""PEFT's files: a directory of adapters that other libraries read.

Nothing here imports peft.
"""

from lightning_lora.storage.peft.export import export_peft

__all__ = ["export_peft"]
