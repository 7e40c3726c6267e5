"""The steps of calls on a model: attach and detach adapters, freeze the base, undo it all after an error."""
