"""Casts through the command line: into every container, with what they refuse and what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, step
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp

import ckptool
from ckptool import containers
from ckptool.errors import EditError, Overflow
from ckptool.state import casting as casts, checkpoint as places

Run = Callable[..., Outcome]
State = dict[str, torch.Tensor]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def strided() -> State:
    """Make a state_dict with shared storages, strides, ties, and what no cast touches."""
    torch.manual_seed(0)
    weight = torch.randn(300, 70) * 0.1
    images = torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last)
    return {
        "a.weight": weight,
        "a.tied": weight,
        "a.turned": weight.t(),
        "a.part": weight[10:20, 5:9],
        "conv.weight": images,
        "conv.same": torch.randn(4, 1).expand(4, 6),
        "norm.weight": torch.ones(7, dtype=torch.float64) / 3,
        "half": torch.randn(5, 7).half(),
        "steps": torch.tensor(3),
        "mask": torch.tensor([True, False]),
        "waves": torch.randn(3, dtype=torch.complex64),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(-0.0),
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder with an input, `in.pth`, as the current one."""
    monkeypatch.chdir(tmp_path)
    torch.save(strided(), "in.pth")
    return tmp_path


def read(path: Path, like: State) -> State:
    """Read an output as its own library does."""
    if path.suffix == ".pth":
        return dict(torch.load(path, weights_only=True))
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    if (path / ".metadata").exists():
        empty: dict[str, Any] = {key: torch.empty_like(value) for key, value in like.items()}
        load_dcp(empty, storage_reader=FileSystemReader(path))
        return empty
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def as_torch_casts(state: State, dtype: torch.dtype, *, chosen: Callable[[str], bool]) -> State:
    """Cast with torch; float64 by way of numpy or not at all, where torch rounds it twice."""
    return {
        key: value.to(dtype) if value.is_floating_point() and chosen(key) else value
        for key, value in state.items()
    }


FORMS = {
    "out.pth": [],
    "out.safetensors": [],
    "dcp": ["--to", "dcp"],
    "shards": ["--max-shard-size", "20KB"],
}


@pytest.mark.parametrize("source", ["in.pth", "in.safetensors"])
@pytest.mark.parametrize("word", ["bf16", "float16", "F64", "fp8_e5m2"])
@pytest.mark.parametrize("name", FORMS)
def test_every_container_has_what_torch_casts(
    run: Run, here: Path, name: str, word: str, source: str
) -> None:
    dtypes = {"bf16": torch.bfloat16, "float16": torch.float16, "F64": torch.float64}
    dtype = dtypes.get(word, torch.float8_e5m2)
    if source != "in.pth":
        run("convert", "--allow-expand", "in.pth", source)
    line = ["--dtype", word, "--dtype-except", "norm.*", *FORMS[name], source, name]
    assert run("convert", *line, "--allow-expand").code == 0
    wanted = as_torch_casts(strided(), dtype, chosen=lambda key: not key.startswith("norm"))
    got = read(here / name, wanted)
    tied = set() if name in ("out.pth", "dcp") else {"a.tied"}
    assert set(got) == set(wanted) - tied
    for key in got:
        assert (got[key].dtype, got[key].shape) == (wanted[key].dtype, wanted[key].shape)
        assert bits(got[key]) == bits(wanted[key]), key


def test_strides_storages_and_ties_stay(run: Run, here: Path) -> None:
    assert run("convert", "--dtype", "bf16", "in.pth", "out.pth").code == 0
    state = torch.load("out.pth", weights_only=True)
    shared = [state[key] for key in ("a.weight", "a.tied", "a.turned", "a.part")]
    assert len({tensor.untyped_storage().data_ptr() for tensor in shared}) == 1
    assert {key: tensor.stride() for key, tensor in state.items()} == {
        key: tensor.stride() for key, tensor in strided().items()
    }
    assert state["conv.same"].untyped_storage().nbytes() == 4 * 2


