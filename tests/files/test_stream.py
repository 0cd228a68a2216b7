"""A planned file that goes through a pipe: in order, and its end only when all is known."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

from ckptool.errors import NoSpace
from ckptool.files.spool import streamed
from ckptool.files.stream import Pipe, Stream


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    yield reading, writing
    for fd in (reading, writing):
        os.close(fd)


def arrived(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return b""


def test_literals_and_zeros_come_where_they_belong(ends: tuple[int, int]) -> None:
    reading, writing = ends
    stream = Stream(Pipe("-", writing), 20, [(12, b"mid"), (0, b"head"), (18, b"!!"), (3, b"")])
    stream.write(b"data", 6)
    assert arrived(reading) == b"head\0\0data"
    stream.write(b"x", 15)
    assert arrived(reading) == b"\0\0midx"
    stream.close()
    assert arrived(reading) == b"\0\0!!"


def test_the_last_bytes_wait_for_the_end(ends: tuple[int, int]) -> None:
    reading, writing = ends
    stream = Stream(Pipe("-", writing), 8, [(0, b"head")])
    stream.write(b"tail", 4)
    assert arrived(reading) == b"head"
    stream.close()
    assert arrived(reading) == b"tail"


def test_a_file_of_zeros_alone_has_its_size(ends: tuple[int, int]) -> None:
    reading, writing = ends
    Stream(Pipe("-", writing), 5, []).close()
    assert arrived(reading) == bytes(5)


def test_bytes_out_of_order_are_a_defect(ends: tuple[int, int]) -> None:
    stream = Stream(Pipe("-", ends[1]), 8, [])
    stream.write(b"1234", 0)
    with pytest.raises(RuntimeError, match="comes after"):
        stream.write(b"1", 3)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
def test_the_system_refuses_with_its_reason() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        stream = Stream(Pipe("-", fd), 8, [])
        with pytest.raises(NoSpace, match="no space left while writing -"):
            stream.write(b"1234", 0)
    finally:
        os.close(fd)


@pytest.mark.skipif(sys.platform != "linux", reason="pipes of other systems have their own sizes")
def test_pipes_hold_a_megabyte(ends: tuple[int, int]) -> None:
    import fcntl

    read, write = ends
    Stream(Pipe("-", write), 0, [])
    assert fcntl.fcntl(read, fcntl.F_GETPIPE_SZ) == 1 << 20
    with suppress(PermissionError):  # of more, only root may ask
        fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, 1 << 21)
        Stream(Pipe("-", write), 0, [])
        assert fcntl.fcntl(read, fcntl.F_GETPIPE_SZ) == 1 << 21
    other, given = os.pipe()
    os.close(given)
    streamed("-", other)
    assert fcntl.fcntl(other, fcntl.F_GETPIPE_SZ) == 1 << 20
    os.close(other)
