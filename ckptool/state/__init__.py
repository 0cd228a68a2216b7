"""The state_dict in a tree: find it, name its places, edit its keys and values."""
