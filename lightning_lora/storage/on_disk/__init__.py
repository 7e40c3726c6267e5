"""Files on a disk or elsewhere: written whole or not at all, checked before they are read, read as plain types."""
