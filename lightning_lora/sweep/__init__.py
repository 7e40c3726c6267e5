"""Several adapters in one fit: ``runs`` that take turns, in copies of the Trainer that share data and base."""
