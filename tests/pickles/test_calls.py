"""Calls judged by their shape: whatever torch runs of them, `check` calls unsafe.

The package `borrowed` stands for any third-party one: its function `run` notes that it was called,
and with what.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FIXTURES, Outcome, environment

from ckptool import containers
from ckptool.pickles import calls, pickle_reader
from ckptool.pickles.names import Level
from ckptool.pickles.safety import judge
from ckptool.pickles.tree import children
from ckptool.verbs import checking
from ckptool.verbs.checked import Status

sys.path.append(str(FIXTURES))

from containers import legacy, torch_zip
from opcodes import (
    FALSE,
    NONE,
    build,
    call,
    dict_,
    integer,
    list_,
    name,
    new,
    ordered_dict,
    pickled,
    storage,
    tensor,
    text,
    tuple_,
)

Run = Callable[..., Outcome]

BORROWED = """
ran = []
def run(*args, **kwargs):
    if args or kwargs:
        ran.append((args, kwargs))
    return run
class Thing:
    def __setstate__(self, state): run(state)
    def extend(self, items): run(items)
    append = run
    def __setitem__(self, key, value): run(key, value)
def thing(*args): return Thing()
class lower:
    def __new__(cls, *args, **kwargs):
        run(*args, **kwargs)
        return object.__new__(cls)
class Caller:
    def __init__(self, function, *args, what=None): function(*args, what)
