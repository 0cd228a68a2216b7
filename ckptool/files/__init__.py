"""Bytes from disk, archives and URLs; the copy engine; publishing; downloads."""
