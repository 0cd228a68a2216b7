"""Reports are pure text: what is shown of a result, and that nothing of a file can act in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from ckptool import containers, text
from ckptool.cli import report, report_plan, talk
from ckptool.state import edits
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import Storage, TensorInfo, contiguous_stride
from ckptool.verbs import listing
from ckptool.verbs.fitting import Fit, Mismatch, Transferred
from ckptool.verbs.surgery import Dropped, Rewrite

VISIBLE = [
    ("plain text, \u5c42 \u00e9 \U0001f600", "plain text, \u5c42 \u00e9 \U0001f600"),
    ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
    ("\x00\x07\x1b[31m\x7f\x9b", "\\x00\\x07\\x1b[31m\\x7f\\x9b"),
    ("\u202egnp.\u2066x\u2069", "\\u202egnp.\\u2066x\\u2069"),
    ("\u200b\u200e\u2028\u2029\ufeff\u061c", "\\u200b\\u200e\\u2028\\u2029\\ufeff\\u061c"),
    ("\ud800x\udcff", "\\ud800x\\udcff"),
    ("", ""),
]


@pytest.mark.parametrize(("raw", "shown"), VISIBLE, ids=[ascii(row[0]) for row in VISIBLE])
def test_visible(raw: str, shown: str) -> None:
    assert text.visible(raw) == shown


@given(st.text())
def test_visible_text_is_one_line_that_any_unicode_stream_holds(raw: str) -> None:
    shown = text.visible(raw)
    assert len(shown.splitlines()) <= 1
    assert shown.encode("utf-8").decode() == shown
    assert text.visible(shown) == shown


SIZES = [
    (0, "0 B"),
    (1023, "1023 B"),
    (1024, "1.0 KiB"),
    (37632, "36.8 KiB"),
    (1 << 20, "1.0 MiB"),
    (102_400_000, "97.7 MiB"),
    (5 << 30, "5.0 GiB"),
    (1 << 40, "1.0 TiB"),
    (5000 << 40, "5000.0 TiB"),
]


@pytest.mark.parametrize(("nbytes", "shown"), SIZES)
def test_sizes(nbytes: int, shown: str) -> None:
    assert text.readable(nbytes) == shown


def test_shares_round_to_all_only_when_they_are_all() -> None:
    assert text.percent(1.0) == "100.0 %"
    assert text.percent(0.99999) == "99.9 %"
    assert text.percent(0.5) == "50.0 %"
    assert text.percent(0.0) == "0.0 %"


def test_shapes_and_lists() -> None:
    assert text.shape(()) == "[]"
    assert text.shape((64, 3, 7, 7)) == "[64, 3, 7, 7]"
    assert text.listed(["a", "b"]) == "a, b"
    assert text.listed([str(i) for i in range(14)], limit=3) == "0, 1, 2 and 11 more"
    assert text.listed(["a\nb"]) == "a\\nb"


def test_words_for_a_shell() -> None:
    assert text.quoted("a/b-c_d.pth") == "a/b-c_d.pth"
    assert text.quoted("a b") == "'a b'"
    assert text.quoted("it's") == "'it'\"'\"'s'"
    assert text.quoted("") == "''"
    assert text.quoted("$(x)") == "'$(x)'"


def test_tables_are_aligned_without_trailing_space() -> None:
    rows = [("NAME", "SIZE"), ("a", "1 B"), ("longer", "")]
    assert text.table(rows) == ["NAME    SIZE", "a       1 B", "longer"]
    assert text.table(rows, right=(1,)) == ["NAME    SIZE", "a        1 B", "longer"]
    assert text.table([]) == []


def test_documents_are_ascii_json() -> None:
    fields = {"schema": "x/1", "key": "\u5c42\u202e\ud800\x1b\x7f", "count": 3}
    made = talk.document(fields)
    assert made.isascii()
    assert "\x1b" not in made
    assert "\x7f" not in made
    assert json.loads(made) == fields
    assert next(iter(json.loads(made))) == "schema"


# Lists.


def tensor(*shape: int, dtype: DType = DType.F32) -> TensorInfo:
    storage = Storage("file", "0", 0, 1 << 40)
    return TensorInfo(dtype, shape, contiguous_stride(shape), storage)


ENTRIES = [
    ("a.b.weight", tensor(2, 3)),
    ("a.b.bias\x1b", tensor(2)),
    ("a.c", tensor(4, dtype=DType.F16)),
    ("top", tensor()),
]


def test_rows_have_four_fields_between_tabs() -> None:
    assert report.key_rows(ENTRIES) == [
        "a.b.weight\tF32\t[2, 3]\t24",
        "a.b.bias\\x1b\tF32\t[2]\t8",
        "a.c\tF16\t[4]\t8",
        "top\tF32\t[]\t4",
    ]


def test_table_of_keys() -> None:
    assert report.key_table(ENTRIES, 80) == [
        "KEY           DTYPE  SHAPE   SIZE",
        "a.b.weight    F32    [2, 3]  24 B",
        "a.b.bias\\x1b  F32    [2]     8 B",
        "a.c           F16    [4]     8 B",
        "top           F32    []      4 B",
    ]


def test_tree_adds_up_and_keeps_order() -> None:
    assert report.tree_table(ENTRIES, None, width=None) == [
        ".\t4\t44\t100.0 %",
        "a\t3\t40\t90.9 %",
        "a.b\t2\t32\t72.7 %",
    ]
    assert report.tree_table(ENTRIES, 1, width=None) == [".\t4\t44\t100.0 %", "a\t3\t40\t90.9 %"]
    assert report.tree_table(ENTRIES, None, width=80) == [
        "MODULE  TENSORS  SIZE    SHARE",
        "(all)         4  44 B  100.0 %",
        "  a           3  40 B   90.9 %",
        "    b         2  32 B   72.7 %",
    ]
    assert report.tree_table([], None, width=None) == [".\t0\t0\t0.0 %"]


def test_a_tree_of_empty_tensors_divides_by_nothing() -> None:
    assert report.tree_table([("a.b", tensor(0))], None, width=None)[0] == ".\t1\t0\t0.0 %"


WRAPPED = [
    (["module.a"], "every key starts with `module.` (DataParallel)", "strip-prefix f OUT"),
    (["_orig_mod.a"], "(torch.compile)", "strip-prefix --prefix auto f OUT"),
    (["module._orig_mod.a"], "(DataParallel, torch.compile)", "--prefix auto"),
    (["_module.a"], "(Opacus, or a module of that name)", "--prefix auto"),
    (["module.a", "b", "c"], "1 of 3 keys start with `module.` (DataParallel)", ""),
    (["a"], "", ""),
    ([], "", ""),
]


@pytest.mark.parametrize(("keys", "said", "command"), WRAPPED, ids=[str(row[0]) for row in WRAPPED])
def test_wrappers_are_named_with_what_removes_them(
    keys: list[str], said: str, command: str
) -> None:
    line = report.prefix_line("f", dict.fromkeys(keys))
    assert said in line
    assert command in line
    assert bool(line) is bool(said)


def test_commands_in_hints_can_be_pasted() -> None:
    line = report.prefix_line("my file.pth", {"module.a": 1})
    assert "ckptool strip-prefix 'my file.pth' OUT" in line


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("plain.pth", "torch zip, 8 tensors, 704 B"),
        ("plain_legacy.pth", "legacy torch, 8 tensors, 704 B"),
        ("plain.safetensors", "safetensors, 8 tensors, 704 B"),
    ],
)
def test_the_first_line_says_what_a_file_is(good: Path, name: str, line: str) -> None:
    found = listing.listing(containers.read(good / name))
    assert report.listing_lines(found, every=False)[0] == f"{good / name}: {line}"


def test_entries_that_are_no_tensors_are_counted(good: Path) -> None:
    found = listing.listing(containers.read(good / "extra_state.pth"))
    lines = report.listing_lines(found, every=False)
    assert any("not tensors" in line for line in lines)


@pytest.mark.parametrize(
    "words", ["1 tensor", "2 tensors", "0 keys", "1 entry", "2 more entries", "2 copies"]
)
def test_counts_have_their_plural(words: str) -> None:
    count, _, noun = words.partition(" ")
    one = noun.replace("ies", "y").removesuffix("s")
    assert text.counted(int(count), one) == words


# Rewrites.


def rewrite(**changes: object) -> Rewrite:
    fields: dict[str, object] = {
        "source": "in", "target": "out", "container": "torch-zip", "at": (), "map": (),
        "dropped": (), "written": 0, "nbytes": 0, "tensor_nbytes": 0,
    }  # fmt: skip
    return Rewrite(**{**fields, **changes})  # type: ignore[arg-type]


def test_counts_add_up() -> None:
    result = rewrite(
        map=(("a", "b"), ("c", "c"), ("d", None)), dropped=(Dropped("d", "d", "why"),), written=2
    )
    assert (result.read, result.renamed, result.kept) == (3, 1, 1)
    assert report.counts_line(result) == "read 3, renamed 1, dropped 1, written 2"
    result = rewrite(written=2, dry_run=True, added=1)
    assert report.counts_line(result) == ("read 0, renamed 0, dropped 0, added 1, would write 2")


CHANGES = [
    ([edits.strip_prefix()], "module.a module.b", ["stripped `module.` from 2 of 2 keys"]),
    ([edits.strip_prefix()], "module.a b", ["stripped `module.` from 1 of 2 keys"]),
    ([edits.strip_prefix(), edits.drop(["b"])], "module.a module.b",
     ["stripped `module.` from 2 of 2 keys"]),
    ([edits.strip_wrappers()], "_orig_mod.module.a",
     ["stripped `_orig_mod.module.` from 1 of 1 keys"]),
    ([edits.strip_wrappers(required=False)], "a", []),
    ([edits.strip_prefix(anywhere=True)], "a.module.b c",
     ["stripped `module.` from 1 of 2 keys"]),
    ([edits.add_prefix()], "a b", ["added `module.` to 2 of 2 keys"]),
    ([edits.strip_prefix(), edits.rename("a", "c")], "module.a.x module.b",
     ["stripped `module.` from 2 of 2 keys", "moved `a` to `c` in 1 of 2 keys"]),
    ([edits.strip_prefix("x\x1b")], "x\x1b.a", ["stripped `x\\x1b.` from 1 of 1 keys"]),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "keys", "lines"), CHANGES, ids=[row[1] for row in CHANGES])
def test_what_happened_to_prefixes_is_named(
    steps: list[edits.Edit], keys: str, lines: list[str]
) -> None:
    key_map, _ = edits.apply(steps, keys.split(" "))
    assert report.rewrite_lines(rewrite(map=key_map.pairs, said=key_map.said)) == lines


def test_what_is_dropped_is_named_by_reason() -> None:
    dropped = (
        Dropped("module.a", "a", "dropped as asked", (2, 3)),
        Dropped("b", "b", "not in x\x1b", ()),
        Dropped("c", "c", "dropped as asked"),
        Dropped("d", "d", "tied to e", (4,)),
        Dropped("f", "f\n", "shape differs", (4,)),
    )
    assert report.rewrite_lines(rewrite(dropped=dropped)) == [
        "dropped 2: a [2, 3], c",
        "dropped 1 (not in x\\x1b): b []",
        "1 tied, stored once (--untie writes each): d = e",
    ]


def test_many_dropped_keys_are_counted() -> None:
    dropped = tuple(Dropped(f"k{i}", f"k{i}", "dropped as asked") for i in range(20))
    (line,) = report.rewrite_lines(rewrite(dropped=dropped))
    assert line.startswith("dropped 20: k0, k1, ")
    assert line.endswith(", k11 and 8 more")


def test_what_is_left_behind_is_named() -> None:
    result = rewrite(at=("state_dict",), bare=True, not_carried=("epoch", "arch\x1b"))
    assert report.rewrite_lines(result) == [
        "took the state_dict at `state_dict`; not written: epoch, arch\\x1b"
    ]
    assert report.rewrite_lines(rewrite(not_carried=("x",))) == ["not written: x"]


def test_a_plan_shows_each_change() -> None:
    pairs = (("module.a", "a"), ("b", "b"), ("c\x1b", None))
    result = rewrite(map=pairs, written=2, nbytes=2048, dry_run=True, free=1 << 30)
    assert report_plan.plan_lines(result, report.counts_line(result)) == [
        "- module.a",
        "+ a",
        "- c\\x1b",
        "read 3, renamed 1, dropped 0, would write 2",
        "out: 2.0 KiB to write, 1.0 GiB free",
    ]
    assert report_plan.plan_lines(rewrite(), "")[-1] == "out: 0 B to write, unknown free"


def test_a_fit_is_told() -> None:
    fit = Fit("x\x1b", ("a",), (Mismatch("b\x1b", (2,), (3, 4)),), ("c",), (), 0.25)
    assert report.fit_lines(fit) == [
        "dropped, shape differs:",
        "    b\\x1b  [2]  here, [3, 4] in x\\x1b",
        "fills 1 of 3 tensors, 25.0 % of the parameters; not filled: b\\x1b, c",
    ]
    assert report.fit_lines(Fit("x", ("a",), (), (), (), 1.0)) == [
        "fills 1 of 1 tensors, 100.0 % of the parameters"
    ]
    document = Transferred(rewrite(), fit).to_dict()
    assert (
        document.items()
        >= {
            "schema": "transfer/1",
            "matched": 1,
            "mismatched": [{"key": "b\x1b", "here": [2], "there": [3, 4]}],
            "missing": ["c"],
            "filled": 0.25,
        }.items()
    )
