"""`ckptool diff`: what it prints, what decides, and its exit code."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, Outcome, environment

import ckptool
from ckptool.cli.report_diff import differences
from ckptool.errors import (
    AmbiguousStateDict,
    CkptoolError,
    LimitExceeded,
    NoStateDict,
    NothingMatched,
    NotRepresentable,
    WriteError,
)
from ckptool.pickles.tree import Dict
from ckptool.verbs.compare_trees import places_of

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

Run = Callable[..., Outcome]
UNREAD = ("plain_pickle.pkl", "torch_0_1.tar")
FILES = sorted(path.name for path in (FIXTURES / "good").iterdir() if path.name not in UNREAD)


def rows(outcome: Outcome) -> list[list[str]]:
    return [line.split("\t") for line in outcome.out.splitlines()]


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture
def entries() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "features.weight": torch.randn(4, 3, generator=generator),
        "features.bias": torch.randn(4, generator=generator),
        "head.weight": torch.randn(2, 4, generator=generator),
    }


# Equal.


@pytest.mark.parametrize("name", FILES)
def test_every_fixture_equals_itself(run: Run, good: Path, name: str) -> None:
    outcome = run("diff", good / name, good / name)
    assert (outcome.code, outcome.out) == (0, "")
    first, *notes = [line for line in outcome.err.splitlines() if not is_warning(line)]
    assert first.startswith("equal: ")
    assert set(notes) <= {"all tensors were compared, by their path"}


def is_warning(line: str) -> bool:
    return line.startswith(("warning", "    "))


@pytest.mark.product(3)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", FILES)
def test_every_fixture_equals_what_it_is_converted_to(
    run: Run, good: Path, tmp_path: Path, name: str, suffix: str
) -> None:
    target = tmp_path / f"out{suffix}"
    if name == "script_frozen.pt":  # none of whose weights would be written
        with pytest.raises(NothingMatched):
            ckptool.convert(good / name, target)
        return
    try:
        ckptool.convert(good / name, target)
    except (NotRepresentable, AmbiguousStateDict, NoStateDict, WriteError):
        if suffix == ".safetensors":  # which cannot hold all of them
            return
        raise
    outcome = run("diff", good / name, target)
    assert (outcome.code, outcome.out) == (0, "")


def test_equal_files_are_counted_and_what_one_lacks_is_told(run: Run, good: Path) -> None:
    outcome = run("diff", good / "model_best.pth.tar", good / "data_parallel.pth")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err.splitlines()[0] == "equal: 8 tensors, 704 B compared byte for byte"
    assert "model_best.pth.tar has epoch, arch, best_acc1, optimizer" in outcome.err
    assert run("diff", "-q", good / "plain.pth", good / "plain.pth").err == ""


def test_structure_says_that_no_values_were_compared(
    run: Run, tmp_path: Path, entries: dict[str, Any]
) -> None:
    one = saved(tmp_path / "one.pth", entries)
    other = saved(tmp_path / "other.pth", {key: value + 1 for key, value in entries.items()})
    outcome = run("diff", "--structure", one, other)
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err.startswith("equal in structure: 3 tensors, 96 B; no values were compared")
    assert run("diff", one, other).code == 1


# Different.


def test_each_kind_of_difference_has_its_line(
    run: Run, tmp_path: Path, entries: dict[str, Any]
) -> None:
    one = saved(tmp_path / "one.pth", {**entries, "gone": torch.ones(1), "step": 3})
    entries["features.weight"] = entries["features.weight"].clone()
    entries["features.weight"][2, 1] += 1
    entries["features.bias"] = entries["features.bias"].half()
    entries["head.weight"] = entries["head.weight"].T.contiguous()
    other = saved(tmp_path / "other.pth", {**entries, "come": torch.ones(1), "step": 4})
    outcome = run("diff", one, other)
    assert outcome.code == 1
    only, more, *changed = rows(outcome)
    assert (only, more) == (["only-left", "gone"], ["only-right", "come"])
    by_key = {key: [what, *cells] for what, key, *cells in changed}
    assert by_key["features.bias"][:3] == ["dtype", "F32", "F16"]
    assert by_key["features.bias"][-1] == "equal-after-rounding"
    assert by_key["head.weight"] == ["shape", "[2, 4]", "[4, 2]"]
    assert by_key["step"] == ["value", "3", "4"]
    what, count, of, first, most, ulp, special, *far = by_key["features.weight"]
    assert all(0 < float(each) <= 1 for each in far)
    assert (what, count, of, first, special) == ("values", "1", "12", "[2, 1]", "")
    assert float(most) == pytest.approx(1, abs=1e-6)
    assert int(ulp) > 0
    verdict = outcome.err.splitlines()[0]
    assert verdict == (
        f"different: 1 key only in {one}; 1 key only in {other}; "
        "1 of 3 tensors differ in dtype, 1 of them equal after rounding; "
        "1 of 3 tensors differ in shape; 1 entry is not a tensor and differs; "
        "1 of 3 tensors differ in values"
    )


def test_people_get_a_table(tmp_path: Path, entries: dict[str, Any]) -> None:
    one = saved(tmp_path / "one.pth", entries)
    entries["features.bias"] = torch.nextafter(entries["features.bias"], torch.tensor(9.0))
    del entries["head.weight"]
    found = ckptool.diff(one, saved(tmp_path / "other.pth", entries))
    head, only, values = differences(found, 200)
    assert head.split() == ["WHAT", "KEY", "RELATIVE", "COSINE", "MAX", "ABS", "DIFFERENCE"]
    assert only.split("  ")[0] == "only left"
    assert only.endswith("F32 [2, 4]")
    assert values.endswith("all 4, 1 ulp")
    relative, cosine, most = map(float, values.split()[2:5])
    assert 0 < relative < 1e-6
    assert 0 < most < 1e-6
    assert cosine in (0.9999, 1)


def test_the_document(run: Run, tmp_path: Path, entries: dict[str, Any]) -> None:
    one = saved(tmp_path / "one.pth", {"state_dict": entries, "epoch": 3})
    changed = {**entries, "features.bias": entries["features.bias"].clone()}
    changed["features.bias"][1] = float("nan")
    other = saved(tmp_path / "other.pth", {"state_dict": changed, "epoch": 4, "extra": [1]})
    outcome = run("diff", "--json", one, other)
    assert outcome.code == 1
    document = outcome.document
    assert (document["schema"], document["equal"]) == ("diff/1", False)
    assert document["left"] == {
        "file": str(one),
        "container": "torch-zip",
        "at": ["state_dict"],
    }
    (change,) = document["changed"]
    assert (change["key"], change["what"]) == ("features.bias", "values")
    assert (change["count"], change["of"], change["first"]) == (1, 4, [1])
    assert (change["nan_one_side"], change["max_abs"], change["max_ulp"]) == (1, None, None)
    assert (document["only_left"], document["only_right"]) == ([], [])
    assert document["beside"]["only_right"] == ["extra"]
    assert document["beside"]["changed"] == [
        {"key": "epoch", "what": "value", "left": "3", "right": "4"}
    ]
    equal = run("diff", "--json", one, one)
    assert (equal.code, equal.document["equal"], equal.document["changed"]) == (0, True, [])
    assert (equal.document["tensors"], equal.document["nbytes"]) == (3, 96)


@pytest.mark.parametrize("suffix", ["zip", "legacy", "safetensors"])
def test_one_bit_is_found_in_every_container(
    run: Run, tmp_path: Path, entries: dict[str, Any], suffix: str
) -> None:
    def write(path: Path) -> Path:
        if suffix == "safetensors":
            safetensors_torch.save_file(entries, path)
        else:
            torch.save(entries, path, _use_new_zipfile_serialization=suffix == "zip")
        return path

    one = write(tmp_path / "one")
    entries["head.weight"].view(torch.int32)[1, 3] ^= 1
    (row,) = rows(run("diff", one, write(tmp_path / "other")))
    assert row[:5] == ["values", "head.weight", "1", "8", "[1, 3]"]
    assert row[6] == "1"


# What stands beside the state_dict.


def test_what_stands_beside_counts_where_both_have_some(
    run: Run, tmp_path: Path, entries: dict[str, Any]
) -> None:
    def write(name: str, **beside: Any) -> Path:
        return saved(tmp_path / name, {"state_dict": entries, **beside})

    momentum = torch.ones(3)
    one = write("one.pth", epoch=3, args={"lr": 0.1}, optimizer={"m": momentum})
    other = write("other.pth", epoch=4, args={"lr": 0.2, "wd": 0}, optimizer={"m": momentum + 1})
    outcome = run("diff", one, other)
    assert outcome.code == 1
    assert sorted(rows(outcome)) == [
        ["beside-only-right", "args.wd"],
        ["beside-value", "args.lr", "0.1", "0.2"],
        ["beside-value", "epoch", "3", "4"],
        ["beside-values", "optimizer.m", "3", "3", "[0]", "1", "8388608", "", "1.0", "1.0"],
    ]
    assert "4 places outside the state_dict" in outcome.err
    for choice in (["--at", "state_dict"], ["--select", "*"]):
        assert run("diff", *choice, one, other).code == 0
    bare = saved(tmp_path / "bare.pth", entries)
    told = run("diff", one, bare)
    assert (told.code, told.out) == (0, "")
    assert f"outside the state_dict, only {one} has epoch, args, optimizer" in told.err


def test_versions_of_modules_count_where_both_have_some(
    run: Run, tmp_path: Path, entries: dict[str, Any]
) -> None:
    def write(name: str, metadata: Any) -> Path:
        state = OrderedDict(entries)
        if metadata is not None:
            state._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
        return saved(tmp_path / name, state)

    one = write("one.pth", {"": {"version": 1}, "features": {"version": 1}})
    other = write("other.pth", {"": {"version": 1}, "features": {"version": 2}})
    (row,) = rows(run("diff", one, other))
    assert row == ["beside-value", "_metadata.features.version", "1", "2"]
    without = run("diff", one, write("without.pth", None))
    assert without.code == 0
    assert f"only {one} has `_metadata` (module versions)" in without.err
    fewer = run("diff", one, write("fewer.pth", {"": {"version": 1}}))
    assert fewer.code == 0
    assert f"only {one} has `_metadata` of features (" in fewer.err


def test_plain_values_differ_by_type_and_bits(run: Run, tmp_path: Path) -> None:
    values = {"w": {"x": torch.ones(1)}, "b": True, "f": 0.0, "n": float("nan"), "s": {1, 2, 3}}
    changed = {**values, "b": 1, "f": -0.0, "s": {3, 2, 4}}
    one, other = saved(tmp_path / "one.pth", values), saved(tmp_path / "other.pth", changed)
    assert sorted(rows(run("diff", one, other))) == [
        ["beside-only-left", "s.1"],
        ["beside-only-right", "s.4"],
        ["beside-value", "b", "True", "1"],
        ["beside-value", "f", "0.0", "-0.0"],
    ]
    assert run("diff", one, one).code == 0


# What a protocol or a container spells in its own way.
ODD = {
    "keys": {b"k": 1, (b"z", 1): 2, 2**80: 3, -(2**90): 4, None: 5, 1.5: 6, frozenset([1]): 7},
    "set": {b"x", 2**80, "s"},
    "long": [2**127, -(2**127), 2**63, 10**60, -(2**300)],
    "bytes": [b"", b"\xff", bytearray(b"a"), bytearray()],
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("zipped", [True, False])
def test_a_lossless_conversion_of_any_protocol_is_equal(
    run: Run, tmp_path: Path, protocol: int, zipped: bool
) -> None:
    one, other = tmp_path / "one.pth", tmp_path / "other.pth"
    content = {"state_dict": {"w": torch.ones(1)}, **ODD}
    how = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save(content, one, **how)
    assert run("convert", one, other).code == 0
    equal = run("diff", one, other)
    assert (equal.code, equal.out) == (0, "")
    for name, value in {"keys": {2**80 + 1: 3}, "set": {b"y"}, "long": [10**60 + 1]}.items():
        torch.save({**content, name: value}, tmp_path / "changed.pth", **how)
        assert run("diff", other, tmp_path / "changed.pth").code == 1


def test_a_set_is_no_frozenset(run: Run, tmp_path: Path) -> None:
    paths = [
        saved(tmp_path / f"{kind.__name__}.pth", {"state_dict": {"w": torch.ones(1)}, "s": kind()})
        for kind in (set, frozenset)
    ]
    assert run("diff", *paths).code == 1


def test_attributes_of_tensors_count_where_both_have_some(run: Run, tmp_path: Path) -> None:
    def write(name: str, **attributes: Any) -> Path:
        parameter, tensor = torch.nn.Parameter(torch.ones(2)), torch.ones(2)
        parameter.__dict__.update(attributes)
        tensor.__dict__.update(attributes)
        return saved(tmp_path / name, {"p": parameter, "t": tensor})

    one = write("one.pth", scale=2.0, more=torch.ones(2))
    assert run("diff", one, write("same.pth", scale=2.0, more=torch.ones(2))).code == 0
    changed = run("diff", one, write("other.pth", scale=3.0, more=torch.zeros(2)))
    assert changed.code == 1
    assert sorted(rows(changed)) == [
        ["attributes", "p", "2.0", "3.0"],
        ["attributes", "t", "2.0", "3.0"],
        ["values", "p.(attributes).more", "2", "2", "[0]", "1", "1065353216", "", "1.0", ""],
        ["values", "t.(attributes).more", "2", "2", "[0]", "1", "1065353216", "", "1.0", ""],
    ]
    alone = run("diff", one, write("none.pth"))
    assert alone.code == 0
    assert "which tensors have attributes differ: p, t" in alone.err


def test_attributes_that_are_tensors_with_attributes_take_linear_time(
    run: Run, tmp_path: Path
) -> None:
    tensor = torch.ones(1)
    for _ in range(40):
        outer = torch.ones(1)
        outer.one = outer.other = tensor
        tensor = outer
    path = saved(tmp_path / "nested.pth", {"w": tensor})
    assert run("diff", path, path).code == 0


# Which keys pair.


def test_prefixes_are_ignored_on_request(run: Run, tmp_path: Path, entries: dict[str, Any]) -> None:
    bare = saved(tmp_path / "bare.pth", entries)
    wrapped = {f"_orig_mod.module.{key}": value for key, value in entries.items()}
    one = saved(tmp_path / "one.pth", wrapped)
    outcome = run("diff", one, bare)
    assert outcome.code == 1
    assert f"every key of {one} starts with `_orig_mod.module.`" in outcome.err
    assert "--ignore-prefix auto" in outcome.err
    assert run("diff", "--ignore-prefix", "auto", one, bare).code == 0
    assert run("diff", "--ignore-prefix", "auto", bare, one).code == 0
    assert run("diff", "--ignore-prefix", "_orig_mod.module", bare, one).code == 0
    refused = run("diff", "--ignore-prefix", "backbone", bare, one)
    assert (refused.code, refused.out) == (2, "")
    assert "error[nothing-matched]" in refused.err


def test_renamed_keys_pair(run: Run, tmp_path: Path, entries: dict[str, Any]) -> None:
    one = saved(tmp_path / "one.pth", entries)
    renamed = {key.replace("head", "fc"): value for key, value in entries.items()}
    other = saved(tmp_path / "other.pth", renamed)
    assert run("diff", one, other).code == 1
    assert run("diff", "--rename", "head=fc", one, other).code == 0
    assert run("diff", "--map", "head=fc", one, other).code == 0
    assert run("diff", "--map", "nothing=fc", one, other).code == 2
    bad = run("diff", "--map", "head", one, other)
    assert bad.code == 2
    assert "--rename classifier=head" in bad.err


def test_renames_and_recipes_are_applied_in_the_order_given(
    run: Run, tmp_path: Path, entries: dict[str, Any]
) -> None:
    one = saved(tmp_path / "one.pth", entries)
    renamed = {key.replace("head", "fc.last"): value for key, value in entries.items()}
    other = saved(tmp_path / "other.pth", renamed)
    recipe = tmp_path / "last.toml"
    recipe.write_text("recipe = 1\n[[step]]\nrename = [['fc', 'fc.last']]\n")
    for options, code in (
        (("--rename", "head=fc", "--recipe", recipe), 0),
        (("--recipe", recipe, "--rename", "head=fc"), 2),
        (("--map", "head=fc", "--recipe", recipe), 0),
        (("--map", "head=fc", "--rename", "fc=fc.last"), 2),  # one step, which sees `head` alone
        (("--recipe", recipe, "--reverse", "--rename", "fc=head"), 0),
    ):
        pair = (one, other) if "--reverse" not in options else (other, one)
        assert run("diff", *options, *pair).code == code


def test_select_chooses_keys(run: Run, tmp_path: Path, entries: dict[str, Any]) -> None:
    one = saved(tmp_path / "one.pth", entries)
    other = saved(
        tmp_path / "other.pth", {**entries, "head.weight": torch.ones(2), "extra": torch.ones(1)}
    )
    assert run("diff", "--select", "features", one, other).code == 0
    assert rows(run("diff", "--select", "extra", one, other)) == [["only-right", "extra"]]
    missing = run("diff", "--select", "feature", one, other)
    assert (missing.code, missing.out) == (2, "")


def test_one_of_several_state_dicts_must_be_chosen(run: Run, good: Path) -> None:
    outcome = run("diff", good / "dino.pth", good / "plain.pth")
    assert (outcome.code, outcome.out) == (2, "")
    assert "error[ambiguous-state-dict]" in outcome.err
    assert "--left-at teacher" in outcome.err
    swapped = run("diff", good / "plain.pth", good / "dino.pth")
    assert "--right-at teacher" in swapped.err
    both = ("--left-at", "student", "--right-at", "teacher", "--ignore-prefix", "auto")
    chosen = run("diff", *both, good / "dino.pth", good / "dino.pth")
    assert chosen.code == 1
    assert {what for what, *_ in rows(chosen)} == {"values"}


def test_all_compares_by_path(run: Run, tmp_path: Path, good: Path) -> None:
    lists = [saved(tmp_path / f"{n}.pth", [torch.ones(2), {"x": torch.zeros(n)}]) for n in (3, 4)]
    assert rows(run("diff", *lists)) == [["shape", "1.x", "[3]", "[4]"]]
    one = good / "model_best.pth.tar"
    outcome = run("diff", "--all", one, good / "data_parallel.pth")
    assert outcome.code == 1
    found = {(what, key) for what, key, *_ in rows(outcome)}
    assert ("only-left", "state_dict.module.classifier.bias") in found
    assert ("only-right", "module.classifier.bias") in found
    assert run("diff", "--all", "--at", "state_dict", one, one).code == 2
    assert run("diff", "--all", "--map", "a=b", one, one).code == 2
    assert run("diff", "--all", "--recipe", "lightning-to-plain", one, one).code == 2


# Told, and of no weight.


def test_order_ties_strides_and_gradients_are_notes(run: Run, tmp_path: Path) -> None:
    weight, other = torch.ones(2, 3), torch.zeros(2)
    one = saved(tmp_path / "one.pth", {"a": weight, "b": weight, "c": other})
    untied = {"c": torch.nn.Parameter(other), "a": weight, "b": weight.T.contiguous().T}
    second = saved(tmp_path / "other.pth", untied)
    outcome = run("diff", one, second)
    assert (outcome.code, outcome.out) == (0, "")
    assert "the keys are in another order: a where c is" in outcome.err
    assert f"tied only in {one}: b = a" in outcome.err
    assert "strides differ: b" in outcome.err
    assert "requires_grad differ: c" in outcome.err
    assert "Parameter or tensor differ: c" in outcome.err


def test_a_damaged_file_is_told_from_a_different_one(
    run: Run, tmp_path: Path, entries: dict[str, Any]
) -> None:
    one = saved(tmp_path / "one.pth", entries)
    other = shutil.copy(one, tmp_path / "other.pth")
    with zipfile.ZipFile(one) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data/2"))
        wanted = archive.read(name)
    data = bytearray(other.read_bytes())
    data[data.index(wanted)] ^= 1
    other.write_bytes(data)
    outcome = run("diff", one, other)
    assert outcome.code == 1
    assert rows(outcome)[0][:2] == ["values", "head.weight"]
    assert f"{other}: the bytes of storage 2 do not match their checksum" in outcome.err


def test_errors_keep_their_exit_codes(run: Run, good: Path, tmp_path: Path) -> None:
    plain = good / "plain.pth"
    missing = run("diff", plain, tmp_path / "missing.pth")
    assert (missing.code, missing.out) == (3, "")
    short = tmp_path / "short.pth"
    short.write_bytes(plain.read_bytes()[:500])
    assert run("diff", plain, short).code == 3
    assert run("diff", "--atol", "-1", plain, plain).code == 2
    assert run("diff", "--rtol", "nan", plain, plain).code == 2
    assert run("diff", plain).code == 2


def test_what_would_run_is_warned_of(run: Run, hostile: Path) -> None:
    hooked = hostile / "eval_in_namespace.pth"
    outcome = run("diff", "-q", hooked, hooked)
    assert (outcome.code, outcome.out) == (0, "")
    assert "would run code when loaded; nothing was executed" in outcome.err


# Cost.


def test_small_differences_need_no_library(spawn: Callable[..., Outcome], good: Path) -> None:
    code = (
        "import sys; from ckptool.cli.main import main; sys.argv[0] = 'ckptool'; code = main(); "
        "assert not {'numpy', 'torch', 'tqdm'} & sys.modules.keys(); sys.exit(code)"
    )
    both = ("--left-at", "student", "--right-at", "teacher", "--ignore-prefix", "auto")
    line = ("diff", *both, good / "dino.pth", good / "dino.pth")
    outcome = spawn(*line, program=("-c", code))
    assert (outcome.code, len(rows(outcome))) == (1, 8)


# ru_maxrss would be at least that of this process, which forks.
MEASURED = """
import sys
sys.argv[0] = "ckptool"
from ckptool.cli.main import main
code = main()
print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, make_safetensors: Callable[..., Path]
) -> None:
    shapes: dict[str, Sequence[int]] = {"w": (64 << 20,)}
    one, other = (make_safetensors(tmp_path / name, shapes) for name in ("one", "other"))
    peaks = []
    for flips in ((), (1 << 20, 100 << 20), range(1 << 20, 2 << 20, 512)):
        with other.open("r+b") as file:
            for at in flips:
                file.seek(at)
                file.write(b"\1")
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, "diff", "-q", one, other],
            env=environment(),
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == bool(flips)
        peaks.append(int(done.stderr.split()[1]) >> 10)
    assert max(peaks) < 64


