"""Which layers of a model are adapted, and what to say of a name that matches none.

Nothing here changes a model.
"""
