"""What is added to a Trainer's strategy. The file of each kind registers itself."""
