"""Judge what `fsdp_cells.py` wrote: joined, it is the truth bit for bit.

usage: python fsdp_matrix.py FOLDER

Each cell is converted from its folder, and from its last file, to torch and to safetensors; keys,
order, dtypes, shapes, bytes and plain values must be those of `truth.pth`. Prints a line for each
cell that differs, and how many there were; exits with 1 where one does.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# Which of two neighbours a rank wrote alone is in none of the files.
UNORDERED = "dcp_safetensors"


def flat(held: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield what is in dicts and lists by its path."""
    if isinstance(held, dict | list):
        pairs = held.items() if isinstance(held, dict) else enumerate(held)
        for key, value in pairs:
            yield from flat(value, (*path, key))
    else:
        yield path, held


def same(one: Any, other: Any) -> bool:
    """Compare tensors by dtype, shape and bytes, anything else as it is."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and bool(one == other)
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    bits = [each.detach().contiguous().view(-1).view(torch.uint8) for each in (one, other)]
    return torch.equal(*bits)


def differences(cell: Path, source: Path, out: Path) -> Iterator[str]:
    """Say in what an output is not the truth."""
    expect = cell / "expect.txt"
    expected = expect.read_text(encoding="utf-8") if expect.exists() else ""
    nested = out.suffix == ".safetensors" and "optim" in cell.name
    command = ["convert", source, out, *(["--at", "model"] if nested else [])]
    done = subprocess.run(
        [sys.executable, "-m", "ckptool", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
    )
    kind, _, named = expected.partition(": ")
    if (done.returncode == 3) != (kind == "refused") or named not in done.stderr:
        yield done.stderr.partition("\n")[0]
    if done.returncode or kind == "refused":
        return
    truth = torch.load(cell / "truth.pth", weights_only=True)
    truth = truth["model"] if nested else truth
    found = torch.load(out, weights_only=True) if out.suffix == ".pth" else load_file(out)
    wanted, got = dict(flat(truth)), dict(flat(found))
    if out.suffix == ".safetensors":  # a tie is written once
        wanted = {key: value for key, value in wanted.items() if key in got or not tied(key, truth)}
    elif [*got] != [*wanted] and not cell.name.startswith(UNORDERED):
        yield "another order"
    if got.keys() != wanted.keys():
        yield f"other keys: {sorted(map(str, got.keys() ^ wanted.keys()))}"
    yield from (str(key) for key in got.keys() & wanted.keys() if not same(got[key], wanted[key]))


def tied(key: tuple[Any, ...], truth: Any) -> bool:
    """Tell whether a tensor of the truth is another one, too."""
    return sum(truth[key[0]].data_ptr() == each.data_ptr() for each in truth.values()) > 1


def main(folder: str) -> int:
    """Judge all cells of a folder."""
    cells = sorted(path for path in Path(folder).iterdir() if path.is_dir())
    wrong = 0
    for cell in cells:
        files = sorted(path for path in cell.iterdir() if path.stem not in ("truth", "expect"))
        found = []
        for source in (cell, files[-1]):
            if source is cell and "_full_" in cell.name:  # as many checkpoints as files
                continue
            with tempfile.TemporaryDirectory() as place:
                for suffix in (".pth", ".safetensors"):
                    found += differences(cell, source, Path(place, f"out{suffix}"))
        if found:
            wrong += 1
            print(f"{cell.name}: {'; '.join(found)[:500]}")
    print(f"{len(cells)} cells, {wrong} wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
