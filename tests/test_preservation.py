"""Every good fixture, every edit, every container: what torch loads is what torch loaded before.

The expectation is made here, on the Python objects that torch loads from the original, by rules
simple enough to be seen to be right; ckptool's own edits have no part in it.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import pickletools
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ckptool import containers
from ckptool.errors import (
    AmbiguousStateDict,
    CkptoolError,
    EditError,
    KeyCollision,
    NoStateDict,
    NotACheckpoint,
    NothingMatched,
    NotRepresentable,
    WriteError,
)
from ckptool.pickles import safety
from ckptool.pickles.names import Level
from ckptool.state import edits
from ckptool.verbs import fitting, surgery
from ckptool.verbs.surgery import Options, Rewrite

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
judge = pytest.importorskip("judge")

FOLDER = Path(__file__).parent.parent / "fixtures"
GOOD = FOLDER / "good"
UNREAD = {"plain_pickle.pkl": "plain pickle"}
# What test_torchscript.py, test_torch_tar.py and test_rank_files.py judge: programs, storages cut
# out of others, pieces.
PATTERNS = ("script*", "torch_0_1*", "mesh_ranks")
APART = {path.name for pattern in PATTERNS for path in GOOD.glob(pattern)}
FILES = sorted(path.name for path in GOOD.iterdir() if path.name not in UNREAD.keys() | APART)


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What torch needs beside weights_only=False to read these.
HOW: dict[str, dict[str, Any]] = {
    "protocol0.pth": {"pickle_module": judge.text_ids},
    "protocol0_legacy.pth": {"pickle_module": judge.text_ids},
    "python2_training.pth": {"encoding": "latin1"},
}
# Needs a GPU in torch, or is in pieces; its twin holds the same tensors.
TWIN = {
    "tensors_2017_cuda.pth": "tensors_2017.pth",
    **dict.fromkeys(("fsdp2_ranks", "zero1_ranks", "zero3_ranks"), "plain.pth"),
}
# The README says of each file whether torch takes it with weights_only=True.
ACCEPTED = {
    name
    for name, loads in re.findall(
        r"^\| `good/([^`]+)` \|.*\| ([^|]+) \|$",
        (FOLDER / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    if loads == "yes"
}
# What torch refuses with weights_only=True in the output too: foreign things, or text of no
# encoding. All else it takes, whatever protocol the original had.
REFUSED_BY_TORCH = words(
    "dino.pth foreign.pth foreign_legacy.pth python2_training.pth set_and_bytes.pth "
    "set_and_bytes_protocol4.pth stdlib.pth whole_model.pth whole_model_legacy.pth "
    "whole_model_2017.pth whole_model_in_dict.pth whole_model_in_list.pth "
    "whole_model_protocol4.pth dcp_megatron"
)

# Where the state_dict sits; at the top where nothing is said.
AT: dict[str, tuple[str, ...]] = {
    "nested.pth": ("model", "state_dict"),
    "gan.pth": ("generator",),
    "whole_model_in_dict.pth": ("model",),
    "whole_model_in_list.pth": ("0",),
    "whole_model_protocol4.pth": ("model",),
    "dcp": ("model",),
    "dcp_two_ranks": ("model",),
    **dict.fromkeys(
        words(
            "aliases.pth duplicate_outside.pth foreign.pth foreign_legacy.pth lightning.ckpt "
            "model_best.pth.tar model_best_legacy.pth.tar protocol0.pth protocol0_legacy.pth "
            "protocol1.pth protocol2.pth protocol3.pth protocol4.pth protocol4_legacy.pth "
            "protocol5.pth python2_training.pth same_string.pth shared_with_optimizer.pth "
            "stdlib.pth integer_keys.pth set_and_bytes.pth set_and_bytes_protocol4.pth"
        ),
        ("state_dict",),
    ),
}
# No state_dict, or several: nothing is guessed.
SEVERAL = words("dino.pth ema.pth parts.pth")
NO_STATE_DICT = words(
    "bare_tensor.pth dino.pth ema.pth empty_state_dict.pth list_of_tensors.pth "
    "no_tensors.pth optimizer.pth parts.pth"
)
# Modules: their state_dict can be taken out, and is not edited where it is.
WHOLE_MODELS = words(
    "whole_model.pth whole_model_2017.pth whole_model_in_dict.pth whole_model_in_list.pth "
    "whole_model_legacy.pth whole_model_protocol4.pth"
)
# The entries that safetensors cannot hold.
UNFIT = {
    "dcp_megatron": words("decoder.layers.mlp._extra_state/shard_0_1"),
    "complex32.pth": words("weight"),
    "every_dtype.pth": words("complex128"),
    "every_dtype_legacy.pth": words("complex128"),
    "extra_state.pth": words("scaler._extra_state tokenizer._extra_state"),
    "non_tensor.pth": words("step scheduler arch widths dtype shape device"),
    "odd_dtypes.pth": words("bits8 bits16 bits1x8 bits2x4 bits4x2 bcomplex32"),
    "qtensors.pth": words("qint8 quint8 qint32 per_channel"),
    "quantized.pth": words(
        "0._packed_params.dtype 0._packed_params._packed_params "
        "2._packed_params.dtype 2._packed_params._packed_params"
    ),
    "sparse.pth": words("coo csr"),
    "storages.pth": words("typed untyped"),
    "unicode_keys.pth": frozenset(["\ud800"]),
}
# Stride 0 over gigabytes, which safetensors would have to write out.
FAR = {"expanded_far.pth": words("mask")}

Loaded = Any
OldToNew = Callable[[str], "str | None"]


@functools.cache
def original(name: str) -> Loaded:
    """Load a fixture with the library that wrote it."""
    judge.skip_unread(name)
    path = GOOD / TWIN.get(name, name)
    if (path / ".metadata").exists():
        return by_dcp(path)
    if path.name == "dcp_safetensors":
        return by_boxes(path)
    if path.is_dir():
        return by_shards(path)
    if path.suffix == ".safetensors":
        return by_header(path)
    weights_only = path.name in ACCEPTED or path.name in ("cuda_tagged.pth", "mps_tagged.pth")
    return judge.load(path, weights_only=weights_only, **HOW.get(name, {}))


def by_dcp(folder: Path) -> Loaded:
    """Load a distributed checkpoint as torch converts one."""
    dcp = pytest.importorskip("torch.distributed.checkpoint.format_utils")
    with tempfile.TemporaryDirectory() as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.dcp_to_torch_save(folder, f"{made}/whole.pth")
        return judge.load(f"{made}/whole.pth", weights_only=False)


def by_boxes(folder: Path) -> OrderedDict[str, Any]:
    """Put the pieces of each file where its metadata says that they begin."""
    pieces: dict[str, list[tuple[list[int], Any]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header, _ = header_of(path)
        begins = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        tensors = safetensors_torch.load_file(path)
        for key, said in begins.items():
            pieces.setdefault(key, []).append((said["saved_offsets"], tensors[key]))
    loaded: OrderedDict[str, Any] = OrderedDict()
    for key, boxes in pieces.items():
        places = [
            tuple(map(slice, at, map(sum, zip(at, piece.shape, strict=True))))
            for at, piece in boxes
        ]
        shape = [max(each.stop for each in dim) for dim in zip(*places, strict=True)]
        loaded[key] = torch.full(shape, float("nan"))
        for place, (_, piece) in zip(places, boxes, strict=True):
            loaded[key][place] = piece
    return loaded


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file into its header and its data."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def by_header(path: Path) -> OrderedDict[str, Any]:
    """Load a safetensors file in the order of its header, each tensor for itself."""
    header, _ = header_of(path)
    tensors = safetensors_torch.load_file(path)
    assert tensors.keys() == header.keys() - {"__metadata__"}
    loaded: Any = OrderedDict((key, tensors[key].clone()) for key in header if key in tensors)
    said = header.get("__metadata__", {}).items()
    texts = {name: text for name, text in said if (name, text) != ("format", "pt")}
    if texts:
        loaded._safetensors_metadata = texts
    return loaded


def by_shards(folder: Path) -> OrderedDict[str, Any]:
    """Load each file of a folder with the library that wrote it, in the order of the index."""
    index = next(iter(folder.glob("*.index*.json")), None)
    weight_map = json.loads(index.read_text())["weight_map"] if index else {}
    shards = {name: name.split("-of-")[0].split("-")[-1] for name in weight_map.values()}
    names = sorted(shards, key=lambda name: int(shards[name])) or ["model.safetensors"]
    loaded: OrderedDict[str, Any] = OrderedDict()
    for name in names:
        safe = name.endswith(".safetensors")
        loaded.update(by_header(folder / name) if safe else judge.load(folder / name))
    by_name = list(weight_map) == sorted(weight_map)
    return loaded if by_name else OrderedDict((key, loaded[key]) for key in weight_map)


WRAPPERS = (
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_forward_module.",
    "_module.",
)

# The edits: what ckptool is asked, and what is expected of keys and of module paths.


@dataclass(frozen=True)
class Kind:
    """One edit of the matrix; the functions get the keys of the original."""

    steps: Callable[[list[str]], list[edits.Edit]]
    key: Callable[[list[str]], OldToNew] = lambda keys: same
    module: Callable[[list[str]], Callable[[str], str]] = lambda keys: same
    bare: bool = False
    unwrap: bool = False


def same(name: str) -> str:
    return name


def first_part(keys: list[str]) -> str:
    return next(key for key in keys if key).split(".")[0]


def under(prefix: str, key: str) -> bool:
    return key == prefix or key.startswith(prefix + ".")


def wrappers(keys: list[str]) -> list[str]:
    """Give the known wrappers that all keys start with, from the outside in."""
    taken: list[str] = []
    while keys:
        start = "".join(taken)
        found = [w for w in WRAPPERS if all(key.startswith(start + w) for key in keys)]
        if not found:
            break
        taken += found
    return taken


def peeled(keys: list[str]) -> Callable[[str], str]:
    return lambda key: key.removeprefix("".join(wrappers(keys)))


def stripped(*prefixes: str) -> Callable[[str], str]:
    """Take prefixes off a module path, which has no final dot."""

    def strip(path: str) -> str:
        for prefix in prefixes:
            path = (path + ".").removeprefix(prefix).removesuffix(".")
        return path

    return strip


def without_module(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "module")


def unless(dropped: Callable[[str], bool]) -> OldToNew:
    return lambda key: None if dropped(key) else key


def renamed(part: str) -> Callable[[str], str]:
    return lambda path: "new.name" + path.removeprefix(part) if under(part, path) else path


KINDS = {
    "no edit": Kind(lambda keys: []),
    "strip-prefix": Kind(
        lambda keys: [edits.strip_prefix()],
        lambda keys: lambda key: key.removeprefix("module."),
        lambda keys: stripped("module."),
    ),
    "strip-prefix auto": Kind(
        lambda keys: [edits.strip_wrappers()],
        peeled,
        lambda keys: stripped(*wrappers(keys)),
    ),
    "strip-prefix --anywhere": Kind(
        lambda keys: [edits.strip_prefix(anywhere=True)],
        lambda keys: without_module,
        lambda keys: without_module,
    ),
    "add-prefix": Kind(
        lambda keys: [edits.add_prefix()],
        lambda keys: lambda key: "module." + key,
        lambda keys: lambda path: f"module.{path}" if path else "module",
    ),
    "unwrap": Kind(lambda keys: [], bare=True, unwrap=True),
    "rename": Kind(
        lambda keys: [edits.rename(first_part(keys), "new.name")],
        lambda keys: renamed(first_part(keys)),
        lambda keys: renamed(first_part(keys)),
    ),
    "drop a key": Kind(
        lambda keys: [edits.drop([keys[0]])],
        lambda keys: unless(lambda key: under(keys[0], key)),
    ),
    "drop a prefix": Kind(
        lambda keys: [edits.drop([keys[-1].split(".")[0] + "."])],
        lambda keys: unless(lambda key: under(keys[-1].split(".")[0], key)),
    ),
    "keep": Kind(
        lambda keys: [edits.keep([first_part(keys)])],
        lambda keys: unless(lambda key: not under(first_part(keys), key)),
    ),
    "transfer": Kind(
        lambda keys: [edits.strip_wrappers(required=False)],
        peeled,
        lambda keys: stripped(*wrappers(keys)),
        bare=True,
    ),
    "several": Kind(
        lambda keys: [edits.add_prefix("a.b"), edits.rename("a.b", "c"), edits.strip_prefix("c")],
    ),
}
# Edits by the fixtures that they match; the others are refused with `NothingMatched`.
MATCHED = {
    "strip-prefix": words(
        "collision.pth data_parallel.pth model.safetensors model_best.pth.tar "
        "model_best_legacy.pth.tar parallel_compiled.pth part_prefixed.pth python2_training.pth "
        "same_string.pth whole_model_in_dict.pth whole_model_protocol4.pth"
    ),
    "strip-prefix auto": words(
        "compiled.pth compiled_parallel.pth data_parallel.pth model.safetensors "
        "model_best.pth.tar model_best_legacy.pth.tar opacus.pth parallel_compiled.pth "
        "python2_training.pth same_string.pth whole_model_in_dict.pth whole_model_protocol4.pth"
    ),
    "strip-prefix --anywhere": words(
        "collision.pth compiled_parallel.pth data_parallel.pth model.safetensors "
        "model_best.pth.tar model_best_legacy.pth.tar parallel_compiled.pth parallel_inside.pth "
        "part_prefixed.pth python2_training.pth same_string.pth whole_model_in_dict.pth "
        "whole_model_protocol4.pth"
    ),
}
COLLIDE = {("collision.pth", "strip-prefix"), ("collision.pth", "strip-prefix --anywhere")}
# Empty to begin with: there is no key to name.
KEYLESS = words("empty.pth empty.safetensors")
NAMES_KEYS = words("rename keep") | {"drop a key", "drop a prefix", "several"}


def state_of(name: str) -> dict[str, Any]:
    state = original(name)
    for step in AT.get(name, ()):
        state = state[int(step) if isinstance(state, list) else step]
    if name in WHOLE_MODELS:
        state = state.state_dict()
        del state._metadata  # versions of classes, which are not in the file
    return state


def refusal(name: str, kind: str, container: str) -> type[CkptoolError] | None:
    """Say which error an edit of a fixture ends in, if any."""
    bare = KINDS[kind].bare or container == "safetensors"
    if name in NO_STATE_DICT:
        several = AmbiguousStateDict if name in SEVERAL else NoStateDict
        return several if kind != "no edit" or bare else None
    if name in WHOLE_MODELS and kind != "no edit" and not bare:
        return EditError
    if KINDS[kind].unwrap and name not in {*AT, *WHOLE_MODELS}:
        return EditError
    if name in KEYLESS and kind in NAMES_KEYS:
        return NothingMatched
    if name not in MATCHED.get(kind, FILES):
        return NothingMatched
    if (name, kind) in COLLIDE:
        return KeyCollision
    if container == "safetensors":
        left = [key for key in state_of(name) if moved(name, kind)(key) is not None]
        if UNFIT.get(name, frozenset()) & set(left):
            return NotRepresentable
        if FAR.get(name, frozenset()) & set(left):
            return WriteError
    return None


def moved(name: str, kind: str) -> OldToNew:
    return KINDS[kind].key(list(state_of(name)))


def expected(name: str, kind: str, *, bare: bool) -> Loaded:
    """Edit what torch loads from a fixture."""
    tree = original(name)
    if name in NO_STATE_DICT or (name in WHOLE_MODELS and not bare):
        return tree
    state = expected_state(name, kind)
    if bare:
        return state
    tree = put(tree, AT.get(name, ()), state)
    if name in NAMES_PARAMETERS:
        tree["optim"] = renamed_optimizer(tree["optim"], moved(name, kind))
    return tree


def renamed_optimizer(optimizer: dict[str, Any], move: OldToNew) -> dict[str, Any]:
    """Rename the parameters that an optimizer names; dropped ones stay."""
    groups = [
        {**group, "params": [move(each) or each for each in group["params"]]}
        for group in optimizer["param_groups"]
    ]
    state = {move(each) or each: value for each, value in optimizer["state"].items()}
    return {**optimizer, "state": state, "param_groups": groups}


def put(tree: Loaded, at: tuple[str, ...], state: Loaded) -> Loaded:
    if not at:
        return state
    tree = copy.copy(tree)
    tree[at[0]] = put(tree[at[0]], at[1:], state)
    return tree


def expected_state(name: str, kind: str) -> dict[str, Any]:
    """Give the state_dict with its keys and `_metadata` edited, all else as it was."""
    state, move = state_of(name), moved(name, kind)
    made = type(state)()
    for old, value in state.items():
        new = move(old)
        if new is not None:
            made[new] = value
    if hasattr(state, "_metadata"):
        made._metadata = expected_metadata(name, kind)
    if hasattr(state, "_safetensors_metadata"):
        made._safetensors_metadata = state._safetensors_metadata
    return made


def expected_metadata(name: str, kind: str) -> dict[str, Any]:
    """Move the entries of `_metadata` with the modules that they are of."""
    state, move = state_of(name), moved(name, kind)
    module = KINDS[kind].module(list(state))
    made: OrderedDict[str, Any] = OrderedDict()
    if kind == "add-prefix" and "" in state._metadata:
        made[""] = {"version": 1}  # as nn.DataParallel has it
    for path, entry in state._metadata.items():
        inside = [key for key in state if not path or key.startswith(path + ".")]
        if inside and all(move(key) is None for key in inside):
            continue
        new = module(path)
        if new not in made or new != path:  # a wrapper's own entry gives way
            made[new] = entry
        homes = {(move(key) or "").rpartition(".")[0] for key in inside if module_of(key) == path}
        for home in homes - made.keys():  # whose tensors are of this version
            made[home] = dict(entry)
    return made


def module_of(key: str) -> str:
    return key.rpartition(".")[0]


# Doing it.


def do(name: str, kind: str, container: str, target: Path) -> Rewrite:
    """Run an edit on a fixture through the library."""
    to = {"torch-zip": "torch", "safetensors": "safetensors"}[container]
    options = Options(to=to, sync=False)
    keys = [] if name in NO_STATE_DICT else list(state_of(name))
    asked = KINDS[kind]
    steps = asked.steps(keys or ["no.such"])
    if kind == "transfer":
        return fitting.transfer(GOOD / name, target, steps=steps, options=options).rewrite
    return surgery.rewrite(
        GOOD / name, target, steps, bare=asked.bare, unwrap=asked.unwrap, options=options
    )


def trusted(name: str, *, bare: bool) -> bool:
    """Tell whether torch takes the output with weights_only=True."""
    inside = name == "dcp_megatron"  # a buffer stands in the state_dict itself
    return (bare and not inside) or name not in REFUSED_BY_TORCH


READINGS: dict[str, dict[str, bool]] = {
    "plain": {},
    "mmap": {"mmap": True},
    "calculated": {"mmap": True, "calculated_offsets": True},
}
# Storages that were views of another become that one; without the tensor that spans it, torch's
# own reading no longer shows that they belong together.
VIEWS = "legacy_views.pth"


def assert_loads_as(path: Path, wanted: Loaded, name: str, *, bare: bool, **loosely: bool) -> None:
    """Let torch load a file in every way that it has, and compare."""
    how: dict[str, Any] = {"weights_only": trusted(name, bare=bare)}
    if not how["weights_only"]:
        how |= {key: value for key, value in HOW.get(name, {}).items() if key == "encoding"}
    if name == VIEWS:
        loosely |= {"storage": False, "sharing": "flat" in wanted}
    for reading, options in READINGS.items():
        loaded = judge.load(path, **options, **how)
        assert judge.same(wanted, loaded, **loosely) == [], reading


def assert_counts(result: Rewrite, name: str, kind: str) -> None:
    """Compare the report with what should have happened to each key."""
    if name in NO_STATE_DICT:
        return
    move = moved(name, kind)
    assert list(result.map) == [(key, move(key)) for key in state_of(name)]
    assert result.read == result.kept + result.renamed + len(result.dropped)
    assert result.written == result.kept + result.renamed
    assert {each.key for each in result.dropped} == {
        key for key in state_of(name) if move(key) is None
    }


CASES = [(name, kind) for name in FILES for kind in KINDS]


@pytest.mark.product(12, always="no edit")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_torch_output_loads_as_the_original_did(name: str, kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    error = refusal(name, kind, "torch-zip")
    if error is not None:
        assert_refused(error, name, kind, "torch-zip", out)
        return
    result = do(name, kind, "torch-zip", out)
    assert_counts(result, name, kind)
    assert_layout(out, restricted=trusted(name, bare=KINDS[kind].bare))
    wanted = expected(name, kind, bare=KINDS[kind].bare)
    # safetensors holds nothing of storages, and the library gives each tensor its own
    loosely = {"storage": False} if name.endswith(".safetensors") else {}
    assert_loads_as(out, wanted, name, bare=KINDS[kind].bare, **loosely)


def assert_refused(
    error: type[CkptoolError], name: str, kind: str, container: str, out: Path
) -> None:
    with pytest.raises(CkptoolError) as caught:
        do(name, kind, container, out)
    assert type(caught.value) is error
    assert list(out.parent.iterdir()) == []
    if error is NotRepresentable:
        left = {key for key in UNFIT[name] if moved(name, kind)(key) is not None}
        shown = "\n".join(caught.value.evidence)
        assert all(str(moved(name, kind)(key)) in shown for key in left)


NAMES_PARAMETERS = {"dcp_two_ranks"}  # in its optimizer, where others count them by index
WEIGHTS_ONLY_OPCODES = {
    getattr(pickle, name)
    for name in vars(torch._weights_only_unpickler)
    if name.isupper() and isinstance(getattr(pickle, name, None), bytes)
}


def assert_layout(path: Path, *, restricted: bool) -> None:
    """Look at the written zip with the standard library."""
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None
        for member in opened.infolist():
            assert member.compress_type == zipfile.ZIP_STORED
            assert data_start(path, member) % 64 == 0
        names = opened.namelist()
        assert len(names) == len({name.casefold() for name in names})
        assert not any(".format_version" in name for name in names)
        body = opened.read("archive/data.pkl")
        assert opened.read("archive/version") == b"3\n"
        numbers = [name.removeprefix("archive/data/") for name in names if "/data/" in name]
        assert numbers == [str(number) for number in range(len(numbers))]
    codes = [code for code, _, _ in pickletools.genops(body)]
    assert body[:2] == b"\x80\x02"
    assert all(code.proto <= 2 or code.name == "NEWOBJ_EX" for code in codes)
    if restricted:
        assert {code.code.encode("latin-1") for code in codes} <= WEIGHTS_ONLY_OPCODES


def data_start(path: Path, member: zipfile.ZipInfo) -> int:
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return member.header_offset + 30 + name + extra


@pytest.mark.product(12, always="no edit")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_safetensors_output_is_that_of_the_library(name: str, kind: str, tmp_path: Path) -> None:
    out, back = tmp_path / "out.safetensors", tmp_path / "back.pth"
    error = refusal(name, kind, "safetensors")
    if error is not None:
        assert_refused(error, name, kind, "safetensors", out)
        return
    result = do(name, kind, "safetensors", out)
    assert result.container == "safetensors"
    meant = contiguous(expected_state(name, kind))
    aliases = ties(expected_state(name, kind))
    alone = {key: tensor for key, tensor in meant.items() if key not in aliases}
    assert_equals_library(out, alone)
    loaded = safetensors_torch.load_file(out)
    assert judge.same(alone, loaded, **OF_SAFETENSORS) == []

    surgery.rewrite(out, back, options=Options(sync=False))
    wanted = OrderedDict((key, meant[aliases.get(key, key)]) for key in meant)
    state = expected_state(name, kind)
    if hasattr(state, "_metadata"):
        wanted._metadata = state._metadata  # type: ignore[attr-defined]
    if hasattr(state, "_safetensors_metadata"):  # the file has them by name
        texts = dict(sorted(state._safetensors_metadata.items()))
        wanted._safetensors_metadata = texts  # type: ignore[attr-defined]
    assert_loads_as(back, wanted, name, bare=True, storage=False)
    assert_layout(back, restricted=True)


# Of what torch knows of a tensor, safetensors keeps dtype, shape and bytes.
OF_SAFETENSORS = {
    "containers": False,
    "order": False,
    "metadata": False,
    "storage": False,
    "sharing": False,
}


def contiguous(state: dict[str, Any]) -> dict[str, Any]:
    """Give each tensor alone and contiguous, as safetensors wants them."""
    return {key: alone(tensor) for key, tensor in state.items()}


def alone(tensor: Any) -> Any:
    resolved = tensor.detach().resolve_conj().resolve_neg()
    return resolved.clone(memory_format=torch.contiguous_format)


def ties(state: dict[str, Any]) -> dict[str, str]:
    """Map each key to the first one of exactly the same view; empty tensors share nothing."""
    first: dict[Any, str] = {}
    found = {}
    for key, tensor in state.items():
        if tensor.numel():
            view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            kept = first.setdefault((*view, tensor.is_conj(), tensor.is_neg()), key)
            if kept != key:
                found[key] = kept
    return found


def assert_equals_library(path: Path, tensors: dict[str, Any]) -> None:
    """Compare a file with the library's own: its entries and their order, its data, its padding."""
    theirs = path.with_suffix(".theirs")
    safetensors_torch.save_file(tensors, theirs, {"format": "pt"})
    header, data = header_of(path)
    their_header, their_data = header_of(theirs)
    metadata = header.pop("__metadata__")
    their_metadata = their_header.pop("__metadata__")
    assert list(header.items()) == list(their_header.items())
    assert data == their_data
    assert (path.stat().st_size - len(data)) % 8 == 0
    if metadata == their_metadata:
        assert path.read_bytes() == theirs.read_bytes()


