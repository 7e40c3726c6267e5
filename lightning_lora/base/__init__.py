"""What an adapted model remembers: what is known of its base, what each adapter changed, and the model's state."""
