"""What a download is called: names from elsewhere made harmless."""

from __future__ import annotations

import os
import re
from hashlib import sha256
from urllib.parse import unquote, urlsplit

LONGEST = 255  # bytes, of a name on any common file system
_UNWANTED = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufffd"
    '\\ud800-\\udfff<>:"|?*]'
)
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # on Windows


def safe(name: str) -> str:
    """Make a name from elsewhere harmless: one name in a folder; an empty string for none."""
    name = re.split(r"[/\\]", name)[-1]
    name = _UNWANTED.sub("_", name).lstrip(". ").rstrip(". ")
    if name.startswith("-") or _DEVICES.match(name):
        name = f"_{name}"
    return shortened(name)


def shortened(name: str) -> str:
    """Cut a name that is too long to be one; its suffix is kept."""
    stem, dot, suffix = name.rpartition(".")
    if not stem or len(suffix.encode()) > 20:
        stem, dot, suffix = name, "", ""
    room = LONGEST - len(f"{dot}{suffix}".encode())
    return stem.encode()[:room].decode("utf-8", "ignore") + dot + suffix


def of_part(name: str) -> str:
    """Name the part of a file; it leaves room for a suffix of the record beside it."""
    raw = os.fsencode(name)
    if len(raw) > LONGEST - len(".part.json"):
        name = f"{raw[:200].decode('utf-8', 'ignore')}-{sha256(raw).hexdigest()[:8]}"
    return f"{name}.part"


def of_url(url: str) -> str:
    """Give the file name that a URL ends with; an empty string for none."""
    segment = urlsplit(url).path.rpartition("/")[2]
    return safe(unquote(segment))


def of_disposition(header: str) -> str:
    """Give the file name in a Content-Disposition header; an empty string for none."""
    from email.message import Message

    message = Message()
    message["Content-Disposition"] = header
    try:
        return safe(message.get_filename() or "")
    except (LookupError, UnicodeError, ValueError):  # a charset that nobody knows
        return ""
