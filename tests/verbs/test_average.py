"""Averages of checkpoints: any dtype in any container, judged by torch in double precision."""

from __future__ import annotations

import copy
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ckptool
from ckptool.errors import EditError, Malformed, Overflow, WriteError
from ckptool.tensors import numbers
from ckptool.tensors.dtype import BY_TORCH_NAME, DType

judge = pytest.importorskip("judge")

Run = Callable[..., Outcome]
State = dict[str, torch.Tensor]

FLOATS = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
]


def of_torch(dtype: torch.dtype) -> DType:
    return BY_TORCH_NAME[str(dtype).removeprefix("torch.")]


def raw(tensor: torch.Tensor) -> bytes:
    """Return the elements in order, what is pending done."""
    made = tensor.detach().resolve_conj().resolve_neg().contiguous().clone()
    return bytes(judge.storage_bytes(made.untyped_storage()))


def once(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round doubles once, to nearest even: torch does so to float32 and half precision alone.

    To fewer bits it rounds to float32 first; made odd where it is not exact, that does no harm.
    """
    if dtype in (torch.float64, torch.float32, torch.complex64, torch.complex128):
        return wide.to(dtype)
    single = wide.float()
    below = torch.where(single.double().abs() > wide.abs(), single.nextafter(single * 0), single)
    odd = below.view(torch.int32) | (below.double() != wide).int()
    return odd.view(torch.float32).to(dtype)


def summed(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Sum in double precision, in order, and round once to the dtype of the first."""
    wide = torch.complex128 if tensors[0].is_complex() else torch.float64
    total = weights[0] * tensors[0].to(wide)
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor.to(wide)
    return once(total, tensors[0].dtype)


def mean(states: Sequence[State], weights: Sequence[float] = ()) -> State:
    """Average state_dicts as the issue says: floats, and all else of the last."""
    given = list(weights) or [1 / len(states)] * len(states)
    return {
        key: summed([state[key] for state in states], given)
        if value.is_floating_point() or value.is_complex()
        else states[-1][key]
        for key, value in states[0].items()
    }


def model(seed: int, dtypes: Sequence[torch.dtype] = FLOATS) -> State:
    """Make a state_dict with every dtype, a tie, a view, a buffer that counts, and empty ones."""
    torch.manual_seed(seed)
    tied = torch.randn(7, 5)
    state = {f"layer.{number}": torch.randn(9, 4).to(d) for number, d in enumerate(dtypes)}
    state |= {"head.weight": tied, "embed.weight": tied, "bn.running_mean": torch.randn(3)}
    state |= {"bn.num_batches_tracked": torch.tensor(seed), "mask": torch.tensor([seed > 0, True])}
    return state | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(seed / 3)}


def equal(got: State, wanted: State) -> None:
    """Compare key order and bits."""
    assert list(got) == list(wanted)
    for key, value in wanted.items():
        assert (got[key].dtype, got[key].shape) == (value.dtype, value.shape), key
        assert raw(got[key]) == raw(value), key


