"""Calls on a model, and what one look at it shows.

A model is adapted, merged or shows its base: ``base/states.py``. What it remembers of
its base and its adapters is its record (``records.py``). A view (``view.py``) is one
look at the model and its record, which a call makes once.

Originals are the base's values of what changes while an adapter trains, besides the
adapter (``AdapterState.originals`` says of what; ``base_values.py``).

On the base lie adapters, each of which is:

- active: on its layers, or merged. There is one, and it has the effect, unless the base
  is shown (disabled).
- inactive: off its layers, and kept by the record. To users, it rests.

A layer's adapter, of the active one:

- trains, or the user has frozen it: then the layer's weight is meant
  (``user_flags.py``).
- is paused: it has learned, and no optimizer of this fit holds it or its weight. Its
  effect stays.
- follows: its layer is in a copy of a network, and its values follow those of the
  original's adapter.

A network, a module with layers of its own, trains or stands still (``still/``,
``networks/still_networks.py``):

- beside training networks: it gets no adapters, or loses them.
- under a head: nothing but a head trains beside it, so it gets adapters.
- as a copy: other code moves its weights after those of the original, as a momentum
  network's. Its adapters follow.

The configuration decides besides: ``modules_to_save`` are trained in full (saved), and
``exclude_modules`` left out.

Begin with ``inject.py``, the public call that needs most of the rest. In its order:
``start_call.py`` (may it start?), ``view.py`` (what is there), ``plan_adapters.py``
(what is to be done), ``changes/`` (it is done). Then ``switch.py`` with
``changes/exchange.py`` and ``changes/show_base.py``, ``merge.py``, ``unmerge.py`` and
``remove.py``, which are calls of the same form.
"""
