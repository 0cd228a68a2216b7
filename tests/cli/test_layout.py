"""How rows fold and how texts fit so many columns."""

from __future__ import annotations

import unicodedata

import pytest
from test_screens import LONG, WIDTH, columns

from ckptool.cli import folding, screen
from ckptool.cli.help import shown as page
from ckptool.text import measured

ROWS = [
    ([("a.0.w", 1), ("a.1.w", 1)], ["a.0.w", "a.1.w"]),  # too few
    ([("a.0.w", 1), ("a.1.w", 1), ("a.2.w", 1)], ["a.{0-2}.w"]),
    ([("a.0.w", 1), ("a.1.w", 2), ("a.2.w", 1), ("a.3.w", 1)], ["a.{0,2-3}.w", "a.1.w"]),
    ([("a0.w", 1), ("a1.w", 1), ("a2.w", 1)], ["a0.w", "a1.w", "a2.w"]),  # no numbers
    ([("a.00", 1), ("a.01", 1), ("a.02", 1)], ["a.00", "a.01", "a.02"]),  # not how it is written
    ([("a.²", 1), ("a.9999999999", 1), ("a.-1", 1)], ["a.²", "a.9999999999", "a.-1"]),
    ([("2", 1), ("0", 1), ("1", 1)], ["{0-2}"]),
    ([], []),
]


@pytest.mark.parametrize(("rows", "keys"), ROWS)
def test_folding(rows: list[tuple[str, int]], keys: list[str]) -> None:
    folds = folding.folded(rows)
    assert [fold.key for fold in folds] == keys
    assert sorted(index for fold in folds for index in fold.rows) == list(range(len(rows)))


CUT = [
    ("module.layer4.1.downsample.0.weight", 24, "module.layer4...0.weight"),
    ("module.layer4.1.conv1.weight", 28, "module.layer4.1.conv1.weight"),
    ("model.language_model.layers.17.self_attn.q_proj.weight", 34, "17.self_attn.q_proj.weight"),
]


@pytest.mark.parametrize(("key", "width", "kept"), CUT)
def test_a_key_is_cut_in_its_middle(key: str, width: int, kept: str) -> None:
    short = screen.shortened(key, width)
    assert columns(short) <= width
    assert kept in short


@pytest.mark.parametrize("width", range(8, 60))
@pytest.mark.parametrize("text", ["编码器.层.0.权重", LONG, "e\u0301" * 40, "한국어.weight"])
def test_what_is_cut_fits(text: str, width: int) -> None:
    short = screen.shortened(text, width)
    assert columns(short) <= width
    assert short == text or "..." in short
    assert not unicodedata.combining(short[short.find("...") + 3])


def test_columns_align_as_displayed() -> None:
    lines = screen.table([("编码", "x"), ("e\u0301", "x"), ("four", "x")], WIDTH)
    assert {columns(line) for line in lines} == {7}
    assert measured("\x1b[1m编\x1b[0m") == 2


def test_a_command_to_paste_stays_in_a_line() -> None:
    command = "ckptool strip-prefix --at state_dict model_best.pth.tar OUT"
    line = f"every key starts with `module.`: {command}   removes it; more"
    assert any(command + "   removes" in each for each in screen.wrapped(line, 75))
    assert any(command in each for each in screen.wrapped(line, 40))


def test_columns_that_can_be_missed_go_before_keys_are_cut_short() -> None:
    row = ("a" * 30, "b" * 20, "1" * 20)
    assert screen.table([row], 60, right=[2], spare=[1])[0].split() == [row[0], row[2]]
    assert len(screen.table([row], 80, right=[2], spare=[1])[0].split()) == 3


def test_sentences_lose_nothing() -> None:
    """An error may show what a file would run, in one long word."""
    word = "builtins.eval(" + "编a1" * 60 + ")"
    for width in (20, 33, 80):
        lines = screen.wrapped(f"    data.pkl: {word} at `hook`", width)
        assert max(map(columns, lines)) <= width
        assert (
            "".join(line.strip() for line in lines).replace(" ", "") == f"data.pkl:{word}at`hook`"
        )


@pytest.mark.parametrize("width", range(1, 40))
def test_a_deep_indent_leaves_room(width: int) -> None:
    """A value may be deeper than the terminal is wide, which may be of hardly any width."""
    for text in ("'a name': 'a value of words'", "编码" * 20, "x" * 90, "{'path': '" + "y" * 90):
        lines = screen.wrapped(" " * 60 + text, width)
        assert "".join("".join(lines).split()) == "".join(text.split())
        assert max(map(columns, lines)) <= max(width, screen.LEAST)


def test_a_key_with_spaces_is_a_row() -> None:
    """Lightning's callbacks have such keys, and paths in them."""
    key = "callbacks.ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min'}./a/b/best one.ckpt"
    rows = [(key, "F32", "[300, 86]", "100.8 KiB"), ("w", "F32", "[]", "4 B")]
    head = ("KEY", "DTYPE", "SHAPE", "SIZE")
    lines = screen.listed(head, rows, WIDTH)
    assert [line.split()[-1] for line in lines] == ["SIZE", "KiB", "B"]
    assert max(map(columns, lines)) <= WIDTH
    last = ("equal", key, "differs in a sentence that is long enough to be broken in two, or three")
    lines = screen.listed(("WHAT", "KEY", "DIFFERENCE"), [last], 60, key=1)
    assert "".join(line[-18:] for line in lines).replace(" ", "").endswith("intwo,orthree")


def test_a_page_is_laid_out_anew() -> None:
    text = (
        "# a: b\n\nOne line of\nwords that go on.\n\n- an item of\n  two lines\n- another\n\n"
        "| one | two |\n|---|---|\n| `a` | b |\n\n```text\n- as it is\n```\n"
    )
    assert page(text, styled=False, width=40).splitlines() == [
        "a: b", "", "One line of words that go on.", "", "- an item of two lines", "- another", "",
        "one  two", "`a`  b", "", "    - as it is",
    ]  # fmt: skip
    assert page(text, styled=False).splitlines()[2:4] == ["One line of", "words that go on."]