def test_numbers_of_a_big_endian_machine(run: Run, good: Path, here: Path) -> None:
    for source in ("big_endian.pth", "big_endian_odd.pth"):
        state = torch.load(good / source, weights_only=True)
        run("convert", "--dtype", "bf16", "--force", good / source, "out.pth")
        got = torch.load("out.pth", weights_only=True)
        wanted = as_torch_casts(state, torch.bfloat16, chosen=lambda key: True)
        assert {key: bits(got[key]) for key in wanted} == {k: bits(v) for k, v in wanted.items()}


def test_a_dtype_comes_last_whatever_the_order(run: Run, here: Path) -> None:
    for line in (
        ["--dtype", "bf16", "--dtype-only", "x", "--rename", "a=x"],
        ["--rename", "a=x", "--dtype-only", "x", "--dtype", "bf16"],
    ):
        assert run("convert", *line, "--force", "in.pth", "out.pth").code == 0
        state = torch.load("out.pth", weights_only=True)
        cast = {key for key, value in state.items() if value.dtype is torch.bfloat16}
        assert cast == {"x.weight", "x.tied", "x.turned", "x.part"}
    document = run("convert", *line, "--json", "--force", "in.pth", "out.pth").document
    assert document["casts"][0]["to"] == "BF16"
    assert document["casts"][0]["tensors"] == 4
    assert document["casts"][0]["kept"]["I64"] == 1


def test_one_name_of_a_tied_tensor_is_not_cast_alone(run: Run, here: Path) -> None:
    for option, pattern in (("--dtype-only", "a.weight"), ("--dtype-except", "a.tied")):
        done = run("convert", "--dtype", "bf16", option, pattern, "in.pth", "out.pth")
        assert done.code == 2
        assert "a.weight" in done.err
        assert "a.tied" in done.err
    assert not Path("out.pth").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--dtype", "b16"], "did you mean `bf16`"),
        (["--dtype", "int8"], "known are bf16, f16, f32, f64, f8_e4m3, f8_e5m2"),
        (["--dtype", "f8_e8m0"], "not a dtype of floats"),
        (["--dtype-only", "a"], "--dtype-only has no effect without --dtype"),
        (["--overflow", "inf"], "--overflow has no effect without --dtype"),
        (["--dtype", "bf16", "--overflow", "wrap"], "'wrap' is not one of"),
        (["--dtype", "f8_e4m3", "--overflow", "inf"], "has no infinity"),
        (["--dtype", "bf16", "--dtype-except", "nope"], "selects none of"),
    ],
)
def test_what_makes_no_sense_is_exit_2(run: Run, here: Path, line: list[str], said: str) -> None:
    done = run("convert", *line, "in.pth", "out.pth")
    assert done.code == 2
    assert said in done.err
    assert not Path("out.pth").exists()


def test_the_library_refuses_the_same(here: Path) -> None:
    for given in ({"dtype_only": "a"}, {"overflow": "inf"}, {"dtype": "x"}):
        with pytest.raises(EditError):
            ckptool.convert("in.pth", "out.pth", **given)  # type: ignore[arg-type]
    with pytest.raises(EditError):
        ckptool.edits.cast("bf16", overflow="wrap")
    assert casts.OVERFLOW == ("refuse", "inf", "clamp")


# What is beyond the dtype.

LARGE = [1e9, -1e9, 2.0, 1e-30, 3e-6, float("inf"), float("nan"), 0.0, -0.0]


def large() -> State:
    """Make a state_dict with numbers beyond F16: in ties, in parts, in what no view shows."""
    whole = torch.tensor(LARGE * 1000)
    return {
        "large.weight": whole,
        "large.tied": whole,
        "hidden": torch.tensor([1e9, 1.0, 2.0, 1e9])[1:3],
        "part": torch.tensor([1e9, 1.0, 2.0, 7e4])[1:],
        "grid": torch.tensor(LARGE[:6]).reshape(2, 3).t(),
        "again": torch.tensor([1e9]).expand(5),
        "small": torch.ones(4),
    }


COUNTS = {"large.weight": 2000, "large.tied": 2000, "part": 1, "grid": 2, "again": 5}


