"""The start of a sha256 that a file name may hold.

torch's convention: `resnet18-5c106cde.pth` holds the first digits of the file's sha256
(torch.hub.load_state_dict_from_url). A run of digits alone is a date more often than a hash.
"""

from __future__ import annotations

import re

_HASH = re.compile(r"-([0-9a-f]{8,64})(?:\.[^-]*)?$", re.IGNORECASE)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(?![0-9a-f])", re.IGNORECASE)
_REGISTRY_HASH = re.compile(r"[-_]([0-9a-f]{8,64})\.[^-_]*$", re.IGNORECASE)


def hash_in(name: str) -> str | None:
    """Give the start of a sha256 that a name holds after its last hyphen."""
    found = _HASH.search(name)
    if found is None or found[1].isdigit() or _UUID.search(name):
        return None
    return found[1].lower()


def hash_of_registry(name: str) -> str | None:
    """Give the start of a sha256 in a name of torchvision's registry, where digits alone count."""
    found = _REGISTRY_HASH.search(name)
    return found[1].lower() if found else None
