"""The Trainer's side: what a run does at each moment.

It may use every room below it, and is the only one that knows Lightning.
"""
