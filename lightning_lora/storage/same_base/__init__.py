"""Whether a base is the one that adapters were trained on.

Read first which tensors are compared (``compared_tensors.py``), then what a base's
``fingerprint.py`` is. What changed since is in ``base_changes.py``, what files hold in
``stored_fingerprints.py``. ``base_check.py`` refuses another base: it compares the base
at hand ("here") with the fingerprints in a file ("there"), by ``base_comparison.py``.
"""
