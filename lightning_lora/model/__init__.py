"""Calls on a model: inject, merge, switch, remove."""
