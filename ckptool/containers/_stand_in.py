"""Which file of a folder stands for it: an index, or the one checkpoint under a usual name.

The usual names are those of transformers, diffusers, peft and accelerate
(transformers/utils/__init__.py, `WEIGHTS_NAME` and its like), and Lightning's suffix.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from ckptool.errors import AmbiguousStateDict, Malformed, NoSuchFile
from ckptool.files.fileio import reason

_USUAL = re.compile(
    r"(model|pytorch_model|adapter_model|diffusion_pytorch_model)(\.\w+)?\.(safetensors|bin)"
    r"|.+\.ckpt"
)
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{1,6})-of-(?P<count>\d{1,6})(?P<suffix>\.\w+)")
SHOWN = 20


def shard_of(name: str) -> tuple[str, int, int] | None:
    """Split `model-00001-of-00002.safetensors` into `model.safetensors`, 1 and 2."""
    found = _SHARD.fullmatch(name)
    if found is None:
        return None
    return found["stem"] + found["suffix"], int(found["number"]), int(found["count"])


def file_of(path: str, is_index: Callable[[str], bool]) -> str:
    """Give the file that stands for a folder; any other path, and other folders, as they are.

    Raises `AmbiguousStateDict` where there are several, `Malformed` for shards alone, `NoSuchFile`
    where the folder cannot be opened.
    """
    if not os.path.isdir(path):
        return path
    try:
        with os.scandir(path) as entries:
            files = sorted(entry.name for entry in entries if entry.is_file())
    except OSError as error:
        raise NoSuchFile(f"{path} cannot be opened: {reason(error)}", path=path) from None
    chosen = [name for name in files if is_index(name) or _USUAL.fullmatch(name)]
    if len(chosen) > 1:
        raise AmbiguousStateDict(
            f"{path} is a folder of {len(chosen)} checkpoints",
            evidence=chosen[:SHOWN],
            hint="name one of them",
        )
    if not chosen:
        _refuse_shards(path, files)
    return os.path.join(path, chosen[0]) if chosen else path


def _refuse_shards(path: str, files: Sequence[str]) -> None:
    """Say of shards without an index what is missing."""
    shards: dict[tuple[str, int], int] = {}
    for name in files:
        whole, _, count = shard_of(name) or ("", 0, 0)
        if whole:
            shards[whole, count] = shards.get((whole, count), 0) + 1
    if shards:
        whole, count = next(iter(shards))
        raise Malformed(
            f"{path} is a folder with {shards[whole, count]} of {count} shards of {whole}, "
            f"without their index {whole}.index.json",
            path=path,
            hint="get it from where the shards came; a shard can also be named alone",
        )


def shard_note(path: str) -> str:
    """Note that a file is one shard of a set; an empty string for any other."""
    shard = shard_of(os.path.basename(path))
    if shard is None:
        return ""
    whole, number, count = shard
    index = f"{whole}.index.json"
    note = f"this is shard {number} of {count}"
    beside = os.path.isfile(os.path.join(os.path.dirname(path), index))
    return f"{note}; {index} beside it stands for all" if beside else note