def test_trees_that_refer_to_themselves_take_linear_time() -> None:
    """Two rings of coprime lengths, and two webs in which everything refers to everything."""

    def ring(length: int) -> list[Any]:
        nodes: list[list[Any]] = [[] for _ in range(length)]
        for at, node in enumerate(nodes):
            node += [nodes[(at + 1) % length]]
        return nodes[0]

    def web(size: int, leaf: int) -> list[Any]:
        nodes: list[list[Any]] = [[] for _ in range(size)]
        for at, node in enumerate(nodes):
            node += nodes[at:] + nodes[:at] + [leaf]
        return nodes[0]

    assert list(places_of(ring(197), ring(199))) == []
    with pytest.raises(LimitExceeded):
        list(places_of(ring(10_007), ring(10_009)))
    assert list(places_of(web(150, 1), web(149, 1))) != []
    assert list(places_of(web(150, 1), web(150, 1))) == []
    assert list(places_of(web(150, 1), web(150, 2))) != []


def test_a_file_cannot_choose_hashes() -> None:
    step = (1 << 61) - 1
    colliding = [Dict([(at * step, at) for at in range(40_000)]) for _ in range(2)]
    assert list(places_of(*colliding)) == []


# As a function.


def test_the_function_takes_what_the_command_does(tmp_path: Path, entries: dict[str, Any]) -> None:
    one = saved(tmp_path / "one.pth", {"model": entries, "ema": entries})
    other = saved(tmp_path / "other.pth", {f"x.{key}": value for key, value in entries.items()})
    found = ckptool.diff(one, other, left_at="ema", ignore_prefix="x")
    assert found.equal
    assert (found.left.at, found.right.at) == (("ema",), ())
    assert ckptool.diff(one, other, left_at="ema", map={"head": "x.head"}, select=["x.head"])
    with pytest.raises(CkptoolError):
        ckptool.diff(one, other, left_at="nothing")


