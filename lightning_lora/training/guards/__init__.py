"""What a fit watches for, and says: one file a hazard, with its rule and message, and one for reports."""
