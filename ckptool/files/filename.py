"""Names of downloads: those from URLs and headers made harmless, and the hashes in names.

torch's convention: `resnet18-5c106cde.pth` holds the first digits of the file's sha256
(torch.hub.load_state_dict_from_url). A run of digits alone is a date more often than a hash.
"""

from __future__ import annotations

import os
import re

LONGEST = 255  # bytes, of a name on any common file system
_UNWANTED = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufffd"
    '\\ud800-\\udfff<>:"|?*]'
)
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # on Windows
_HASH = re.compile(r"-([0-9a-f]{8,64})(?:\.[^-]*)?$", re.IGNORECASE)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(?![0-9a-f])", re.IGNORECASE)
_REGISTRY_HASH = re.compile(r"[-_]([0-9a-f]{8,64})\.[^-_]*$", re.IGNORECASE)


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
    """Return the name of a file's part, short enough for the suffix of the record beside it."""
    raw = os.fsencode(name)
    if len(raw) > LONGEST - len(".part.json"):
        from hashlib import sha256

        name = f"{raw[:200].decode('utf-8', 'ignore')}-{sha256(raw).hexdigest()[:8]}"
    return f"{name}.part"


def of_url(url: str) -> str:
    """Return the file name that a URL ends with; an empty string for none."""
    from urllib.parse import unquote, urlsplit

    return safe(unquote(urlsplit(url).path.rpartition("/")[2]))


def of_disposition(header: str) -> str:
    """Return the file name in a Content-Disposition header; an empty string for none."""
    from email.message import Message

    message = Message()
    message["Content-Disposition"] = header
    try:
        return safe(message.get_filename() or "")
    except (LookupError, UnicodeError, ValueError):  # an unknown charset
        return ""


def hash_in(name: str) -> str | None:
    """Return the start of a sha256 that a name holds after its last hyphen."""
    match = _HASH.search(name)
    if match is None or match[1].isdigit() or _UUID.search(name):
        return None
    return match[1].lower()


def hash_of_registry(name: str) -> str | None:
    """Return the start of a sha256 in a name of torchvision's registry; digits alone count."""
    match = _REGISTRY_HASH.search(name)
    return match[1].lower() if match else None
