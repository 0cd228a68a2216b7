"""What torch and safetensors make of a damaged file, against what ckptool makes of it.

Where torch loads a file strictly (`weights_only=True`) and ckptool writes it again, torch must load
the copy with the same content, under every way of loading; of a safetensors copy, each tensor must
be torch's. That ckptool refuses what torch loads is no complaint: it is stricter on purpose.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import judge
import torch
from cases import Bench, Case, Report, make
from safetensors.torch import load_file

from ckptool.cli import main as cli


class Judge(Bench):
    """A bench that asks torch instead of watching."""

    def run_case(self, case: Case, commands: Any = (), tell: Any = lambda line: None) -> Report:
        """Compare what torch loads from the damaged file and from copies of it."""
        report = Report(case)
        with self._folder() as folder, contextlib.chdir(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = make(case, folder).name
            tell("torch.load")
            theirs = loaded(source)
            for target in ("out.pth", "out.safetensors"):
                tell(f"convert {source} {target}")
                code, said = converted(source, target)
                report.runs += 1
                state = "loads" if theirs is not None else "refuses"
                report.signatures.append(f"torch {state}, ckptool {target} {code}")
                if code == 0:
                    report.written += 1
                    for what in differences(theirs, source, target, said):
                        report.complaints.append((f"convert {source} {target}", what, ""))
        return report


def loaded(path: str, **how: Any) -> Any:
    """Load a file as strictly as its library does; None where it refuses."""
    try:
        return load_file(path) if path.endswith(".safetensors") else judge.load(path, **how)
    except Exception:
        return None


def converted(source: str, target: str) -> tuple[int, dict[str, Any]]:
    """Convert with ckptool; give the exit code, and the document where there is one."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["convert", "--json", "--no-sync", source, target])
    return code, json.loads(out.getvalue()) if code == 0 else {}


def differences(theirs: Any, source: str, target: str, said: dict[str, Any]) -> Iterator[str]:
    """Say how a copy differs from what torch loads from the original.

    safetensors has no order and no classes of dicts; legacy files name parts of storages as
    storages of their own, which are written whole.
    """
    if target.endswith(".safetensors"):
        if theirs is not None or not source.endswith(".safetensors"):  # it knows no F6_E2M3
            yield from _safetensors_differences(theirs, target, said)
        return
    for how in ({}, {"mmap": True}, {"mmap": True, "calculated_offsets": True}):
        if theirs is None:
            return
        ours = loaded(target, **how)
        if ours is None:
            yield f"torch loads the original, not the copy {how}: {_refusal(target, **how)}"
            return
        forgiven = {"storage": False}
        if source.endswith(".safetensors"):
            if b"ckptool" in Path(source).read_bytes():  # order and ties that we noted come back
                return
            forgiven = dict.fromkeys(("containers", "order", "metadata", "storage"), False)
        try:
            found = judge.same(theirs, ours, **forgiven)
        except (OverflowError, ValueError):  # strides that are beyond the judge's numpy
            return
        for line in found[:1]:
            if "keys on one side" in line and "tensor(" in line:  # keys that the judge cannot pair
                return
            yield f"torch loads something else from the copy {how}: {line}"


def _refusal(path: str, **how: Any) -> str:
    try:
        judge.load(path, **how)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return ""


def _safetensors_differences(theirs: Any, target: str, said: dict[str, Any]) -> Iterator[str]:
    try:
        ours = load_file(target)
    except Exception as error:
        yield f"safetensors does not load the copy: {error}"
        return
    if not isinstance(theirs, dict):
        return
    state = theirs
    for step in said.get("at") or ():
        state = state[step]
    tied = {row["key"] for row in said["dropped"]}
    for old, new in said["map"]:
        if new is None or old in tied or old not in state:  # an alias that our note brought back
            continue
        if new not in ours:
            yield f"{new} is not in the copy"
        elif not _same_tensor(state[old], ours[new]):
            yield f"{new} differs in the copy"


def _same_tensor(one: Any, other: Any) -> bool:
    """Compare dtype, shape and bytes; lazy bits resolved, as safetensors has none."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return raw(one) == raw(other)


def raw(tensor: Any) -> bytes:
    """Give the bytes of a tensor, contiguous."""
    resolved = tensor.detach().resolve_conj().resolve_neg()
    whole = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(resolved).reshape(-1)
    return bytes(whole.view(torch.uint8).numpy()) if whole.numel() else b""
