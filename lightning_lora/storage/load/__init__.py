"""The one way in. Whatever is loaded by whoever: it is read, all of it is checked, and then it is written or undone."""
