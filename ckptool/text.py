"""Text for people: sizes, shapes, and what comes from a file made harmless to show."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from ckptool.errors import EditError

_INVISIBLE = (  # compiled when it is met: most texts are plain ASCII
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
HIDDEN = "?..."  # for what may be a secret in a URL
SHOWN = 12  # names in a line of talk before "and N more"


def visible(text: str) -> str:
    """Escape control, escape and bidirectional characters, and what no encoding can hold."""
    if text.isascii() and text.isprintable():
        return text
    return re.sub(_INVISIBLE, _escape, text)


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    code = ord(character)
    wide = f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"
    return _SHORT.get(character) or (f"\\x{code:02x}" if code < 256 else wide)


def quoted(word: str) -> str:
    """Write a word so that a POSIX shell takes it as one (the `$'...'` of POSIX.1-2024)."""
    if visible(word) != word:
        plain = word.replace("\\", "\\\\").replace("'", "\\'")
        return f"$'{re.sub(_INVISIBLE, _as_bytes, plain)}'"
    if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII):
        return word
    return "'" + word.replace("'", "'\"'\"'") + "'"


def argument(path: str) -> str:
    """Write a path as a command takes it: quoted, and no option; `-` is standard input."""
    return quoted(f"./{path}" if path.startswith("-") and path != "-" else path)


def _as_bytes(found: re.Match[str]) -> str:
    """Write a character as the bytes that it is in the name of a file."""
    escapes = "surrogateescape" if "\udc80" <= found[0] <= "\udcff" else "surrogatepass"
    return "".join(f"\\{byte:03o}" for byte in found[0].encode("utf-8", escapes))


def length(stated: object, base: int = 0) -> int | None:
    """Return the length below 2^63 that a file or a server states, None for anything else.

    With a base it is text: `int` also takes signs, spaces, `1_000` and the digits of all scripts.
    """
    if base:
        text = stated.decode("latin-1") if isinstance(stated, bytes) else str(stated)
        known = 0 < len(text) < 100 and not text.lower().strip("0123456789abcdef"[:base])
        stated = int(text, base) if known else None
    return stated if type(stated) is int and 0 <= stated < 1 << 63 else None


def counted(count: int, noun: str) -> str:
    """Write a count with its noun: `1 tensor`, `2 tensors`, `2 entries`."""
    return f"{count} {noun}" if count == 1 else f"{count} {re.sub(r'(?<![aeo])y$', 'ie', noun)}s"


def readable(nbytes: int) -> str:
    """Write a size as people read it: `36.8 KiB`."""
    if nbytes < 1024:
        return f"{nbytes} B"
    size = float(nbytes)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def parse_size(text: str, option: str) -> int:
    """Read `5GB` (10^9), `2GiB` (2^30) or plain bytes; `option` shows how it is written."""
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]?)(i?)b?\s*", text, re.I | re.A)
    nbytes = 0
    if found and (found[2] or not found[3]):
        unit = (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " ")
        nbytes = int(found[1]) * unit if "." not in found[1] else int(float(found[1]) * unit)
    if nbytes < 1:
        raise EditError(f"`{text}` is not a size", hint=option)
    return nbytes


def percent(share: float) -> str:
    """Write a share; only all of it is `100.0 %`."""
    return f"{min(100 * share, 100.0 if share >= 1 else 99.9):.1f} %"


def shape(sizes: Sequence[int]) -> str:
    """Write a shape as torch does: `[64, 3, 7, 7]`."""
    return f"[{', '.join(map(str, sizes))}]"


def listed(names: Iterable[str], limit: int = SHOWN) -> str:
    """Write names in a line, the rest as a count."""
    shown = [visible(name) for name in names]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def at_most(lines: Sequence[str], limit: int, of: str = "") -> list[str]:
    """Return the first lines, and a last one that counts the rest, `of` what."""
    more = len(lines) - limit
    return [*lines[:limit], *([f"and {more} more{of}"] if more > 0 else [])]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ask for the known name that is spelled most like one; an empty text where none is."""
    from difflib import get_close_matches

    close = get_close_matches(name, list(known), n=1)
    return f"did you mean `{close[0]}`?" if close else ""


def several(given: str | Iterable[str]) -> tuple[str, ...]:
    """Read one text, or any number of them, as several."""
    return (given,) if isinstance(given, str) else tuple(given)


def html_table(rows: Sequence[Sequence[str]], caption: str, limit: int = 100) -> str:
    """Write a table for notebooks, its first row as the head; rows beyond a limit are counted."""
    from html import escape

    more = [(f"and {len(rows) - 1 - limit} more",)] if len(rows) - 1 > limit else []
    lines = [
        "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
        for tag, part in (("th", rows[:1]), ("td", [*rows[1 : limit + 1], *more]))
        for row in part
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><caption>{escape(caption)}</caption>{body}</table>"


def measured(text: str) -> int:
    """Return how many columns a text takes on a terminal; escapes of colour take none."""
    if text.isascii() and "\x1b" not in text:
        return len(text)
    return sum(map(_columns, re.sub(r"\x1b\[[\d;]*m", "", text)))


def _columns(character: str) -> int:
    from unicodedata import category, east_asian_width

    if category(character) in ("Mn", "Me", "Cf") or "\u1160" <= character <= "\u11ff":
        return 0  # marks, and the vowels and finals of a Hangul syllable
    return 2 if east_asian_width(character) in "WF" else 1


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Align columns; those in `right` to the right."""
    if not rows:
        return []
    widths = [max(map(measured, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_padded(row, widths, right)).rstrip() for row in rows]


def _padded(row: Sequence[str], widths: Sequence[int], right: Sequence[int]) -> Iterator[str]:
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        gap = " " * (width - measured(cell))
        yield gap + cell if column in right else cell + gap
