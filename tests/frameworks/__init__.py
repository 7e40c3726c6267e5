"""LoRACallback in other frameworks: what is measured of each is in ``results``, and docs/frameworks.md shows it."""
