"""One file for each framework.

It is imported in the framework's own environment alone.
"""
