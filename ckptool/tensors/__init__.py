"""Dtypes, storages, views, values and numbers; this room opens nothing."""