def save(state: State, folder: Path, form: str) -> Path:
    """Write a state_dict in a form; give its path."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{form}.pth"
    if form == "torch":
        torch.save(OrderedDict(state), path)
    elif form == "legacy":
        old = {key: value for key, value in state.items() if value.dtype not in NEW}
        torch.save(OrderedDict(old), path, _use_new_zipfile_serialization=False)
    elif form == "nested":
        torch.save({"epoch": 3, "state_dict": OrderedDict(state), "args": "x"}, path)
    elif form == "wrapped":
        wrapped = {f"_orig_mod.module.{key}": value for key, value in reversed(state.items())}
        torch.save(wrapped, path)
    elif form == "safetensors":
        path = folder / "model.safetensors"
        save_file({key: value.clone() for key, value in state.items()}, path)
    else:
        torch.save(OrderedDict(state), path)
        options = {"to": "dcp"} if form == "dcp" else {"max_shard_size": 700}
        ckptool.convert(path, folder / form, force=True, **options)  # type: ignore[arg-type]
        path = folder / form
    return path


NEW = (torch.float8_e4m3fn, torch.float8_e5m2)  # which the old form has no storages for
FORMS = ("torch", "legacy", "nested", "wrapped", "safetensors", "sharded", "dcp")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", ["torch", "safetensors", "wrapped"])
def test_inputs_of_any_container_and_wrapper_are_averaged_as_torch_does(
    tmp_path: Path, first: str, form: str
) -> None:
    dtypes = [each for each in FLOATS if each != torch.complex128 and each not in NEW]
    states = [model(seed, dtypes) for seed in range(3)]
    forms = (first, form, form)
    paths = [save(state, tmp_path / str(n), forms[n]) for n, state in enumerate(states)]
    out = tmp_path / ("out.safetensors" if first == "safetensors" else "out.pth")
    done = ckptool.average(paths, out)
    wanted = mean(states)
    if first == "wrapped":
        wanted = {f"_orig_mod.module.{key}": value for key, value in reversed(wanted.items())}
    got = load_file(out) if first == "safetensors" else torch.load(out, weights_only=True)
    if first == "safetensors":
        wanted = {key: wanted[key] for key in got}
        assert got.keys() == states[0].keys()
    equal(got, wanted)
    assert done.from_last == 2
    assert ckptool.diff(out, out).equal


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", "", "/"])
def test_the_output_is_of_any_container(tmp_path: Path, suffix: str) -> None:
    states = [model(seed, FLOATS[:-1]) for seed in range(2)]
    paths = [save(state, tmp_path / str(n), "nested") for n, state in enumerate(states)]
    out = tmp_path / f"out{suffix}"
    done = ckptool.average(paths, out, **({"to": "dcp"} if suffix == "/" else {}))
    assert done.rewrite.not_carried == ("epoch", "args")
    wanted = mean(states)
    got: dict[str, Any] = {key: torch.empty_like(value) for key, value in wanted.items()}
    if suffix == "/":
        load_dcp(got, storage_reader=FileSystemReader(out))
    elif suffix == ".safetensors":
        got = load_file(out)
        assert wanted.keys() - got.keys() == {"embed.weight"}  # tied, and noted in the file
        wanted = {key: wanted[key] for key in got}
    else:
        got = dict(torch.load(out, weights_only=True))
        assert got["head.weight"].data_ptr() == got["embed.weight"].data_ptr()
    equal(got, wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weights", [(), (1.0, 1.0, -1.0), (0.25, -0.5, 1e-3)], ids=str)
def test_sums_of_any_bits_are_rounded_once(
    tmp_path: Path, dtype: torch.dtype, weights: tuple[float, ...]
) -> None:
    """Random bits are of every exponent; what is not finite, or would not be, is another test."""
    random = torch.Generator().manual_seed(1)
    states = []
    for _ in range(3):
        data = torch.randint(0, 256, (1 << 16,), generator=random, dtype=torch.uint8)
        real = data.view(dtype)
        if dtype.is_complex:
            real = torch.view_as_real(real)
        small = real.double().abs() < torch.finfo(dtype).max / 4
        values = torch.where(small, real.double(), 0.0).to(real.dtype)
        states.append({"w": torch.view_as_complex(values) if dtype.is_complex else values})
    paths = [save(state, tmp_path / str(n), "torch") for n, state in enumerate(states)]
    ckptool.average(paths, tmp_path / "out.pth", weights=weights or None)
    equal(torch.load(tmp_path / "out.pth", weights_only=True), mean(states, weights))


@pytest.mark.parametrize("dtype", [each for each in FLOATS if not each.is_complex], ids=str)
def test_what_is_the_same_in_all_stays_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.uint8)
    odd = torch.tensor([1, 3, -1], dtype=torch.int64).view(torch.uint8)  # subnormal doubles
    state = {"w": torch.cat([every, odd]).view(dtype), "last": torch.tensor(1)}
    path, other = (save(state, tmp_path / name, "torch") for name in "ab")
    for sources, weights in (
        ([path], None),
        ([path], [1]),
        ([path, path], None),
        ([path, other], None),
        ([path, other, path], None),
        ([path, other], [0.999, 0.001]),
        ([path, other, path], [1, 1, -1]),
    ):
        done = ckptool.average(sources, tmp_path / "out.pth", weights=weights, force=True)
        equal(torch.load(tmp_path / "out.pth", weights_only=True), state)
        assert len(done.keys) == 1


def test_one_input_gives_all_that_is_in_it_back(tmp_path: Path, good: Path) -> None:
    for name in ("every_dtype.pth", "strided.pth", "big_endian.pth", "tied.pth"):
        out = tmp_path / name
        ckptool.average(good / name, out)
        unwrapped = tmp_path / "bare.pth"
        ckptool.convert(good / name, unwrapped, unwrap=True, force=True)
        assert out.read_bytes() == unwrapped.read_bytes()


def test_what_is_not_finite_is_as_arithmetic_has_it(tmp_path: Path) -> None:
    inf, nan = float("inf"), float("nan")
    columns = [(inf, 1.0), (inf, inf), (inf, -inf), (nan, 1.0), (-0.0, -0.0), (-inf, 2.0)]
    for number, values in enumerate(zip(*columns, strict=True)):
        torch.save({"w": torch.tensor(values)}, tmp_path / f"{number}.pth")
    ckptool.average([tmp_path / "0.pth", tmp_path / "1.pth"], tmp_path / "out.pth")
    got = torch.load(tmp_path / "out.pth")["w"]
    assert [str(each) for each in got.tolist()] == ["inf", "inf", "nan", "nan", "-0.0", "-inf"]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4).flatmap(
        lambda n: st.lists(st.tuples(*[st.floats(width=32)] * n), min_size=1, max_size=9)
    ),
    weights=st.lists(st.floats(-4, 4), min_size=4, max_size=4),
)
def test_the_kernel_is_the_sum_of_python(
    rows: list[tuple[float, ...]], weights: list[float]
) -> None:
    columns = [struct.pack(f"<{len(rows)}f", *column) for column in zip(*rows, strict=True)]
    factors = tuple(weights[: len(columns)])
    made = bytearray(8 * len(rows))
    numbers.mean(made, columns, [DType.F32] * len(columns), factors, DType.F64)
    for row, got in zip(rows, struct.unpack(f"<{len(rows)}d", made), strict=True):
        total = row[0] * factors[0]
        for value, weight in zip(row[1:], factors[1:], strict=True):
            total += value * weight
        assert struct.pack("<d", got) == struct.pack("<d", total) or (got != got and total != total)


# What is taken of which.


def test_dtypes_may_differ_and_those_of_the_first_are_written(tmp_path: Path) -> None:
    states: list[State] = []
    for seed, dtype in enumerate((torch.bfloat16, torch.float32, torch.float16)):
        torch.manual_seed(seed)
        tied = torch.randn(8, 300).to(dtype)
        states.append({"w": tied, "again": tied, "part": tied[2:4], "t": tied.t()})
        torch.save(states[-1], tmp_path / f"{seed}.pth")
    done = ckptool.average([tmp_path / f"{seed}.pth" for seed in range(3)], tmp_path / "out.pth")
    got = torch.load(tmp_path / "out.pth")
    equal(got, mean(states))
    assert len({value.untyped_storage().data_ptr() for value in got.values()}) == 1
    assert [note.split(" has ")[1] for note in done.rewrite.notes] == [
        f"4 tensors in another dtype; written as in {tmp_path / '0.pth'}"
    ] * 2


def test_ties_of_the_first_alone_are_computed_apart_and_named(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    torch.save({"a": weight, "b": weight, "c": weight}, tmp_path / "tied.pth")
    other = torch.randn(4, 3)
    torch.save({"a": other, "b": other + 1, "c": other}, tmp_path / "half.pth")
    paths = [tmp_path / "tied.pth", tmp_path / "half.pth"]
    done = ckptool.average(paths, tmp_path / "out.pth")
    got = torch.load(tmp_path / "out.pth")
    assert torch.equal(got["a"], got["c"])
    assert got["a"].data_ptr() == got["c"].data_ptr()
    assert torch.equal(got["b"], summed([weight, other + 1], [0.5, 0.5]))
    assert done.apart == {"b": "a"}
    assert done.to_dict()["untied"] == [["b", "a"]]
    assert any(note.endswith("not in the output: b = a") for note in done.rewrite.notes)


def test_what_cannot_be_averaged_is_the_last_files(tmp_path: Path) -> None:
    def state(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        weight = torch.randn(4, 4)
        return {
            "w": weight,
            "ids": torch.tensor([seed]),
            "flag": torch.tensor(seed > 0),
            "sparse": weight.to_sparse(),
            "q": torch.quantize_per_tensor(weight, 0.1 + seed, 3, torch.qint8),
            "packed.weight": torch.full((4,), seed, dtype=torch.int8),
            "packed.weight_scale": torch.tensor([float(seed)]),
            "_extra_state": f"text {seed}",
        }

    for seed in range(2):
        torch.save(state(seed), tmp_path / f"{seed}.pth")
    done = ckptool.average([tmp_path / "0.pth", tmp_path / "1.pth"], tmp_path / "out.pth")
    got, last = torch.load(tmp_path / "out.pth"), state(1)
    assert torch.equal(got["w"], summed([state(0)["w"], last["w"]], [0.5, 0.5]))
    assert got["_extra_state"] == "text 1"
    assert (got["q"].q_scale(), got["packed.weight_scale"].item()) == (1.1, 1)
    assert torch.equal(got["sparse"].to_dense(), last["w"])
    assert done.keys == ("w",)
    assert done.last == {
        "I64": ("ids",),
        "BOOL": ("flag",),
        "sparse_coo": ("sparse",),
        "quantized, with scales": ("q", "packed.weight", "packed.weight_scale"),
        "not tensors": ("_extra_state",),
    }


def test_layout_parameters_and_versions_are_the_firsts(tmp_path: Path) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        state = net.to(memory_format=torch.channels_last).state_dict(keep_vars=True)
        if seed:
            del state._metadata  # type: ignore[attr-defined]
        torch.save(state, tmp_path / f"{seed}.pth")
    done = ckptool.average([tmp_path / "0.pth", tmp_path / "1.pth"], tmp_path / "out.pth")
    got = torch.load(tmp_path / "out.pth")
    assert got._metadata["1"] == {"version": 2}
    assert isinstance(got["0.weight"], torch.nn.Parameter)
    assert got["0.weight"].requires_grad
    assert got["0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert any("update_bn" in note for note in done.rewrite.notes)


def test_files_of_both_byte_orders_become_one(tmp_path: Path, good: Path) -> None:
    big = good / "big_endian.pth"
    state = torch.load(big, weights_only=True)
    torch.save(state, tmp_path / "little.pth")
    for paths in ([big, tmp_path / "little.pth"], [tmp_path / "little.pth", big], [big, big]):
        ckptool.average(paths, tmp_path / "out.pth", force=True)
        equal(torch.load(tmp_path / "out.pth", weights_only=True), state)


def test_a_wrappers_own_entries_need_not_be_in_all(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    averaged = AveragedModel(net)
    averaged.update_parameters(net)
    torch.save(averaged.state_dict(), tmp_path / "swa.pth")
    torch.save(net.state_dict(), tmp_path / "net.pth")
    swa, plain = tmp_path / "swa.pth", tmp_path / "net.pth"
    done = ckptool.average([swa, plain], tmp_path / "one.pth")
    equal(torch.load(tmp_path / "one.pth"), averaged.state_dict())
    assert done.last == {"a wrapper's own": ("n_averaged",)}
    ckptool.average([plain, swa], tmp_path / "two.pth")
    equal(torch.load(tmp_path / "two.pth"), net.state_dict())


# What people average for.


def trained(steps: int) -> Iterator[torch.nn.Module]:
    """Yield a small network after each of some steps."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
        yield net


