"""Plain pickles of tensors: read as data, judged by the `pickle` and the torch that made them."""

from __future__ import annotations

import functools
import gzip
import io
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

import ckptool
from ckptool.verbs import checking
from ckptool.verbs.checked import Status

torch = pytest.importorskip("torch")
Run = Callable[..., Any]


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    return {**model.state_dict(), "h": torch.ones(3, dtype=torch.bfloat16)}


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("echo executed",)


class Loads:
    """A call of torch.storage._load_from_bytes on some bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self.content,)


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_is_read(run: Run, tmp_path: Path, protocol: int) -> None:
    source, out = tmp_path / "in.pkl", tmp_path / "out.pth"
    wanted = {"epoch": 3, "state_dict": state()}
    source.write_bytes(pickle.dumps(wanted, protocol))
    assert run("convert", source, out).code == 0
    assert same(torch.load(out, weights_only=True)["state_dict"], wanted["state_dict"])
    assert same(ckptool.load_state_dict(source), wanted["state_dict"])
    document = run("info", source, "--json").document
    assert (document["container"], document["safety"]) == ("plain-pickle", "foreign")
    assert document["foreign"] == ["torch.storage._load_from_bytes"]
    assert run("check", source).out.split("\t")[1] == "ok"


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_numpy_alone_are_a_state_dict(run: Run, tmp_path: Path, protocol: int) -> None:
    """As Detectron's model zoo has them; arrays that are in no dict are not."""
    numpy = pytest.importorskip("numpy")
    source, out = tmp_path / "model_final.pkl", tmp_path / "out.pth"
    model = {key: value.numpy() for key, value in state().items() if key != "h"}
    source.write_bytes(pickle.dumps({"model": model, "__author__": "Caffe2"}, protocol))
    assert run("unwrap", "--tensors-only", source, out).code == 0
    loaded = torch.load(out, weights_only=True)
    assert list(loaded) == list(model)
    assert all(numpy.array_equal(loaded[key].numpy(), model[key]) for key in model)
    assert run("check", source).out.split("\t")[1] == "ok"
    source.write_bytes(pickle.dumps([numpy.arange(3), 1], protocol))
    assert "error[not-a-checkpoint]" in run("keys", source).err


