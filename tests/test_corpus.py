"""Real checkpoints of public repositories: a folder that `CKPTOOL_CORPUS` names; skipped without.

`index.json` there says of each file what it is and how many tensors it refers to. Nothing that a
file names is imported: torch either reads it with `weights_only=True`, or is given stand-ins for
every name that it does not accept by default.
"""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from ckptool.state import edits
from ckptool.verbs import surgery
from ckptool.verbs.surgery import Options

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
judge = pytest.importorskip("judge")

FOLDER = Path(os.environ.get("CKPTOOL_CORPUS") or "no corpus")
INDEX = FOLDER / "index.json"
ROWS = json.loads(INDEX.read_text(encoding="utf-8")) if INDEX.exists() else []
READ = ("zip-torch", "legacy-pickle (magic)", "whole-model pickle in legacy-pickle", "safetensors")
# Judged by torch.jit in test_torchscript.py, and by what others wrote of them in test_torch_tar.py.
ELSEWHERE = ("torchscript", "legacy-tar IMITATION")
READABLE = [row for row in ROWS if row["format"] in READ]
TORCH_FILES = [row for row in READABLE if row["format"] != "safetensors"]
INDICES = [row for row in ROWS if row["format"].startswith("DCP .metadata")]
OTHERS = [row for row in ROWS if row["format"] not in (*READ, *ELSEWHERE) and row not in INDICES]

# What a file in a container that is not read yet is called.
NAMED = {
    "tar.gz archive (other)": "gzip archive",
    "plain pickle (non-torch.save)": "plain pickle",
    "DCP shard (concatenated zips)": "shard (.distcp) of a distributed checkpoint",
    "other: git-LFS pointer": "git-LFS pointer",
    "other: JSON": "JSON text",
}
# What a file that is no checkpoint at all is called, by a word of its description.
NO_CHECKPOINT = {
    "ZERO-BYTE": "empty (0 bytes)",
    "SYMLINK": "path of a symbolic link",
    "3 bytes": "a text file (3 B)",
    "lossy UTF-8": "saved as text on its way",
    "CTranslate2": "a CTranslate2 model",
    "": "unknown bytes",
}
# Files of which no state_dict can be taken without being told where it is.
NESTED = {"tracel-ai__burn/complex_structure.pt": ["state.encoder", "state.decoder"]}

pytestmark = pytest.mark.skipif(not ROWS, reason="CKPTOOL_CORPUS names no folder with index.json")


def each(rows: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("row", rows, ids=lambda row: row["path"])


# Stand-ins.


class Stand:
    """Stands for a class or function that a file names: keeps what it is given, does nothing."""

    dump_patches = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Stand:
        made = super().__new__(cls)
        made.args, made.kwargs, made.items, made.state = args, kwargs, [], None
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)

    def extend(self, values: Any) -> None:
        self.items += values

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stand) and vars(self) == vars(other)


@cache
def stand_in(module: str, name: str) -> type[Stand]:
    return type(f"{module}.{name}", (Stand,), {})


class Unpickler(pickle.Unpickler):
    """Resolves the names that torch accepts by default, to what torch resolves them to."""

    accepted: ClassVar = torch._weights_only_unpickler._get_allowed_globals()

    def find_class(self, module: str, name: str) -> Any:
        return self.accepted.get(f"{module}.{name}") or stand_in(module, name)


def live(stand: Stand) -> Any:
    """Make a module of torch of the stand-in for one, with what it was given."""
    module = torch.nn.Module()
    module.__setstate__(dict(stand.state))
    module._modules = {name: live(inner) for name, inner in stand.state["_modules"].items()}
    return module


stand_ins = SimpleNamespace(__name__="pickle", Unpickler=Unpickler, load=pickle.load)


def accepted(row: dict[str, Any]) -> bool:
    return bool(row["torch_weights_only"] == "OK")


def load(row: dict[str, Any], path: Path, **how: Any) -> Any:
    """Load a file, or what was made of it, as the original can be loaded."""
    if accepted(row):
        return judge.load(path, weights_only=True, **how)
    return judge.load(path, weights_only=False, pickle_module=stand_ins, encoding="latin1", **how)


def original(row: dict[str, Any]) -> Any:
    path = FOLDER / row["path"]
    if row["format"] != "safetensors":
        return load(row, path)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors = safetensors_torch.load_file(path)
    state = OrderedDict((key, tensors[key].clone()) for key in header if key != "__metadata__")
    if texts := {k: v for k, v in header.get("__metadata__", {}).items() if k != "format"}:
        state._safetensors_metadata = texts
    return state


# Reading.


LABELS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "bool": "BOOL",
}


@each(READABLE)
def test_all_tensors_are_listed(row: dict[str, Any], run: Callable[..., Any]) -> None:
    outcome = run("keys", "--all", "--json", FOLDER / row["path"])
    assert outcome.code == 0
    document = outcome.document
    assert document["count"] == row["tensor_references"] == len(document["tensors"])
    if not accepted(row):
        return
    found = [(each["key"], each["dtype"], each["shape"]) for each in document["tensors"]]
    assert found == [
        (path.partition("#")[0], LABELS[str(tensor.dtype).removeprefix("torch.")], [*tensor.shape])
        for path, tensor in judge.tensors(original(row)).items()
    ]


# Rewriting.


