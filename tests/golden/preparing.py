"""The preparations of a case: steps of `lines.txt` that make files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def prepare(step: list[str]) -> None:
    """Run a preparation in the current folder."""
    PREPARATIONS[step[0]](*step[1:])


def _copy(source: str, target: str) -> None:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    if os.path.isdir(source):
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def _write(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(text.encode().decode("unicode_escape").encode("latin-1"))


def _patch(name: str, offset: str, data: str) -> None:
    with open(name, "r+b") as file:
        file.seek(int(offset), os.SEEK_SET if int(offset) >= 0 else os.SEEK_END)
        file.write(bytes.fromhex(data))


def _folder(name: str) -> None:
    os.makedirs(name)


def _remove(name: str) -> None:
    os.unlink(name)


def _source(name: str) -> None:
    """Copy the source of a small network."""
    shutil.copyfile(HERE.parent / "model" / "ghost_net.py", name)


def _net(name: str, target: str, **arguments: Any) -> None:
    """Save the state_dict of a torchvision model."""
    import torch
    from torchvision import models

    torch.manual_seed(0)
    torch.save(models.get_model(name, weights=None, **arguments).state_dict(), target)


def _ghost() -> None:
    """Save a small network as a training checkpoint, as weights, and with one bit flipped."""
    import sys

    import torch

    _source("net.py")
    sys.path.insert(0, str(HERE.parent / "model"))
    from ghost_net import ghost_net

    del sys.path[0]
    torch.manual_seed(6)
    state = ghost_net(10, 8).state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, "trained.pth")
    torch.save(state, "clean.pth")
    torch.save({key: value for key, value in state.items() if "classifier" not in key}, "part.pth")
    changed = {key: value.clone() for key, value in state.items()}
    changed["features.1.primary.0.weight"].view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 22)
    torch.save(changed, "flipped.pth")


def _picture(name: str) -> None:
    """Write a picture of 32 x 32 pixels."""
    from PIL import Image

    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (32, 32), bytes(n * 7 % 256 for n in range(32 * 32 * 3))).save(name)


PREPARATIONS = {
    "+copy": _copy,
    "+write": _write,
    "+patch": _patch,
    "+cut": lambda name, size: os.truncate(name, int(size)),
    "+link": lambda target, name: os.symlink(target, name),
    "+hard": lambda target, name: os.link(target, name),
    "+pipe": lambda name: os.mkfifo(name),
    "+mode": lambda name, mode: os.chmod(name, int(mode, 8)),
    "+folder": _folder,
    "+remove": _remove,
    "+source": _source,
    "+net": _net,
    "+ghost": _ghost,
    "+picture": _picture,
}
