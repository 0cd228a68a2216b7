"""Values: tensors computed, cut and joined on the way into any container, judged by torch."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import environment
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp

import ckptool
from ckptool import containers, edits
from ckptool.cli import _options, convert as convert_command
from ckptool.errors import EditError, Malformed, NothingMatched, WriteError
from ckptool.files import planner
from ckptool.files.blocks import blocks
from ckptool.files.copying import run_jobs
from ckptool.files.fileio import Readers
from ckptool.files.jobs import Copy
from ckptool.state import checkpoint as places, edit_options
from ckptool.state.edit_options import EditSpec
from ckptool.state.edits import Change, Edit, Entries, Move
from ckptool.tensors import numbers, values
from ckptool.tensors.casting import Rounding
from ckptool.tensors.dtype import BY_TORCH_NAME, DType
from ckptool.tensors.tensor import TensorInfo

FLOAT8 = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]


def of_torch(dtype: torch.dtype) -> DType:
    return BY_TORCH_NAME[str(dtype).removeprefix("torch.")]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Check whether two tensors have the same bits, but for those of a NaN."""
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    nan = wanted.float().isnan()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    equal = got.contiguous().view(bits) == wanted.contiguous().view(bits)
    return bool((got.float().isnan() == nan).all() and (equal | nan).all())


