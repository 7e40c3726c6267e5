"""PEFT's format: its names and configuration, our layers and its counterparts, what it cannot hold, its files."""
