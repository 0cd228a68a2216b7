"""Tensors as values: dtypes, storages, views, numbers; pure, opens nothing."""