@pytest.mark.parametrize("name", FORMS)
def test_what_would_become_infinite_is_refused_by_tensor(run: Run, here: Path, name: str) -> None:
    torch.save(large(), "large.pth")
    line = ["--dtype", "f16", "--allow-expand", *FORMS[name], "large.pth", name]
    done = run("convert", *line)
    assert done.code == 1
    assert not Path(name).exists()
    assert sorted(path.name for path in here.iterdir()) == ["in.pth", "large.pth"]
    assert "error[overflow]: 2008 values in 5 tensors" in done.err
    for key, count in COUNTS.items():
        assert f"    {key}: {count} of {large()[key].numel()}\n" in done.err
    assert "--overflow clamp   clamp makes them that, inf infinite; bf16" in done.err
    wanted = as_torch_casts(large(), torch.float16, chosen=lambda key: True)
    assert run("convert", "--overflow", "inf", *line).code == 0
    got = read(here / name, wanted)
    for key in got:
        assert torch.equal(got[key].nan_to_num(7), wanted[key].nan_to_num(7))


@pytest.mark.parametrize("name", FORMS)
def test_counts_are_those_of_torch(run: Run, here: Path, name: str) -> None:
    torch.save(large(), "large.pth")
    line = ["--dtype", "f16", "--allow-expand", *FORMS[name], "--json", "large.pth", name]
    (found,) = run("convert", "--overflow", "clamp", *line).document["casts"]
    (checked,) = run("check", "--as", "f16", "--json", "large.pth").document["files"]
    assert checked["cast"]["losses"] == found["losses"]
    assert checked["cast"]["total"] == found["total"]
    for each in found["losses"]:
        before = large()[each["key"]]
        after = before.half().float()
        tiny = torch.finfo(torch.float16).tiny
        assert each["overflow"] == (after.isinf() & before.isfinite()).sum()
        assert each["zero"] == ((after == 0) & (before != 0)).sum()
        assert each["subnormal"] == ((after != 0) & (after.abs() < tiny)).sum()
    assert {each["key"]: each["overflow"] for each in found["losses"] if each["overflow"]} == COUNTS
    assert found["total"] == {"overflow": 2008, "zero": 1001, "subnormal": 1001}
    got = read(here / name, as_torch_casts(large(), torch.float16, chosen=lambda key: True))
    assert got["large.weight"][:2].tolist() == [65504, -65504]
    assert got["again"].tolist() == [65504] * 5
    assert got["large.weight"][5].isinf()


def test_infinity_is_beyond_f8_e4m3(run: Run, here: Path) -> None:
    torch.save({"w": torch.tensor([float("inf"), 464.0, 465.0, -1e9])}, "w.pth")
    done = run("convert", "--dtype", "f8_e4m3", "w.pth", "out.pth")
    assert done.code == 1
    assert "w: 3 of 4" in done.err
    assert "inf infinite" not in done.err
    assert run("convert", "--dtype", "f8_e4m3", "--overflow", "clamp", "w.pth", "out.pth").code == 0
    assert torch.load("out.pth")["w"].float().tolist() == [448, 448, 448, -448]