def test_some_outputs_equal_the_library_to_the_last_byte(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    surgery.rewrite(GOOD / "plain.safetensors", out, options=Options(sync=False))
    header, _ = header_of(out)
    assert header["__metadata__"] == {"format": "pt"}
    assert out.read_bytes() == (GOOD / "plain.safetensors").read_bytes()


@pytest.mark.parametrize("name", UNREAD)
def test_containers_that_are_not_read_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match=UNREAD[name]):
        surgery.rewrite(GOOD / name, tmp_path / "out.pth")
    assert list(tmp_path.iterdir()) == []


# Real torch says what an edit should give.


TWINS = [
    ("data_parallel.pth", edits.strip_prefix(), "plain.pth"),
    ("data_parallel.pth", edits.strip_wrappers(), "plain.pth"),
    ("data_parallel.pth", edits.strip_prefix(anywhere=True), "plain.pth"),
    ("plain.pth", edits.add_prefix(), "data_parallel.pth"),
    ("plain_legacy.pth", edits.add_prefix(), "data_parallel.pth"),
    ("compiled_parallel.pth", edits.strip_wrappers(), "plain.pth"),
    ("parallel_compiled.pth", edits.strip_wrappers(), "plain.pth"),
    ("compiled.pth", edits.strip_wrappers(), "plain.pth"),
    ("compiled.pth", edits.strip_prefix("_orig_mod"), "plain.pth"),
    ("opacus.pth", edits.strip_prefix("_module."), "plain.pth"),
    ("parallel_inside.pth", edits.strip_prefix(anywhere=True), "plain.pth"),
    ("parallel_inside.pth", edits.rename("features.module", "features"), "plain.pth"),
]


