"""Other code that reads, writes or asks for adapted weights in a fit: one file a hazard, with its rule and message."""
