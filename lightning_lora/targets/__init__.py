"""Select the layers of a model to adapt.

Nothing here changes a model. A name that matches nothing is an error. Begin with
``select.py``. It resolves the arguments to modules (``resolve.py``), makes a
:class:`.Choice` of each layer (``choice.py``), and checks these (``checks.py``). All
share one :class:`.Lookup` of the model's names (``lookup.py``), in which
``find_names.py`` finds those that an argument means. What its error advises, if a name
matches nothing: ``unmatched.py``, ``arguments.py`` and ``suggestions.py``.
"""
