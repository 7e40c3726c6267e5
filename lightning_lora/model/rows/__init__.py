"""Several adapters in one forward pass: each row of a batch runs with its own (``adapter_names``)."""
