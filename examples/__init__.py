"""Examples. Each file runs by itself; ``python -m examples.paper`` is a study."""
