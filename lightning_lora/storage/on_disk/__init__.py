"""Files on a disk or elsewhere: written whole or not at all, checked before they are read, read as plain types.

``places.py`` says where a file is. It is written by ``whole_files.py``, under a name of
``temporary_files.py``. Before it is read, ``archives.py`` says what it is, and whether
it is damaged. ``plain_pickles.py`` and ``safetensors_bytes.py`` are its two formats.
``read_errors.py`` says what went wrong. ``place_of_model.py`` says on which device a
model goes whose checkpoint was read.
"""
