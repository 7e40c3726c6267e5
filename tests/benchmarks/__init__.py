"""What adapters cost, against the frozen model and against peers, side by side in one run.

``python -m tests.benchmarks`` measures everything; ``--help`` says how to measure less.
"""
