"""Which networks of a module train, stand still beside others, are below a head, or follow another one."""
