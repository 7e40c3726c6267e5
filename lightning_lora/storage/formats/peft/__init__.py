"""PEFT's format: a folder with ``adapter_model.safetensors`` and ``adapter_config.json``.

Reading (``reading/``): names of tensors say which layers there are, the configuration
says their numbers. Writing (``writing/``): what PEFT cannot hold is refused
(``refusals/``), all else becomes tensors and a configuration. Both ask
``counterparts.py``: what PEFT has for each of our adapters, and when it would compute
something else. PEFT wraps layers, and renames tensors while it loads them: ``naming/``
finds names under which they arrive. ``readers/`` knows the other programs that open
such a folder, and says where they differ from PEFT.
"""
