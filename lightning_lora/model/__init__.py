"""Functions on a model. The only files written here are temporary: they carry data from one process to another."""

from lightning_lora.model import loading as loading  # it looks at each state dict that torch loads