def test_swa_is_that_of_torch(tmp_path: Path) -> None:
    swa: AveragedModel | None = None
    paths = []
    for number, net in enumerate(trained(5)):
        swa = swa or AveragedModel(net, use_buffers=True)
        swa.update_parameters(net)
        paths.append(tmp_path / f"{number}.pth")
        torch.save({"model": net.state_dict(), "epoch": number}, paths[-1])
    assert swa is not None
    ckptool.average(paths, tmp_path / "swa.pth")
    got, wanted = torch.load(tmp_path / "swa.pth"), swa.module.state_dict()
    for key, value in wanted.items():
        if value.is_floating_point():
            torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-7)
    assert got["1.num_batches_tracked"] == 5


def test_ema_and_task_arithmetic_are_those_of_torch(tmp_path: Path) -> None:
    states = [copy.deepcopy(net.state_dict()) for net in trained(3)]
    paths = [save(state, tmp_path / str(n), "torch") for n, state in enumerate(states)]
    ckptool.average(paths[:2], tmp_path / "ema.pth", weights=[0.999, 0.001])
    floats = [[v for v in state.values() if v.is_floating_point()] for state in states]
    wanted = [each.clone() for each in floats[0]]
    get_ema_multi_avg_fn(0.999)(wanted, floats[1], None)
    got = torch.load(tmp_path / "ema.pth")
    for value, other in zip(
        (v for v in got.values() if v.is_floating_point()), wanted, strict=True
    ):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7)
    done = ckptool.average(paths, tmp_path / "task.pth", weights=[1, 1, -1])
    equal(torch.load(tmp_path / "task.pth"), mean(states, [1, 1, -1]))
    assert done.weights == (1, 1, -1)


