"""What an adapted model remembers: one row for each tensor of its base, what each adapter changed, and its state."""
