"""The pickle reader and writer, opcode by opcode, against the standard library."""

from __future__ import annotations

import collections
import io
import itertools
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sampled

from ckptool.errors import (
    CkptoolError,
    LimitExceeded,
    Malformed,
    NotRepresentable,
    Unsupported,
)
from ckptool.pickles import pickle_reader, pickle_writer
from ckptool.pickles.pickle_reader import Ended, Vocabulary, load
from ckptool.pickles.pickle_writer import dump
from ckptool.pickles.torch_objects import Lowering, StorageId, TorchVocabulary
from ckptool.pickles.tree import (
    ByteArray,
    Dict,
    Global,
    LongInteger,
    Node,
    Object,
    OldString,
    PersistentId,
    Set,
)
from ckptool.tensors.tensor import Storage, TensorInfo

CODES = {code.name: code.code.encode("latin-1") for code in pickletools.opcodes}


def no_lowering(node: Any) -> Node:
    raise AssertionError(f"nothing of a higher floor here: {node!r}")


def written(tree: Node) -> bytes:
    return dump(tree, no_lowering)


def shape(node: Node, seen: dict[int, int] | None = None) -> Any:
    """Describe a tree in values that compare: each node numbered, met again by its number."""
    seen = {} if seen is None else seen
    if isinstance(node, float):
        return ("float", struct.pack(">d", node))
    if isinstance(node, (bool, int, str, bytes, type(None), Global)):
        return (type(node).__name__, node)
    if id(node) in seen:
        return ("again", seen[id(node)])
    seen[id(node)] = len(seen)
    match node:
        case list() | tuple():
            return (type(node).__name__, [shape(item, seen) for item in node])
        case Dict():
            return ("dict", [(shape(k, seen), shape(v, seen)) for k, v in node.pairs])
        case Set():
            return ("set", node.frozen, [shape(item, seen) for item in node.items])
        case ByteArray() | OldString() | LongInteger():
            return (type(node).__name__, node.data)
        case PersistentId():
            return ("id", shape(node.value, seen))
        case Object():
            parts = [shape(part, seen) for part in (node.callee, node.args, node.kwargs)]
            return ("object", node.how, parts, shape([list(step) for step in node.steps], seen))
    raise AssertionError(node)


# Every opcode.