# What is refused.


def test_differences_are_all_named(tmp_path: Path) -> None:
    ones = torch.ones
    torch.save({"a": ones(2), "b": ones(3), "c": ones(1), "n": ones(1)}, tmp_path / "x.pth")
    int_b = {"a": ones(2), "d": ones(3), "c": ones(5), "n": ones(1).long()}
    torch.save(int_b, tmp_path / "y.pth")
    paths = [tmp_path / name for name in ("x.pth", "x.pth", "y.pth")]
    with pytest.raises(EditError, match="1 of 2 others") as caught:
        ckptool.average(paths, tmp_path / "out.pth")
    x, y = (tmp_path / name for name in ("x.pth", "y.pth"))
    assert list(caught.value.evidence) == [
        f"only in {x}: 1 key: b",
        f"only in {y}: 1 key: d",
        f"c: F32 [1] in {x}, F32 [5] in {y}",
        f"n: F32 [1] in {x}, I64 [1] in {y}",
    ]
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    "weights", [[1], [1, 2, 3], [], [1, float("nan")], [1, float("inf")], "ab"]
)
def test_weights_must_be_numbers_and_one_for_each(tmp_path: Path, weights: Any) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pth")
    with pytest.raises(EditError, match="weight"):
        ckptool.average([tmp_path / "a.pth"] * 2, tmp_path / "out.pth", weights=weights)
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("words", ["-1,2", "-1 2", "-1, 2", "=-1,2"])
def test_weights_of_the_command_may_begin_with_a_sign(run: Run, tmp_path: Path, words: str) -> None:
    for number in range(2):
        torch.save({"w": torch.full((3,), float(number))}, tmp_path / f"{number}.pth")
    option = [f"--weights{words}"] if words.startswith("=") else ["--weights", words]
    done = run("average", *option, tmp_path / "0.pth", tmp_path / "1.pth", tmp_path / "out.pth")
    assert done.code == 0
    assert torch.load(tmp_path / "out.pth")["w"].tolist() == [2.0] * 3
    assert "sum to" not in done.err