@pytest.mark.parametrize(("name", "edit", "twin"), TWINS)
def test_an_edit_gives_what_torch_gives(
    name: str, edit: edits.Edit, twin: str, tmp_path: Path
) -> None:
    surgery.rewrite(GOOD / name, tmp_path / "out.pth", [edit], options=Options(sync=False))
    assert judge.same(original(twin), judge.load(tmp_path / "out.pth")) == []


def test_a_stripped_state_dict_loads_strictly_into_the_model(tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    source = tmp_path / "in.pth"
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(torch.nn.DataParallel(model).state_dict(), source)
    surgery.rewrite(source, out, [edits.strip_prefix()], options=Options(sync=False))
    model.load_state_dict(judge.load(out), strict=True)
    surgery.rewrite(out, source, [edits.add_prefix()], options=Options(sync=False, force=True))
    torch.nn.DataParallel(model).load_state_dict(judge.load(source), strict=True)


# Several state_dicts: the one that is named is edited, and no other.


NAMED = [
    ("ema.pth", "model_ema", True),
    ("ema.pth", "model", False),
    ("dino.pth", "student", True),
    ("dino.pth", "teacher", False),
    ("gan.pth", "discriminator", False),
    ("parts.pth", "networks.encoder", False),
]


@pytest.mark.parametrize(("name", "at", "wrapped"), NAMED)
def test_only_the_named_state_dict_is_edited(
    name: str, at: str, wrapped: bool, tmp_path: Path
) -> None:
    edit = edits.strip_prefix() if wrapped else edits.add_prefix()
    out = tmp_path / "out.pth"
    surgery.rewrite(GOOD / name, out, [edit], options=Options(at=at, sync=False))
    tree = original(name)
    state = tree
    for step in at.split("."):
        state = state[step]
    change = (lambda key: key.removeprefix("module.")) if wrapped else (lambda key: "module." + key)
    made = OrderedDict((change(key), tensor) for key, tensor in state.items())
    if hasattr(state, "_metadata"):
        made._metadata = judge_metadata(state._metadata, wrapped)  # type: ignore[attr-defined]
    assert_loads_as(out, put(tree, tuple(at.split(".")), made), name, bare=False)


def judge_metadata(metadata: dict[str, Any], wrapped: bool) -> OrderedDict[str, Any]:
    if wrapped:
        inner = {path: entry for path, entry in metadata.items() if path}
        return OrderedDict((path[7:], entry) for path, entry in inner.items())
    outer = ((f"module.{path}".rstrip("."), entry) for path, entry in metadata.items())
    return OrderedDict([("", {"version": 1}), *outer])


def test_parts_are_joined_by_dots(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    surgery.rewrite(GOOD / "parts.pth", out, options=Options(at="networks", sync=False))
    networks = original("parts.pth")["networks"]
    wanted = {f"{part}.{key}": t for part, inner in networks.items() for key, t in inner.items()}
    assert judge.same(wanted, safetensors_torch.load_file(out), **OF_SAFETENSORS) == []


# What is written, and how much of it.


def records_of(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as opened:
        return [name for name in opened.namelist() if "/data/" in name]


def storage_count(tree: Loaded) -> int:
    return len({t.untyped_storage().data_ptr() for t in judge.tensors(tree).values()})


@pytest.mark.parametrize("name", ["shared_with_optimizer.pth", "tied.pth", "slices.pth"])
def test_shared_storages_are_written_once(name: str, tmp_path: Path) -> None:
    surgery.rewrite(GOOD / name, tmp_path / "out.pth", options=Options(sync=False))
    assert len(records_of(tmp_path / "out.pth")) == storage_count(original(name))
    assert storage_count(original(name)) < len(judge.tensors(original(name)))


def test_what_is_no_longer_referenced_is_not_written(tmp_path: Path) -> None:
    source, out = tmp_path / "in.pth", tmp_path / "out.pth"
    torch.save({f"layer{n}.weight": torch.full((5000,), float(n)) for n in range(10)}, source)
    dropped = [f"layer{n}" for n in range(5)]
    surgery.rewrite(source, out, [edits.drop(dropped)], options=Options(sync=False))
    assert len(records_of(out)) == 5
    assert out.stat().st_size < 0.55 * source.stat().st_size


def test_a_storage_that_something_else_still_uses_stays(tmp_path: Path) -> None:
    name, out = "shared_with_optimizer.pth", tmp_path / "out.pth"
    edit = edits.drop(["classifier.weight"])
    surgery.rewrite(GOOD / name, out, [edit], options=Options(sync=False))
    loaded = judge.load(out)
    weight = state_of(name)["classifier.weight"]
    assert judge.same(loaded["optimizer"]["state"][0]["anchor"], weight, storage=False) == []
    assert len(records_of(out)) == storage_count(original(name))


def test_unwrap_leaves_the_storages_around_it_behind(tmp_path: Path) -> None:
    name, out = "model_best.pth.tar", tmp_path / "out.pth"
    result = surgery.rewrite(GOOD / name, out, bare=True, options=Options(sync=False))
    assert set(result.not_carried) == {"epoch", "arch", "best_acc1", "optimizer"}
    assert len(records_of(out)) == len(state_of(name))


# Determinism.


@pytest.mark.parametrize("name", FILES)
def test_same_input_same_bytes(name: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for container, suffix in (("torch-zip", ".pth"), ("safetensors", ".safetensors")):
        if refusal(name, "no edit", container):
            continue
        outs = [tmp_path / f"a{suffix}", tmp_path / "other" / f"b_longer{suffix}"]
        for out in outs:
            do(name, "no edit", container, out)
        assert outs[0].read_bytes() == outs[1].read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_a_second_rewrite_changes_nothing(name: str, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.pth", tmp_path / "twice.pth"
    do(name, "no edit", "torch-zip", once)
    surgery.rewrite(once, twice, options=Options(sync=False))
    assert once.read_bytes() == twice.read_bytes()


def test_bytes_do_not_hang_on_the_hash_seed(tmp_path: Path) -> None:
    script = (
        "import sys; from ckptool.verbs.surgery import rewrite, Options\n"
        "for number, source in enumerate(sys.argv[2:]):\n"
        "    rewrite(source, f'{sys.argv[1]}{number}.pth', options=Options(sync=False))"
    )
    sources = [str(GOOD / name) for name in ("set_and_bytes_protocol4.pth", "foreign.pth")]
    for seed in ("1", "2"):
        command = [sys.executable, "-c", script, str(tmp_path / seed), *sources]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    for number in range(len(sources)):
        first, second = (tmp_path / f"{seed}{number}.pth" for seed in ("1", "2"))
        assert first.read_bytes() == second.read_bytes()


# Safety: what is plain to ckptool is what torch takes.


@pytest.mark.parametrize("name", FILES)
def test_torch_takes_exactly_the_plain_outputs(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    do(name, "no edit", "torch-zip", out)
    plain = safety.judge(containers.read(out).globals).level is Level.PLAIN
    # python2_training is plain; its text is of no encoding that torch would know
    assert plain is (trusted(name, bare=False) or name == "python2_training.pth")
    if not plain:
        with pytest.raises(pickle.UnpicklingError):
            judge.load(out)


# Device tags.


@pytest.mark.parametrize(
    ("name", "tag"),
    [("cuda_tagged.pth", "cuda:7"), ("mps_tagged.pth", "mps"), ("tensors_2017_cuda.pth", "cuda:0")],
)
def test_device_tags_are_kept(name: str, tag: str, tmp_path: Path) -> None:
    out, through = tmp_path / "out.pth", tmp_path / "out.safetensors"
    do(name, "no edit", "torch-zip", out)
    assert tags_of(out) == {tag}
    do(name, "no edit", "safetensors", through)
    surgery.rewrite(through, out, options=Options(sync=False, force=True))
    assert tags_of(out) == {"cpu"}


def tags_of(path: Path) -> set[str]:
    seen = set()

    def remember(storage: Any, location: str) -> Any:
        seen.add(location)
        return storage

    judge.load(path, map_location=remember)
    return seen


# The command line gives what the library gives.


COMMANDS: list[tuple[str, str, list[str]]] = [
    ("no edit", "torch-zip", ["convert"]),
    ("no edit", "safetensors", ["convert"]),
    ("strip-prefix", "torch-zip", ["strip-prefix"]),
    ("strip-prefix", "torch-zip", ["convert", "--strip-prefix", "module"]),
    ("strip-prefix", "safetensors", ["strip-prefix", "--prefix", "module"]),
    ("strip-prefix auto", "torch-zip", ["strip-prefix", "--prefix", "auto"]),
    ("strip-prefix auto", "torch-zip", ["convert", "--strip-prefix", "auto"]),
    ("strip-prefix --anywhere", "torch-zip", ["strip-prefix", "--anywhere"]),
    ("add-prefix", "torch-zip", ["add-prefix"]),
    ("add-prefix", "safetensors", ["convert", "--add-prefix", "module."]),
    ("unwrap", "torch-zip", ["unwrap"]),
    ("transfer", "torch-zip", ["transfer"]),
    ("transfer", "safetensors", ["transfer"]),
    (
        "several",
        "torch-zip",
        ["convert", "--add-prefix", "a.b", "--rename", "a.b=c", "--strip-prefix", "c"],
    ),
]
THROUGH_THE_COMMAND_LINE = sorted(
    words(
        "data_parallel.pth model_best.pth.tar model_best_legacy.pth.tar tied.pth strided.pth "
        "quantized.pth ema.pth foreign.pth collision.pth parallel_inside.pth model.safetensors "
        "conj.pth big_endian.pth empty.pth"
    )
)
EXIT_CODES: dict[type[CkptoolError], int] = {
    AmbiguousStateDict: 2,
    NoStateDict: 2,
    EditError: 2,
    KeyCollision: 2,
    NothingMatched: 2,
    NotRepresentable: 5,
}


@pytest.mark.product(4)
@pytest.mark.parametrize("name", THROUGH_THE_COMMAND_LINE)
@pytest.mark.parametrize(("kind", "container", "command"), COMMANDS)
def test_the_command_line_writes_the_same_bytes(
    name: str,
    kind: str,
    container: str,
    command: list[str],
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    suffix = {"torch-zip": ".pth", "safetensors": ".safetensors"}[container]
    ours, theirs = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    code = run(*command, "--no-sync", GOOD / name, ours).code
    error = refusal(name, kind, container)
    if error is not None:
        assert code == EXIT_CODES[error]
        assert list(tmp_path.iterdir()) == []
        return
    assert code == 0
    do(name, kind, container, theirs)
    assert ours.read_bytes() == theirs.read_bytes()
