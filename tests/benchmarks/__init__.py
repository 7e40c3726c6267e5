"""Benchmarks of adapters against the frozen model and other libraries.

``python -m tests.benchmarks`` measures everything, side by side in one run. ``--help``
shows how to measure less.
"""