@pytest.mark.parametrize(
    ("dtype", "large"),
    [
        (torch.float16, 60000.0),
        (torch.bfloat16, 3e38),
        (torch.float32, 3e38),
        (torch.float64, 1.5e308),
        (torch.float8_e4m3fn, 448.0),
        (torch.complex64, 3e38),
    ],
    ids=str,
)
def test_a_sum_beyond_the_dtype_is_refused(
    tmp_path: Path, dtype: torch.dtype, large: float
) -> None:
    values = torch.tensor([large, 1.0, large, -large], dtype=torch.float64).to(dtype)
    path = tmp_path / "a.pth"
    torch.save({"layer.w": values, "v": torch.ones(2)}, path)
    with pytest.raises(Overflow, match="3 values in 1 tensor") as caught:
        ckptool.average([path, path], tmp_path / "out.pth", weights=[1, 1])
    assert caught.value.exit_code == 1
    assert caught.value.evidence[0].startswith("layer.w")
    assert [each.name for each in tmp_path.iterdir()] == ["a.pth"]


def test_what_no_view_shows_does_not_overflow(tmp_path: Path) -> None:
    buffer = torch.full((1000,), 3e38)
    buffer[100:200] = 1
    torch.save({"w": buffer[100:200]}, tmp_path / "a.pth")
    ckptool.average([tmp_path / "a.pth"] * 2, tmp_path / "out.pth", weights=[1, 1])
    assert torch.load(tmp_path / "out.pth")["w"].tolist() == [2.0] * 100


