"""What ckptool says of each file against torch, safetensors and picklescan: all disagreements.

Every one of them stands in a table with its reason. The tests fail on one that does not, and on a
row that is none any more.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, environment

from ckptool import containers
from ckptool.errors import CkptoolError
from ckptool.files.blocks import blocks
from ckptool.files.fileio import Readers
from ckptool.pickles import safety
from ckptool.state import walk
from ckptool.tensors.tensor import CompositeTensor, TensorInfo

pytest.importorskip("torch")
pytest.importorskip("safetensors")
judge = pytest.importorskip("judge")

CORPUS = Path(os.environ.get("CKPTOOL_CORPUS") or "no corpus")


def opinions(whose: str, files: list[Path]) -> dict[Path, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("opinions.py")), whose],
        input=json.dumps([str(path) for path in files]),
        capture_output=True, text=True, timeout=600, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(files)
    return {Path(row["path"]): row for row in rows}


def ours(path: Path) -> dict[str, Any]:
    """Give what ckptool says: the level and every tensor, or how it refuses."""
    try:
        found = containers.read(path)
        level = safety.judge(found.globals).level.name.lower()
        readers = Readers()
        rows = [
            [walk.dotted(at) or ".", *described(info, readers)]
            for at, info in walk.tensors(found.tree)
        ]
        readers.close()
    except CkptoolError as error:
        return {"refused": error.slug}
    return {"level": level, "tensors": rows}


def described(info: Any, readers: Readers) -> tuple[str, list[int], str]:
    composite = isinstance(info, CompositeTensor) or not info.dtype.torch_name
    if composite or info.dtype.quantized or info.dtype.itemsize > 8:
        return info.dtype.torch_name, list(info.shape), ""
    assert isinstance(info, TensorInfo)
    digest = hashlib.sha256()
    for block in blocks(info, readers):
        digest.update(block)
    return info.dtype.torch_name, list(info.shape), digest.hexdigest()


def disagreement(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Say in which way two opinions differ, if they do."""
    if "refused" in mine:
        return "" if "refused" in theirs else LOADS_REFUSED
    if "refused" in theirs:
        return REFUSES_PLAIN if mine["level"] == "plain" else ""
    if mine["level"] != "plain":
        return LOADS_UNSAFE
    differing = sorted(map(str, mine["tensors"])) != sorted(map(str, theirs["tensors"]))
    return DIFFERENT if differing else ""


LOADS_REFUSED = "torch or safetensors loads what ckptool refuses"
REFUSES_PLAIN = "torch refuses what ckptool reads and calls plain"
LOADS_UNSAFE = "torch loads with weights_only=True what ckptool calls foreign or dangerous"
DIFFERENT = "both read it, and see other tensors"

# Way -> reason -> the files, of fixtures/ or of the corpus; a name may end in `*`.
EXPLAINED: dict[str, dict[str, str]] = {
    LOADS_REFUSED: {
        "miniz reads a zip archive that is not whole or not one; two readers may see two files": """
            bytes_after.pth case_variant_names.pth duplicate_names.pth member_inside_member.pth
            overlapping_members.pth nul_name.pth zip_slip.pth zip64_end_elsewhere.pth
            zip64_no_end.pth
        """,
        "miniz looks at the directory alone, never at what the local headers say": """
            local_crc_differs.pth local_method_differs.pth local_name_differs.pth
            local_size_differs.pth
        """,
        "torch reads what a record inflates to up to its size, and looks no further": """
            inflate_garbage.pth inflate_lies.pth
        """,
        "one storage is described in two ways; torch takes the first, or each in turn": """
            two_dtypes_one_storage.pth two_lengths_one_storage.pth
        """,
        "torch stops at the first STOP, and does not look at what follows": "two_stops.pth",
        "torch reads as many storages as the list names; an absent one stays as memory was": """
            legacy_duplicate_key.pth legacy_no_keys.pth
        """,
        "more dimensions than torch computes with; nesting deeper than any checkpoint": """
            deep_key.pth dimensions_65.pth
        """,
        "torch 2.6 looks neither at the end of a storage nor at what SETITEM sets": """
            long_storage.pth setitem_on_tensor.pth short_storage.pth
        """,
        "the library takes the last of two keys, and space before the header": """
            safetensors_duplicate_escaped.safetensors safetensors_duplicate_key.safetensors
            safetensors_leading_space.safetensors
        """,
    },
    REFUSES_PLAIN: {
        "torch's restricted unpickler knows protocol 2 alone, and not every opcode of it": """
            protocol0.pth protocol0_legacy.pth protocol1.pth protocol3.pth protocol4.pth
            protocol4_legacy.pth protocol5.pth set_and_bytes_protocol4.pth python2_training.pth
            billion_dups.pth billion_laughs.pth long_many_digits.pth .metadata
        """,
        "torch.load leaves TorchScript to torch.jit.load, which runs it; ckptool reads it": """
            script*.pt script*.ptl joint_VAD_just_RU_jit_cut_q.pth.tar model_micro*.jit
        """,
        "torch refuses the tar of torch 0.1 under weights_only=True": """
            tar_multi_dtype.tar tar_weight_bias.tar torch_0_1*.tar
        """,
        "torch wants a GPU for the storage; ckptool never allocates one": "tensors_2017_cuda.pth",
        "torch insists on a `version` record, which says nothing": "missing_version.pth",
        "an older torch has no such dtype": " ".join(judge.DTYPES),
    },
    LOADS_UNSAFE: {},
    DIFFERENT: {
        "the key appears twice; ckptool lists both, torch keeps the last; edits refuse it where "
        "the values differ": "duplicate_keys.pth duplicate_keys_differ.pth",
    },
}
# Rows about some versions of torch only: the first of them, and the first after them.
VERSIONS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "two_dtypes_one_storage.pth": ((2, 15), (99, 0)),
    **dict.fromkeys(
        ("long_storage.pth", "setitem_on_tensor.pth", "short_storage.pth"), ((2, 6), (2, 14))
    ),
}