def test_parameters_that_are_keys_pair_by_their_number(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of an optimizer that was pickled whole, in another order on the right."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    torch.save({"optimizer": optimizer}, "left.pt")
    parameter = list(model.parameters())[2]
    moved = dict(reversed(list(optimizer.state.items())))
    optimizer.state.clear()
    optimizer.state.update(moved)
    torch.save({"optimizer": optimizer}, "reordered.pt")
    optimizer.state[parameter]["exp_avg"].add_(1)
    torch.save({"optimizer": optimizer}, "right.pt")
    assert run("diff", "--all", "left.pt", "reordered.pt").code == 0
    done = run("diff", "--all", "left.pt", "right.pt")
    assert [row.split("\t")[:2] for row in done.out.splitlines()] == [
        ["values", "optimizer.state.2.exp_avg"]
    ]
    names = run("keys", "--all", "--names", "right.pt").out.splitlines()
    assert len(set(names)) == len(names) == 24
    assert "optimizer.state.5.step" in names


def test_metadata_that_one_side_lacks_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state_dict = torch.nn.Linear(2, 2).state_dict()
    torch.save({"state_dict": state_dict}, "left.pt")
    del state_dict._metadata
    torch.save({"state_dict": state_dict}, "right.pt")
    done = run("diff", "--all", "left.pt", "right.pt")
    assert done.out.splitlines() == ["beside-only-left\tstate_dict._metadata"]
