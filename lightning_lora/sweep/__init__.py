"""Several adapters in one fit: ``runs`` in ``copies`` of the Trainer share the base and the ``data``."""
