"""Bad recipes: each gives one error that says where it is and what is wrong, and writes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome

from ckptool import Recipe
from ckptool.state.templates import Matcher

Run = Callable[..., Outcome]
STEP = "recipe = 1\n[[step]]\n"
SPLIT = STEP + "split = {from = 'h.{i}.q.weight', to = ['a.{i}', 'b.{i}']"
DROP = STEP + "drop = 'epoch'\n"
ONE = "r.toml, step 1"

# name: (recipe, the first line of the error without its slug)
BAD = {
    # TOML
    "syntax": (
        "recipe = 1\n[[step]\n",
        "not TOML: Expected ']]' at the end of an array declaration (at line 2, column 7)",
    ),
    "not closed": (
        STEP + "rename = [['a', 'b']\n",
        "not TOML: Unclosed array (at end of document)",
    ),
    "twice": (
        "recipe = 1\nrecipe = 1\n",
        "not TOML: Cannot overwrite a value (at line 2, column 11)",
    ),
    "brackets": ("recipe = 1\na = " + "[" * 100_000, "not TOML: maximum recursion depth exceeded"),
    "braces": ("recipe = 1\na = " + "{a=" * 100_000, "not TOML: maximum recursion depth exceeded"),
    "dots": (
        "recipe = 1\n" + "a." * 300_000 + "b = 1",
        "names with more than 16 dots that are not in quotes",
    ),
    "quoted dots": (
        "recipe = 1\n" + "''." * 300_000 + "b = 1",
        "names with more than 16 dots that are not in quotes",
    ),
    "dots in a header": (
        "recipe = 1\n[" + "a . " * 250_000 + "b]",
        "names with more than 16 dots that are not in quotes",
    ),
    "digits": ("recipe = " + "1" * 5000, "a number in it has thousands of digits"),
    "not text": ("recipe = 1\n\udcff", "byte 11 is not UTF-8 text"),
    "size": ("recipe = 1\n" + "#" * (1 << 20), "more than 1 MiB"),
    # version
    "empty": ("", "`recipe = 1` is missing: this ckptool reads version 1"),
    "no version": ("[[steps]]\n", "`recipe = 1` is missing: this ckptool reads version 1"),
    "version 2": ("recipe = 2\nnew = 1\n", "recipe = 2: this ckptool reads version 1"),
    "version true": ("recipe = true\n", "recipe = true: this ckptool reads version 1"),
    "version 1.0": ("recipe = 1.0\n", "recipe = 1.0: this ckptool reads version 1"),
    "version text": ("recipe = '1'\n", "recipe = '1': this ckptool reads version 1"),
    # steps
    "no steps": ("recipe = 1\n", "no steps"),
    "one table": ("recipe = 1\n[step]\ndrop = 'epoch'\n", "no steps"),
    "unknown table": ("recipe = 1\n[[steps]]\n", "`steps` is unknown"),
    "unknown step": (
        DROP + "[[step]]\nrenam = [['a', 'b']]\n",
        "r.toml, step 2: `renam` is unknown",
    ),
    "unknown field": (SPLIT + ", dims = 0}\n", f"{ONE} (split): `dims` is unknown"),
    "no operation": (STEP, f"{ONE}: no operation"),
    "two operations": (DROP + "keep = 'h'\n", f"{ONE}: drop, keep: one operation a step"),
    "optional": (DROP + "optional = 1\n", f"{ONE}: optional = 1: true or false"),
    "optional inside": (SPLIT + ", optional = true}\n", f"{ONE} (split): `optional` is unknown"),
    "steps": (DROP + "[[step]]\ndrop = 'epoch'\n" * 1000, "1001 steps: at most 1000"),
    "rules": (STEP + "rename = [" + "['a', 'b'], " * 10_001 + "]\n", "10001 rules: at most 10000"),
    # fields
    "not a table": (STEP + "split = 3\n", f"{ONE} (split): 3: it takes a table"),
    "missing field": (STEP + "split = {from = 'a'}\n", f"{ONE} (split): `to` is missing"),
    "text for a list": (
        STEP + "split = {from = 'a', to = 'b'}\n",
        f"{ONE} (split): to = 'b': it must be a list of one or more texts",
    ),
    "text for a number": (
        SPLIT + ", dim = '0'}\n",
        f"{ONE} (split): dim = '0': it must be a whole number",
    ),
    "true for a number": (
        SPLIT + ", dim = true}\n",
        f"{ONE} (split): dim = true: it must be a whole number",
    ),
    "a date": (
        SPLIT + ", dim = 1979-05-27}\n",
        f"{ONE} (split): dim = 1979-05-27: it must be a whole number",
    ),
    "table for patterns": (
        STEP + "drop = {patterns = 'epoch'}\n",
        f"{ONE} (drop): drop = {{'patterns': 'epoch'}}: it must be one or more texts",
    ),
    "number for a prefix": (STEP + "add = 1\n", f"{ONE} (add): add = 1: it must be a text"),
    "no prefix": (STEP + "strip = ''\n", f"{ONE} (strip): the prefix is empty: nothing to do"),
    "file of patterns": (
        STEP + "drop = ['@file']\n",
        f"{ONE} (drop): `@file`: a recipe names no files of patterns",
    ),
    "negative size": (
        SPLIT + ", sizes = [-1, 5]}\n",
        f"{ONE} (split): sizes = -1, 5: it must be 1 or more",
    ),
    "sizes": (SPLIT + ", sizes = [4]}\n", f"{ONE} (split): 1 size for 2 parts"),
    "one part": (
        STEP + "split = {from = 'a', to = ['b']}\n",
        f"{ONE} (split): ['b']: at least two parts are needed",
    ),
    "the same part": (
        STEP + "split = {from = 'a', to = ['b', 'b']}\n",
        f"{ONE} (split): `b` is named twice",
    ),
    "a field alone": (
        STEP + "fuse = {from = ['h.{i}.q', 'h.{j}.k'], to = 'f.{i}'}\n",
        f"{ONE} (fuse): `f.{{i}}` has {{i}}, and `h.{{j}}.k` has not",
    ),
    "over": (
        STEP + "stack = {from = 'h.0.{x}.weight', to = 'h', over = 'x'}\n",
        f"{ONE} (stack): over = `x`: it must be one of e, i, j, k, l, m, n",
    ),
    "not over": (
        STEP + "stack = {from = 'x.{i}.w', to = 'x.w'}\n",
        f"{ONE} (stack): {{e}} must be in `x.{{i}}.w`, and not in `x.w`",
    ),
    "dims": (
        STEP + "transpose = {keys = 'h', dims = [0, 1, 2]}\n",
        f"{ONE} (transpose): dims = [0, 1, 2]: transpose takes two dimensions",
    ),
    "order": (
        STEP + "permute = {keys = 'h', dims = [0, 0]}\n",
        f"{ONE} (permute): dims = [0, 0]: permute takes each dimension once, from 0 on",
    ),
    "rows": (
        STEP + "slice = {keys = 'h', rows = '1:2:3'}\n",
        f"{ONE} (slice): rows = `1:2:3`: `1:2:3` is not a row or a range",
    ),
    "digits of rows": (
        STEP + f"slice = {{keys = 'h', rows = '{'9' * 5000}'}}\n",
        f"{ONE} (slice): rows have at most 18 digits",
    ),
    "heads": (
        STEP + "rope = {keys = 'h', heads = 0, to = 'half'}\n",
        f"{ONE} (rope): heads = 0: it must be 1 or more",
    ),
    "layout": (
        STEP + "rope = {keys = 'h', heads = 2, to = 'hf'}\n",
        f"{ONE} (rope): to = `hf`: rope takes `half` or `interleaved`",
    ),
    "dtype": (STEP + "cast = {to = 'int8'}\n", f"{ONE} (cast): `int8` is not a dtype of floats"),
    # rules
    "pair": (
        STEP + "rename = [['a', 'b'], ['a']]\n",
        f"{ONE} (rename), rule 2: ['a'] is not a pair of OLD and NEW",
    ),
    "flat": (
        STEP + "rename = ['a', 'b']\n",
        f"{ONE} (rename), rule 1: 'a' is not a pair of OLD and NEW",
    ),
    "no rules": (
        STEP + "rename = []\n",
        f"{ONE} (rename): rename = []: it must be pairs of OLD and NEW: [['fc', 'head'], ...]",
    ),
    "expression": (
        STEP + "rename = [['h', 'g'], ['re:(', 'b']]\n",
        f"{ONE} (rename), rule 2: `(` is not a "
        "regular expression: missing ), unterminated subpattern at position 0",
    ),
    "group": (
        STEP + "rename = [['h', 'g'], ['re:h(.*)', 'b\\2']]\n",
        f"{ONE} (rename), rule 2: `b\\2` is not a replacement for `h(.*)`: "
        "invalid group reference 2 at position 2",
    ),
    "field of NEW": (
        STEP + "rename = [['x', 'y'], ['h.{i}', 'b.{j}']]\n",
        f"{ONE} (rename), rule 2: {{j}} is only in NEW, in `h.{{i}}=b.{{j}}`",
    ),
    "half a field": (
        STEP + "rename = [['h.{rest:**}', 'b.{rest}']]\n",
        f"{ONE} (rename): `h.{{rest:**}}` has {{rest:**}}, and `b.{{rest}}` has {{rest}}",
    ),
    "two stars": (
        STEP + "rename = [['*.*', 'b.*']]\n",
        f"{ONE} (rename): `*.*=b.*` needs one `*` in OLD, and at most one in NEW",
    ),
    "star and field": (
        STEP + "rename = [['h.{i}.*', 'b.*']]\n",
        f"{ONE} (rename): `h.{{i}}.*=b.*` has both `*` and a field",
    ),
    "brace": (
        STEP + "rename = [['h.{0}', 'b']]\n",
        f"{ONE} (rename): `h.{{0}}` has a brace that is not of a field",
    ),
    "fields together": (
        STEP + "rename = [['h.{a}{b}', '{b}.{a}']]\n",
        f"{ONE} (rename): `h.{{a}}{{b}}` does not say where one field ends and the next begins",
    ),
    "deep together": (
        STEP + "rename = [['{a:**}.{b:**}.w', '{b:**}.{a:**}']]\n",
        f"{ONE} (rename): `{{a:**}}.{{b:**}}.w` "
        "does not say where one field ends and the next begins",
    ),
    "many ways": (
        STEP + "rename = [['{a}_{b}_{c}', '{a}{b}']]\n",
        f"{ONE} (rename): `{{a}}_{{b}}_{{c}}` can be read in too many ways",
    ),
    "no match": (
        STEP + "rename = [['h', 'g'], ['hh.0', 'i']]\n",
        f"{ONE} (rename), rule 2: `hh.0` selects none of 20 keys",
    ),
    "earlier rule": (
        STEP + "rename = [['h', 'g'], ['h.0', 'b']]\n",
        f"{ONE} (rename), rule 2: `h.0=b` takes nothing: 3 keys that it matches "
        "went to the rules before it, such as `h=g`",
    ),
    "collision": (
        STEP + "rename = [['h.0.q', 'g'], ['h.0.k', 'g']]\n",
        f"{ONE} (rename): h.0.q.weight and h.0.k.weight would both become g.weight",
    ),
    "taken": (
        STEP + "rename = [['h.0.q.weight', 'epoch']]\n",
        f"{ONE} (rename): h.0.q.weight and epoch would both become epoch",
    ),
    "no name": (
        STEP + "rename = [['epoch', '']]\n",
        f"{ONE} (rename): the key epoch would have no name left",
    ),
    # groups
    "member": (
        STEP + "fuse = {from = ['h.{i}.q.weight', 'h.{i}.v.weight'], to = 'h.{i}.qv.weight'}\n",
        f"{ONE} (fuse): h.1.qv.weight lacks h.1.v.weight",
    ),
    "gap": (
        STEP + "stack = {from = 'x.{e}.w', to = 'x.w'}\n",
        f"{ONE} (stack): x.w lacks {{e}} = 1: there are 0, 2",
    ),
    "shapes": (
        STEP + "stack = {from = 'y.{e}.w', to = 'y.w'}\n",
        f"{ONE} (stack): y.w of y.0.w, y.1.w: unlike: F32 [4, 6], F32 [2, 6]",
    ),
    "dtypes": (
        STEP + "stack = {from = 'z.{e}.w', to = 'z.w'}\n",
        f"{ONE} (stack): z.w of z.0.w, z.1.w: unlike: F16 [4, 6], F32 [4, 6]",
    ),
    "numbers": (
        STEP + "stack = {from = 'n.{e}', to = 'n'}\n",
        f"{ONE} (stack): n.1 and n.01 have the same number",
    ),
    "used twice": (
        STEP + "fuse = {from = ['p.{i}.{j}', 'p.{j}.{i}'], to = 'p.{i}.{j}'}\n",
        f"{ONE} (fuse): p.1.0 is used twice: p.0.1 + p.1.0 and p.1.0 + p.0.1",
    ),
    "tied": (
        STEP + "transpose = {keys = 'emb'}\n",
        f"{ONE} (transpose): emb.weight and head.weight "
        "are one tensor, and the step takes only emb.weight",
    ),
    "dimension": (
        SPLIT + ", dim = 2}\n",
        f"{ONE} (split): h.0.q.weight: [4, 6] has no dimension 2",
    ),
    "uneven": (
        STEP + "split = {from = 'x.0.w', to = ['a', 'b', 'c']}\n",
        f"{ONE} (split): x.0.w: 4 in dimension 0 are not 3 equal parts",
    ),
    "sum": (
        SPLIT + ", sizes = [1, 2]}\n",
        f"{ONE} (split): h.0.q.weight: 4 in dimension 0 are not 1 + 2",
    ),
    "reshape": (
        STEP + "reshape = {keys = 'x.0.w', shape = [5, 5]}\n",
        f"{ONE} (reshape): x.0.w: 24 elements cannot have the shape [5, 5]",
    ),
    "any size": (
        STEP + "reshape = {keys = 'none', shape = [0, -1]}\n",
        f"{ONE} (reshape): none: 0 elements cannot have the shape [0, -1]",
    ),
    "squeeze": (
        STEP + "squeeze = {keys = 'x.0.w', dim = 0}\n",
        f"{ONE} (squeeze): x.0.w: dimension 0 of [4, 6] is not 1",
    ),
    "row": (
        STEP + "slice = {keys = 'x.0.w', rows = '3:9'}\n",
        f"{ONE} (slice): x.0.w: rows 3:9 of 4 in dimension 0",
    ),
    "pairs": (
        STEP + "rope = {keys = 'x.0.w', heads = 3, to = 'half'}\n",
        f"{ONE} (rope): x.0.w: 4 rows are not 3 heads of pairs",
    ),
    "not a tensor": (
        STEP + "unsqueeze = {keys = 'epoch', dim = 0}\n",
        f"{ONE} (unsqueeze): epoch is not a tensor: it is not changed",
    ),
    "sparse": (
        STEP + "transpose = {keys = 'sparse'}\n",
        f"{ONE} (transpose): sparse is a sparse_coo tensor: it is not changed",
    ),
    "copy of nothing": (
        STEP + "copy = {from = 'nope', to = 'h'}\n",
        f"{ONE} (copy): `nope` selects none of 20 keys",
    ),
    "tie to itself": (
        STEP + "tie = {from = 'epoch', to = 'epoch'}\n",
        f"{ONE} (tie): epoch would become epoch twice",
    ),
    # expect
    "expect": ("expect = 3\n" + DROP, "r.toml, [expect]: 3: it is a table"),
    "expect tensor": (DROP + "[expect]\ntensor = 1\n", "r.toml, [expect]: `tensor` is unknown"),
    "expect count": (
        DROP + "[expect]\ntensors = -1\n",
        "r.toml, [expect]: tensors = -1: it must be a count",
    ),
    "expect word": (
        DROP + "[expect]\nunmatched = 'no'\n",
        "r.toml, [expect]: unmatched = 'no': it is allow, name, refuse",
    ),
    **{
        f"like {name}": (DROP + f"[expect]\nlike = {like}\n", f"r.toml, [expect]: {told}")
        for name, like, told in [
            ("number", "3", "like = 3: it must be a text"),
            (
                "absolute",
                "'/etc/passwd'",
                "like = '/etc/passwd' is not a path below the folder of the recipe",
            ),
            (
                "url",
                "'http://x/y.json'",
                "like = 'http://x/y.json' is not a path below the folder of the recipe",
            ),
            (
                "above",
                "'../in.json'",
                "like = '../in.json' is not a path below the folder of the recipe",
            ),
            (
                "link",
                "'link.json'",
                "like = 'link.json' is not a path below the folder of the recipe",
            ),
            ("nul", r'"a\u0000b"', r"like = 'a\x00b' is not a path below the folder of the recipe"),
            ("missing", "'none.json'", "none.json cannot be read: no such file or directory"),
            ("folder", "'.'", "like = '.' is not a file"),
            ("pipe", "'pipe'", "like = 'pipe' is not a file"),
            ("words", "'words.json'", "words.json is not a list of keys"),
        ]
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder with a checkpoint, `in.pth`, as the current one."""
    monkeypatch.chdir(tmp_path)
    weight, tied = torch.arange(24.0).reshape(4, 6), torch.ones(6, 4)
    state = {f"h.{key}.weight": weight + at for at, key in enumerate(["0.q", "0.k", "0.v", "1.q"])}
    state |= {
        "x.0.w": weight,
        "x.2.w": weight + 9,
        "y.0.w": weight + 5,
        "y.1.w": weight[:2].clone(),
    }
    state |= {"z.0.w": weight.half(), "z.1.w": weight + 6, "emb.weight": tied, "head.weight": tied}
    state |= {"n.0": weight + 7, "n.1": weight + 8, "n.01": weight + 10, "none": torch.ones(0, 4)}
    state |= {"p.0.1": weight + 11, "p.1.0": weight + 12}
    state |= {"sparse": torch.eye(3).to_sparse()}
    torch.save({**state, "epoch": 7}, "in.pth")
    Path("words.json").write_text("hello")
    os.symlink("/etc/passwd", "link.json")
    os.mkfifo("pipe")
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recipe_is_one_clear_error(run: Run, folder: Path, name: str) -> None:
    text, told = BAD[name]
    Path("r.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    before = sorted(path.name for path in folder.iterdir())
    outcome = run("convert", "in.pth", "out.pth", "--recipe", "r.toml")
    slug, _, first = outcome.err.partition(": ")
    wanted = told if told.startswith("r.toml") else f"r.toml: {told}"
    assert (outcome.code, first.splitlines()[0]) == (2, wanted)
    assert slug in {
        f"error[{kind}]"
        for kind in ("bad-recipe", "edit-error", "nothing-matched", "key-collision")
    }
    assert outcome.out == ""
    assert sorted(path.name for path in folder.iterdir()) == before


EXPECTED = {
    "tensors = 3": "r.toml: 19 tensors where [expect] says 3; nothing was written",
    "unmatched = 'refuse'": "r.toml: 19 keys that no rule matches; nothing was written",
    "like = 'like.json'": "r.toml: 20 tensors not as in like.json; nothing was written",
}


@pytest.mark.parametrize("line", EXPECTED)
def test_what_is_not_as_expected_is_not_written(run: Run, folder: Path, line: str) -> None:
    like = {"tensors": [{"key": "h", "dtype": "F32", "shape": [1]}]}
    Path("like.json").write_text(json.dumps(like))
    Path("r.toml").write_text(f"{DROP}[expect]\n{line}\n")
    outcome = run("convert", "in.pth", "out.pth", "--recipe", "r.toml")
    assert outcome.code == 1
    assert outcome.err.splitlines()[0] == f"error[not-as-expected]: {EXPECTED[line]}"
    assert not Path("out.pth").exists()


def keys(path: str) -> list[str]:
    return list(torch.load(path, weights_only=True))


def test_expect_is_of_the_output_and_backwards_of_the_input(run: Run, folder: Path) -> None:
    torch.save({"w": torch.arange(4.0), "x": torch.arange(2)}, "in.pth")
    Path("r.toml").write_text(
        STEP + "split = {from = 'w', to = ['a', 'b']}\n[[step]]\nrename = [['x', 'y']]\n"
        "[expect]\ntensors = 3\nunmatched = 'refuse'\nlike = 'like.json'\n"
    )
    rows = [{"key": key, "dtype": "F32", "shape": [2]} for key in "ab"]
    rows.append({"key": "y", "dtype": "I64", "shape": [2]})
    Path("like.json").write_text(json.dumps({"tensors": rows}))
    assert run("convert", "in.pth", "out.pth", "--recipe", "r.toml").code == 0
    assert run("convert", "out.pth", "back.pth", "--recipe", "r.toml", "--reverse").code == 0
    assert keys("back.pth") == ["w", "x"]
    outcome = run("convert", "in.pth", "no.pth", "--recipe", "r.toml", "--reverse")
    assert outcome.code == 1
    assert "2 tensors where [expect] says 3" in outcome.err


NO_WAY_BACK = {
    "drop = 'w'": "what it drops cannot be restored",
    "keep = 'w'": "what it drops cannot be restored",
    "strip = 'auto'": "`auto` does not say which prefix was there",
    "slice = {keys = 'w', rows = '0'}": "the rows that it leaves out cannot be restored",
    "cast = {to = 'bf16'}": "rounding cannot be undone",
    "reshape = {keys = 'w', shape = [4]}": "without `was` the shape before is not known",
    "rename = [['a', 'b'], ['re:w', 'v']]": (
        "rule 2, `re:w=v`: a regular expression cannot be reversed"
    ),
    "rename = [['w.{i}.{x}', 'v.{x}']]": "rule 1, `w.{i}.{x}=v.{x}`: what {i} holds is not in NEW",
    "rename = [['w*', 'v']]": "rule 1, `w*=v`: what `*` holds is not in NEW",
}


@pytest.mark.parametrize("step", NO_WAY_BACK)
def test_a_step_without_a_way_back_is_named(run: Run, folder: Path, step: str) -> None:
    Path("r.toml").write_text(f"recipe = 1\n[[step]]\nadd = 'm'\n[[step]]\n{step}\n")
    name = step.partition(" ")[0]
    outcome = run("convert", "in.pth", "out.pth", "--recipe", "r.toml", "--reverse")
    told = f"r.toml: step 2 ({name}) has no way back: {NO_WAY_BACK[step]}"
    assert outcome.code == 2
    assert outcome.err.splitlines()[0] == f"error[bad-recipe]: {told}"
    assert not Path("out.pth").exists()


@pytest.mark.parametrize("step", ["copy", "tie"])
def test_the_way_back_of_a_copy_takes_out_nothing_else(run: Run, folder: Path, step: str) -> None:
    torch.save({"a.w": torch.ones(2), "b.v": torch.zeros(3)}, "in.pth")
    Path("r.toml").write_text(
        f"{STEP}{step} = {{from = 'a', to = 'b'}}\n[[step]]\nrename = [['b.v', 'b.u']]\n"
        "[expect]\nunmatched = 'refuse'\n"
    )
    assert run("convert", "in.pth", "out.pth", "--recipe", "r.toml").code == 0
    assert keys("out.pth") == ["a.w", "b.w", "b.u"]
    assert run("convert", "out.pth", "back.pth", "--recipe", "r.toml", "--reverse").code == 0
    assert keys("back.pth") == ["a.w", "b.v"]


def test_texts_have_as_many_dots_as_they_like(folder: Path) -> None:
    dots = "a." * 40 + "b"
    text = f"""\ufeffrecipe = 1 # {dots}
[[step]]
rename = [['{dots}', "c \\" {dots}"], ['''
{dots}''', \"\"\"\\\"{dots}\"\"\"]]
"""
    Path("r.toml").write_text(text, encoding="utf-8")
    (asked,) = Recipe.load("r.toml").steps
    assert asked.given["rules"] == [[dots, f'c " {dots}'], [dots, f'"{dots}']]


def test_a_long_value_is_not_repeated_whole(run: Run, folder: Path) -> None:
    Path("r.toml").write_text(f"{STEP}drop = {[1] * 50_000}\n")
    outcome = run("convert", "in.pth", "out.pth", "--recipe", "r.toml")
    assert outcome.code == 2
    assert len(outcome.err) < 250


def test_an_error_in_a_recipe_names_no_option(run: Run, folder: Path) -> None:
    torch.save({"module.a": torch.ones(1)}, "in.pth")
    for step in ("strip = 'other'", "rename = [['module.a', 'b'], ['module', 'c']]"):
        Path("r.toml").write_text(f"{STEP}{step}\n")
        outcome = run("convert", "in.pth", "out.pth", "--recipe", "r.toml")
        assert outcome.code == 2
        assert "--" not in outcome.err


def test_a_fuse_of_unequal_parts_says_what_gives_it_a_way_back(run: Run, folder: Path) -> None:
    torch.save({"q": torch.ones(8, 2), "k": torch.ones(2, 2), "v": torch.ones(2, 2)}, "in.pth")
    step = STEP + "fuse = {from = ['q', 'k', 'v'], to = 'qkv'%s}\n"
    Path("r.toml").write_text(step % "")
    outcome = run("convert", "in.pth", "out.pth", "--recipe", "r.toml")
    assert (
        "fuse: qkv is of [8, 2], [2, 2], [2, 2]: it can be reversed only with `sizes`"
        in outcome.err
    )
    outcome = run("convert", "out.pth", "back.pth", "--recipe", "r.toml", "--reverse")
    assert "split: 1 tensor of 1 became 3 of equal size" in outcome.err
    Path("r.toml").write_text(step % ", sizes = [8, 2, 2]")
    assert run("convert", "out.pth", "b.pth", "--recipe", "r.toml", "--reverse").code == 0
    assert [len(tensor) for tensor in torch.load("b.pth").values()] == [8, 2, 2]


def test_fields_that_cannot_be_told_apart_are_fine_where_none_is_sought(
    run: Run, folder: Path
) -> None:
    torch.save({"b.1.w": torch.ones(1)}, "in.pth")
    Path("r.toml").write_text(f"{STEP}rename = [['{{x}}.{{i}}.{{y}}', '{{x}}{{i}}{{y}}']]\n")
    assert run("convert", "in.pth", "out.pth", "--recipe", "r.toml").code == 0
    assert keys("out.pth") == ["b1w"]
    outcome = run("convert", "out.pth", "back.pth", "--recipe", "r.toml", "--reverse")
    assert outcome.code == 2
    assert "`{x}{i}{y}` does not say where one field ends" in outcome.err


@pytest.mark.parametrize("text", ["{a:**}.x.{b:**}.q", "{a}_{b}q", "{a:**}.x.{a:**}q"])
@pytest.mark.parametrize("key", ["a." * 30_000, "x.a." * 249, "a_" * 499, "_" * 60_000])
def test_a_template_takes_no_power_of_a_long_key(text: str, key: str) -> None:
    """Times would tell of the machine: a failed match of more fields would never end."""
    assert Matcher(text)(f"{key}z") is None


def test_keep_takes_what_it_keeps(run: Run, folder: Path) -> None:
    torch.save({"a.w": torch.ones(2), "b.w": torch.ones(2), "c": torch.ones(1)}, "k.pth")
    Path("r.toml").write_text(
        "recipe = 1\n[[step]]\nkeep = ['a.w', 'b.w']\n[expect]\nunmatched = 'refuse'\n"
    )
    assert run("convert", "--recipe", "r.toml", "k.pth", "o.pth").code == 0
    assert keys("o.pth") == ["a.w", "b.w"]


def test_the_document_has_what_is_noted(run: Run, folder: Path) -> None:
    one = torch.ones(2)
    state = {"a": torch.ones(4), "b": torch.ones(2), "q": one, "k": one, "c": torch.ones(1)}
    torch.save(state, "k.pth")
    Path("r.toml").write_text(
        "recipe = 1\n[[step]]\nrename = [['a', 'x']]\n"
        "[[step]]\nfuse = {from = ['x', 'b'], to = 'f'}\n"
        "[[step]]\nfuse = {from = ['q', 'k'], to = 'qk'}\n"
    )
    torch.save(
        {"a": torch.ones(4), "b": torch.ones(2), "q": one, "k": one, "c": torch.ones(1)}, "k.pth"
    )
    notes = [
        "fuse: f is of [4], [2]: it can be reversed only with `sizes`",
        "fuse: q, k are one tensor; in qk each has its own bytes",
        "1 key that no rule matches: c",
    ]
    done = run("convert", "--recipe", "r.toml", "k.pth", "o.pth")
    assert [line for line in done.err.splitlines() if line in notes] == notes
    done = run("convert", "--force", "--json", "--recipe", "r.toml", "k.pth", "o.pth")
    assert json.loads(done.out)["notes"] == notes
    tried = run("recipe", "r.toml", "--from", "k.pth")
    assert [line for line in tried.err.splitlines() if line in notes] == notes
    assert json.loads(run("recipe", "r.toml", "--from", "k.pth", "--json").out)["notes"] == notes
    with Path("r.toml").open("a") as file:
        file.write("[expect]\nunmatched = 'allow'\n")
    tried = run("recipe", "r.toml", "--from", "k.pth")
    assert [line for line in tried.err.splitlines() if line in notes] == notes


def test_more_dimensions_than_torch_takes(run: Run, folder: Path) -> None:
    torch.save({"a": torch.ones(2)}, "k.pth")
    step = "[[step]]\nunsqueeze = {keys = 'a', dim = 0}\n"
    Path("r.toml").write_text("recipe = 1\n" + 64 * step)
    done = run("convert", "--recipe", "r.toml", "k.pth", "o.pth")
    why = "r.toml, step 64 (unsqueeze): a would have 65 dimensions: torch takes 64"
    assert (done.code, done.err.splitlines()[0]) == (2, f"error[edit-error]: {why}")


@pytest.mark.parametrize("option", ["--rename", "--drop", "--keep"])
def test_an_expression_that_is_too_deep(run: Run, folder: Path, option: str) -> None:
    torch.save({"a": torch.ones(2)}, "k.pth")
    deep = "re:" + "(" * 5000 + "a" + ")" * 5000 + ("=b" if option == "--rename" else "")
    assert run("convert", option, deep, "k.pth", "o.pth").code == 2


def test_no_name_is_offered_for_itself(run: Run, folder: Path) -> None:
    torch.save({"a.w": torch.ones(2)}, "k.pth")
    Path("r.toml").write_text("recipe = 1\n[[step]]\nsplit = {from = 'a', to = ['x', 'y']}\n")
    done = run("convert", "--recipe", "r.toml", "k.pth", "o.pth")
    assert done.code == 2
    assert "did you mean `a`" not in done.err


def test_what_is_dropped_before_a_collision_is_what_stands_there(run: Run, folder: Path) -> None:
    torch.save({"a.w": torch.ones(2), "b.w": torch.zeros(2)}, "two.pth")
    done = run("convert", "--rename", "b=a", "two.pth", "o.pth")
    assert done.code == 2
    assert "drop one first: ckptool convert --drop a.w two.pth OUT" in done.err
    assert run("convert", "--drop", "a.w", "two.pth", "one.pth").code == 0
    assert run("convert", "--rename", "b=a", "one.pth", "o.pth").code == 0
