"""Bytes from disk, archives and URLs; blocks of values; the copy engine; publishing; downloads."""
