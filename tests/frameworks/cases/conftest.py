"""pytest does not import the frameworks: they are not installed beside each other."""

collect_ignore_glob = ["*.py"]
