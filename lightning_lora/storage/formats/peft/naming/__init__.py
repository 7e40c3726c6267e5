"""What PEFT does to names: its wrappers add components, and its loading renames tensors of some models."""