"""
FUNCTION, THING = name("borrowed", "run"), name("borrowed", "thing")
COMMAND = text("touch x")
TENSOR = tensor(storage(text("0"), 4), [4])
SPACE = new(name("argparse", "Namespace"))
PARTIAL = name("functools", "partial")
FROM_TYPE = name("torch._tensor", "_rebuild_from_type_v2")


def with_attribute(method: str) -> bytes:
    """Push an inert object whose method is the function."""
    return build(SPACE, dict_([(text(method), FUNCTION)]))


def bound(function: bytes, *arguments: bytes, keywords: bytes = NONE) -> bytes:
    """Push a `functools.partial` as Python pickles it."""
    state = tuple_(function, tuple_(*arguments), keywords, NONE)
    return build(call(PARTIAL, function), state)


def with_state(*more: tuple[bytes, bytes]) -> bytes:
    """Push a Parameter with attributes."""
    function = name("torch._utils", "_rebuild_parameter_with_state")
    return call(function, TENSOR, FALSE, ordered_dict(()), dict_(more))


def made_on_demand(factory: bytes) -> bytes:
    """Push a dict of a ChainMap, whose defaultdict calls for a key that another map has."""
    found = call(name("collections", "defaultdict"), factory)
    chain = call(name("collections", "ChainMap"), found, dict_([(text("a"), NONE)]))
    return call(name("builtins", "dict"), chain)


# What `functools.partial` gets as its state.
STATE = tuple_(FUNCTION, tuple_(COMMAND), dict_(()), NONE)
# What torch.load(weights_only=False) runs.
RUN = {
    "text": call(FUNCTION, COMMAND),
    "text among others": call(FUNCTION, integer(1), TENSOR, COMMAND),
    "in a list": call(FUNCTION, list_(COMMAND)),
    "in a tuple in a dict": call(FUNCTION, dict_([(integer(1), tuple_(COMMAND))])),
    "a key": call(FUNCTION, dict_([(COMMAND, integer(1))])),
    "bytes": call(FUNCTION, b"C\x02ls"),
    "bytes of protocol 2": call(FUNCTION, call(name("_codecs", "encode"), COMMAND)),
    "bytes of numbers": call(FUNCTION, call(name("builtins", "bytes"), list_(integer(108)))),
    "a bytearray": call(FUNCTION, b"\x96\x02\0\0\0\0\0\0\0ls"),
    "a path": call(FUNCTION, call(name("pathlib", "PurePosixPath"), text("etc"))),
    "a URL": call(FUNCTION, new(name("urllib.parse", "DefragResult"), COMMAND, text(""))),
    "an object that holds text": call(FUNCTION, build(SPACE, dict_([(text("a"), COMMAND)]))),
    "what a function returned": call(FUNCTION, call(name("borrowed", "thing"))),
    "an underscore": call(name("borrowed_too", "_run"), COMMAND),
    "OBJ": b"(" + FUNCTION + COMMAND + b"o",
    "INST": b"(" + COMMAND + b"iborrowed\nrun\n",
    "NEWOBJ": new(name("borrowed", "lower"), COMMAND),
    "NEWOBJ_EX": name("borrowed", "lower") + b")" + dict_([(text("a"), COMMAND)]) + b"\x92",
    "a popped call": call(FUNCTION, COMMAND) + b"0N",
    "the result of a call": call(call(FUNCTION), COMMAND),
    "a partial": call(bound(FUNCTION, COMMAND)),
    "a partial that gets the text": call(call(PARTIAL, FUNCTION), COMMAND),
    "a partial of a partial": made_on_demand(call(PARTIAL, call(PARTIAL, FUNCTION), COMMAND)),
    "a partial whose state a call makes": made_on_demand(
        build(
            call(PARTIAL, FUNCTION),
            call(
                name("builtins", "tuple"),
                list_(FUNCTION, tuple_(COMMAND), dict_(()), NONE),
            ),
        )
    ),
    "a partial of copyreg": made_on_demand(
        build(call(name("copyreg", "__newobj__"), PARTIAL, FUNCTION), STATE)
    ),
    "a partial of _reconstructor": made_on_demand(
        build(call(name("copyreg", "_reconstructor"), PARTIAL, PARTIAL, FUNCTION), STATE)
    ),
    "a partial for a class that calls": call(
        name("borrowed", "Caller"), call(PARTIAL, FUNCTION), COMMAND
    ),
    "keywords of a class that calls": made_on_demand(
        bound(name("borrowed", "Caller"), keywords=dict_(
            [(text("function"), FUNCTION), (text("what"), COMMAND)])),
    ),
    "__reduce_ex__ of what is copied": call(
        name("torch.optim.swa_utils", "AveragedModel"),
        build(SPACE, dict_([(text("__reduce_ex__"), call(
            PARTIAL, name("torch.jit._pickle", "restore_type_tag"),
            tuple_(FUNCTION, tuple_(COMMAND)),
        ))])),
    ),
    "a state": build(call(THING), COMMAND),
    "a state of numbers and names": build(call(THING), dict_([(text("a"), integer(1))])),
    "appended": call(THING) + COMMAND + b"a",
    "appended at once": call(THING) + b"(" + COMMAND + b"e",
    "set": call(THING) + COMMAND + NONE + b"s",
    "__setstate__": build(with_attribute("__setstate__"), COMMAND),
    "append": with_attribute("append") + COMMAND + b"a",
    "extend": with_attribute("extend") + b"(" + COMMAND + b"e",
    "__setstate__ of an OrderedDict": build(
        build(ordered_dict(()), dict_([(text("__setstate__"), FUNCTION)])), COMMAND
    ),
    "__setstate__ of a Parameter": build(with_state((text("__setstate__"), FUNCTION)), COMMAND),
    "from type": call(FROM_TYPE, FUNCTION, name("torch", "Tensor"), tuple_(COMMAND), dict_(())),
    "from type, of a partial": call(
        FROM_TYPE, call(PARTIAL, FUNCTION), name("torch", "Tensor"), tuple_(COMMAND), dict_(())
    ),
    "__newobj__": call(name("copyreg", "__newobj__"), with_attribute("__new__"), COMMAND),
    "_reconstructor": call(
        name("copyreg", "_reconstructor"), name("borrowed", "lower"), name("borrowed", "lower"),
        COMMAND,
    ),
    "a generator": call(name("numpy.random._pickle", "__generator_ctor"), COMMAND, FUNCTION),
    "a class that calls": call(name("borrowed", "Caller"), FUNCTION, COMMAND),
    "a name that gets a state": name("borrowed", "anything") + COMMAND + b"b",
    "of a logger": build(
        call(name("logging", "getLogger"), COMMAND), dict_([(text("a"), FUNCTION)])
    ),
}  # fmt: skip
# What is dangerous by its shape, though here it fails or waits before it runs.
WAITS = {
    "a partial alone": bound(FUNCTION, COMMAND),
    "keywords of a partial": bound(FUNCTION, keywords=dict_([(text("path"), COMMAND)])),
    "NEWOBJ of a function": new(FUNCTION, COMMAND),
    "the result of a plain call": call(call(name("collections", "OrderedDict")), COMMAND),
    "the result of NEWOBJ": call(SPACE, COMMAND),
    "NEWOBJ of a result": new(SPACE, COMMAND),
    "a call of text": call(COMMAND, COMMAND),
}
# What honest files hold.
FINE = {
    "no arguments": call(FUNCTION),
    "numbers": call(FUNCTION, integer(1), list_(integer(2)), NONE),
    "a tensor": call(FUNCTION, TENSOR),
    "a class": call(name("borrowed", "Thing"), COMMAND),
    "a class with a state": build(new(name("borrowed", "Thing")), dict_([(text("a"), COMMAND)])),
    "scipy": build(new(name("scipy.sparse._csr", "csr_matrix")), dict_([(text("a"), COMMAND)])),
    "scipy, protocol 0": build(
        call(name("copy_reg", "_reconstructor"), name("scipy.sparse._csr", "csr_matrix"),
             name("__builtin__", "object"), NONE),
        dict_([(text("a"), COMMAND)]),
    ),
    "Cython": build(
        call(name("lib._fast", "__pyx_unpickle_Tree"), name("lib._fast", "Tree"), integer(3), NONE),
        tuple_(COMMAND),
    ),
    "pandas": call(
        name("pandas.core.indexes.base", "_new_Index"), name("pandas", "Index"),
        dict_([(text("name"), COMMAND)]),
    ),
    "pytz": call(name("pytz", "_p"), text("Europe/Berlin"), integer(3600)),
    "a partial without text": bound(FUNCTION, keywords=dict_([(text("eps"), integer(1))])),
    "a class given functions that are called": call(
        name("borrowed", "Thing"), call(FUNCTION), COMMAND
    ),
    "a partial of an object": bound(new(name("borrowed", "Thing")), integer(1)),
    "a partial of torch": bound(name("torch.nn.functional", "relu"), COMMAND),
    "a defaultdict": call(name("collections", "defaultdict"), FUNCTION) + COMMAND + NONE + b"s",
    "functions in an old OrderedDict": call(
        name("collections", "OrderedDict"), list_(list_(COMMAND, FUNCTION))
    ),
    "fastai": call(
        name("fastai.torch_core", "_rebuild_from_type"),
        name("torch._utils", "_rebuild_parameter"), name("fastai.torch_core", "TensorImage"),
        tuple_(TENSOR, FALSE), dict_([(text("a"), COMMAND)]),
    ),
    "a generator": call(
        name("numpy.random._pickle", "__generator_ctor"), text("PCG64"),
        name("numpy.random._pickle", "__bit_generator_ctor"),
    ),
    "an enum": call(name("borrowed", "Colour"), text("red")),
}  # fmt: skip
CASES = [
    *((f"{kind}: {what}", hook, status)
      for kind, hooks, status in (
          ("run", RUN, Status.UNSAFE), ("waits", WAITS, Status.UNSAFE), ("fine", FINE, Status.OK))
      for what, hook in hooks.items()),
]  # fmt: skip


def checkpoint_of(hook: bytes) -> bytes:
    """Return a torch file of a state_dict, and something beside it."""
    state_dict = dict_([(text("weight"), TENSOR)])
    body = dict_([(text("state_dict"), state_dict), (text("hook"), hook)])
    return torch_zip(pickled(body, 4), {"0": bytes(16)})


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    def make(hook: bytes) -> Path:
        path = tmp_path / "x.pth"
        path.write_bytes(checkpoint_of(hook))
        return path

    return make


@pytest.mark.parametrize(("hook", "status"), [row[1:] for row in CASES], ids=[c[0] for c in CASES])
def test_the_shape_of_a_call(file: Callable[[bytes], Path], hook: bytes, status: Status) -> None:
    found = checking.check(file(hook))
    assert found.status is status, found.detail
    assert bool(found.calls) is (status is Status.UNSAFE)


def test_torch_runs_what_is_called_unsafe(tmp_path: Path) -> None:
    """Each of the files is loaded as torch loads what it trusts, and the function says so."""
    pytest.importorskip("torch")
    (tmp_path / "borrowed.py").write_text(BORROWED)
    (tmp_path / "borrowed_too.py").write_text("from borrowed import run as _run")
    for what, hook in [*RUN.items(), *WAITS.items()]:
        (tmp_path / what).write_bytes(checkpoint_of(hook))
    script = """
