"""Key edits as tables: a row per case, old keys on the left, what becomes of them on the right."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from ckptool.errors import CkptoolError, EditError, KeyCollision, NothingMatched
from ckptool.state import edits
from ckptool.state.edits import (
    Edit,
    add_prefix,
    apply,
    drop,
    keep,
    rename,
    renames,
    select,
    strip_prefix,
    strip_wrappers,
    without,
)
from ckptool.state.wrappers import WRAPPERS, peeling


def done(steps: list[Edit] | Edit, keys: str) -> str:
    """Apply edits to keys written in one line; `-` stands for a dropped one."""
    key_map, edit = apply(steps if isinstance(steps, list) else [steps], keys.split())
    assert [old for old, _ in key_map.pairs] == keys.split()
    assert [edit(old) for old in keys.split()] == [new for _, new in key_map.pairs]
    return " ".join(new if new is not None else "-" for _, new in key_map.pairs)


EDITS = [
    # at the start of a key, whole components, once
    (strip_prefix(), "module.a module.b.c", "a b.c"),
    (strip_prefix(), "module.a b", "a b"),
    (strip_prefix(), "module.module.a", "module.a"),
    (strip_prefix(), "module.mlp_module.w submodule.w x.module.w",
     "mlp_module.w submodule.w x.module.w"),
    (strip_prefix("module"), "module.a modules.b", "a modules.b"),
    (strip_prefix("module."), "module.b module.a", "b a"),
    (strip_prefix("backbone.net"), "backbone.net.a backbone.network.b", "a backbone.network.b"),
    (strip_prefix("0"), "0.weight 00.weight", "weight 00.weight"),
    (strip_prefix("a", every=True), "a.x a.y", "x y"),
    # anywhere, as whole dotted components
    (strip_prefix(anywhere=True), "features.module.0.weight module.a", "features.0.weight a"),
    (strip_prefix(anywhere=True), "module.features.module.0.w", "features.0.w"),
    (strip_prefix(anywhere=True), "a.submodule.b a.module.b", "a.submodule.b a.b"),
    (strip_prefix(anywhere=True), "a.module.b a.module", "a.b a.module"),
    (strip_prefix("x.y", anywhere=True), "a.x.y.b a.x.z.y.b", "a.b a.x.z.y.b"),
    # every known wrapper that all keys share, in any order, repeatedly
    (strip_wrappers(), "module.a module.b", "a b"),
    (strip_wrappers(), "_orig_mod.module.a _orig_mod.module.b", "a b"),
    (strip_wrappers(), "module._orig_mod.a module._orig_mod.b", "a b"),
    (strip_wrappers(), "module.module._module.a", "a"),
    (strip_wrappers(), "_forward_module._fsdp_wrapped_module._checkpoint_wrapped_module.a", "a"),
    (strip_wrappers(), "module.a module._orig_mod.b", "a b"),
    # inside keys those that begin with `_`, others on request; not where two would become one
    (strip_wrappers(), "a._orig_mod.b c._fsdp_wrapped_module._fpw_module.d", "a.b c.d"),
    (strip_wrappers(), "a.module.b._checkpoint_wrapped_module.c", "a.module.b.c"),
    (strip_wrappers(anywhere=True), "a.module.b._orig_mod.c module.d", "a.b.c d"),
    (strip_wrappers(), "module.a.b module.a._module.b", "a.b a._module.b"),
    (strip_wrappers(), "_orig_mod.a_orig_mod.b _orig_mod.c._orig_mod", "a_orig_mod.b c._orig_mod"),
    # what a wrapper keeps for itself, at its own level, and only beside a prefix of all others
    (strip_wrappers(), "n_averaged module.a", "- a"),
    (strip_wrappers(), "_orig_mod.n_averaged _orig_mod.module.module.a", "- a"),
    (strip_wrappers(), "step module.step module.module.a._orig_mod.b", "- - a.b"),
    (strip_wrappers(), "initted step ema_model.a _metadata", "- - a -"),
    (strip_wrappers(keep_bookkeeping=True), "step module.a", "step a"),
    (strip_wrappers(required=False), "n_averaged a", "n_averaged a"),
    (strip_wrappers(required=False), "step ema_model.a b", "step ema_model.a b"),
    (strip_prefix("net"), "step net.a", "- a"),
    (strip_prefix("net"), "step net.a b", "step a b"),
    (strip_prefix(every=True), "n_averaged module.a", "- a"),
    (strip_prefix(keep_bookkeeping=True), "n_averaged module.a", "n_averaged a"),
    (rename("module", ""), "n_averaged module.a", "n_averaged a"),
    ([strip_wrappers(), drop(["n_averaged"])], "n_averaged module.a", "- a"),
    (strip_wrappers(), "module.module.a module.b", "module.a b"),
    (strip_wrappers(required=False), "a b", "a b"),
    (strip_wrappers(required=False), "module.a b", "module.a b"),
    # prefixes and names
    (add_prefix(), "a b.c", "module.a module.b.c"),
    (add_prefix("x"), "a", "x.a"),
    (add_prefix("x.y."), "a", "x.y.a"),
    (rename("fc", "head"), "fc.weight fc.bias fc2.weight", "head.weight head.bias fc2.weight"),
    (rename("fc.weight", "w"), "fc.weight fc.bias", "w fc.bias"),
    (rename("a.b.", "c."), "a.b.x a.bb.x", "c.x a.bb.x"),
    (rename("a", ""), "a.x b", "x b"),
    (rename("", "a"), "x y.z", "a.x a.y.z"),
    (rename("a", "a.b"), "a.x", "a.b.x"),
    # dropping
    (drop(["fc"]), "fc.weight fc2.weight fc", "- fc2.weight -"),
    (drop(["*.bias", "x"]), "a.bias x.y b", "- - b"),
    (keep(["a", "*.bias"]), "a.x b.bias b.w", "a.x b.bias -"),
    (without(["a"], "why"), "a b", "- b"),
    # several
    ([strip_prefix(), drop(["a"])], "module.a module.b", "- b"),
    ([drop(["module.a"]), strip_prefix()], "module.a module.b", "- b"),
    ([rename("a", "b"), rename("b", "c")], "a.x", "c.x"),
    ([add_prefix("a"), strip_prefix("a")], "x a.x", "x a.x"),
    ([drop(["a"]), rename("b", "a")], "a b", "- a"),
    ([rename("a", "t"), rename("b", "a"), rename("t", "b")], "a.x b.x", "b.x a.x"),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "keys", "expected"), EDITS, ids=[row[1] for row in EDITS])
def test_edits(steps: list[Edit] | Edit, keys: str, expected: str) -> None:
    assert done(steps, keys) == expected


REFUSED = [
    (strip_prefix(), "a b", NothingMatched, "no key starts with `module.`", ""),
    (strip_prefix(), "a.module.b", NothingMatched, "`module.`", "--anywhere"),
    (strip_prefix(anywhere=True), "a", NothingMatched, "no key contains `module.`", ""),
    (strip_prefix(), "_orig_mod.a", NothingMatched, "`module.`", "--prefix _orig_mod."),
    (
        strip_prefix(),
        "_orig_mod.module.a",
        NothingMatched,
        "`module.`",
        "--prefix _orig_mod.module.",
    ),
    (strip_prefix(), "a b", NothingMatched, "`module.`", "no known wrapper prefix on any key"),
    (strip_prefix("featurs"), "features.a", NothingMatched, "", "did you mean `features`?"),
    (strip_prefix("modul"), "module.a", NothingMatched, "`modul.`", "--prefix module."),
    (strip_prefix(every=True), "module.a b c", EditError, "2 of 3 keys do not start", "--every"),
    (strip_prefix(), "module.a a", KeyCollision, "module.a and a would both become a", "drop "),
    (strip_prefix(), "a module.a", KeyCollision, "would both become a", "drop "),
    (strip_prefix(anywhere=True), "a.module.b a.b", KeyCollision, "would both become a.b", ""),
    (strip_prefix("a"), "a. b", EditError, "the key a. would have no name left", ""),
    (strip_wrappers(), "a b", NothingMatched, "no known wrapper prefix", ""),
    (strip_wrappers(), "module.a b", NothingMatched, "", "1 of 2 keys start with `module.`"),
    (rename("x", "y"), "a.b", NothingMatched, "`x` selects none of 1 key", ""),
    (rename("clasifier", "y"), "classifier.w", NothingMatched, "", "did you mean `classifier`?"),
    (rename("a", "b"), "a.x b.x", KeyCollision, "a.x and b.x would both become b.x", ""),
    (rename("a", ""), "a", EditError, "no name left", ""),
    (renames([("a", "x"), ("x", "y")]), "a.b", NothingMatched, "rule 2: `x` selects none", "a=y"),
    (drop(["x"]), "a b", NothingMatched, "`x` selects none of 2 keys", ""),
    (drop(["a", "x"]), "a b", NothingMatched, "`x` selects none", ""),
    (keep(["x"]), "a b", NothingMatched, "`x` selects none", ""),
    (drop(["module.a"]), "a b", NothingMatched, "`module.a` selects none", "`a` selects 1 key"),
    (drop(["module.*s"]), "as bs", NothingMatched, "selects none", "`*s` selects 2 keys"),
    (drop(["re:("]), "a", EditError, "`(` is not a regular expression", ""),
    ([strip_prefix(), strip_prefix()], "module.a", NothingMatched, "no key starts with", ""),
    ([drop(["a"]), drop(["a"])], "a b", NothingMatched, "`a` selects none of 1 key", ""),
]


@pytest.mark.parametrize(
    ("steps", "keys", "kind", "said", "hint"),
    REFUSED,
    ids=[f"{row[1]}: {row[3]}" for row in REFUSED],
)
def test_refusals(
    steps: list[Edit] | Edit, keys: str, kind: type[CkptoolError], said: str, hint: str
) -> None:
    with pytest.raises(kind) as caught:
        done(steps, keys)
    assert type(caught.value) is kind
    assert said in caught.value.message
    assert hint in f"{caught.value.option} {caught.value.hint}"


def test_nothing_matched_shows_what_keys_look_like() -> None:
    with pytest.raises(NothingMatched) as caught:
        drop(["x"]).make([f"layer{i}.weight" for i in range(9)])
    assert caught.value.evidence == (
        "keys look like layer0.weight",
        "keys look like layer4.weight",
        "keys look like layer8.weight",
    )


PEELED = [
    ("", []),
    ("a", []),
    ("module.a", ["module."]),
    ("module.", []),
    ("module.a module.", []),
    ("module._orig_mod.a", ["module.", "_orig_mod."]),
    ("_orig_mod.module.a _orig_mod.module.b", ["_orig_mod.", "module."]),
    ("_orig_mod.module.a _orig_mod.b", ["_orig_mod."]),
    ("module.module.module.a", ["module."] * 3),
    ("modules.a", []),
    ("_module.a", ["_module."]),
    ("ema_model.a", []),
    ("ema_model.a initted step", ["ema_model."]),
    ("_fsdp_wrapped_module._fpw_module.a", ["_fsdp_wrapped_module.", "_fpw_module."]),
    *((f"{wrapper}a {wrapper}b step", [wrapper]) for wrapper in WRAPPERS),
]


@pytest.mark.parametrize(("keys", "wrappers"), PEELED)
def test_peeled(keys: str, wrappers: list[str]) -> None:
    assert list(peeling(keys.split()).prefixes) == wrappers


# The selection language.

KEYS = [
    "classifier.weight",
    "classifier.1.bias",
    "classifier1.weight",
    "features.0.conv.weight",
    "features.0.bn.num_batches_tracked",
    "Features.0",
    "a[0]",
    "a0",
]
SELECTED = [
    ("classifier", [0, 1]),
    ("classifier.", [0, 1]),
    ("classifier.weight", [0]),
    ("classifier1", [2]),
    ("features.0", [3, 4]),
    ("features.0.conv.weight", [3]),
    ("*.weight", [0, 2, 3]),
    ("features.*", [3, 4]),
    ("*.num_batches_tracked", [4]),
    ("f*t", [3]),
    ("classifier?.weight", [2]),
    ("[cC]lassifier1.*", [2]),
    ("[!c]*", [3, 4, 5, 6, 7]),
    ("*", range(8)),
    ("a[0]", [6, 7]),  # the key of that name, and what the glob takes
    ("re:classifier.*", [0, 1, 2]),
    ("re:.*weight", [0, 2, 3]),
    (r"re:features\.\d+\.(conv|bn)\..*", [3, 4]),
    ("re:classifier\\.weight", [0]),
    ("re:(?i)features.0", [5]),
]


@pytest.mark.parametrize(("pattern", "places"), SELECTED, ids=[row[0] for row in SELECTED])
def test_selections(pattern: str, places: list[int]) -> None:
    assert select([pattern], KEYS) == {KEYS[place] for place in places}


@pytest.mark.parametrize(
    "pattern",
    ["class", "weight", "classifier.w", "re:classifier", "re:weight", "?", "*.WEIGHT", "", "re:"],
)
def test_what_is_not_selected(pattern: str) -> None:
    """No part of a component, no part of a key, no other case."""
    with pytest.raises(NothingMatched):
        select([pattern], KEYS)


def test_selections_are_joined() -> None:
    assert select(["a0", "*.weight"], KEYS) == {KEYS[7], KEYS[0], KEYS[2], KEYS[3]}


# Module metadata.

MODULES = [
    (strip_prefix(), "module.a.w", " module module.a", [("module", ""), ("module.a", "a")]),
    (add_prefix(), "a.w", " a", [(None, ""), ("", "module"), ("a", "module.a")]),
    (drop(["a"]), "a.w b.w", " a b", [("", ""), ("b", "b")]),
    (drop(["a"]), "a.w b.w", " a a.x b relu",
     [("", ""), ("a.x", "a.x"), ("b", "b"), ("relu", "relu")]),
    (keep(["b"]), "a.w b.w", " a b relu", [("", ""), ("b", "b"), ("relu", "relu")]),
    (rename("a", "c.d"), "a.w b.w", " a b", [("", ""), ("a", "c.d"), ("b", "b")]),
    (strip_prefix(anywhere=True), "f.module.0.w", " f f.module f.module.0",
     [("", ""), ("f.module", "f"), ("f.module.0", "f.0")]),
]  # fmt: skip


@pytest.mark.parametrize(("step", "keys", "paths", "expected"), MODULES)
def test_module_paths_move_with_keys(
    step: Edit, keys: str, paths: str, expected: list[tuple[str | None, str]]
) -> None:
    key_map, edit = apply([step], keys.split())
    assert edits.rekey_modules(paths.split(" "), key_map, edit) == expected


# Properties.

names = st.lists(
    st.sampled_from(["module", "a", "b", "modules", "_orig_mod"]), min_size=1, max_size=4
)
key_lists = st.lists(names.map(".".join), min_size=1, max_size=8, unique=True)


@given(key_lists, st.sampled_from(["module.", "x.", "a.b."]))
def test_strip_after_add_is_the_identity(keys: list[str], prefix: str) -> None:
    key_map, _ = apply([add_prefix(prefix), strip_prefix(prefix, every=True)], keys)
    assert key_map.pairs == tuple((key, key) for key in keys)


@given(key_lists)
def test_peeling_leaves_no_wrapper_and_loses_no_key(keys: list[str]) -> None:
    key_map, _ = apply([strip_wrappers(required=False)], keys)
    assert len(set(key_map.written)) == len(keys)
    assert not peeling(key_map.written)


@given(key_lists, st.sampled_from([strip_prefix(), strip_prefix(anywhere=True), rename("a", "b")]))
def test_an_edit_keeps_order_and_count_or_refuses(keys: list[str], step: Edit) -> None:
    try:
        key_map, _ = apply([step], keys)
    except EditError:
        return
    assert [old for old, _ in key_map.pairs] == keys
    assert len(set(key_map.written)) == len(keys)


def test_key_map_views() -> None:
    key_map, _ = apply([rename("a", "x"), drop(["b"])], ["a.w", "b", "c"])
    assert key_map.renamed == [("a.w", "x.w")]
    assert key_map.dropped == ["b"]
    assert key_map.written == ["x.w", "c"]
    assert key_map.why == {"b": ("b", "dropped as asked")}
