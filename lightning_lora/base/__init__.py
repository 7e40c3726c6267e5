"""What an adapted model remembers: what is known of its base, what each adapter changed, and the model's state.

All of it is in one :class:`.Record`. Begin with ``record.py``.

The values and digests of the base are in five places, each of other tensors:

- ``AdapterState.originals``: the base's values of what changes while an adapter
  trains, or by its file (see there). They stay as long as the adapter.
- ``Base.changes``: of frozen tensors that other code has changed. They go when the
  base's values are there again.
- ``Base.computed_back``: of weights that were computed back from merged ones. They
  stay.
- ``Base.after_merge.weights``: the weights without updates, while the updates are merged.
- ``Base.hidden``: the active adapter's values, while the base is shown in their place.
"""
