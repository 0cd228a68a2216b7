"""Wrappers around a model and around its parts, in any nesting: what `auto` leaves is the model."""

from __future__ import annotations

from fnmatch import fnmatchcase

from hypothesis import given, strategies as st

from ckptool.pickles.tree import Dict, Node
from ckptool.state.candidates import KNOWN_NAMES, NOT_STATE_DICTS, candidates
from ckptool.state.edits import apply, strip_wrappers
from ckptool.state.wrappers import WRAPPERS, peeling, submodules, worn
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import Storage, TensorInfo

KEYS = [
    "conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer1.0.bn1.bias",
    "layer4.1.downsample.0.weight", "fc.weight", "fc.bias", "features.denseblock1.norm1.weight",
]  # fmt: skip
BEGINNING = [each for each in WRAPPERS if each != "ema_model."]
INSIDE = [each for each in WRAPPERS if each[0] == "_"]
COUNTERS = {"module.": ["n_averaged"], "ema_model.": ["initted", "step"]}


@st.composite
def wrapped(draw: st.DrawFn) -> dict[str, str | None]:
    """Keys of a wrapped model -> those of the model, None for what is a wrapper's own."""
    around = st.lists(st.sampled_from(INSIDE), min_size=1, max_size=2)
    parts = draw(st.dictionaries(st.sampled_from(["layer1", "layer1.0", "fc", "features"]), around))
    keys: dict[str, str | None] = {}
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, unique=True)):
        inner = key
        for part, names in sorted(parts.items(), reverse=True):
            if key.startswith(f"{part}."):
                inner = inner.replace(f"{part}.", f"{part}.{''.join(names)}", 1)
        keys[inner] = key
    for prefix in draw(st.lists(st.sampled_from(list(WRAPPERS)), max_size=4)):
        keys = {prefix + new: old for new, old in keys.items()}
        beside = COUNTERS.get(prefix, [])
        if prefix == "ema_model." or draw(st.booleans()):
            keys |= dict.fromkeys(beside)
    order = draw(st.permutations(list(keys)))
    return {key: keys[key] for key in order}


@given(wrapped())
def test_any_nesting_of_wrappers_peels_to_the_model(keys: dict[str, str | None]) -> None:
    key_map, _ = apply([strip_wrappers(required=False)], list(keys))
    assert dict(key_map.pairs) == keys
    assert all(reason == "bookkeeping" for _, reason in key_map.why.values())
    assert not worn(dict.fromkeys(key_map.written))


def tensor(shape: tuple[int, ...] = (2,), name: str = "s") -> TensorInfo:
    """A tensor of a storage of its own name."""
    return TensorInfo(DType.F32, shape, (1,) * len(shape), Storage("file", name, 0, 4))


def test_a_counter_is_one_number() -> None:
    keys = {"module.a": tensor(), "step": tensor((3,))}
    assert not peeling(keys)
    assert peeling({**keys, "step": tensor((1,))}).bookkeeping == {"step"}
    assert not peeling({"module.a": tensor(), "_metadata": tensor(())})


def test_a_submodule_called_module_is_no_wrapper() -> None:
    shared = tensor(name="one")
    keys = {"module.w": shared, "a.module.w": shared, "scaler.w": tensor(name="two")}
    assert submodules(keys) == {"module."}
    assert worn(keys) == []
    assert not peeling(keys, anywhere=True)
    assert worn({**keys, "a.module.w": tensor(name="three")})


# Which dicts may be the state_dict.

MODELS = {
    "a": {"conv.weight": (2, 3), "conv.bias": (2,), "bn.running_mean": (2,)},
    "b": {"conv.weight": (2, 3), "conv.bias": (5,)},
    "c": {"head.weight": (2, 3)},
}
NAMES = ["model", "state_dict", "ema", "net_ema", "teacher", "best", "optimizer_x", "lr_scheduler"]
ODD: list[Node] = [7, ("x", 1), None]


@st.composite
def trees(draw: st.DrawFn) -> tuple[Node, list[tuple[tuple[str, ...], str, int]]]:
    """A file of dicts of tensors, and where each is: its path, its model, its number."""
    made: list[tuple[str, Dict]] = []
    places: list[tuple[tuple[str, ...], str, int]] = []

    def one(path: tuple[str, ...]) -> Dict:
        again = made and draw(st.integers(0, 4)) == 0
        if again:
            number = draw(st.integers(0, len(made) - 1))
        else:
            number, which = len(made), draw(st.sampled_from(list(MODELS)))
            prefix = draw(st.sampled_from(["", "", "module.", "_orig_mod.module."]))
            keys = {
                k: v for k, v in MODELS[which].items() if "running" not in k or draw(st.booleans())
            }
            pairs: list[tuple[Node, Node]] = [
                (prefix + key, tensor(shape, f"{number}{key}")) for key, shape in keys.items()
            ]
            if prefix and draw(st.booleans()):
                pairs.append(
                    ("n_averaged" if prefix == "module." else "_orig_mod.step", tensor(()))
                )
            if draw(st.booleans()):
                pairs.insert(draw(st.integers(0, len(pairs))), (draw(st.sampled_from(ODD)), "odd"))
            made.append((which, Dict(pairs)))
        places.append((path, made[number][0], number))
        return made[number][1]

    root: list[tuple[Node, Node]] = [
        ("epoch", 3),
        *((key, 1) for key in draw(st.sets(st.sampled_from(ODD[:2])))),
    ]
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True)):
        match draw(st.integers(0, 3)):
            case 0:
                root.append((name, [one((name, str(i))) for i in range(draw(st.integers(1, 2)))]))
            case 1:
                root.append((name, Dict([("inner", one((name, "inner"))), ("step", 1)])))
            case _:
                root.append((name, one((name,))))
    return Dict(root), places


@given(trees())
def test_candidates_are_all_that_may_be_meant(
    case: tuple[Node, list[tuple[tuple[str, ...], str, int]]],
) -> None:
    tree, places = case
    paths: dict[int, list[tuple[str, ...]]] = {}
    model = {number: which for _, which, number in places}
    for path, _, number in places:
        if not any(fnmatchcase(path[0], pattern) for pattern in NOT_STATE_DICTS):
            paths.setdefault(number, []).append(path)
    known = {n for n, found in paths.items() if any(path[-1] in KNOWN_NAMES for path in found)}
    copied = {model[number] for number in known}
    chosen = {n for n in paths if not known or n in known or model[n] in copied}
    found = candidates(tree)
    assert {frozenset({each.at, *each.also}) for each in found} == {
        frozenset(paths[number]) for number in chosen
    }
    assert all(
        each.at[-1] in KNOWN_NAMES
        for each in found
        if {each.at, *each.also}
        & {path for number in known for path in paths[number] if path[-1] in KNOWN_NAMES}
    )