@each(READABLE)
def test_torch_output_holds_the_same(row: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    surgery.rewrite(FOLDER / row["path"], out, options=Options(sync=False))
    wanted = original(row)
    loosely = {"storage": False} if row["format"] == "safetensors" else {}
    for how in ({}, {"mmap": True}, {"mmap": True, "calculated_offsets": True}):
        assert judge.same(wanted, load(row, out, **how), **loosely) == []


@each(READABLE)
def test_there_and_back_through_safetensors(row: dict[str, Any], tmp_path: Path) -> None:
    source = FOLDER / row["path"]
    for at in NESTED.get(row["path"], [None]):
        out, back = tmp_path / f"{at}.safetensors", tmp_path / f"{at}.pth"
        options = Options(at=at, sync=False)
        result = surgery.rewrite(source, out, options=options)
        if row["tensor_references"] == 0:  # an empty dict is an empty state_dict
            assert safetensors_torch.load_file(out) == {}
            return
        state = original(row)
        for step in result.at or ():
            state = state[int(step) if isinstance(state, list) else step]
        beside = getattr(state, "__dict__", {})  # `_metadata`, and the texts of safetensors
        if isinstance(state, Stand):
            state, beside = live(state).state_dict(), {}
        wanted = OrderedDict(
            (key, t.detach().clone(memory_format=torch.contiguous_format))
            for key, t in judge.tensors(state).items()
        )
        ties = {each.key: each.reason.removeprefix("tied to ") for each in result.dropped}
        assert all(judge.same(wanted[one], wanted[other]) == [] for one, other in ties.items())
        kept = {key: t for key, t in wanted.items() if key not in ties}
        loosely = {"containers": False, "order": False, "sharing": False, "storage": False}
        assert judge.same(kept, safetensors_torch.load_file(out), **loosely) == []

        surgery.rewrite(out, back, options=Options(sync=False))
        restored = OrderedDict((key, wanted[ties.get(key, key)]) for key in wanted)
        vars(restored).update(beside)
        assert judge.same(restored, judge.load(back), storage=False) == []


@each([row for row in READABLE if row["format"].startswith("whole-model")])
def test_whole_models_give_their_state_dict(row: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    result = surgery.rewrite(FOLDER / row["path"], out, bare=True, unwrap=True)
    whole = original(row)
    assert f"<{result.module}>" in row["top"]
    model = live(whole[0] if isinstance(whole, list) else whole)
    assert result.at == (("0",) if isinstance(whole, list) else ())
    assert judge.same(model.state_dict(), judge.load(out), metadata=False) == []


@each([row for row in TORCH_FILES if "all keys `module.`" in row["quirks"]])
def test_wrapped_checkpoints_are_unwrapped(row: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    surgery.rewrite(
        FOLDER / row["path"], out, [edits.strip_prefix()], bare=True, options=Options(sync=False)
    )
    state = original(row)["state_dict"]
    wanted = OrderedDict((key.removeprefix("module."), tensor) for key, tensor in state.items())
    assert judge.same(wanted, judge.load(out), metadata=False) == []


# Distributed checkpoints.

# What an index may name before torch is let near it: torch unpickles it, whatever is in it.
INERT = re.compile(
    r"torch (float32|Size)|torch\.serialization _get_layout|pathlib PosixPath"
    r"|torch\.distributed\.(checkpoint|_shard\.sharded_tensor)\.(metadata|filesystem) \w+"
)


@each(INDICES)
def test_a_folder_holds_what_torch_loads(
    row: dict[str, Any], tmp_path: Path, run: Callable[..., Any]
) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    folder = (FOLDER / row["path"]).parent
    assert all(INERT.fullmatch(each) for each in named((folder / ".metadata").read_bytes()))
    out = tmp_path / "out.pth"
    assert run("convert", folder, out, "--no-sync", "--tensors-only").code == 0
    reader = dcp.FileSystemReader(folder)
    known = reader.read_metadata().state_dict_metadata
    keys = {key for key, value in known.items() if hasattr(value, "chunks")}
    wanted: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner(keys=keys)
    planner._should_include_key = lambda key, metadata: key in keys
    _load_state_dict(wanted, storage_reader=reader, planner=planner, no_dist=True)
    found = judge.tensors(judge.load(out))
    assert list(found) == list(judge.tensors(wanted))
    for key, tensor in judge.tensors(wanted).items():
        assert judge.same(found[key], tensor, storage=False) == []


def named(data: bytes) -> set[str]:
    """List what a pickle of protocol 4 names: `module name`, of the texts before each global."""
    texts: list[str] = []
    memo: list[Any] = []
    found = set()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            found.add(argument)
        elif "UNICODE" in opcode.name:
            texts.append(argument)
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            texts.append(memo[argument])
        elif opcode.name == "MEMOIZE":
            memo.append(texts[-1] if texts else "")
        elif opcode.name == "STACK_GLOBAL":
            found.add(" ".join(texts[-2:]))
    return found


# What is not read.


@each(OTHERS)
def test_other_files_are_named(
    row: dict[str, Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    what = NAMED.get(row["format"]) or next(
        called for word, called in NO_CHECKPOINT.items() if word in row["quirks"]
    )
    out = tmp_path / "out.pth"
    for command in (["info"], ["keys"], ["keys", "--all", "--json"], ["convert"], ["strip-prefix"]):
        arguments = [FOLDER / row["path"]] + ([out] if command[0] not in ("info", "keys") else [])
        outcome = run(*command, *arguments)
        assert outcome.code == 3
        assert outcome.out == ""
        assert outcome.err.startswith("{" if "--json" in command else "error[")
        assert what in outcome.err
        assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []
