"""Which networks of a module stand still: beside others that train, under a head, or as a copy of another one."""