GLOBAL_A = b"ca\nb\n"
A = Global("a", "b")
OPCODES: dict[str, tuple[bytes, Any]] = {
    "PROTO": (b"\x80\x05N", None),
    "FRAME": (b"\x95" + struct.pack("<Q", 2) + b"N.", None),
    "STOP": (b"N", None),
    "NONE": (b"N", None),
    "NEWTRUE": (b"\x88", True),
    "NEWFALSE": (b"\x89", False),
    "INT": (b"(I-7\nI01\nI00\nI1\nI70000000000\nt", (-7, True, False, 1, 70000000000)),
    "BININT": (b"J\xfe\xff\xff\xff", -2),
    "BININT1": (b"K\xff", 255),
    "BININT2": (b"M\x01\xff", 0xFF01),
    "LONG": (b"(L-12L\nL12\nt", (-12, 12)),
    "LONG1": (b"(\x8a\x00\x8a\x01\xff\x8a\x08" + bytes(7) + b"\x80t", (0, -1, -(2**63))),
    "LONG4": (b"\x8b\x02\x00\x00\x00\x00\x80", -(2**15)),
    "FLOAT": (b"(F0.1\nF-inf\nt", (0.1, float("-inf"))),
    "BINFLOAT": (b"G" + struct.pack(">d", -0.0), -0.0),
    "STRING": (b"(S'a\\n\\x41'\nS\"it's\"\nt", ("a\nA", "it's")),
    "BINSTRING": (b"T\x03\x00\x00\x00abc", "abc"),
    "SHORT_BINSTRING": (b"U\x02\xc3\xa9", "\u00e9"),
    "UNICODE": (b"V\\u5c42\\ud800 \xe9\n", "\u5c42\ud800 \u00e9"),
    "BINUNICODE": (b"X\x05\x00\x00\x00\xed\xa0\x80ab", "\ud800ab"),
    "SHORT_BINUNICODE": (b"\x8c\x02\xc3\xa9", "\u00e9"),
    "BINUNICODE8": (b"\x8d" + struct.pack("<Q", 2) + b"ab", "ab"),
    "BINBYTES": (b"B\x02\x00\x00\x00\xff\x00", b"\xff\0"),
    "SHORT_BINBYTES": (b"C\x02\xff\x00", b"\xff\0"),
    "BINBYTES8": (b"\x8e" + struct.pack("<Q", 2) + b"\xff\x00", b"\xff\0"),
    "BYTEARRAY8": (b"\x96" + struct.pack("<Q", 2) + b"\xff\x00", ByteArray(b"\xff\0")),
    "EMPTY_TUPLE": (b")", ()),
    "TUPLE1": (b"N\x85", (None,)),
    "TUPLE2": (b"NK\x01\x86", (None, 1)),
    "TUPLE3": (b"NK\x01K\x02\x87", (None, 1, 2)),
    "TUPLE": (b"(NK\x01K\x02K\x03t", (None, 1, 2, 3)),
    "EMPTY_LIST": (b"]", []),
    "LIST": (b"(NK\x01l", [None, 1]),
    "APPEND": (b"]Na", [None]),
    "APPENDS": (b"](NK\x01e", [None, 1]),
    "EMPTY_DICT": (b"}", Dict()),
    "DICT": (b"(K\x01NK\x01K\x02d", Dict([(1, None), (1, 2)])),
    "SETITEM": (b"}K\x01Ns", Dict([(1, None)])),
    "SETITEMS": (b"}(K\x01NK\x02Nu", Dict([(1, None), (2, None)])),
    "EMPTY_SET": (b"\x8f", Set([])),
    "ADDITEMS": (b"\x8f(K\x01K\x02\x90", Set([1, 2])),
    "FROZENSET": (b"(K\x01\x91", Set([1], frozen=True)),
    "MARK": (b"((tt", ((),)),
    "POP": (b"NK\x010(0K\x020", None),
    "POP_MARK": (b"N(K\x01K\x021", None),
    "DUP": (b"(N2t", (None, None)),
    "PUT": (b"(Np7\ng7\nt", (None, None)),
    "GET": (b"(Np7\ng7\nt", (None, None)),
    "BINPUT": (b"(Nq\xffh\xfft", (None, None)),
    "BINGET": (b"(Nq\xffh\xfft", (None, None)),
    "LONG_BINPUT": (b"(Nr\x00\x01\x00\x00j\x00\x01\x00\x00t", (None, None)),
    "LONG_BINGET": (b"(Nr\x00\x01\x00\x00j\x00\x01\x00\x00t", (None, None)),
    "MEMOIZE": (b"(N\x94K\x01\x94h\x00h\x01t", (None, 1, None, 1)),
    "GLOBAL": (GLOBAL_A, A),
    "STACK_GLOBAL": (b"\x8c\x01a\x8c\x01b\x93", A),
    "REDUCE": (GLOBAL_A + b"N\x85R", Object(A, (None,))),
    "NEWOBJ": (GLOBAL_A + b")\x81", Object(A, (), "newobj")),
    "NEWOBJ_EX": (GLOBAL_A + b")}\x92", Object(A, (), "newobj_ex", Dict())),
    "INST": (b"(NK\x01ia\nb\n", Object(A, (None, 1), "obj")),
    "OBJ": (b"(" + GLOBAL_A + b"NK\x01o", Object(A, (None, 1), "obj")),
    "BUILD": (GLOBAL_A + b")R}b", Object(A, (), steps=[("build", Dict())])),
    "PERSID": (b"P12 a\n", PersistentId("12 a")),
    "BINPERSID": (b"K\x07Q", PersistentId(7)),
}
REFUSED = {
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"N\x98",
}


def test_every_opcode_is_in_one_of_the_tables() -> None:
    assert OPCODES.keys() | REFUSED.keys() == CODES.keys()
    assert not OPCODES.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", OPCODES)
