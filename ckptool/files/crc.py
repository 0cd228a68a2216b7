"""CRC-32 of a whole from the CRC-32 of its parts, so that parts can be computed side by side.

crc32(A + B) follows from crc32(A), crc32(B) and len(B) alone: multiply by x^(8 len(B)) in
GF(2)[x] modulo the CRC polynomial (zlib's `crc32_combine`).
"""

from __future__ import annotations

from collections.abc import Iterable

_POLYNOMIAL = 0xEDB88320  # reflected: the lowest power stands in the highest bit


def join_crc32(parts: Iterable[tuple[int, int]]) -> int:
    """Give the CRC-32 of bytes from `(crc32, nbytes)` of their consecutive parts."""
    total = 0
    powers: dict[int, int] = {}
    for crc32, nbytes in parts:
        if nbytes not in powers:
            powers[nbytes] = _power(nbytes)
        total = _multiply(powers[nbytes], total) ^ crc32
    return total


def _multiply(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _power(nbytes: int) -> int:
    """Give x^(8 nbytes) modulo the polynomial."""
    power, square = 1 << 31, 1 << 23
    while nbytes:
        if nbytes & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        nbytes >>= 1
    return power