def test_each_value_is_read_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one view of a storage shows is not read again for its counts."""
    torch.save({"w": torch.full((1000,), 1e9), "turned": torch.ones(3, 4).t() * 1e-9}, "w.pth")

    def never(*given: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("ckptool.verbs.finite.blocks", never)
    ckptool.convert("w.pth", "out.pth", dtype="f16", overflow="inf")
    with pytest.raises(Overflow):
        ckptool.convert("w.pth", "out.safetensors", dtype="f16")


def test_a_damaged_input_is_not_counted(run: Run, here: Path) -> None:
    data = bytearray(Path("in.pth").read_bytes())
    at = data.index(bits(strided()["a.weight"]))
    data[at + 3] ^= 0x40  # a number of 1e37, which is refused for its checksum first
    Path("in.pth").write_bytes(data)
    for name in ("out.pth", "out.safetensors"):
        done = run("convert", "--dtype", "f16", "--allow-expand", "in.pth", name)
        assert done.code == 3
        assert "do not match their checksum" in done.err


# What is said.


def test_a_report_says_what_was_cast_and_what_not(run: Run, here: Path) -> None:
    torch.save({"state_dict": strided(), "epoch": 3, "ema": [torch.ones(2)]}, "wrapped.pth")
    said = run("convert", "--dtype", "f16", "wrapped.pth", "out.pth").err
    line = "cast 9 tensors to F16; not cast: 1 F16, 1 I64, 1 BOOL, 1 C64; "
    assert line in said
    assert "also contains, not cast: epoch, ema\n" in said
    saved = torch.load("out.pth", weights_only=True)
    assert saved["ema"][0].dtype is torch.float32
    said = run("convert", "--dtype", "f16", "out.pth", "again.pth").err
    assert "no tensor to cast to F16: that changes nothing; not cast: 10 F16" in said


def test_a_dry_run_reads_no_values(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(large(), "large.pth")
    monkeypatch.setattr("ckptool.files.blocks.blocks", None)
    done = run("convert", "-n", "--dtype", "f16", "large.pth", "out.pth")
    assert done.code == 0
    assert "`ckptool check --as f16 large.pth` counts" in done.err
    (found,) = run("convert", "-n", "--json", "--dtype", "f16", "large.pth", "o").document["casts"]
    assert (found["total"], found["losses"]) == (None, [])


def test_check_as_says_whether_a_cast_would_overflow(run: Run, here: Path) -> None:
    torch.save(large(), "large.pth")
    done = run("check", "--as", "fp16", "large.pth")
    assert done.code == 1
    assert "as F16, 2008 values would become infinite (large.weight, large.tied" in done.out
    assert "large.pth: part as F16: 1 overflow\n" in done.err
    done = run("check", "--as", "bf16", "large.pth")
    assert done.code == 0
    assert "as BF16, no value would become infinite, zero or subnormal" in done.out
    assert run("check", "--as", "int8", "large.pth").code == 2
    document = run("check", "--json", "large.pth").document
    assert document["files"][0]["cast"] is None


def test_check_as_judges_every_file_that_check_judges(run: Run, hostile: Path) -> None:
    for path in sorted(hostile.iterdir())[:: step(7)]:
        plain, cast = (
            run("check", "--json", *line, path).document for line in ([], ["--as", "f16"])
        )
        before, after = plain["files"][0], cast["files"][0]
        assert after["status"] in (before["status"], "damaged")


def test_views_that_overlap_for_ever_count_for_the_whole(run: Run, here: Path) -> None:
    whole = torch.ones(1 << 16)
    whole[7] = 1e9
    state = {f"{n}": whole.as_strided((300, 60_000 - n), (1, 1)) for n in range(4)}
    torch.save(state, "views.pth")
    done = run("convert", "--dtype", "f16", "views.pth", "out.pth")
    assert done.code == 1
    assert "in 4 tensors" in done.err


def test_attributes_of_tensors_that_are_cast_are_named(run: Run, here: Path) -> None:
    weight = torch.ones(2)
    weight.note = "mine"  # type: ignore[attr-defined]
    torch.save({"w": weight}, "w.pth")
    said = run("convert", "--dtype", "bf16", "w.pth", "out.pth").err
    assert "not written, attributes of tensors that are cast: w\n" in said


def test_storages_of_casts_are_told_apart_quickly(here: Path) -> None:
    """Of equal hashes, each would be compared with all others."""
    torch.save({f"{number}": torch.ones(2) for number in range(100)}, "many.pth")
    entries = places.find(containers.read("many.pth")).entries
    key_map, _ = ckptool.edits.apply([ckptool.edits.cast("bf16")], entries)
    assert len({hash(value.storage) for value in key_map.entries.values()}) == 100


def test_a_whole_model_is_cast_as_its_state_dict(run: Run, here: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), "model.pth")
    said = run("convert", "--dtype", "bf16", "model.pth", "out.safetensors").err
    assert "cast 2 tensors to BF16\n" in said
    assert "not in its state_dict" not in said
    assert run("convert", "--dtype", "bf16", "model.pth", "out.pth").code == 2


def test_what_is_no_plain_tensor_stays_and_is_counted(run: Run, here: Path) -> None:
    import numpy as np

    state = {
        "array": np.ones(2, "f4"),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "plain": torch.ones(2),
    }
    torch.save(state, "odd.pth")
    said = run("convert", "--dtype", "bf16", "odd.pth", "out.pth").err
    line = "cast 1 tensor to BF16; not cast: 1 numpy.ndarray, 1 sparse_coo F32, 1 meta F32\n"
    assert line in said


def test_two_threads_lose_no_count(run: Run, here: Path) -> None:
    """A tensor of many blocks, of which every hundredth number overflows."""
    whole = torch.ones(5_000_000)
    whole[::100] = 1e9
    whole[7::100] = 1e-9
    torch.save({"w": whole, "x": whole.clone()}, "w.pth")
    for name in ("out.pth", "out.safetensors"):
        line = ["--dtype", "f16", "--overflow", "inf", "--json", "w.pth", name]
        (found,) = run("convert", *line).document["casts"]
        assert found["total"] == {"overflow": 100_000, "zero": 100_000, "subnormal": 0}


def test_a_cast_in_place_replaces_the_input_or_leaves_it(run: Run, here: Path) -> None:
    torch.save(large(), "w.pth")
    before = Path("w.pth").read_bytes()
    assert run("convert", "--dtype", "f16", "--in-place", "w.pth").code == 1
    assert Path("w.pth").read_bytes() == before
    assert run("convert", "--dtype", "bf16", "--in-place", "w.pth").code == 0
    assert {v.dtype for v in torch.load("w.pth").values()} == {torch.bfloat16}


# In a recipe.


def test_a_cast_is_a_step_of_a_recipe(run: Run, here: Path) -> None:
    torch.save(large(), "large.pth")
    text = "recipe = 1\n[[step]]\nrename = [['large', 'x']]\n[[step]]\ncast = {%s}\n"
    for fields, code, said in (
        ("to = 'float16', overflow = 'clamp', except = ['small']", 0, "cast 6 tensors to F16"),
        ("to = 'f16', only = ['small', 'hidden']", 0, "cast 2 tensors to F16; not cast: 5 F32"),
        ("to = 'f16'", 1, "error[overflow]: r.toml, step 2 (cast): 2008 values in 5 tensors"),
        ("to = 'f16', only = ['x.weight']", 2, "x.weight and x.tied are one tensor"),
        ("to = 'f15'", 2, "step 2 (cast): `f15` is not a dtype of floats"),
        ("to = 'f16', overflow = 'wrap'", 2, "overflow is not one of refuse, inf, clamp: `wrap`"),
        ("to = 'f8_e4m3', overflow = 'inf'", 2, "F8_E4M3 has no infinity"),
    ):
        Path("r.toml").write_text(text % fields)
        done = run("convert", "--recipe", "r.toml", "--force", "large.pth", "out.pth")
        assert done.code == code
        assert said in done.err
        assert "--overflow clamp" not in done.err
    Path("r.toml").write_text(text % "to = 'f16'")
    assert "no way back" in run("convert", "--recipe", "r.toml", "--reverse", "large.pth", "o").err


def test_what_is_moved_after_a_cast_is_counted_with_it(run: Run, here: Path) -> None:
    numbers = torch.tensor(LARGE[:5] * 24).reshape(2, 60)
    torch.save({"qkv.weight": numbers, "o.weight": numbers.clone(), "gone": numbers + 1}, "m.pth")
    Path("r.toml").write_text(
        "recipe = 1\n[[step]]\ncast = {to = 'f16', overflow = 'clamp'}\n"
        "[[step]]\nsplit = {from = 'qkv.{p}', to = ['q.{p}', 'k.{p}', 'v.{p}'], dim = 1}\n"
        "[[step]]\ntranspose = {keys = ['o.weight']}\n[[step]]\ndrop = ['gone']\n"
    )
    for name in ("out.pth", "out.safetensors"):
        line = ["convert", "--recipe", "r.toml", "--json", "m.pth", name]
        (found,) = run(*line).document["casts"]
        assert {each["key"] for each in found["losses"]} == {"qkv.weight", "o.weight"}
        assert found["total"] == {"overflow": 96, "zero": 48, "subnormal": 48}
        wanted = numbers.clamp(-65504, 65504).half()
        got = read(here / name, {})
        assert torch.equal(
            torch.cat([got["q.weight"], got["k.weight"], got["v.weight"]], 1), wanted
        )
        assert torch.equal(got["o.weight"], wanted.t())


# Quantized weights.

I8, U8, I32, F32, F16 = torch.int8, torch.uint8, torch.int32, torch.float32, torch.float16
F8 = torch.float8_e4m3fn
FORMATS: dict[str, tuple[dict[str, torch.dtype], set[str]]] = {
    # The keys of a format, and which of them are cast nevertheless.
    "DeepSeek": (
        {"q.weight": F8, "q.weight_scale_inv": F32, "norm.weight": F32}, {"norm.weight"}
    ),
    "compressed-tensors": (
        {
            "m.q.weight": I8, "m.q.weight_scale": F32, "m.q.input_scale": F32, "m.q.bias": F16,
            "m.o.weight_packed": I32, "m.o.weight_scale": F16, "m.o.weight_shape": torch.int64,
            "m.k_scale": F32, "m.norm.weight": F32,
        },
        {"m.q.bias", "m.norm.weight"},
    ),
    "GPTQ": (
        {"q.qweight": I32, "q.qzeros": I32, "q.scales": F16, "q.g_idx": I32, "q.bias": F16},
        {"q.bias"},
    ),
    "bitsandbytes of 8 bits": ({"q.weight": I8, "q.SCB": F32, "q.bias": F32}, {"q.bias"}),
    "bitsandbytes of 4 bits": (
        {
            "q.weight": U8, "q.weight.absmax": F32, "q.weight.quant_map": F32,
            "q.weight.nested_absmax": F32, "q.bias": F32,
        },
        {"q.bias"},
    ),
    "quanto": (
        {"q.weight._data": I8, "q.weight._scale": F32, "q.input_scale": F32, "q.bias": F32},
        {"q.bias"},
    ),
    "Quark": ({"q.weight": F8, "q.weight_quantizer.scale": F32, "n.scale": F32}, {"n.scale"}),
    "MLX": (
        {"q.weight": torch.uint32, "q.scales": F16, "q.biases": F16, "n.weight": F16}, {"n.weight"}
    ),
    "NVFP4": (
        {"q.weight": U8, "q.weight_scale": F8, "q.weight_scale_2": F32, "logit_scale": F32},
        {"logit_scale"},
    ),
    "MXFP4": (
        {"e.up_blocks": U8, "e.up_scales": U8, "e.up_bias": F32, "scale": F32},
        {"e.up_bias", "scale"},
    ),
    "quantization-aware": (
        {"f.weight": F32, "f.fake_quant.scale": F32, "f.fake_quant.zero_point": I32}, {"f.weight"}
    ),
    "float8 without scales": (
        {"q.weight": F8, "a.norm.scale": F8, "logit_scale": F32},
        {"q.weight", "a.norm.scale", "logit_scale"},
    ),
    "indices and masks": (
        {
            "attn.relative_position_index": torch.int64, "attn.logit_scale": F32,
            "attn.bias": torch.bool, "attn.scale": F32, "embed.position_ids": torch.int64,
            "embed.class": F32, "bn.num_batches_tracked": torch.int64, "bn.weight": F32,
        },
        {"attn.logit_scale", "attn.scale", "embed.class", "bn.weight"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_weights_and_their_scales_stay(run: Run, here: Path, name: str) -> None:
    dtypes, cast = FORMATS[name]
    state = {key: torch.ones(2, 2).to(dtype) for key, dtype in dtypes.items()}
    save_file(state, "q.safetensors")
    assert run("convert", "--dtype", "bf16", "q.safetensors", "out.safetensors").code == 0
    got = load_file("out.safetensors")
    changed = {key for key in got if got[key].dtype is torch.bfloat16}
    assert changed == cast
    assert all(bits(got[key]) == bits(state[key]) for key in got.keys() - cast)


def test_what_is_tied_to_a_quantized_weight_stays_with_it(run: Run, here: Path) -> None:
    weight = torch.ones(2, 2).to(F8)
    state = {"head.weight": weight, "embed.weight": weight, "embed.weight_scale": torch.ones(1)}
    torch.save(state, "q.pth")
    said = run("convert", "--dtype", "bf16", "q.pth", "out.pth").err
    assert "no tensor to cast to BF16: that changes nothing; not cast: 2 quantized" in said
    got = torch.load("out.pth", weights_only=True)
    assert got["head.weight"].data_ptr() == got["embed.weight"].data_ptr()


def test_tensors_that_torch_quantizes_stay_with_their_scales(run: Run, here: Path) -> None:
    weight = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    state = {
        "conv.weight": weight,
        "conv.scale": torch.tensor(0.5),
        "fc._packed_params._packed_params": (weight, torch.ones(2)),
        "fc.scale": torch.tensor(0.5),
        "bn.weight": torch.ones(2),
    }
    torch.save(state, "q.pth")
    said = run("convert", "--dtype", "f16", "q.pth", "out.pth").err
    assert "cast 1 tensor to F16; not cast: 2 quantized with 2 scales\n" in said
    got = torch.load("out.pth", weights_only=True)
    assert {key for key in state if getattr(got[key], "dtype", None) is F16} == {"bn.weight"}


def test_the_counts_of_quantized_ones_are_in_the_document(run: Run, here: Path) -> None:
    state = {"q.weight": torch.ones(2, dtype=I8), "q.scales": torch.ones(2), "n": torch.ones(2)}
    save_file(state, "q.safetensors")
    done = run("convert", "--dtype", "bf16", "--json", "q.safetensors", "out.pth")
    (found,) = json.loads(done.out)["casts"]
    assert (found["tensors"], found["quantized"], found["scales"], found["kept"]) == (1, 1, 1, {})


def test_doubles_are_not_taken_for_packed_integers(run: Run, here: Path) -> None:
    """A module with a `scale` is quantized where it has integers or six-bit floats, not F64."""
    doubles = torch.randn(3, dtype=torch.float64)
    torch.save(
        {"norm.scale": doubles, "norm.bias": doubles + 1, "head.weight": doubles + 2}, "d.pth"
    )
    done = run("convert", "--dtype", "f32", "d.pth", "o.pth")
    assert done.code == 0
    assert "quantized" not in done.err
    read_back = torch.load("o.pth", weights_only=True)
    assert {each.dtype for each in read_back.values()} == {torch.float32}
    torch.save({"n.scale": torch.tensor([1e300]), "n.w": doubles * 1e300}, "large.pth")
    assert run("check", "--as", "f16", "large.pth").code == 1


def test_tensors_inside_other_entries_are_counted(run: Run, here: Path) -> None:
    inside = {"k": torch.ones(2)}
    torch.save({"a": torch.ones(3), "m._extra_state": inside, "n": [torch.ones(1).half()]}, "x.pth")
    done = run("convert", "--dtype", "bf16", "x.pth", "o.pth")
    assert (
        "cast 1 tensor to BF16; not cast: 1 F32 inside other entries, 1 F16 inside other"
        in done.err
    )
    done = run("convert", "--json", "--force", "--dtype", "bf16", "x.pth", "o.pth")
    (cast,) = json.loads(done.out)["casts"]
    assert cast["kept"] == {"F32 inside other entries": 1, "F16 inside other entries": 1}


def test_what_is_taken_twice_loses_once(run: Run, here: Path) -> None:
    """The rows that a later step takes twice are half of the tensor: as many as all of it."""
    values = torch.ones(10, 4)
    values[0, 0], values[1, 1] = 1e30, 1e-30
    torch.save({"w": values}, "w.pth")
    cast = "[[step]]\ncast = {to = 'f16', overflow = 'inf'}\n"
    for wanted in ("0:10", "0:5,0:5"):
        rows = f"[[step]]\nslice = {{keys = 'w', rows = '{wanted}'}}\n"
        Path("r.toml").write_text(f"recipe = 1\n{cast}{rows}")
        done = run("convert", "--force", "--recipe", "r.toml", "w.pth", "o.pth")
        assert "1 value became infinite (w), 1 zero" in done.err
