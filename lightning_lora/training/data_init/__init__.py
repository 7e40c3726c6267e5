"""Adapters that start from the fit's own data: some batches run through the module before its first step."""
