"""Calls that rebuild plain tensors, found and written at once: a file has one for each tensor.

A call of `_rebuild_tensor_v2`, as picklers write nearly all of them under protocol 2 once what they
share is in the memo, is about 30 opcodes from the mark of its arguments on.
"""

from __future__ import annotations

import re

from ckptool.records import NamedTuple

# In groups: what tells the tensor from others, but for the key of its storage and what the memo
# calls its parts.
_GET, _PUT, _INT = rb"(?:h.|j.{4})", rb"(r.{4})", rb"(?:K.|M..|J.{4})"
_SIZES = rb"(?:INT\x85|INTINT\x86|INTINTINT\x87|\((?:INT)+t)".replace(b"INT", _INT)
_STORAGE = [
    b"(",
    _GET,
    _GET,
    rb")X([\x01-\x0a])\0\0\0([0-9]+)",
    _PUT,
    b"(",
    _GET,
    _INT,
    b"t)",
    _PUT,
]
_VIEW = [b"(Q", _INT, _SIZES, b")", _PUT, b"(", _SIZES, b")", _PUT, rb"([\x88\x89]", _GET, rb"\)R)"]
_OPCODES = [b"(", _GET, rb")?\(\(", *_STORAGE, *_VIEW, _PUT, b"t", _PUT, b"R", _PUT]
_CALL = re.compile(b"".join(_OPCODES), re.DOTALL)
_KEY_GROUP, _PUT_GROUPS = 4, (5, 7, 9, 11, 13, 14, 15)
PUTS = len(_PUT_GROUPS)
_FIRST_PUTS = sum((ord("r") + (at << 8)) << 40 * at for at in range(PUTS))
_NEXT_PUTS = sum(1 << 40 * at + 8 for at in range(PUTS))

Spelling = tuple[bytes, ...]  # what plain tensors that are written alike share


class Call(NamedTuple):
    """A call that was found, from what fetches its function on, or from its mark."""

    get: bytes | None
    spelling: Spelling
    key: bytes  # of the storage
    number: int  # the first of those that it takes in the memo
    found: re.Match[bytes]

    @property
    def storage_at(self) -> int:
        """Return where the opcode is that refers to the storage."""
        return self.found.end(_PUT_GROUPS[1])


class Template(NamedTuple):
    """How calls are written that differ in the key of the storage and in their numbers alone.

    `tail` is what follows the key, as an integer with the numbers from zero on; each number that
    the first is larger adds a `step` to it.
    """

    head: bytes
    tail: int
    step: int
    nbytes: int  # of the tail
    around: int  # bytes of a call, but for the key
    view_nbytes: int  # from the opcode on that refers to the storage

    def written(self, key: bytes, number: int) -> bytes:
        """Write a call whose numbers in the memo begin with this one."""
        tail = (self.tail + number * self.step).to_bytes(self.nbytes, "little")
        return b"%b%c\0\0\0%b%b" % (self.head, len(key), key, tail)

    def key_in(self, data: bytes, start: int, number: int) -> bytes:
        """Return the key of a call that begins at `start` and is written so; empty for another."""
        if not data.startswith(self.head, start):
            return b""
        start += len(self.head) + 4
        key = data[start : start + int.from_bytes(data[start - 4 : start], "little")]
        tail = (self.tail + number * self.step).to_bytes(self.nbytes, "little")
        return key if key.isdigit() and data.startswith(tail, start + len(key)) else b""


def call_at(data: bytes, start: int) -> Call | None:
    """Find the call that starts there, and whose parts have the numbers next to each other."""
    found = _CALL.match(data, start)
    if found is None:
        return None
    get, kind, size, key, p0, place, p1, view, p2, stride, p3, rest, p4, p5, p6 = found.groups()
    number = int.from_bytes(p0[1:], "little")
    puts = int.from_bytes(b"".join((p0, p1, p2, p3, p4, p5, p6)), "little")
    if puts != _FIRST_PUTS + number * _NEXT_PUTS or len(key) != size[0]:
        return None
    return Call(get, (kind, place, view, stride, rest), key, number, found)


def template(call: Call) -> Template:
    """Return how calls like this one are written."""
    found, start = call.found, call.found.end(_KEY_GROUP)
    head = found.string[found.start() : found.start(_KEY_GROUP) - 4]
    raw = found.string[start : found.end()]
    step = sum(1 << 8 * (found.start(put) + 1 - start) for put in _PUT_GROUPS)
    tail = int.from_bytes(raw, "little") - call.number * step
    around, view = len(head) + 4 + len(raw), found.end() - call.storage_at
    return Template(head, tail, step, len(raw), around, view)
