"""What only a loop of one's own can get wrong, and a Trainer does right."""
