"""Pickle bytes <-> inert tree, torch's words in it, what its names would do."""
