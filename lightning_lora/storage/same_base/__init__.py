"""Whether a base is the one that adapters were trained on."""