def cast(tensor: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    made = bytearray(tensor.numel() * target.itemsize)
    numbers.cast(made, raw(tensor), of_torch(tensor.dtype), of_torch(target))
    return torch.frombuffer(made, dtype=target)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "target", [torch.float64, torch.float32, torch.bfloat16, torch.float16, *FLOAT8]
)
def test_all_halves_are_cast_as_torch_casts_them(source: torch.dtype, target: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(source)
    if target is torch.float8_e4m3fn:  # torch 2.6 makes NaN of what newer ones clip
        every = every[~(every.abs() > 464)]
    assert same(cast(every, target), every.to(target))


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", [torch.float32, torch.float64])
def test_ties_round_to_even_as_in_torch(source: torch.dtype, target: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(target).to(source)
    finite = every[every.isfinite()]
    half = torch.nextafter(finite.float(), torch.tensor(torch.inf)).to(source)
    middles = (finite[:-1] + finite[1:]) / 2
    numbers_ = torch.cat([finite, half, middles, torch.tensor([0.0, -0.0, 1e39], dtype=source)])
    assert same(cast(numbers_, target), numbers_.to(target))


@pytest.mark.parametrize("source", FLOAT8)
def test_all_eights_widen_as_in_torch(source: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(source)
    for target in (torch.float32, torch.bfloat16, torch.float16):
        assert same(cast(every, target), every.to(target))


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    weight = torch.randn(300, 70)
    state = {
        "a.weight": weight,
        "a.tied": weight,
        "a.turned": weight.t(),
        "a.part": weight[10:20, 5:9],
        "b.half": torch.randn(5, 7).half(),
        "b.count": torch.tensor(3),
        "b.empty": torch.zeros(0, 4),
    }
    path = tmp_path / "in.pth"
    torch.save(state, path)
    return path, state


def written(path: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read an output as its own library does."""
    if path.suffix == ".pth":
        return dict(torch.load(path, weights_only=True))
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    if (path / ".metadata").exists():
        empty: dict[str, Any] = {key: torch.empty_like(value) for key, value in state.items()}
        load_dcp(empty, storage_reader=FileSystemReader(path))
        return empty
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors", "dcp", "shards"])
def test_cast_into_every_container(
    model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, name: str
) -> None:
    path, state = model
    options: dict[str, Any] = {"dcp": {"to": "dcp"}, "shards": {"max_shard_size": "20KB"}}
    out = tmp_path / name
    ckptool.convert(path, out, steps=[edits.cast("bf16")], **options.get(name, {}))
    wanted = {key: t.bfloat16() if t.is_floating_point() else t for key, t in state.items()}
    got = written(out, wanted)
    kept = set(state) - ({"a.tied"} if name in ("out.safetensors", "shards") else set())
    assert set(got) == kept
    assert all(same(got[key], wanted[key]) for key in kept)


def test_what_shares_a_storage_is_cast_once_and_still_shares_it(
    model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    out = tmp_path / "out.pth"
    ckptool.convert(model[0], out, steps=[edits.cast("f16")])
    state = torch.load(out, weights_only=True)
    shared = [state[key] for key in ("a.weight", "a.tied", "a.turned", "a.part")]
    assert len({tensor.untyped_storage().data_ptr() for tensor in shared}) == 1
    assert state["a.turned"].stride() == (1, 70)
    assert out.stat().st_size < model[0].stat().st_size * 0.6


def test_only_and_except_choose_by_the_keys_at_that_step(
    model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    steps = [edits.rename("a", "x"), edits.cast("bfloat16", only="x", except_="x.part")]
    done = ckptool.convert(model[0], tmp_path / "out.pth", steps=steps)
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    kept = {key for key, tensor in state.items() if tensor.dtype is torch.bfloat16}
    assert kept == {"x.weight", "x.tied", "x.turned"}
    assert done.map[0] == ("a.weight", "x.weight")
    with pytest.raises(NothingMatched):
        ckptool.convert(model[0], tmp_path / "no.pth", steps=[edits.cast("bf16", only="nope")])
    with pytest.raises(EditError, match="not a dtype of floats"):
        edits.cast("int8")
    with pytest.raises(EditError, match="not a dtype of floats"):
        edits.cast("F8_E8M0")


def test_a_cast_of_a_damaged_storage_is_refused(
    model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path, state = model
    data = bytearray(path.read_bytes())
    data[data.index(raw(state["a.weight"])) + 7] ^= 1
    path.write_bytes(data)
    for name in ("out.pth", "out.safetensors"):
        with pytest.raises(Malformed, match="do not match their checksum"):
            ckptool.convert(path, tmp_path / name, steps=[edits.cast("bf16")])
        assert not (tmp_path / name).exists()


def test_an_expansion_is_measured_before_a_cast(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 20, dtype=torch.float8_e5m2)}, tmp_path / "in.pth")
    ckptool.convert(tmp_path / "in.pth", tmp_path / "out.pth", steps=[edits.cast("f64")])
    assert (tmp_path / "out.pth").stat().st_size > 8 << 20
    wide = torch.zeros(1 << 18, dtype=torch.float64).expand(8, 1 << 18)
    torch.save({"a": wide}, tmp_path / "wide.pth")
    out = tmp_path / "out.safetensors"
    with pytest.raises(WriteError, match=r"the output would have 16\.0 MiB"):
        ckptool.convert(tmp_path / "wide.pth", out, steps=[edits.cast("f8_e5m2")])


# A value edit is one function and one row.


def halve(name: str) -> Edit:
    """Split a tensor in two along its first dimension."""

    def change(entries: Entries) -> Change:
        moves: list[Move] = []
        for key, value in entries.items():
            middle = value.shape[0] // 2 if key == name else 0
            if key != name:
                moves.append(((key,), key, value))
                continue
            moves.append(((key,), f"{key}.0", values.part(value, 0, 0, middle)))
            moves.append(((key,), f"{key}.1", values.part(value, 0, middle, value.shape[0])))
        return Change(moves)

    return Edit("halve", change=change)


def _parse(texts: Sequence[str]) -> Edit:
    return halve(texts[0])


def test_a_value_edit_is_a_function_and_a_row(
    model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (*edit_options.EDITS, EditSpec("--halve", "KEY", "Split a tensor.", _parse))
    with monkeypatch.context() as patched:
        patched.setattr(_options, "EDITS", rows)
        patched.setattr(edit_options, "EDITS", rows)
        command = importlib.reload(convert_command).command
        line = ["--halve", "a.weight", "--rename", "a=x", str(model[0]), str(tmp_path / "out.pth")]
        result = CliRunner().invoke(command, line, catch_exceptions=False)
        assert "--halve KEY" in CliRunner().invoke(command, ["--help"]).output
    importlib.reload(convert_command)
    assert result.exit_code == 0
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(state)[:3] == ["x.weight.0", "x.weight.1", "x.tied"]
    assert torch.equal(torch.cat([state["x.weight.0"], state["x.weight.1"]]), state["x.tied"])


# The constructors.


def tensors(model: tuple[Path, dict[str, torch.Tensor]]) -> dict[str, Any]:
    return places.find(containers.read(model[0])).entries


def read(value: TensorInfo) -> torch.Tensor:
    """Read a value as every reader does, and as the copy engine writes it."""
    readers = Readers()
    data = b"".join(bytes(block) for block in blocks(value, readers, limit=1000))
    readers.close()
    dtype = getattr(torch, value.dtype.torch_name)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(value.shape)


def test_values_are_what_torch_makes(model: tuple[Path, dict[str, torch.Tensor]]) -> None:
    state, infos = model[1], tensors(model)
    weight, info = state["a.weight"], infos["a.weight"]
    turned, other = infos["a.turned"], values.permuted(infos["a.weight"], (1, 0))
    to_half = Rounding(DType.F32, DType.BF16)
    half = values.computed(to_half, [info], DType.BF16)
    expected = [
        (values.part(info, 1, 3, 9), weight[:, 3:9]),
        (other, weight.t()),
        (values.shaped(info, (70, 300)), weight.reshape(70, 300)),
        (values.shaped(turned, (21000,)), weight.t().reshape(-1)),
        (values.joined([info, info], 0), torch.cat([weight, weight])),
        (values.joined([info, info], 1), torch.cat([weight, weight], 1)),
        (values.joined([turned, other], 1), torch.cat([weight.t(), weight.t()], 1)),
        (half, weight.bfloat16()),
        (values.part(half, 1, 3, 9), weight.bfloat16()[:, 3:9]),
        (values.permuted(half, (1, 0)), weight.bfloat16().t()),
        (
            values.joined([half, values.part(half, 0, 0, 2)], 0),
            torch.cat([weight.bfloat16(), weight.bfloat16()[:2]]),
        ),
        (
            values.shaped(values.permuted(half, (1, 0)), (30, 700)),
            weight.bfloat16().t().reshape(30, 700),
        ),
    ]
    for value, wanted in expected:
        assert torch.equal(read(value), wanted)
        assert {leaf.storage for leaf in values.leaves(value)} == {info.storage}


def test_split_join_and_stack_are_those_of_torch(
    model: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    weight, info = model[1]["a.weight"], tensors(model)["a.weight"]
    parts = [values.part(info, 0, start, start + 100) for start in (0, 100, 200)]
    for part, wanted in zip(parts, weight.split(100), strict=True):
        assert torch.equal(read(part), wanted)
    assert torch.equal(read(values.joined(parts[::-1], 0)), torch.cat(weight.split(100)[::-1]))
    stacked = values.joined([values.shaped(each, (1, *each.shape)) for each in parts], 0)
    assert torch.equal(read(stacked), torch.stack(weight.split(100)))


def test_views_and_joins_of_views_stay_byte_copies(
    model: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    info = tensors(model)["a.weight"]
    rows = [values.part(info, 0, 200, 300), values.part(info, 0, 0, 200)]
    for value in (rows[0], values.joined(rows, 0)):
        assert isinstance(planner.job(value, 0), Copy)


def test_the_checksum_under_parts_is_compared(
    model: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, state = model
    info = tensors(model)["a.weight"]
    data = bytearray(path.read_bytes())
    data[data.index(raw(state["a.weight"]))] ^= 1
    path.write_bytes(data)
    rows = [values.part(info, 0, 100, 200), values.part(info, 0, 200, 300)]
    to_half = Rounding(DType.F32, DType.BF16)
    nested = values.joined([values.computed(to_half, [row], DType.BF16) for row in rows], 0)
    for value in (values.joined(rows, 0), nested, values.joined([values.joined(rows, 0)], 0)):
        jobs = planner.jobs([(value, 0)])
        with pytest.raises(Malformed, match="checksum"):
            run_jobs([job for job in jobs if job.target is None], None, lambda nbytes: None)


_PEAK = """
import resource, sys, ml_dtypes, ckptool
from ckptool import edits
ckptool.convert, edits.cast
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import ckptool.verbs.surgery, ckptool.containers.torch_zip
before = peak()
ckptool.convert(sys.argv[1], sys.argv[2], steps=[edits.cast("bf16")])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_a_cast_takes_constant_memory(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(4096, 4096)}, tmp_path / "in.pth")
    for name in ("out.pth", "out.safetensors"):
        line = [sys.executable, "-c", _PEAK, str(tmp_path / "in.pth"), str(tmp_path / name)]
        done = subprocess.run(line, capture_output=True, text=True, env=environment({}), check=True)
        assert int(done.stdout) < 40 << 10


def test_a_parameter_that_is_cast_stays_one(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4).t())
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    plain = torch.ones(3, requires_grad=True)
    tensors = {"weight": weight, "tied": weight, "frozen": frozen, "plain": plain}
    torch.save(tensors, tmp_path / "in.pth")
    ckptool.convert(tmp_path / "in.pth", tmp_path / "out.pth", steps=[edits.cast("bf16")])
    loaded = torch.load(tmp_path / "out.pth", weights_only=True)
    for key, value in tensors.items():
        assert type(loaded[key]) is type(value)
        assert loaded[key].requires_grad == value.requires_grad
        assert torch.equal(loaded[key], value.to(torch.bfloat16))
    assert loaded["tied"] is loaded["weight"]
