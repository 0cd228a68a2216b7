"""What lies packed in an archive, unpacked into a temporary file that goes with its last user."""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress

from ckptool.errors import LimitExceeded, Malformed
from ckptool.files.fileio import CHUNK, Reader
from ckptool.text import readable

EXPANSION = 16  # weights hardly shrink; what grows more than this is no archive of weights
ALWAYS = 64 << 20


class Spool:
    """A temporary file that holds some bytes; it is removed when nothing refers to it any more."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        from tempfile import mkstemp

        descriptor, self.path = mkstemp(prefix="ckptool-")
        self._remove = weakref.finalize(self, _remove, self.path)
        try:
            for block in blocks:
                _write(descriptor, block)
        except BaseException:
            self._remove()
            raise
        finally:
            os.close(descriptor)


def _write(descriptor: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def limit(nbytes: int) -> int:
    """Give how many bytes may be unpacked from so many."""
    return EXPANSION * nbytes + ALWAYS


def bounded(blocks: Iterable[bytes], reader: Reader) -> Iterator[bytes]:
    """Yield blocks unpacked from a file; raises `LimitExceeded` where they are too many."""
    left = limit(reader.nbytes)
    for block in blocks:
        left -= len(block)
        if left < 0:
            raise LimitExceeded(
                f"{reader.path} has {readable(reader.nbytes)} and unpacks to more than "
                f"{readable(limit(reader.nbytes))}",
                path=reader.path,
                hint="if that is meant, unpack it by hand",
            )
        yield block


def gunzipped(reader: Reader) -> Iterator[bytes]:
    """Yield the bytes of a gzip file, of each of its members; their checksums are verified.

    Raises `Malformed` for one that is damaged, cut off, or followed by other bytes than zeros.
    """
    inflater = zlib.decompressobj(31)
    for start in range(0, reader.nbytes, CHUNK):
        data = reader.read(start, min(CHUNK, reader.nbytes - start))
        while data:
            if inflater.eof:  # another member, or the zeros that fill up a tape
                data = data.lstrip(b"\0")
                if not data:
                    break
                inflater = zlib.decompressobj(31)
            try:
                block = inflater.decompress(data, CHUNK)
            except zlib.error:
                raise _damaged(reader, start) from None
            if block:
                yield block
            data = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
    if not inflater.eof:
        raise _damaged(reader, reader.nbytes)


def _damaged(reader: Reader, offset: int) -> Malformed:
    return Malformed(
        f"{reader.path}: the gzip archive is damaged or cut off",
        path=reader.path,
        offset=offset,
        hint="get it again from where it came",
    )
