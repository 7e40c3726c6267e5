"""Select the layers of a model to adapt.

Nothing here changes a model. A name that matches nothing is an error. Begin with
``select.py``. It resolves the arguments to modules (``resolve.py``), makes a
:class:`.Choice` of each layer (``choice.py``), and checks these (``checks.py``). All
look names up in one :class:`.Lookup` (``lookup.py``). What an error advises about a
name that matches nothing: ``unmatched.py``, ``arguments.py`` and ``suggestions.py``.
"""
