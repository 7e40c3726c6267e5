"""Calls on a whole model: adapt it, merge it, and remember what it was.

It may use targets and layers, and writes no file but what it hands over between processes.
"""
