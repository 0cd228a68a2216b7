"""What is packed in an archive, unpacked into a temporary file that goes with its last user."""

from __future__ import annotations

import io
import os
import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress

from ckptool.errors import LimitExceeded, Malformed
from ckptool.files.fileio import CHUNK, Reader, ReaderFile
from ckptool.files.temporary import temporary
from ckptool.text import readable

EXPANSION = 16  # weights hardly shrink; what grows more than this is not an archive of weights
ALWAYS = 64 << 20


class Spool:
    """A temporary file that holds some bytes; it is removed when nothing refers to it any more."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        from tempfile import mkstemp

        with temporary():
            descriptor, self.path = mkstemp(prefix="ckptool-")
            remove = weakref.finalize(self, _remove, self.path)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.writelines(blocks)
            except BaseException:
                remove()
                raise


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def limit(nbytes: int) -> int:
    """Return how many bytes may be unpacked from so many."""
    return EXPANSION * nbytes + ALWAYS


def gunzipped(reader: Reader) -> Iterator[bytes]:
    """Iterate over the bytes of a gzip file, of each of its members; check their checksums.

    Raises `Malformed` for one that is damaged, cut off, or followed by other bytes than zeros, and
    `LimitExceeded` for one that unpacks to too many.
    """
    import gzip

    packed = io.BufferedReader(ReaderFile(reader), CHUNK)
    left = limit(reader.nbytes)
    try:
        with gzip.GzipFile(fileobj=packed) as file:
            while block := file.read(CHUNK):
                left -= len(block)
                if left < 0:
                    raise _too_large(reader)
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise Malformed(
            f"{reader.path}: the gzip archive is damaged or cut off",
            path=reader.path,
            offset=packed.tell(),
            hint="download or copy it again",
        ) from None


def _too_large(reader: Reader) -> LimitExceeded:
    return LimitExceeded(
        f"{reader.path} has {readable(reader.nbytes)} and unpacks to more than "
        f"{readable(limit(reader.nbytes))}",
        path=reader.path,
        hint="if that is intended, unpack it yourself",
    )