def test_opcode(name: str) -> None:
    body, wanted = OPCODES[name]
    data = body if name == "FRAME" else body + b"."
    assert CODES[name] in data
    found = load(data)
    assert shape(found.tree) == shape(wanted)
    assert found.end == len(data)


@pytest.mark.parametrize("name", REFUSED)
def test_opcode_that_is_refused(name: str) -> None:
    assert REFUSED[name].startswith(CODES[name]) or name == "READONLY_BUFFER"
    with pytest.raises(Unsupported) as caught:
        load(b"\x80\x05" + REFUSED[name] + b".")
    assert caught.value.offset == 2 + REFUSED[name].index(CODES[name])


def test_bytes_that_are_no_opcode() -> None:
    unknown = sorted(set(range(256)) - {code[0] for code in CODES.values()})
    assert unknown
    for byte in unknown:
        with pytest.raises(Malformed, match=f"0x{byte:02x}"):
            load(b"N" + bytes([byte]) + b".")


IMPOSSIBLE = {
    "stack underflow": b"R.",
    "append to nothing": b"Na.",
    "append to a tuple": b")Na.",
    "setitem on a list": b"]NNs.",
    "odd setitems": b"}(Nu.",
    "odd dict": b"(Nd.",
    "additems to a frozenset": b"(\x91(N\x90.",
    "additems to a list": b"](N\x90.",
    "tuple without mark": b"Nt.",
    "mark left open": b"(N.",
    "two values left": b"NN.",
    "nothing left": b"N0.",
    "arguments that are a list": GLOBAL_A + b"]R.",
    "newobj with a list": GLOBAL_A + b"]\x81.",
    "obj without a class": b"(o.",
    "state for a list": b"]}b.",
    "global that is a number": b"K\x01\x8c\x01b\x93.",
    "memo that was never made": b"h\x05.",
    "memo by text": b"gx\n.",
    "negative memo": b"Np-1\n.",
    "int of letters": b"Ixyz\n.",
    "float of letters": b"Fxyz\n.",
    "string without quotes": b"Sabc\n.",
    "string of one quote": b"S'\n.",
    "text that is not UTF-8": b"\x8c\x01\xff.",
    "negative length": b"T\xff\xff\xff\xff.",
    "negative long": b"\x8b\xff\xff\xff\xff.",
    "mark across a call": b"(" + GLOBAL_A + b"(tR.",
}