def test_a_whole_model_and_a_packed_file(run: Run, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    packed, out = tmp_path / "model.pkl.gz", tmp_path / "out.pth"
    packed.write_bytes(gzip.compress(pickle.dumps(model)))
    assert "model.pkl.gz::model.pkl" in run("keys", packed).err
    assert run("unwrap", f"{packed}::model.pkl", out).code == 0
    assert same(torch.load(out, weights_only=True), model.state_dict())


def test_ties_are_kept(tmp_path: Path, run: Run) -> None:
    weight = torch.randn(3, 2)
    source, out = tmp_path / "in.pkl", tmp_path / "out.pth"
    source.write_bytes(pickle.dumps({"a": weight, "b": weight}))
    assert run("convert", source, out).code == 0
    loaded = torch.load(out, weights_only=True)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


HOSTILE = {
    "beside": lambda: Runs(),
    "inside": lambda: Loads(saved(Runs())),
    "inside the inside": lambda: Loads(saved(Loads(saved(Runs())))),
    "not a torch file": lambda: Loads(b"cos\nsystem\n(S'echo executed'\ntR."),
    "kept for later": lambda: functools.partial(torch.storage._load_from_bytes, saved(Runs())),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_would_run_is_unsafe(run: Run, tmp_path: Path, kind: str, protocol: int) -> None:
    source, out = tmp_path / "in.pkl", tmp_path / "out.pth"
    source.write_bytes(pickle.dumps({"w": torch.zeros(2), "hook": HOSTILE[kind]()}, protocol))
    assert checking.check(source).status is Status.UNSAFE
    assert run("convert", source, out).code == 4
    assert run("convert", source, out, "--tensors-only").code == 0
    assert list(torch.load(out, weights_only=True)) == ["w"]


def test_no_advice_loads_what_would_run(run: Run, tmp_path: Path) -> None:
    """Not of a pickle without tensors either, nor of one that is cut off after the call."""
    source = tmp_path / "in.pkl"
    for value in ({"hook": Runs()}, {"xgboost": Runs()}, {"a": 1, "joblib.numpy_pickle": Runs()}):
        for content in (pickle.dumps(value), pickle.dumps(value, 2)[:-1] + b"\xff"):
            source.write_bytes(content)
            done = run("info", source)
            assert done.code == 3
            assert "load" not in done.err.partition("hint:")[2]
            assert "reads it" not in done.err


def test_arrays_that_joblib_writes_between_opcodes(run: Run, tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    arrays = {
        "c": np.arange(6.0).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6, dtype="i2").reshape(2, 3)),
        "text": np.array(["ab", "c"]),
    }
    source, out = tmp_path / "in.joblib", tmp_path / "out.pth"
    source.write_bytes(joblib_dump({"w": torch.arange(4.0), **arrays, "end": 7}))
    assert run("convert", source, out).code == 0
    loaded = torch.load(out, weights_only=False)
    assert loaded["w"].tolist() == [0, 1, 2, 3]
    assert loaded["end"] == 7
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert np.array_equal(loaded[name], array)
    source.write_bytes(joblib_dump(arrays))
    assert "pickle of joblib" in run("info", source).err
    source.write_bytes(joblib_dump({"w": torch.arange(4.0), "o": np.array([None])}))
    assert checking.check(source).status is not Status.OK


CODE = b"cposix\nsystem\nX\x04\0\0\0true\x85R0"


def text(letters: str) -> bytes:
    return b"X" + len(letters).to_bytes(4, "little") + letters.encode()


def array_of_joblib(
    kind: str,
    count: int,
    content: bytes,
    *,
    state: bytes = b"",
    more: bytes = b"",
    new: bytes = b"",
) -> bytes:
    """Push an array as joblib writes it, but for what is given."""
    dtype = b"cnumpy\ndtype\n" + text(kind) + b"K\0K\1\x87R" + state
    fields = {"shape": b"K%c\x85" % count, "dtype": dtype, "order": text("C")}
    pairs = b"".join(text(key) + value for key, value in fields.items())
    named = b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n"
    return named + (new or b")\x81") + b"}(" + pairs + more + b"ub" + content


LONG = len(CODE)
TWICE = text("shape") + b"K\0\x85"
ALIGNED = text("numpy_array_alignment_bytes") + b"K\x10"
LYING_ARRAYS = {
    "padding that pickle.load runs": array_of_joblib(
        "f4", 1, b"0" + CODE.ljust(ord("0"), b"N") + bytes(4), more=ALIGNED
    ),
    "elements that pickle.load runs": array_of_joblib("u1", LONG + 1, b"0" + CODE),
    "a shape that appears twice": array_of_joblib("u1", LONG, CODE, more=TWICE),
    "elements of another size": array_of_joblib(
        f"S{LONG}", 1, b"\xff" + CODE[:-1], state=b"(K\3" + text("|") + b"NNNK\1K\1K\0tb"
    ),
    "Python objects": array_of_joblib(
        f"S{LONG}", 1, CODE,
        state=b"(K\3" + text("|") + b"(cnumpy\ndtype\n" + text("O8") + b"\x85RK\1\x85tNN"
        b"K%cK\1K\x3ftb" % LONG,
    ),
    "a state after an __init__": array_of_joblib(
        "u1", LONG, CODE, new=b"(cnumpy\nndarray\nK\1\x85" + text("C") + b"NtR"
    ),
    "a second state": array_of_joblib(  # its text is an element to joblib, and code
        "u1", 1, b"\xffh\x50}bUN" + CODE.ljust(ord("N"), b"N") + b"00", new=b")\x81q\x50"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LYING_ARRAYS)
def test_arrays_that_joblib_or_pickle_reads_otherwise(tmp_path: Path, what: str) -> None:
    """What is the array to one is code to the other, or to joblib itself."""
    np = pytest.importorskip("numpy")
    whole = pickle.dumps({"w": np.ones(3)}, 2)
    path = tmp_path / "in.joblib"
    path.write_bytes(whole[:-2] + b"s" + text("x") + LYING_ARRAYS[what] + b"s.")
    found = checking.check(path)
    assert found.status is not Status.OK
    if "pickle.load" in what:
        assert found.status is Status.UNSAFE
        assert "posix.system('true')" in found.detail


def joblib_dump(value: Any) -> bytes:
    """Write as joblib/numpy_pickle.py does: the bytes of an array behind what describes it."""
    np = pytest.importorskip("numpy")
    names = b"joblib.numpy_pickle\nNumpyArrayWrapper\n"
    file = io.BytesIO()

    class Wrapper:
        def __init__(self, array: Any) -> None:
            fortran = array.flags.f_contiguous and not array.flags.c_contiguous
            self.__dict__ = {"subclass": np.ndarray, "shape": array.shape, "dtype": array.dtype}
            self.__dict__ |= {"order": "F" if fortran else "C", "numpy_array_alignment_bytes": 16}

    class Pickler(pickle._Pickler):  # type: ignore[misc,name-defined]
        def save_global(self, obj: Any, name: Any = None) -> None:
            if obj is Wrapper:
                self.write(b"c" + names)
            else:
                super().save_global(obj, name)

        dispatch: ClassVar[Any] = {**pickle._Pickler.dispatch, type: save_global}  # type: ignore[attr-defined]

        def save(self, obj: Any, save_persistent_id: bool = True) -> None:
            if type(obj) is not np.ndarray:
                super().save(obj, save_persistent_id)
                return
            wrapper = Wrapper(obj)
            super().save(wrapper)
            padding = 16 - (file.tell() + 1) % 16
            order = wrapper.__dict__["order"]
            file.write(bytes([padding]) + b"\xff" * padding + obj.tobytes(order))

    Pickler(file, 2).dump(value)
    return file.getvalue()


def test_a_snapshot_of_stylegan(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules are read by their attributes; the source text in them is never run."""
    for name in ("torch_utils", "torch_utils.persistence"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    vars(sys.modules["torch_utils.persistence"]).update(locals())

    class Net(torch.nn.Linear):  # type: ignore[misc,name-defined]
        def __reduce__(self) -> Any:
            meta = {"type": "class", "module_src": "raise Exception", "class_name": "Net"}
            return _reconstruct_persistent_obj, ({**meta, "state": vars(self)},)

    source, out = tmp_path / "network.pkl", tmp_path / "out.pth"
    nets = {"G": Net(3, 2), "D": Net(2, 1), "G_ema": Net(3, 2)}
    source.write_bytes(pickle.dumps(nets))
    assert run("unwrap", source, out, "--at", "G_ema").code == 0
    assert same(torch.load(out, weights_only=True), dict(nets["G_ema"].state_dict()))
    assert checking.check(source).status is Status.UNSAFE
    assert run("convert", source, out, "--force").code == 4
