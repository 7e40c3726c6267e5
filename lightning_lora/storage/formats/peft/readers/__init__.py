"""The programs that read folders of PEFT's format: what each takes, refuses, or leaves out without a word.

The table is in ``reader_table.py``. ``folder_readers.py`` compares one folder with it,
and ``reader_warnings.py`` has what an export says of it.
"""
