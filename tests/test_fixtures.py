"""The fixtures are what make.py makes, the README lists them, and the judge sees differences."""

from __future__ import annotations

import functools
import inspect
import json
import re
import shutil
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
pytest.importorskip("safetensors")
judge = pytest.importorskip("judge")


FOLDER = Path(__file__).parent.parent / "fixtures"
KINDS = ("good", "frameworks", "hostile")
FILES = sorted(path for kind in KINDS for path in (FOLDER / kind).iterdir())
ROW = re.compile(r"^\| `((?:good|frameworks|hostile)/[^`]+)` \| ([^|]+) \| ", re.MULTILINE)
ROWS = ROW.findall((FOLDER / "README.md").read_text(encoding="utf-8"))
SINCE_2_8 = pytest.mark.skipif(
    judge.VERSION < (2, 8), reason="make.py writes dtypes and settings of torch 2.8"
)

# What torch needs beside weights_only=False to read these; BYTEWISE it does not read here at all.
HOW: dict[str, dict[str, Any]] = {
    "protocol0.pth": {"pickle_module": judge.text_ids},
    "protocol0_legacy.pth": {"pickle_module": judge.text_ids},
    "python2_training.pth": {"encoding": "latin1"},
}
BYTEWISE = (
    {"plain_pickle.pkl", "tensors_2017_cuda.pth", ".metadata"}
    | {f"script_{name}.pt" for name in ("2018", "2019", "no_source")}
    | {"torch_0_1_imitation.tar", "torch_0_1_gnu.tar"}
)


def name_of(path: Path) -> str:
    """Return the name by which the README knows a fixture."""
    return f"{path.parent.name}/{path.name}"


def parts_of(path: Path) -> list[Path]:
    """List the files of a fixture: itself, or those in a folder."""
    return sorted(path.rglob("*")) if path.is_dir() else [path]


def is_loadable(path: Path) -> bool:
    """Tell whether torch can be asked what a file holds."""
    special = path.suffix in (".safetensors", ".json", ".distcp") or path.name in BYTEWISE
    special = special or path.parent.name.endswith("_ranks")  # pieces, by hand
    return "good" in path.relative_to(FOLDER).parts and path.is_file() and not special


def read(path: Path) -> Any:
    """Load a good fixture, strictly where torch can."""
    judge.skip_unread(path.name)
    if path.name.startswith("script"):
        return torch.jit.load(path).state_dict()
    how = HOW.get(path.name, {})
    if not how:
        with suppress(Exception):
            return judge.load(path)
    return judge.load(path, weights_only=False, **how)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make every fixture again."""
    out = tmp_path_factory.mktemp("fixtures")
    command = [sys.executable, str(FOLDER / "make.py"), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def test_readme_has_one_row_per_file() -> None:
    assert sorted(name for name, _ in ROWS) == sorted(map(name_of, FILES))


@pytest.mark.thorough
@SINCE_2_8
def test_make_writes_these_files_and_no_others(made: Path) -> None:
    again = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    here = {str(part.relative_to(FOLDER)) for path in FILES for part in parts_of(path)}
    assert again == {*here, "README.md"}


@pytest.mark.thorough
@SINCE_2_8
def test_readme_is_what_make_writes(made: Path) -> None:
    again = ROW.findall((made / "README.md").read_text(encoding="utf-8"))
    assert [name for name, _ in again] == [name for name, _ in ROWS]


@pytest.mark.thorough
@SINCE_2_8
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_fixture_is_what_make_makes(path: Path, made: Path) -> None:
    for part in parts_of(path):
        compare(part, made / part.relative_to(FOLDER))


def compare(path: Path, again: Path) -> None:
    if path.suffix == ".safetensors":
        assert safetensors_parts(path) == safetensors_parts(again)
    elif is_loadable(path):
        assert judge.same(read(path), read(again)) == []
    else:
        assert path.read_bytes() == again.read_bytes()


def safetensors_parts(path: Path) -> Any:
    """Return header and data; the library writes `__metadata__` in any order."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:end])
    except (ValueError, RecursionError):
        return content
    if isinstance(header, dict):
        header = [header.pop("__metadata__", None), list(header.items())]
    return content[:8], header, content[end:]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_fixture_is_small_and_names_no_machine(path: Path) -> None:
    content = b"".join(part.read_bytes() for part in parts_of(path))
    assert len(content) < 60_000
    folders = [f"/{name}/".encode() for name in ("home", "root", "tmp", "Users")]
    for part in (*folders, b"site-packages", b"C:\\Users"):
        assert part not in content