@pytest.mark.parametrize("body", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_impossible_pickle(body: bytes) -> None:
    with pytest.raises(Malformed) as caught:
        load(b"\x80\x04" + body)
    assert caught.value.offset is not None


def test_protocol_beyond_five() -> None:
    with pytest.raises(Unsupported):
        load(b"\x80\x06N.")


def test_what_stands_behind_stop_is_not_read() -> None:
    found = load(b"XXN.garbage", 2)
    assert (found.tree, found.end) == (None, 4)


# Nothing is imported, resolved or called.


def framed(content: bytes, rest: bytes = b"", size: int | None = None) -> bytes:
    return (
        b"\x80\4\x95" + struct.pack("<Q", len(content) if size is None else size) + content + rest
    )


CROSSING = {
    "an argument": framed(b"X\5\0\0\0ab", b"cde0N."),
    "a length": framed(b"X\5\0", b"\0\0abcde0N."),
    "an argument behind it alone": framed(b"X", b"\2\0\0\0ab0N."),
    "a line": framed(b"cos\nsys", b"tem\n0N."),
    "a short text": framed(b"\x8c\4a", b"bcd0N."),
    "a number": framed(b"J\1", b"\0\0\0000N."),
    "a memo key": framed(b"Nr\0", b"\0\0\0000N."),
    "bytes": framed(b"\x8e\3" + b"\0" * 7, b"abc0N."),
    "another frame": framed(framed(b"NNNNN")[2:-3], b"NNN."),
    "a frame inside it": framed(b"\x95\1" + b"\0" * 7 + b"N0N."),
    "the end of the pickle": framed(b"N.NN"),
    "the end, and more frames": framed(b"N", b"0" + framed(b"N.N")[2:]),
}


@pytest.mark.parametrize("body", CROSSING.values(), ids=CROSSING)
def test_what_crosses_the_end_of_a_frame_is_read_in_two_ways(body: bytes) -> None:
    with pytest.raises(Malformed, match="frame"):
        load(body)


def test_frames_end_between_opcodes() -> None:
    values = [[b"x" * 70_000, "y" * 70_000, *range(40_000)], "short", ()]
    for value, protocol in itertools.product(values, (4, 5)):
        for pickler in (pickle.dumps, pickle._dumps):  # type: ignore[attr-defined]
            assert load(pickler(value, protocol)).tree == value
    for one in range(2, 6):  # a frame of any size that ends with an opcode
        assert load(framed(b"NNNN"[: one - 1], b"0" * (one - 2) + b".")).tree is None
    assert load(framed(b"N", framed(b"0N", framed(b".")[2:])[2:])).tree is None


@pytest.mark.parametrize("line", ["010", "0x10", "-010", "0o7", "0_1"])
def test_integers_that_unpicklers_read_differently_are_refused(line: str) -> None:
    with pytest.raises(Malformed):
        load(f"I{line}\n.".encode())


def test_escapes_of_old_strings_are_those_of_bytes() -> None:
    for text in (r"'\x6fs'", r"'\u006fs'", r"'a\'b\n\101'", r"'\N{DASH}'"):
        body = b"S" + text.encode() + b"\n."
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert load(body).tree == pickle.loads(body)


def test_nothing_is_imported(tmp_path: Path) -> None:
    (tmp_path / "trap.py").write_text("open('imported', 'w')")
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "from ckptool.pickles.pickle_reader import load\n"
        r"bodies = [b'ctrap\nx\n)R.', b'(itrap\nx\n.', b'\x8c\x04trap\x8c\x01x\x93)\x81}b.']"
        "\nfor body in bodies:\n"
        "    assert load(body).globals\n"
        "assert 'trap' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert not (tmp_path / "imported").exists()


def test_names_and_calls_are_listed_even_when_thrown_away() -> None:
    found = load(b"N" + GLOBAL_A + b")R0" + b"cx\ny\n0.")
    assert found.tree is None
    assert found.globals == {A: 1, Global("x", "y"): 9}
    assert [(call.callee, call.offset) for call in found.calls] == [(A, 7)]


def test_what_build_makes_of_a_node_takes_its_place_in_the_memo() -> None:
    class Words(Vocabulary):
        def built(self, node: Node, state: Node) -> Node:
            return ("built", state)

    body = b"(" + GLOBAL_A + b")Rq\x01q\x02K\x07bh\x01h\x02t."
    assert load(body, vocabulary=Words()).tree == (("built", 7),) * 3


# Bounds.


def test_count_of_opcodes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_reader, "MAX_OPCODES", 1000)
    load(b"N" + b"N0" * 400 + b".")
    with pytest.raises(LimitExceeded):
        load(b"N" + b"N0" * 600 + b".")


@pytest.mark.parametrize("opcode", [b"\x8d", b"\x8e", b"\x96"])
@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1])
def test_a_length_beyond_the_file_allocates_nothing(opcode: bytes, length: int) -> None:
    with pytest.raises(Ended):
        load(opcode + struct.pack("<Q", length) + b"abc.")


def test_integers_of_too_many_digits() -> None:
    with pytest.raises(LimitExceeded):
        load(b"I" + b"1" * 5000 + b"\n.")
    started = time.process_time()
    with pytest.raises(LimitExceeded):
        load(b"L" + b"1" * 10_000_000 + b"L\n.")
    assert time.process_time() - started < 1


def test_long_integers_are_not_computed() -> None:
    data = bytes(100_000) + b"\x01"
    found = load(b"\x8b" + struct.pack("<i", len(data)) + data + b".").tree
    assert isinstance(found, LongInteger)
    assert pickle.loads(written(found)) == 1 << 800_000


