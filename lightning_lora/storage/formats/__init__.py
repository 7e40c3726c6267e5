"""The formats of files: each is read into ``StoredAdapters``, and most are written from it."""