TWINS = [
    ("plain.pth", "plain_legacy.pth"),
    ("plain.pth", "rezipped.pth"),
    ("plain.pth", "no_byteorder.pth"),
    ("plain.pth", "no_crc.pth"),
    ("plain.pth", "other_order.pth"),
    ("plain.pth", "unaligned.pth"),
    ("plain.pth", "big_endian.pth"),
    ("plain.pth", "cuda_tagged.pth"),
    ("plain.pth", "mps_tagged.pth"),
    ("model_best.pth.tar", "model_best_legacy.pth.tar"),
    ("tied.pth", "tied_legacy.pth"),
    ("slices.pth", "slices_legacy.pth"),
    ("strided.pth", "strided_legacy.pth"),
    ("foreign.pth", "foreign_legacy.pth"),
    *(("protocol2.pth", f"protocol{number}.pth") for number in (0, 1, 3, 4, 5)),
    ("protocol2.pth", "protocol0_legacy.pth"),
    ("protocol2.pth", "protocol4_legacy.pth"),
    ("set_and_bytes.pth", "set_and_bytes_protocol4.pth"),
]


@pytest.mark.parametrize(("left", "right"), TWINS)
def test_twins_hold_the_same(left: str, right: str) -> None:
    assert judge.same(read(FOLDER / "good" / left), read(FOLDER / "good" / right)) == []


def test_safetensors_twin_holds_the_same_tensors() -> None:
    from safetensors.torch import load_file

    left = read(FOLDER / "good" / "plain.pth")
    right = load_file(FOLDER / "good" / "plain.safetensors")
    loosely = {"containers": False, "order": False, "metadata": False, "sharing": False}
    assert judge.same(left, right, storage=False, **loosely) == []
    assert judge.same(left, right) != []


def test_crc_mismatch_is_a_storage_that_torch_takes() -> None:
    left = read(FOLDER / "good" / "plain.pth")
    right = judge.load(FOLDER / "hostile" / "crc_mismatch.pth")
    assert judge.same(left, right) == ["classifier.weight: bytes"]


# The judge.


@pytest.mark.parametrize("path", [*filter(is_loadable, FILES)], ids=name_of)
def test_judge_finds_a_file_equal_to_itself(path: Path) -> None:
    assert judge.same(read(path), read(path)) == []


def counting(count: int) -> Any:
    """Return counting float32 values."""
    return torch.arange(count, dtype=torch.float32)


def tree() -> dict[str, Any]:
    """Return a tree with something of every kind."""
    state_dict = OrderedDict([("weight", torch.ones(2, 3)), ("bias", counting(3)), ("step", 3)])
    state_dict["tied"] = state_dict["weight"].view(2, 3)
    state_dict["top"] = state_dict["weight"][0]
    state_dict["bottom"] = state_dict["weight"][1]
    state_dict["slice"] = counting(8)[2:4]
    state_dict["again"] = counting(3)
    state_dict["row"] = torch.ones(1, 3)
    state_dict._metadata = OrderedDict([("", {"version": 1}), ("a", {"version": 2})])
    names = ["x"]
    return {
        "state_dict": state_dict,
        "parameter": torch.nn.Parameter(counting(2)),
        "nan": torch.tensor([float("nan"), 0.0]),
        "complex": torch.complex(counting(2), counting(2)).conj(),
        "sparse": torch.eye(2).to_sparse().coalesce(),
        "csr": torch.eye(2).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(counting(4), 0.5, 1, torch.qint8),
        "float8": counting(4).to(torch.float8_e4m3fn),
        "huge": torch.tensor(1.0).expand(1 << 20, 1 << 20),
        "empty": torch.empty(0, 3),
        "storage": torch.arange(4, dtype=torch.uint8).untyped_storage(),
        "args": Namespace(lr=0.1, names=names),
        "names": names,
        "array": np.arange(3),
        "scalar": np.float64(0.5),
        "partial": functools.partial(max, 1, key=None),
        "float": 0.0,
        "values": (1, "one", None, b"x", {1, 2}),
    }


Change = Callable[[Any], Any]


def put(key: str, value: Change) -> Change:
    """Replace a value of the tree by what a function makes of it."""
    return lambda whole: whole.__setitem__(key, value(whole[key]))


