"""Random checkpoints, random edits, random strides: what must hold of all of them."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import pickletools
import struct
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import pytest
from conftest import step

from ckptool.errors import EditError, KeyCollision, NothingMatched
from ckptool.files.blocks import blocks
from ckptool.files.copying import NOTHING, Done
from ckptool.pickles.pickle_reader import load
from ckptool.pickles.pickle_writer import dump
from ckptool.state import edits
from ckptool.tensors.dtype import BY_TORCH_NAME
from ckptool.tensors.tensor import Storage, TensorInfo
from ckptool.verbs import surgery
from ckptool.verbs.surgery import Options, Rewrite

hypothesis = pytest.importorskip("hypothesis")
torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
judge = pytest.importorskip("judge")
Memory = pytest.importorskip("test_blocks").Memory

from hypothesis import HealthCheck, assume, example, given, settings, strategies as st  # noqa: E402

settings.register_profile(
    "ckptool",
    deadline=None,
    derandomize=bool(os.environ.get("CI")) or os.environ.get("HYPOTHESIS_PROFILE") == "ci",
    max_examples=100 // step(4),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("ckptool")

# Tensors.


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]
UNTYPED = {torch.uint16, torch.float8_e4m3fn}  # no place in the legacy container

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
seeds = st.integers(0, 2**16)


def random_base(dtype: Any, seed: int, numel: int = 60) -> Any:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), generator=generator).to(torch.uint8)
    return raw.view(dtype) if dtype != torch.bool else raw[:numel] % 2 == 0


@st.composite
def views(draw: Any, base: Any) -> Any:
    """Draw a view of a flat tensor: an offset, a shape, any strides that fit."""
    shape = draw(shapes)
    stride = tuple(draw(st.integers(0, 6)) for _ in shape)
    reach = sum((size - 1) * step for size, step in zip(shape, stride, strict=True) if size)
    room = base.numel() - reach - 1
    if 0 in shape:
        room = base.numel()
    assume(room >= 0)
    return base.as_strided(shape, stride, draw(st.integers(0, room)))


@st.composite
def tensors(draw: Any, legacy: bool, bases: list[Any]) -> Any:
    """Draw a tensor: a new one, or a view of one that was drawn before."""
    if bases and draw(st.booleans()):
        return draw(views(draw(st.sampled_from(bases))))
    dtype = draw(st.sampled_from([dtype for dtype in DTYPES if not legacy or dtype not in UNTYPED]))
    base = random_base(dtype, draw(seeds))
    bases.append(base)
    made = draw(views(base))
    if dtype.is_floating_point and made.numel() and draw(st.booleans()):
        return torch.nn.Parameter(made.detach().clone(), requires_grad=draw(st.booleans()))
    return made


names = st.one_of(
    st.sampled_from(["weight", "bias", "module", "a", "mlp_module", "0", "", "running_mean"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4).map(lambda t: t.replace(".", "")),
)
keys = st.lists(names, min_size=1, max_size=4).map(".".join)
plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text(max_size=6),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=6,
)


@st.composite
def state_dicts(draw: Any, legacy: bool, bases: list[Any]) -> Any:
    """Draw a state_dict: a plain or an ordered dict, with or without `_metadata`."""
    found = draw(st.lists(keys, min_size=1, max_size=6, unique=True))
    prefix = draw(st.sampled_from(["", "", "module.", "_orig_mod.module."]))
    pairs = [(prefix + key, draw(tensors(legacy, bases))) for key in found]
    # Two weights without elements are what one rank of several has, and refused as that.
    ends = [key.rpartition(".")[2] for key, tensor in pairs if tensor.shape == (0,)]
    assume(ends.count("weight") < 2)
    if draw(st.booleans()):
        return dict(pairs)
    state = OrderedDict(pairs)
    if draw(st.booleans()):
        paths = {"": 1} | {
            ".".join(key.split(".")[:depth]): 1 for key in state for depth in range(key.count("."))
        }
        state._metadata = OrderedDict(  # type: ignore[attr-defined]
            (path, {"version": number}) for number, path in enumerate(paths)
        )
    return state


@st.composite
def checkpoints(draw: Any, legacy: bool) -> Any:
    """Draw what people save: a state_dict, bare or in a dict with other things."""
    bases: list[Any] = []
    state = draw(state_dicts(legacy, bases))
    if draw(st.booleans()):
        return state
    around: dict[Any, Any] = {"epoch": draw(st.integers(0, 99)), "args": draw(plain)}
    around["state_dict"] = state
    if draw(st.booleans()):
        momenta = [draw(tensors(legacy, bases)) for _ in range(draw(st.integers(0, 2)))]
        around["optimizer"] = {"state": dict(enumerate(momenta)), "param_groups": [draw(plain)]}
    return around


@st.composite
def saved(draw: Any) -> tuple[Any, dict[str, Any]]:
    """Draw a checkpoint and how torch is to save it."""
    legacy = draw(st.booleans())
    how: dict[str, Any] = {"pickle_protocol": draw(st.integers(2, 5))}
    if legacy:
        how["_use_new_zipfile_serialization"] = False
    return draw(checkpoints(legacy)), how


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def rewrite(source: Path, target: Path, *steps: edits.Edit, **options: Any) -> Rewrite:
    return surgery.rewrite(
        source, target, steps, options=Options(sync=False, force=True, **options)
    )


def state_of(tree: Any) -> Any:
    return tree["state_dict"] if is_wrapped(tree) else tree


def is_wrapped(tree: Any) -> bool:
    return isinstance(tree.get("state_dict"), dict)


def original(path: Path, how: dict[str, Any]) -> Any:
    return judge.load(path, weights_only=how["pickle_protocol"] == 2)


def assert_same(left: Any, right: Any) -> None:
    assert judge.same(left, right) == []


@given(saved())
def test_torch_output_holds_the_same(given_: tuple[Any, dict[str, Any]]) -> None:
    tree, how = given_
    with folder() as at:
        torch.save(tree, at / "in.pth", **how)
        before = original(at / "in.pth", how)
        rewrite(at / "in.pth", at / "out.pth")
        for reading in ({}, {"mmap": True}, {"mmap": True, "calculated_offsets": True}):
            assert_same(before, judge.load(at / "out.pth", **reading))
        rewrite(at / "in.pth", at / "again.pth")
        assert (at / "out.pth").read_bytes() == (at / "again.pth").read_bytes()


@given(saved())
def test_strip_after_add_is_the_identity(given_: tuple[Any, dict[str, Any]]) -> None:
    tree, how = given_
    state = state_of(tree)
    assume("" not in state)  # a key of which nothing would be left is refused
    weights = [value for key, value in state.items() if key.rpartition(".")[2] == "weight"]
    assume(sum(tuple(getattr(each, "shape", ())) == (0,) for each in weights) < 2)  # a part
    with folder() as at:
        torch.save(tree, at / "in.pth", **how)
        rewrite(at / "in.pth", at / "plain.pth")
        rewrite(at / "in.pth", at / "added.pth", edits.add_prefix("x.y"))
        rewrite(at / "added.pth", at / "out.pth", edits.strip_prefix("x.y", every=True))
        rewrite(at / "in.pth", at / "both.pth", edits.add_prefix(), edits.strip_prefix(every=True))
        added = judge.load(at / "added.pth")
        assert list(state_of(added)) == ["x.y." + key for key in state_of(tree)]
        wanted = (at / "plain.pth").read_bytes()
        assert (at / "out.pth").read_bytes() == wanted
        assert (at / "both.pth").read_bytes() == wanted


# Edits.


Model = Callable[[list[str]], "list[str | None] | type[EditError]"]


def under(prefix: str, key: str) -> bool:
    return key == prefix or key.startswith(prefix + ".")


def strip_model(prefix: str) -> Model:
    def model(given_keys: list[str]) -> Any:
        if not any(key.startswith(prefix) for key in given_keys):
            return NothingMatched
        return [key.removeprefix(prefix) for key in given_keys]

    return model


def drop_model(prefix: str, dropping: bool) -> Model:
    def model(given_keys: list[str]) -> Any:
        if not any(under(prefix, key) for key in given_keys):
            return NothingMatched
        return [None if under(prefix, key) is dropping else key for key in given_keys]

    return model


def rename_model(old: str, new: str) -> Model:
    def model(given_keys: list[str]) -> Any:
        if not any(under(old, key) for key in given_keys):
            return NothingMatched
        return [new + key[len(old) :] if under(old, key) else key for key in given_keys]

    return model


@st.composite
def steps_for(draw: Any, start: list[str]) -> tuple[list[edits.Edit], list[Model]]:
    """Draw edits, most of them about keys that are there, and a simple model of each."""
    known = [".".join(key.split(".")[: depth + 1]) for key in start for depth in range(3)]
    known = [prefix for prefix in known if prefix.strip(".") and not set(prefix) & set("*?[{}")]
    known = [prefix for prefix in known if not prefix.startswith("re:")]
    prefixes = st.sampled_from([*known, "module", "nowhere"])
    made: list[edits.Edit] = []
    models: list[Model] = []
    for _ in range(draw(st.integers(1, 3))):
        prefix = draw(prefixes).rstrip(".")
        kind = draw(st.sampled_from(["add", "strip", "rename", "drop", "keep"]))
        if kind == "add":
            made.append(edits.add_prefix(prefix))
            models.append(lambda ks, p=prefix: [f"{p}.{key}" for key in ks])  # type: ignore[misc]
        elif kind == "strip":
            made.append(edits.strip_prefix(prefix))
            models.append(strip_model(prefix + "."))
        elif kind == "rename":
            made.append(edits.rename(prefix, "new"))
            models.append(rename_model(prefix, "new"))
        else:
            made.append(edits.drop([prefix]) if kind == "drop" else edits.keep([prefix]))
            models.append(drop_model(prefix, kind == "drop"))
    return made, models


def modelled(models: list[Model], start: list[str]) -> Any:
    """Say what edits make of keys: a list in their order, or the error."""
    now: list[str | None] = list(start)
    for model in models:
        kept = [key for key in now if key is not None]
        made = model(kept)
        if isinstance(made, type):
            return made
        following = iter(made)
        now = [None if key is None else next(following) for key in now]
        written = [key for key in now if key is not None]
        if any(new == "" != old for old, new in zip(start, now, strict=True)):
            return EditError
        if len(set(written)) < len(written):
            return KeyCollision
    return now


@given(st.data(), st.lists(keys, min_size=1, max_size=8, unique=True))
@settings(max_examples=300 // step(4))
def test_edits_do_what_their_models_say(data: Any, start: list[str]) -> None:
    steps, models = data.draw(steps_for(start))
    wanted = modelled(models, start)
    if isinstance(wanted, type):
        with pytest.raises(EditError) as caught:
            edits.apply(steps, start)
        assert isinstance(caught.value, wanted)
        return
    key_map, whole = edits.apply(steps, start)
    assert list(key_map.pairs) == list(zip(start, wanted, strict=True))
    assert [whole(key) for key in start] == wanted
    assert set(key_map.why) == {key for key, new in zip(start, wanted, strict=True) if new is None}


@given(st.data(), saved())
def test_random_edits_of_random_checkpoints(data: Any, given_: tuple[Any, dict[str, Any]]) -> None:
    tree, how = given_
    start = list(state_of(tree))
    steps, models = data.draw(steps_for(start))
    wanted = modelled(models, start)
    with folder() as at:
        torch.save(tree, at / "in.pth", **how)
        if isinstance(wanted, type):
            with pytest.raises(EditError):
                rewrite(at / "in.pth", at / "out.pth", *steps)
            assert not (at / "out.pth").exists()
            return
        result = rewrite(at / "in.pth", at / "out.pth", *steps)
        assert list(result.map) == list(zip(start, wanted, strict=True))
        assert result.read == result.kept + result.renamed + len(result.dropped) == len(start)
        before, after = original(at / "in.pth", how), judge.load(at / "out.pth")
        made = type(state_of(before))(
            (new, state_of(before)[old])
            for old, new in zip(start, wanted, strict=True)
            if new is not None
        )
        assert judge.same(made, state_of(after), metadata=False) == []
        if is_wrapped(before):
            assert_same({**before, "state_dict": 0}, {**after, "state_dict": 0})

        step_by_step, now = at / "in.pth", start
        for number, (step, model) in enumerate(zip(steps, models, strict=True)):
            following = modelled([model], now)
            if not now or isinstance(following, type):
                return  # what is fine in the end may be refused on the way
            now = [key for key in following if key is not None]
            target = at / f"step{number}.pth"
            rewrite(step_by_step, target, step)
            step_by_step = target
        last = judge.load(step_by_step)
        assert judge.same(made, state_of(last), metadata=False) == []


@given(saved())
def test_there_and_back_through_safetensors(given_: tuple[Any, dict[str, Any]]) -> None:
    tree, how = given_
    assume("__metadata__" not in state_of(tree))
    with folder() as at:
        torch.save(tree, at / "in.pth", **how)
        before = state_of(original(at / "in.pth", how))
        result = rewrite(at / "in.pth", at / "out.safetensors")
        ties = {each.key: each.reason.removeprefix("tied to ") for each in result.dropped}
        alone = {
            key: tensor.detach().clone(memory_format=torch.contiguous_format)
            for key, tensor in before.items()
        }
        written = {key: tensor for key, tensor in alone.items() if key not in ties}
        safetensors_torch.save_file(written, at / "theirs.safetensors", {"format": "pt"})
        ours, theirs = (split(at / f"{name}.safetensors") for name in ("out", "theirs"))
        assert ours == theirs
        assert set(ties) == {
            key
            for index, (key, tensor) in enumerate(before.items())
            if tensor.numel()
            and any(tied(tensor, other) for other in list(before.values())[:index])
        }
        rewrite(at / "out.safetensors", at / "back.pth")
        wanted: Any = OrderedDict((key, alone[ties.get(key, key)]) for key in alone)
        if hasattr(before, "_metadata"):
            wanted._metadata = before._metadata
        assert judge.same(wanted, judge.load(at / "back.pth"), storage=False) == []


def tied(one: Any, other: Any) -> bool:
    """Tell whether two tensors are exactly one view of one storage."""
    facts = [
        (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
        )
        for tensor in (one, other)
    ]
    return bool(facts[0] == facts[1])


def split(path: Path) -> tuple[list[Any], bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    del header["__metadata__"]
    return list(header.items()), content[end:]


# The pickle writer, against the standard library's.


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**80), 2**80),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.complex_numbers(allow_nan=False),
)
hashable = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5).map(tuple), st.frozensets(inner, max_size=3)
    ),
    max_leaves=4,
)


@st.composite
def graphs(draw: Any) -> Any:
    """Draw values that hold each other: shared, and in cycles."""
    pool: list[Any] = [draw(hashable) for _ in range(draw(st.integers(1, 4)))]
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["list", "dict", "tuple", "set", "bytearray", "ordered"]))
        members = [
            pool[draw(st.integers(0, len(pool) - 1))] for _ in range(draw(st.integers(0, 5)))
        ]
        if kind == "list":
            pool.append(list(members))
        elif kind == "tuple":
            pool.append(tuple(members))
        elif kind == "set":
            pool.append({draw(hashable) for _ in range(2)})
        elif kind == "bytearray":
            pool.append(bytearray(draw(st.binary(max_size=5))))
        else:
            made: Any = {} if kind == "dict" else OrderedDict()
            made.update((draw(hashable), member) for member in members)
            pool.append(made)
    lists = [value for value in pool if type(value) is list]
    for value in lists:  # cycles
        if draw(st.booleans()):
            value.append(pool[draw(st.integers(0, len(pool) - 1))])
    return pool[draw(st.integers(len(pool) // 2, len(pool) - 1))]


def no_lowering(node: Any) -> Any:
    raise AssertionError(node)


@given(graphs(), st.integers(0, 5), st.booleans())
@settings(max_examples=300 // step(4))
@example([b""], 0, False)
def test_pickles_are_written_as_they_were_read(value: Any, protocol: int, optimize: bool) -> None:
    data = pickle.dumps(value, protocol)
    again = dump(load(pickletools.optimize(data) if optimize else data).tree, no_lowering)
    assert alike(pickle.loads(again), value, {}, {})


def alike(left: Any, right: Any, there: dict[int, int], back: dict[int, int]) -> bool:
    """Compare values, their bits, and which mutable ones are the same object."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack("<d", left) == struct.pack("<d", right)
    if isinstance(left, complex):
        return alike(left.real, right.real, {}, {}) and alike(left.imag, right.imag, {}, {})
    if isinstance(left, (set, frozenset)):
        return bool(left == right)
    if not isinstance(left, (list, tuple, dict, bytearray)):
        return bool(left == right)
    if not isinstance(left, tuple):
        if id(left) in there or id(right) in back:
            return there.get(id(left)) == id(right) and back.get(id(right)) == id(left)
        there[id(left)], back[id(right)] = id(right), id(left)
    if len(left) != len(right):
        return False
    if isinstance(left, dict):
        return all(
            alike(a, b, there, back) and alike(left[a], right[b], there, back)
            for a, b in zip(left, right, strict=True)
        )
    if isinstance(left, bytearray):
        return left == right
    return all(alike(a, b, there, back) for a, b in zip(left, right, strict=True))