def of_this_torch(row: str) -> bool:
    """Return whether a row is about the torch that is installed."""
    first, after = VERSIONS.get(row, ((0, 0), (99, 0)))
    return first <= judge.VERSION < after and (row not in judge.DTYPES or bool(judge.unread(row)))


# A file that is not asked about: torch would fill memory for minutes.
NOT_ASKED = {"expanded_far.pth"}


def unexplained(table: dict[str, dict[str, str]], found: dict[str, set[str]]) -> list[str]:
    """List disagreements without a row."""
    return [
        f"{way}: {name}"
        for way, names in found.items()
        for name in sorted(names)
        if not any(fnmatch(name, row) for row in rows(table.get(way, {})))
    ]


def stale(
    table: dict[str, dict[str, str]], found: dict[str, set[str]], names: set[str]
) -> list[str]:
    """List rows about files that are here, and agree."""
    return [
        f"{way}: {row}"
        for way, reasons in table.items()
        for row in rows(reasons)
        if any(fnmatch(name, row) for name in names)
        and not any(fnmatch(name, row) for name in found.get(way, ()))
    ]


def rows(reasons: dict[str, str]) -> list[str]:
    return [row for names in reasons.values() for row in names.split() if of_this_torch(row)]


def assert_explained(
    table: dict[str, dict[str, str]], found: dict[str, set[str]], files: list[Path]
) -> None:
    assert unexplained(table, found) == []
    assert stale(table, found, {path.name for path in files}) == []


def against_torch(files: list[Path]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path, theirs in opinions("torch", files).items():
        way = disagreement(ours(path), theirs)
        if way:
            found.setdefault(way, set()).add(path.name)
    return found


def corpus_files() -> list[Path]:
    if not (CORPUS / "index.json").exists():
        pytest.skip("CKPTOOL_CORPUS names no folder with index.json")
    index = json.loads((CORPUS / "index.json").read_text(encoding="utf-8"))
    return [CORPUS / row["path"] for row in index]


FILES = [
    path
    for kind in ("good", "hostile")
    for path in sorted((FIXTURES / kind).iterdir())
    if path.is_file() and path.name not in NOT_ASKED
]


@pytest.mark.thorough
def test_torch_and_safetensors_over_the_fixtures() -> None:
    assert len(FILES) > 300
    assert_explained(EXPLAINED, against_torch(FILES), FILES)


def test_torch_and_safetensors_over_the_corpus() -> None:
    files = corpus_files()
    assert_explained(EXPLAINED, against_torch(files), files)


# picklescan judges names too, by a list of what is dangerous; ckptool by a list of what is not.

MORE = "picklescan calls it dangerous, ckptool does not"
LESS = "ckptool calls it dangerous, picklescan does not"
SCANNED: dict[str, dict[str, str]] = {
    MORE: {
        "functools.partial calls nothing when made; what it is made of is judged itself": """
            foreign.pth foreign_legacy.pth
        """,
        "uuid.UUID is a number; picklescan lists the whole module for uuid._get_command_stdout": """
            stdlib.pth
        """,
        "ckptool refuses to read it at all, exit 3": """
            bare_pickle.pkl in_persistent_id.pth legacy_magic_call.pth legacy_module_call.pth
            legacy_popped_magic.pth
        """,
    },
    LESS: {
        "picklescan does not look into the tar of torch 0.1": "tar_os_system.tar",
        "picklescan calls names that it does not know suspicious; ckptool dangerous, where they "
        "are of the standard library or dotted": "dangerous_getattr_dotted.pth named_only.pth",
    },
}


def against_picklescan(files: list[Path]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path, theirs in opinions("picklescan", files).items():
        dangerous = "dangerous" in theirs.get("names", {}).values()
        level = ours(path).get("level", "refused")
        if dangerous and level != "dangerous":
            found.setdefault(MORE, set()).add(path.name)
        if level == "dangerous" and not dangerous:
            found.setdefault(LESS, set()).add(path.name)
    return found


def test_picklescan_over_the_fixtures() -> None:
    pytest.importorskip("picklescan")
    assert_explained(SCANNED, against_picklescan(FILES), FILES)


def test_picklescan_over_the_corpus() -> None:
    pytest.importorskip("picklescan")
    files = corpus_files()
    assert_explained(SCANNED, against_picklescan(files), files)


def test_the_tables_can_fail() -> None:
    table = {"way": {"a reason": "known.pth old*.pth"}}
    assert unexplained(table, {"way": {"known.pth", "new.pth"}}) == ["way: new.pth"]
    assert unexplained(table, {"other": {"known.pth"}}) == ["other: known.pth"]
    assert stale(table, {"way": {"known.pth"}}, {"known.pth", "older.pth"}) == ["way: old*.pth"]
    assert stale(table, {"way": {"known.pth"}}, {"known.pth"}) == []
    plain = {"level": "plain", "tensors": [["a", "float32", [1], "x"]]}
    other = {"tensors": [["a", "float32", [1], "y"]]}
    assert disagreement(plain, other) == DIFFERENT
    assert disagreement({**plain, "level": "foreign"}, plain) == LOADS_UNSAFE
    assert disagreement(plain, {"refused": "x"}) == REFUSES_PLAIN
    assert disagreement({"refused": "malformed"}, plain) == LOADS_REFUSED