import contextlib, json, sys, warnings, torch, borrowed
warnings.simplefilter("ignore")
seen = {}
for path in sys.argv[1:]:
    borrowed.ran.clear()
    borrowed.anything = borrowed.Thing()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    seen[path] = bool(borrowed.ran)
import logging
seen["of a logger"] = logging.getLogger("touch x").a is borrowed.run
print(json.dumps(seen))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *RUN, *WAITS], cwd=tmp_path, capture_output=True,
        text=True, check=True, env=environment({"PYTHONPATH": str(tmp_path)}),
    )  # fmt: skip
    ran = json.loads(done.stdout)
    assert [what for what in RUN if not ran[what]] == []
    assert [what for what in WAITS if ran[what]] == []


# What users see.


def test_evidence_shows_the_call_its_byte_and_its_key(
    run: Run, file: Callable[[bytes], Path]
) -> None:
    hook = build(
        call(THING, tuple_(text("a"), list_(integer(1), COMMAND)), TENSOR),
        dict_([(text("path"), bound(FUNCTION, text("x" * 99)))]),
    )
    path = file(hook)
    outcome = run("check", path)
    assert outcome.code == 4
    first = "borrowed.thing(('a', [1, 'touch x']), torch._utils._rebuild_tensor_v2("
    line = next(line for line in outcome.err.splitlines() if first in line)
    byte = int(line.split("byte ")[1].split(":")[0])
    assert line.strip().startswith("data.pkl, byte ")
    assert line.endswith("   at `hook`")
    assert byte in [each.offset for each in containers.read(path).calls]
    assert ".__setstate__({'path': functools.partial(borrowed.run)})" in line
    document = run("check", "--json", path).document["files"][0]
    assert (document["status"], document["safety"]) == ("unsafe", "dangerous")
    said = document["calls"][0]
    assert (said["module"], said["name"], said["at"]) == ("borrowed", "thing", "hook")
    assert set(said) == {"module", "name", "arguments", "pickle", "offset", "at", "text"}
    assert said["text"] in line
    assert {"borrowed.thing", "borrowed.run"} <= set(document["globals"])