def test_deep_nesting_is_read_and_refused_when_written() -> None:
    deep = load(b"N" + b"\x85" * 5000 + b".").tree
    with pytest.raises(LimitExceeded):
        written(deep)
    assert written(load(b"N" + b"\x85" * 150 + b".").tree)


# Against the standard library.


def shared() -> list[Any]:
    """A list that holds one object twice, and itself."""
    inner: dict[str, Any] = {"x": [1]}
    outer = [inner, inner, inner["x"]]
    outer.append(outer)
    inner["up"] = outer
    return outer


def recursive_tuple() -> tuple[Any, ...]:
    inner: list[Any] = []
    outer = (1, inner)
    inner.append(outer)
    return outer


def recursive_long_tuple() -> tuple[Any, ...]:
    inner: list[Any] = []
    outer = (1, 2, 3, inner)
    inner.append(outer)
    return outer


VALUES: dict[str, Any] = {
    "none": None,
    "bools": [True, False, 1, 0],
    "ints": [0, 255, 256, 65535, 65536, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1],
    "longs": [2**63 - 1, 2**63, -(2**63), 2**64, 2**2039, 2**2040, -(2**5000), 128, -128, -129],
    "floats": [0.1, -0.0, 1e308, 5e-324, float("inf"), float("-inf")],
    "texts": ["", "a", "\u00e9", "\u5c42", "\U0001f600", "a\nb\\u", "\x00", "x" * 300, "\ud800"],
    "bytes": [b"", b"a", bytes(range(256)), b"x" * 300],
    "bytearray": bytearray(b"\x00\xff"),
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), ((),))],
    "lists": [[], [1], [[]], list(range(2500))],
    "dicts": [{}, {1: 2}, {"a": {"b": {}}}, {n: str(n) for n in range(2500)}],
    "sets": [set(), {1, 2}, frozenset(), frozenset({"a"})],
    "complex": 1.5 - 2j,
    "ordered": OrderedDict([("b", 1), ("a", 2)]),
    "counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2], 3),
    "shared": shared(),
    "recursive tuple": recursive_tuple(),
    "recursive long tuple": recursive_long_tuple(),
    "odd keys": {(1, "a"): 1, None: 2, 1.5: 3, True: 4, b"x": 5, frozenset({1}): 6},
    "names": [collections.OrderedDict, range(3), slice(1, 2), len],
}