# Strides and checksums.


@given(st.data(), st.sampled_from(DTYPES), seeds, st.integers(8, 200))
@settings(max_examples=300 // step(4))
def test_blocks_hold_what_contiguous_holds(data: Any, dtype: Any, seed: int, limit: int) -> None:
    view = data.draw(views(random_base(dtype, seed)))
    raw = judge.storage_bytes(view.untyped_storage())
    info = TensorInfo(
        BY_TORCH_NAME[str(dtype).removeprefix("torch.")],
        tuple(view.shape),
        tuple(view.stride()),
        Storage("file", "0", 0, len(raw)),
        view.storage_offset(),
    )

    readers = Memory(file=raw)
    parts = [bytes(block) for block in blocks(info, readers, limit)]
    assert max([*readers.reads, *map(len, parts)]) <= max(limit, dtype.itemsize)
    wanted = judge.storage_bytes(view.contiguous().clone().untyped_storage())
    assert b"".join(parts) == (wanted if prod(view.shape) else b"")


def joined(parts: list[bytes]) -> Done:
    total = NOTHING
    for part in parts:
        total = total.followed_by(Done(zlib.crc32(part), len(part)))
    return total


@given(st.binary(max_size=2000), st.lists(st.integers(0, 2000), max_size=8))
@settings(max_examples=300 // step(4))
@example(b"", [])
@example(b"x" * 1999, [0, 0, 1999])
def test_joined_checksums_are_zlibs(data: bytes, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    parts = [data[begin:end] for begin, end in itertools.pairwise(places)]
    assert joined(parts) == (zlib.crc32(data), len(data))


def test_joined_checksums_of_large_parts() -> None:
    parts = [bytes([n]) * ((1 << 20) + n) for n in range(3)]
    whole = b"".join(parts)
    assert joined(parts) == (zlib.crc32(whole), len(whole))
    assert joined([]) == (0, 0)
