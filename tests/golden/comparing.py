"""Compare two recordings."""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path


def compare(a: Path, b: Path) -> int:
    """Print the differences between two recordings, equal ones once; return 1 if there are any."""
    left, right = _texts(a), _texts(b)
    groups: dict[tuple[str, ...], list[str]] = {}
    shown: dict[str, list[str]] = {}
    for name in sorted({*left, *right}):
        one, other = left.get(name), right.get(name)
        if one == other:
            continue
        diff = list(unified_diff(one or [], other or [], f"a/{name}", f"b/{name}", lineterm=""))
        shown[name] = diff
        groups.setdefault(_changed(name, diff), []).append(name)
    for names in groups.values():
        print(f"=== {len(names)} x {(left.get(names[0]) or right[names[0]])[0]}")
        print("\n".join(shown[names[0]]))
        for name in names[1:]:
            print(f"  also {(left.get(name) or right[name])[0]}")
        print()
    total = len({*left, *right})
    print(f"{len(shown)} of {total} cases differ, in {len(groups)} ways")
    return 1 if shown else 0


def _texts(folder: Path) -> dict[str, list[str]]:
    texts = {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8").split("\n")
        for path in folder.rglob("*.txt")
    }
    if not texts:
        raise SystemExit(f"{folder} holds no recording")
    return texts


def _changed(name: str, diff: list[str]) -> tuple[str, ...]:
    """Reduce a diff to the command and the lines that changed."""
    return (name.split("/")[0], *(line for line in diff[2:] if line[:1] in "+-"))
