"""What is packed, or comes from a pipe, in a temporary file that goes with its last user."""

from __future__ import annotations

import io
import os
import stat
import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress

from ckptool.errors import LimitExceeded, Malformed
from ckptool.files.fileio import CHUNK, OpenFile, Reader, ReaderFile
from ckptool.files.stream import widen
from ckptool.files.temporary import temporary, temporary_file
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


class Streamed(OpenFile):
    """What comes from a descriptor: no path leads to it again, so it stays open."""

    def replaced(self) -> bool:
        """Return False: the name is none of a file."""
        return False

    def close(self) -> None:
        """Stay open until nobody refers to it."""


def streamed(name: str, fd: int) -> Streamed:
    """Open what a descriptor gives: a file as it is, else a copy of all that comes from it.

    The copy is a temporary file without a name, which is gone however the process ends.
    """
    if stat.S_ISREG(os.fstat(fd).st_mode) and not os.lseek(fd, 0, os.SEEK_CUR):
        return Streamed(name, os.dup(fd))
    widen(fd)
    with temporary_file() as file:
        while data := os.read(fd, CHUNK):
            file.write(data)
        file.flush()
        return Streamed(name, os.dup(file.fileno()))


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
