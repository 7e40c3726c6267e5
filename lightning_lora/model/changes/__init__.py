"""The steps of calls on a model: attach, detach or exchange adapters, freeze or show the base, undo after an error."""