def entry(key: str, value: Change) -> Change:
    """Replace an entry of the state_dict by what a function makes of it."""
    return lambda whole: put(key, value)(whole["state_dict"])


def state(change: Change) -> Change:
    """Change the state_dict of the tree in place."""
    return lambda whole: change(whole["state_dict"])


def metadata(change: Change) -> Change:
    """Change the `_metadata` of the tree in place."""
    return lambda whole: change(whole["state_dict"]._metadata)


def tagged(tensor: Any) -> Any:
    """Give a tensor a Python attribute."""
    tensor.tag = 1
    return tensor


def flipped(tensor: Any) -> Any:
    """Flip the lowest bit of every element."""
    return (tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int32) ^ 1).view(
        tensor.dtype
    )


def requantized(tensor: Any, scale: float, zero_point: int) -> Any:
    """Return the same integers under another scale."""
    return torch._make_per_tensor_quantized_tensor(tensor.int_repr(), scale, zero_point)


def uncoalesced(tensor: Any) -> Any:
    """Return the same sparse tensor, unaware that it is coalesced."""
    return torch.sparse_coo_tensor(
        tensor.indices(), tensor.values(), tensor.shape, check_invariants=False
    )


OPTIONS = [
    name for name in inspect.signature(judge.same).parameters if name not in ("left", "right")
]

NOTICED: dict[str, Change] = {
    "dtype": entry("bias", lambda t: t.double()),
    "dtype of the same size": put("float8", lambda t: t.view(torch.float8_e5m2)),
    "shape": entry("bias", lambda t: t.reshape(3, 1)),
    "value": entry("bias", lambda t: t + 1),
    "negative zero": put("nan", lambda t: torch.stack([t[0], torch.tensor(-0.0)])),
    "nan payload": put("nan", flipped),
    "float8 bits": put("float8", flipped),
    "value of a stride-0 tensor": put("huge", lambda t: torch.tensor(2.0).expand(t.shape)),
    "missing key": state(lambda d: d.pop("step")),
    "renamed key": state(lambda d: d.update(steps=d.pop("step"))),
    "class of a key": lambda whole: whole.update({1: whole.pop("names")}),
    "conj bit": put("complex", lambda t: t.conj()),
    "neg bit": entry("bias", torch._neg_view),
    "conj resolved": put("complex", lambda t: t.resolve_conj()),
    "sparse value": put("sparse", lambda t: t * 2),
    "sparse to dense": put("sparse", lambda t: t.to_dense()),
    "coalesced": put("sparse", uncoalesced),
    "csr value": put("csr", lambda t: t * 2),
    "quantized value": put("quantized", lambda t: torch.flip(t, [0])),
    "scale": put("quantized", lambda t: requantized(t, 0.25, 1)),
    "zero point": put("quantized", lambda t: requantized(t, 0.5, 2)),
    "bytes of a storage": put("storage", lambda s: torch.ones(4).byte().untyped_storage()),
    "attribute value": put("args", lambda n: Namespace(lr=0.2, names=n.names)),
    "attribute name": put("args", lambda n: Namespace(rate=0.1, names=n.names)),
    "list items": put("names", lambda names: ["x", "y"]),
    "array dtype": put("array", lambda a: a.astype(np.int32)),
    "array value": put("array", lambda a: a + 1),
    "numpy scalar to float": put("scalar", float),
    "numpy scalar value": put("scalar", lambda s: s + 1),
    "partial": put("partial", lambda p: functools.partial(max, 2, key=None)),
    "minus zero": put("float", lambda f: -0.0),
    "int for float": put("float", lambda f: 0),
    "tuple to list": put("values", list),
    "bool for int": put("values", lambda v: (True, *v[1:])),
    "set item": put("values", lambda v: (*v[:4], {1, 3})),
}

