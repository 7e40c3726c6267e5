"""Adapted weights that other code reads: what watches them in the first batch of a fit."""
