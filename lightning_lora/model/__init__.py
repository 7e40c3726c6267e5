"""Calls on a model: inject, merge, switch, remove."""

from lightning_lora.model import loading as loading  # it looks at each state dict that torch loads