def test_no_input_is_overwritten(tmp_path: Path, run: Run) -> None:
    paths = [tmp_path / name for name in ("a.pth", "b.pth")]
    for path in paths:
        torch.save({"w": torch.ones(3)}, path)
    before = paths[1].read_bytes()
    done = run("average", *paths, paths[1], "--force")
    assert done.code == 5
    assert "in-place" not in done.err
    with pytest.raises(EditError, match="in-place"):
        ckptool.average(paths, tmp_path / "out.pth", in_place=True)
    assert paths[1].read_bytes() == before
    with pytest.raises(WriteError):
        ckptool.average(paths, paths[0], force=True)


def test_damage_in_any_input_is_found(tmp_path: Path) -> None:
    paths = [save(model(seed), tmp_path / str(seed), "torch") for seed in range(3)]
    data = bytearray(paths[1].read_bytes())
    data[data.index(raw(model(1)["head.weight"])) + 5] ^= 1
    paths[1].write_bytes(data)
    with pytest.raises(Malformed, match="checksum") as caught:
        ckptool.average(paths, tmp_path / "out.pth")
    assert str(caught.value.path) == str(paths[1])
    assert not (tmp_path / "out.pth").exists()


def test_many_inputs_are_read_a_little_at_a_time(tmp_path: Path) -> None:
    """Of forty tensors of one storage each, blocks of a hundred kilobytes are summed."""
    states = []
    for seed in range(40):
        torch.manual_seed(seed)
        states.append({"w": torch.randn(300, 1000).half(), "d": torch.randn(7).double()})
    paths = [save(state, tmp_path / str(n), "torch") for n, state in enumerate(states)]
    ckptool.average(paths, tmp_path / "out.pth")
    equal(torch.load(tmp_path / "out.pth"), mean(states))


def test_what_would_run_code_is_carried_by_no_average(
    tmp_path: Path, hostile: Path, run: Run
) -> None:
    state = ckptool.keys(hostile / "os_system.pth")
    plain = {key: torch.ones(info.shape) for key, info in state.entries}
    torch.save(plain, tmp_path / "plain.pth")
    pair = [tmp_path / "plain.pth", hostile / "os_system.pth"]
    for paths in (pair, pair[::-1]):
        done = run("average", *paths, tmp_path / "out.pth", "--force")
        assert done.code == 0
        assert f"{hostile / 'os_system.pth'} would run code when loaded" in done.err
        assert torch.load(tmp_path / "out.pth", weights_only=True).keys() == plain.keys()