def same(left: Any, right: Any, seen: dict[int, int] | None = None) -> bool:
    """Compare two values of any shape: types, bits, and which objects are one object."""
    seen = {} if seen is None else seen
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack("<d", left) == struct.pack("<d", right)
    if not isinstance(left, (list, dict, tuple, bytearray)):
        return bool(left == right)
    if id(left) in seen:
        return seen[id(left)] == id(right)
    if id(right) in seen.values() and left:  # empty tuples are all one
        return False
    seen[id(left)] = id(right)
    if isinstance(left, bytearray):
        return left == right
    if isinstance(left, dict):
        keys = zip(left, right, strict=False)
        return len(left) == len(right) and all(
            same(a, b, seen) and same(left[a], right[b], seen) for a, b in keys
        )
    return len(left) == len(right) and all(
        same(a, b, seen) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("optimized", [False, True], ids=["", "optimized"])
def test_what_is_written_is_what_was_read(value: Any, protocol: int, optimized: bool) -> None:
    data = pickle.dumps(value, protocol)
    found = load(pickletools.optimize(data) if optimized else data)
    assert found.protocol == (protocol if protocol >= 2 else 0)
    again = written(found.tree)
    assert again[:2] == b"\x80\x02"
    assert same(pickle.loads(again), value)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_only_opcodes_of_protocol_two_are_written(value: Any) -> None:
    for protocol in range(6):
        body = written(load(pickle.dumps(value, protocol)).tree)
        assert max(code.proto for code, _, _ in pickletools.genops(body)) <= 2
        pickletools.dis(body, out=Nowhere())  # checks the stack and the memo too


class Nowhere:
    def write(self, text: str) -> None:
        pass


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_writing_again_changes_nothing(value: Any) -> None:
    once = written(load(pickle.dumps(value, 4)).tree)
    assert written(load(once).tree) == once


@pytest.mark.parametrize("protocol", range(6))
def test_memo_indexes_beyond_a_byte(protocol: int) -> None:
    value = [[n] for n in range(400)]
    value += value[:300]
    assert same(pickle.loads(written(load(pickle.dumps(value, protocol)).tree)), value)


class Slots:
    """Pickled by NEWOBJ with a state, or by copyreg in old protocols."""

    def __init__(self) -> None:
        self.x, self.y = [1], {"a": self}


class Arguments:
    def __new__(cls, *args: Any, **kwargs: Any) -> Arguments:
        made = super().__new__(cls)
        made.given = (args, kwargs)
        return made

    def __getnewargs_ex__(self) -> Any:
        return self.given


class Filled(list):  # type: ignore[type-arg]
    """A list with attributes: NEWOBJ, APPENDS and BUILD."""


def filled() -> Filled:
    made = Filled([1, 2])
    made.note = made
    return made


@pytest.mark.parametrize("protocol", range(2, 6))
def test_objects_keep_how_they_are_made(protocol: int) -> None:
    for value in (Slots(), Arguments(1, a=2), filled(), shared()):
        data = pickle.dumps(value, protocol)
        tree = load(data).tree
        assert shape(load(written(tree)).tree) == shape(tree)
    again = pickle.loads(written(load(pickle.dumps(Slots(), protocol)).tree))
    assert (again.x, again.y["a"]) == ([1], again)
    made = pickle.loads(written(load(pickle.dumps(Arguments(1, a=2), protocol)).tree))
    assert made.given == ((1,), {"a": 2})
    copy = pickle.loads(written(load(pickle.dumps(filled(), protocol)).tree))
    assert (list(copy), copy.note) == ([1, 2], copy)


def test_steps_keep_their_order() -> None:
    """An object may be filled, given a state, and filled again."""
    body = GLOBAL_A + b")R(K\x01K\x02u}b(K\x03K\x04uNa."
    tree = load(body).tree
    assert [kind for kind, _ in tree.steps] == ["setitem", "build", "setitem", "append"]
    assert shape(load(written(tree)).tree) == shape(tree)


def test_old_objects_keep_their_opcode() -> None:
    tree = load(b"(NK\x01ia\nb\n}b.").tree
    body = written(tree)
    assert "OBJ" in {code.name for code, _, _ in pickletools.genops(body)}
    assert shape(load(body).tree) == shape(tree)


def test_text_of_python_2_is_carried_as_it_was() -> None:
    tree = load(b"\x80\x02(U\x02\xe9aT\x2c\x01\x00\x00" + b"\xff" * 300 + b"U\x01at.").tree
    assert [type(item) for item in tree] == [OldString, OldString, str]
    again = pickle.loads(written(tree), encoding="latin-1")
    assert again == ("\u00e9a", "\u00ff" * 300, "a")


def test_names_are_written_in_utf8_and_refused_with_line_breaks() -> None:
    named = Global("m\u00f6d", "n\u00e4me")
    assert load(written(named)).tree == named
    for bad in (Global("a\nb", "c"), Global("a", "b\nc")):
        with pytest.raises(NotRepresentable):
            written(bad)


def test_what_protocol_two_lacks_is_as_pythons_own_pickler_writes_it() -> None:
    for value in (b"\x00\xff", bytearray(b"ab"), {1}, frozenset({1})):
        ours = set(load(written(load(pickle.dumps(value, 5)).tree)).globals)
        theirs = set(load(pickle.dumps(value, 2)).globals)
        assert ours <= theirs | {Global("_codecs", "encode")}


# Damage.


def small() -> dict[str, Any]:
    return {
        "a": [1, 300, -1, 2**40, 1.5, None, True],
        "b": ("x", b"y", {"z"}, ()),
        "c": OrderedDict(d=bytearray(b"e")),
    }


@pytest.mark.parametrize("protocol", range(6))
def test_truncated_at_every_byte(protocol: int) -> None:
    data = pickle.dumps(small(), protocol)
    for size in range(len(data)):
        with pytest.raises(Ended):
            load(data[:size])


@pytest.mark.parametrize("protocol", range(6))
def test_every_byte_changed_to_eight_others(protocol: int) -> None:
    """Anything but a `CkptoolError` is a failure; so is a tree that cannot be written again."""
    data = pickle.dumps(small(), protocol)
    outcomes = collections.Counter()
    started = time.process_time()
    for place, byte in sampled([*enumerate(data)], 3):
        values = {0, 255, byte ^ 1, byte ^ 0x80, 0x2E, 0x28, 0x71, 0x52} - {byte}
        for value in values:
            changed = data[:place] + bytes([value]) + data[place + 1 :]
            outcomes[outcome(changed)] += 1
    assert outcomes["read"]
    assert outcomes["Malformed"]
    assert time.process_time() - started < 20


def outcome(data: bytes) -> str:
    try:
        tree = load(data).tree
    except CkptoolError as error:
        return type(error).__name__
    try:
        again = written(tree)
    except CkptoolError as error:
        return f"not written: {type(error).__name__}"
    assert written(load(again).tree) == again
    return "read"


def test_random_opcodes_do_no_harm() -> None:
    chooser = random.Random(1)
    opcodes = [code for name, code in CODES.items() if name not in REFUSED]
    for _ in range(3000):
        body = b"".join(
            chooser.choice(opcodes) + chooser.randbytes(chooser.choice((0, 0, 0, 1, 4)))
            for _ in range(chooser.randrange(1, 12))
        )
        outcome(body + b".")


# Tensors read and written at once.


def many_tensors() -> bytes:
    """Save tensors of many kinds with torch, each kind several times; return the pickle."""
    kinds: list[Callable[[int], torch.Tensor]] = [
        lambda n: torch.full((2, 3), float(n)),
        lambda n: torch.full((3, 2), float(n)).t(),
        lambda n: torch.tensor(float(n)),
        lambda n: torch.full((300,), n, dtype=torch.int16),
        lambda n: torch.zeros(2, 1, 3, 1),
        lambda n: torch.zeros(70_000),
        lambda n: torch.zeros(0, 4),
        lambda n: torch.nn.Parameter(torch.full((2, 3), float(n))),
        lambda n: torch.zeros(2, 3).requires_grad_(),
        lambda n: torch.arange(10)[2:8].view(2, 3),
    ]
    shared = torch.arange(12.0)
    tensors = {f"{n}.{at}": make(n) for n in range(40) for at, make in enumerate(kinds)}
    tensors |= {f"{n}.part": shared[n : n + 2] for n in range(4)}
    tensors |= {f"again.{n}": tensors[f"{n}.0"] for n in range(30, 40)}
    tensors |= {f"last.{n}": torch.zeros(2, 3) for n in range(3)}
    file = io.BytesIO()
    torch.save(tensors, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


def found(said: StorageId) -> Storage:
    return Storage("f", said.key, 0, said.nbytes, said.dtype, said.location)


def described(data: bytes) -> tuple[object, ...]:
    """Read a pickle, and describe its tensors, which of them are one, and the rest."""
    read = pickle_reader.load(data, 0, TorchVocabulary(found))
    tree, first = read.tree, {}
    lines = [
        (key, *value.view, value.requires_grad, first.setdefault(id(value), key))
        if isinstance(value, TensorInfo)
        else (key, repr(value))
        for key, value in tree.pairs
    ]
    return lines, read.globals, read.end


def reread(data: bytes) -> Dict:
    tree = pickle_reader.load(data, 0, TorchVocabulary(found)).tree
    assert isinstance(tree, Dict)
    return tree


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchVocabulary, "phrase", lambda *_: None)
    monkeypatch.setattr(Lowering, "phrase", lambda *_: None)


def test_tensors_read_at_once_are_those_read_by_opcodes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = many_tensors()
    at_once = described(data)
    one_by_one(monkeypatch)
    assert described(data) == at_once


def test_tensors_written_at_once_are_those_written_by_opcodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = reread(many_tensors())
    name, last = tree.pairs[-1]
    for n in range(6):  # alike, but for what an edit changed
        other = replace(last, storage=replace(last.storage, key=f"{n}"), requires_grad=n % 2 == 0)
        tree.pairs.append((f"{name}.{n}", other))
    at_once = pickle_writer.dump(tree, Lowering())
    grads = [value.requires_grad for _, value in reread(at_once).pairs[-6:]]
    assert grads == [True, False] * 3
    assert described(at_once)[0][:-6] == described(many_tensors())[0]
    one_by_one(monkeypatch)
    assert pickle_writer.dump(tree, Lowering()) == at_once


def alike(writer: str) -> bytes:
    """Write many tensors of two kinds in turn, by torch or by ckptool, which skips numbers."""
    file = io.BytesIO()
    kinds = [torch.zeros(4, 4), torch.zeros(3, dtype=torch.int8)]
    torch.save({f"layers.{n}.weight": kinds[n % 2].clone() for n in range(42)}, file)
    with zipfile.ZipFile(file) as archive:
        data = archive.read("archive/data.pkl")
    return data if writer == "torch" else pickle_writer.dump(reread(data), Lowering())


def read_or_refused(data: bytes) -> object:
    try:
        return described(data)
    except CkptoolError as error:
        return type(error), str(error), error.offset


@pytest.mark.parametrize("writer", ["torch", "ckptool"])
def test_any_byte_among_tensors_read_at_once_means_what_opcodes_say(
    writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = alike(writer)
    start, end = data.index(b"layers.36.") - 5, data.index(b"layers.38.")
    values = (0x00, 0x01, 0x30, 0x68, 0xFF)
    changed = [
        data[:at] + bytes((value,)) + data[at + 1 :] for at in range(start, end) for value in values
    ]
    changed += [data[:at] + data[at + 1 :] for at in range(start, end)]
    changed += [data[:at] for at in range(start, end)]
    at_once = [read_or_refused(each) for each in changed]
    assert any(isinstance(each[0], list) for each in at_once)
    one_by_one(monkeypatch)
    for each, found in zip(changed, at_once, strict=True):
        assert read_or_refused(each) == found


def test_opcodes_read_at_once_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    data = many_tensors()
    count = sum(1 for _ in pickletools.genops(data))
    monkeypatch.setattr(pickle_reader, "MAX_OPCODES", count)
    pickle_reader.load(data, 0, TorchVocabulary(found))
    monkeypatch.setattr(pickle_reader, "MAX_OPCODES", count - 1)
    with pytest.raises(LimitExceeded):
        pickle_reader.load(data, 0, TorchVocabulary(found))


@pytest.mark.parametrize("get", [b"j%b", b"g%d\n"], ids=["LONG_BINGET", "GET"])
def test_what_a_tensor_is_made_of_can_be_fetched(get: bytes) -> None:
    data = many_tensors()
    shapes = [at for op, _, at in pickletools.genops(data) if op.name == "TUPLE2"]
    key = int.from_bytes(data[shapes[-4] + 2 : shapes[-4] + 6], "little")
    number = struct.pack("<I", key) if b"%b" in get else key
    fetched = b"X\x01\0\0\0z" + get % number
    read = pickle_reader.load(data[:-2] + fetched + b"u.", 0, TorchVocabulary(found))
    name, value = read.tree.pairs[-1]
    assert (name, type(value)) == ("z", tuple)
    assert {type(size) for size in value} == {int}


def test_memo_numbers_out_of_order_are_followed() -> None:
    """A tensor whose parts swap their numbers is another to who fetches them."""
    data = many_tensors()
    ends = [at for op, _, at in pickletools.genops(data) if op.name == "REDUCE"]
    last = ends[-1] + 1  # the LONG_BINPUT of a tensor
    swapped = data[:last] + b"r" + struct.pack("<I", 4) + data[last + 5 :]
    assert data[last : last + 1] == b"r"
    fetched = b"X\x01\0\0\0zh\x04u."
    tree = reread(swapped[:-2] + fetched)
    assert isinstance(dict(tree.pairs)["z"], TensorInfo)
