"""The LoRA paper's claims, tried on models and data that fit two CPU cores."""