# Each of these is noticed too, unless the named options are switched off.
FORGIVEN: dict[str, tuple[Change, str]] = {
    "stride": (entry("bias", lambda t: t.repeat_interleave(2)[::2]), "stride storage"),
    "stride alone": (
        entry("row", lambda t: torch.ones(3).as_strided((1, 3), (7, 1))),
        "stride",
    ),
    "offset alone": (entry("slice", lambda t: torch.cat([t, t, t, t])[4:6]), "storage"),
    "offset": (entry("bias", lambda t: torch.cat([t, t])[3:]), "storage"),
    "storage size": (entry("slice", lambda t: counting(9)[2:4]), "storage"),
    "key order": (state(lambda d: d.move_to_end("weight")), "order"),
    "class of a dict": (put("state_dict", dict), "containers metadata"),
    "metadata gone": (state(lambda d: delattr(d, "_metadata")), "metadata"),
    "metadata value": (metadata(lambda m: m["a"].update(version=1)), "metadata"),
    "metadata order": (metadata(lambda m: m.move_to_end("")), "metadata"),
    "untied": (entry("tied", lambda t: t.clone()), "sharing"),
    "newly tied": (state(lambda d: d.update(again=d["bias"].view(3))), "sharing"),
    "one object": (state(lambda d: d.update(tied=d["weight"])), "identity"),
    "tied to another part": (
        state(lambda d: d.update(top=d["bottom"].view(3), bottom=d["top"])),
        "storage sharing",
    ),
    "parameter to tensor": (put("parameter", lambda t: t.data), "attributes"),
    "tensor to parameter": (entry("bias", lambda t: torch.nn.Parameter(t, False)), "attributes"),
    "requires_grad": (entry("bias", lambda t: t.requires_grad_()), "attributes"),
    "Python attribute": (entry("bias", tagged), "attributes"),
    "list object": (put("names", list), "identity"),
}


def changed(change: Change) -> dict[str, Any]:
    """Return a fresh tree with one change."""
    whole = tree()
    change(whole)
    return whole


def test_judge_finds_two_equal_trees_equal() -> None:
    assert judge.same(tree(), tree()) == []


@pytest.mark.parametrize("change", NOTICED.values(), ids=NOTICED.keys())
def test_judge_notices(change: Change) -> None:
    assert judge.same(tree(), changed(change)) != []
    assert judge.same(changed(change), tree()) != []
    assert judge.same(tree(), changed(change), **dict.fromkeys(OPTIONS, False)) != []


@pytest.mark.parametrize(("change", "options"), FORGIVEN.values(), ids=FORGIVEN.keys())
def test_judge_notices_unless_told_not_to(change: Change, options: str) -> None:
    off = dict.fromkeys(options.split(), False)
    assert judge.same(tree(), changed(change)) != []
    assert judge.same(changed(change), tree()) != []
    assert judge.same(tree(), changed(change), **off) == []


def test_judge_tells_views_apart_by_where_they_lie() -> None:
    swapped = changed(FORGIVEN["tied to another part"][0])
    assert judge.same(tree(), swapped, storage=False) != []


def test_judge_compares_what_is_not_kept_alive_by_the_tree() -> None:
    sparse = {str(n): torch.eye(2).to_sparse() * n for n in range(1, 30)}
    other = {key: tensor * 2 for key, tensor in sparse.items()}
    assert len(judge.same(sparse, other)) == len(sparse)


def test_judge_follows_cycles() -> None:
    left, right = tree(), changed(NOTICED["value"])
    left["self"], right["self"] = left, right
    assert judge.same(left, left) == []
    assert judge.same(left, right) == ["state_dict.bias: bytes"]


def test_tensors_are_listed_by_dotted_path() -> None:
    weight = torch.nn.Parameter(counting(2))
    weight.master = counting(2)
    whole = {"a": [weight, (counting(1),)], "a.0": counting(3), "args": Namespace(t=counting(4))}
    whole["self"] = whole
    found = judge.tensors(whole)
    assert list(found) == ["a.0", "a.0.master", "a.1.0", "a.0#2", "args.t"]
    assert found["a.0"] is weight
    assert found["args.t"].shape == (4,)


def test_calculated_offsets_see_a_layout_that_is_not_torchs(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.serialization")
    good = FOLDER / "good" / "other_order.pth"
    lying = tmp_path / "lying.pth"
    shutil.copy(good, lying)
    with zipfile.ZipFile(lying, "a") as opened:
        opened.writestr("archive/.format_version", b"1")
    plain = judge.load(good)
    assert judge.same(plain, judge.load(good, mmap=True, calculated_offsets=True)) == []
    assert judge.same(plain, judge.load(lying)) == []
    assert judge.same(plain, judge.load(lying, mmap=True)) == []
    assert judge.same(plain, judge.load(lying, mmap=True, calculated_offsets=True)) != []


def test_load_puts_the_setting_back() -> None:
    config = pytest.importorskip("torch.utils.serialization").config
    before = config.load.calculate_storage_offsets
    with pytest.raises(FileNotFoundError):
        judge.load("no such file", mmap=True, calculated_offsets=True)
    assert config.load.calculate_storage_offsets is before
