"""Networks that stand still while others train: which get no adapter, and which follow another one."""
