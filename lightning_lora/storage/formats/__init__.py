"""What reads a file into ``StoredAdapters`` or writes one from it. PEFT is imported only to be asked."""
