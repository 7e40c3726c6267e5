"""What reads a file into ``StoredAdapters`` or writes one from it. Nothing here imports PEFT or loralib."""
