"""The kinds of layers that can be adapted, each in its own file."""
