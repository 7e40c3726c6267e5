"""Whether a base is the one that adapters were trained on.

Read first which tensors are compared (``compared_tensors.py``), then what a base's
``fingerprint.py`` is. What changed since is in ``base_changes.py``, what files hold in
``stored_fingerprints.py``. ``base_check.py`` refuses another base: it compares the base
at hand ("here") with the fingerprints in a file ("there"), by ``base_comparison.py``.

Words such as ``frozen_base`` and ``changes`` are explained in ``storage/__init__.py``.
A base has one fingerprint for each form that it had: it gets another form when it is
converted to another dtype, or quantised.

A fingerprint in a file has one digest for each tensor. Its entry ``rounded`` has half
digests by the tensors' names: those of the values in bfloat16 and in float16::

    "rounded": {"a.weight": [7, 9], "q.weight": None, "ids": []}

None: the tensor is quantised. Empty: the tensor has integers, or its half digests are
not known. A file without this entry does not say the names.

For example, a Trainer has read a weight as W, and code has changed it to W'. A
checkpoint and a file of ``save_adapter`` say this in two ways:

- A checkpoint has the fingerprint with W, and the value W' in its state. The change is
  noted: from then on, ``fingerprint`` has the digest of W for W'.
- A file has the fingerprint with W', if that change is not noted yet: for this file, W'
  is the base's value.

A comparison has three parts. The tensors here are listed, each as a ``ComparedTensor``.
``BaseThere`` has what a fingerprint says, and tells of each of them whether it is the
same. ``compare`` asks that of all, and answers with a ``Comparison``.
"""