@pytest.mark.parametrize("what", RUN)
def test_torch_output_does_not_carry_it(
    run: Run, file: Callable[[bytes], Path], tmp_path: Path, what: str
) -> None:
    """Refused for any edit, and left out with --tensors-only, by safetensors and by `unwrap`."""
    path, out = file(RUN[what]), tmp_path / "out.pth"
    fails = checking.check(path).detail.find("damaged") >= 0  # no pickler's, and read no further
    refused = run("convert", path, out)
    assert refused.code == (3 if fails else 4)
    assert not out.exists()
    if fails:
        return
    assert "error[unsafe-pickle]" in refused.err
    assert run("convert", path, out, "--tensors-only").code == 0
    assert run("check", "--strict", out).code == 0
    assert run("convert", path, tmp_path / "out.safetensors").code == 0
    assert "would run code when loaded" in run("keys", path).err
    assert run("info", "--json", path).document["safety"] == "dangerous"


def test_what_hangs_on_a_tensor_is_judged_and_left_out(run: Run, tmp_path: Path) -> None:
    """In a bare state_dict, where all of the tree is written: attributes, hooks, a subclass."""
    bad = call(FUNCTION, COMMAND)
    function = name("torch._utils", "_rebuild_parameter_with_state")
    held = call(function, TENSOR, FALSE, ordered_dict(()), dict_([(text("a"), bad)]))
    path, out = tmp_path / "x.pth", tmp_path / "out.pth"
    path.write_bytes(torch_zip(pickled(ordered_dict([(text("w"), held)])), {"0": bytes(16)}))
    assert run("add-prefix", path, out).code == 4
    assert run("convert", path, out, "--to", "dcp").code in (2, 5)
    assert run("add-prefix", path, out, "--tensors-only").code == 0
    assert run("check", "--strict", out).code == 0


def test_every_pickle_of_a_file_is_judged(run: Run, tmp_path: Path) -> None:
    """Those of the legacy container, thrown away or not, and those before a fault."""
    bad = call(FUNCTION, COMMAND)
    body = dict_([(text("weight"), tensor(storage(text("0"), 4, NONE), [4]))])
    path = tmp_path / "x.pth"
    whole = legacy(pickled(body), [("0", 4, bytes(16))])
    path.write_bytes(whole)
    assert run("check", path).code == 0
    path.write_bytes(legacy(pickled(bad + b"0" + body), [("0", 4, bytes(16))]))
    assert run("check", path).code == 4
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    assert whole.startswith(magic)
    path.write_bytes(b"\x80\x02" + bad + b"0" + magic[2:] + whole[len(magic) :])
    assert run("check", path).code == 4
    version = pickle.dumps(1001, 2)
    path.write_bytes(magic + b"\x80\x02" + bad + b"0" + version[2:] + b"\x80\x02\xff")
    assert run("check", path).code == 4
    nested = b"(" * 300 + b"l" * 300
    path.write_bytes(checkpoint_of(list_(bad, nested)))
    assert run("check", path).code == 4


def test_calls_in_a_persistent_id_count(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    key = call(FUNCTION, COMMAND)
    path.write_bytes(torch_zip(pickled(tensor(storage(key, 4), [4])), {"0": bytes(16)}))
    outcome = run("check", path)
    assert outcome.code == 4
    assert "damaged" in outcome.out


@pytest.mark.parametrize("hook", [call(FUNCTION, COMMAND), call(name("posix", "system"), COMMAND)])
def test_a_member_of_an_archive_is_judged_as_unpacked(
    run: Run, tmp_path: Path, hook: bytes
) -> None:
    """Of a zip, stored or deflated, of a tar, of a gzip, and of an archive in one."""
    import gzip
    import io
    import tarfile
    import zipfile

    data = pickled(dict_([(text("a"), hook)]))
    bare = tmp_path / "bare.pkl"
    bare.write_bytes(data)
    (tmp_path / "bare.pkl.gz").write_bytes(gzip.compress(data))
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / f"{method}.zip", "w", method) as archive:
            archive.writestr("in/bare.pkl", data)
    inner = (tmp_path / "8.zip").read_bytes()
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for member, content in (("bare.pkl", data), ("8.zip", inner)):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    paths = ["bare.pkl.gz::bare.pkl", "0.zip::in/bare.pkl", "8.zip::in/bare.pkl",
             "all.tar::bare.pkl", "all.tar::8.zip::in/bare.pkl"]  # fmt: skip
    unpacked = run("check", "--json", bare).document["files"][0]
    assert unpacked["status"] == "unsafe"
    for path in paths:
        outcome = run("check", "--json", tmp_path / path)
        found = outcome.document["files"][0]
        assert outcome.code == 4, path
        assert found["calls"] == unpacked["calls"]
        assert found["detail"] == unpacked["detail"]


def test_text_that_looks_like_a_pickle_is_no_danger(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("I1\n(tR and so on, for quite a while, until nobody reads any more of it\n" * 9)
    assert checking.check(path).status is Status.NOT_A_CHECKPOINT


def test_what_calls_share_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of 5 000 lists, given to 5 000 functions; of dangerous calls the first are found."""
    looked = []
    monkeypatch.setattr(calls, "children", lambda node: looked.append(1) or children(node))
    given = b"".join(call(name("borrowed", f"run_{n}"), b"h\x01") for n in range(5_000))
    for last, level, found in ((NONE, Level.FOREIGN, 0), (COMMAND, Level.DANGEROUS, 100)):
        shared = list_(*[b"]"] * 5_000, last) + b"q\x01"
        parsed = pickle_reader.load(pickled(list_(shared, given)))
        verdict = judge(parsed.globals, parsed.calls)
        assert (verdict.level, len(verdict.calls)) == (level, found)
        assert len(looked) < 20_000
