"""`transfer --adapt`: judged by torch's interpolation, by timm where it is installed, by rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, sampled

import ckptool
from ckptool.errors import EditError, NothingMatched
from ckptool.verbs.fitting import Transferred

torch = pytest.importorskip("torch")
F = torch.nn.functional

Run = Callable[..., Outcome]
State = dict[str, Any]
# Sums of five terms or more are in another order before, and without fused operations.
SAME_ORDER = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14) and (
    torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
)
FUSED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def transferred(
    source: State, target: Mapping[str, tuple[int, ...]], **given: Any
) -> tuple[State, Transferred]:
    """Transfer between files; return what was written, and what was said."""
    like = {key: torch.zeros(shape) for key, shape in target.items()}
    torch.save(source, "source.pth")
    torch.save(like, "like.pth")
    given = {"min_match": 0, "force": True, **given}
    done = ckptool.transfer("source.pth", "out.pth", like="like.pth", **given)
    return torch.load("out.pth", weights_only=True), done


def same(one: Any, other: Any) -> bool:
    """Check that two tensors hold the same bits."""
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    kinds = (one.dtype, one.shape) == (other.dtype, other.shape)
    return kinds and torch.equal(one.contiguous().view(ints), other.contiguous().view(ints))


# Position embeddings.


def resampled(value: Any, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Any:
    """Do what timm's `resample_abs_pos_embed` does."""
    before, tokens = value[:, :prefix], value[:, prefix:]
    grid = tokens.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    tokens = grid.permute(0, 2, 3, 1).reshape(1, -1, value.shape[-1]).to(value.dtype)
    return torch.cat([before, tokens], dim=1)


GRIDS = [
    ((14, 14), (16, 16)),
    ((7, 7), (5, 9)),
    ((6, 10), (12, 4)),
    ((14, 14), (24, 18)),
    ((16, 24), (14, 9)),
    ((24, 24), (5, 7)),
    ((8, 8), (8, 12)),
    ((37, 37), (16, 16)),
    ((2, 2), (9, 9)),
    ((1, 1), (3, 2)),
    ((9, 31), (30, 11)),
    ((16, 16), (1, 1)),
]


@pytest.mark.parametrize(("old", "new"), sampled(GRIDS, 2))
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_position_embeddings_are_those_of_torch(
    old: tuple[int, int], new: tuple[int, int], prefix: int
) -> None:
    count, wanted = prefix + old[0] * old[1], prefix + new[0] * new[1]
    value = torch.randn(1, count, 12) * 0.02
    grid = f"{old[0]}x{old[1]}:{new[0]}x{new[1]}"
    out, done = transferred(
        {"pos_embed": value},
        {"pos_embed": (1, wanted, 12)},
        adapt="pos-embed",
        pos_grid=grid,
        pos_prefix=prefix,
    )
    meant = resampled(value, old, new, prefix)
    grows = new[0] >= old[0] and new[1] >= old[1]
    if SAME_ORDER or (FUSED and grows):
        assert same(out["pos_embed"], meant)
    torch.testing.assert_close(out["pos_embed"], meant, rtol=1e-5, atol=1e-7)
    assert done.fit
    assert [each.kind for each in done.fit.adapted] == ["pos-embed"]
    assert done.fit.matched == ("pos_embed",)
    assert not done.fit.mismatched


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_rounded_once(dtype: Any) -> None:
    value = (torch.randn(1, 17, 8) * 0.02).to(dtype)
    torch.save({"pos_embed": torch.zeros(1, 37, 8, dtype=dtype)}, "like.pth")
    torch.save({"pos_embed": value}, "source.pth")
    ckptool.transfer("source.pth", "out.pth", like="like.pth", adapt="pos-embed", min_match=0)
    out = torch.load("out.pth")["pos_embed"]
    if dtype is not torch.float64:
        meant = resampled(value, (4, 4), (6, 6), 1)
        assert same(out, meant) if FUSED else torch.allclose(out, meant, rtol=1e-2)
    else:
        grid = value[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
        wide = F.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True)
        tokens = wide.permute(0, 2, 3, 1).reshape(1, 36, 8)
        assert out.dtype is dtype
        torch.testing.assert_close(out[:, 1:], tokens, rtol=1e-5, atol=1e-8)


def test_infinite_and_missing_numbers_stay_what_they_are() -> None:
    value = torch.randn(1, 16, 4)
    value[0, 5, 0], value[0, 6, 1], value[0, 7, 2] = torch.inf, torch.nan, -torch.inf
    out, _ = transferred({"pos_embed": value}, {"pos_embed": (1, 36, 4)}, adapt="pos-embed")
    meant = resampled(value, (4, 4), (6, 6), 0)
    torch.testing.assert_close(out["pos_embed"], meant, equal_nan=True, rtol=1e-5, atol=1e-7)


def test_tokens_before_the_grid_are_found_by_their_names() -> None:
    source = {
        "cls_token": torch.randn(1, 1, 4),
        "reg_token": torch.randn(1, 4, 4),
        "pos_embed": torch.randn(1, 5 + 16, 4),
    }
    shapes = {"cls_token": (1, 1, 4), "reg_token": (1, 4, 4), "pos_embed": (1, 5 + 25, 4)}
    out, done = transferred(source, shapes, adapt="pos-embed")
    torch.testing.assert_close(
        out["pos_embed"], resampled(source["pos_embed"], (4, 4), (5, 5), 5), rtol=1e-5, atol=1e-6
    )
    assert done.fit
    assert done.fit.adapted[0].how == "bicubic, 4x4 to 5x5, 5 prefix tokens kept"


@pytest.mark.parametrize(
    ("name", "here", "there"),
    [
        ("vision.positional_embedding", (17, 6), (26, 6)),
        ("encoder.pos_embedding", (1, 17, 6), (1, 26, 6)),
        ("embeddings.position_embeddings", (1, 17, 6), (1, 26, 6)),
        ("embeddings.position_embedding.weight", (17, 6), (26, 6)),
    ],
)
def test_names_of_torchvision_clip_and_hugging_face(
    name: str, here: tuple[int, ...], there: tuple[int, ...]
) -> None:
    value = torch.randn(here)
    out, _ = transferred({name: value}, {name: there}, adapt="pos-embed")
    meant = resampled(value.reshape(1, *here[-2:]), (4, 4), (5, 5), 1).reshape(there)
    torch.testing.assert_close(out[name], meant, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("here", "there", "moved"),
    [((1, 4, 6, 5), (1, 7, 3, 5), (0, 3, 1, 2)), ((1, 5, 4, 6), (1, 5, 7, 3), (0, 1, 2, 3))],
)
def test_grids_that_are_dimensions(
    here: tuple[int, ...], there: tuple[int, ...], moved: tuple[int, ...]
) -> None:
    value = torch.randn(here)
    out, _ = transferred({"pos_embed": value}, {"pos_embed": there}, adapt="pos-embed")
    back = tuple(moved.index(dim) for dim in range(4))
    size = (7, 3)
    meant = F.interpolate(value.permute(moved), size=size, mode="bicubic", antialias=True)
    torch.testing.assert_close(out["pos_embed"], meant.permute(back), rtol=1e-5, atol=1e-6)


def test_a_grid_that_is_not_found_is_an_error_with_the_option(run: Run) -> None:
    torch.save({"pos_embed": torch.randn(1, 17, 4)}, "a.pth")
    torch.save({"pos_embed": torch.randn(1, 1 + 24, 4)}, "b.pth")
    line = ["transfer", "a.pth", "out.pth", "--like", "b.pth", "--adapt", "pos-embed"]
    outcome = run(*line, "--min-match", "0")
    assert outcome.code == 2
    assert "not both a square" in outcome.err
    assert "--pos-grid" in outcome.err
    assert not Path("out.pth").exists()
    assert run(*line, "--pos-grid", "4x6").code == 0
    meant = resampled(torch.load("a.pth")["pos_embed"], (4, 4), (4, 6), 1)
    torch.testing.assert_close(torch.load("out.pth")["pos_embed"], meant, rtol=1e-5, atol=1e-6)
    assert run(*line, "--pos-grid", "4x5", "--force").code == 2
    assert run(*line, "--pos-grid", "4by6", "--force").code == 2


# Input channels.


def adapted_channels(want: int, weight: Any) -> Any:
    """Do what timm's `adapt_input_conv` does."""
    if want == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    times = -(-want // 3)
    repeated = weight.float().repeat(1, times, 1, 1)[:, :want]
    return (repeated * (3 / float(want))).to(weight.dtype)


@pytest.mark.parametrize("want", [1, 2, 4, 5, 6, 7, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_input_channels_are_those_of_timm(want: int, dtype: Any) -> None:
    weight = torch.randn(8, 3, 5, 5).to(dtype)
    weight[0] = -0.0
    torch.save({"conv.weight": weight, "b.weight": torch.ones(4, 8, 1, 1)}, "a.pth")
    like = {"conv.weight": torch.zeros(8, want, 5, 5), "b.weight": torch.ones(4, 9, 1, 1)}
    torch.save(like, "b.pth")
    done = ckptool.transfer("a.pth", "out.pth", like="b.pth", adapt="in-chans", min_match=0)
    out = torch.load("out.pth")
    assert same(out["conv.weight"], adapted_channels(want, weight))
    assert done.fit
    assert [each.key for each in done.fit.mismatched] == ["b.weight"]  # not the first


def test_a_stem_of_space_to_depth_sums_three_at_a_time() -> None:
    weight = torch.randn(4, 12, 2, 2)
    out, _ = transferred({"stem.weight": weight}, {"stem.weight": (4, 4, 2, 2)}, adapt="in-chans")
    assert same(out["stem.weight"], weight.reshape(4, 4, 3, 2, 2).sum(dim=2))


def test_other_channels_are_summed_and_never_repeated() -> None:
    weight = torch.randn(4, 5, 2, 2)
    out, _ = transferred({"stem.weight": weight}, {"stem.weight": (4, 1, 2, 2)}, adapt="in-chans")
    torch.testing.assert_close(out["stem.weight"], weight.sum(1, keepdim=True))
    with pytest.raises(EditError, match="5 channels are summed, not repeated"):
        transferred({"stem.weight": weight}, {"stem.weight": (4, 7, 2, 2)}, adapt="in-chans")
    grey = torch.randn(4, 1, 2, 2)
    out, _ = transferred({"stem.weight": grey}, {"stem.weight": (4, 3, 2, 2)}, adapt="in-chans")
    assert same(out["stem.weight"], grey.repeat(1, 3, 1, 1) * (1 / 3))


# Judged by timm itself.


@pytest.mark.skipif(not SAME_ORDER, reason="sums in another order")
def test_a_vision_transformer_of_timm() -> None:
    layers = pytest.importorskip("timm.layers")
    manipulate = pytest.importorskip("timm.models._manipulate")
    timm = pytest.importorskip("timm")
    given = {"depth": 1, "embed_dim": 48, "num_heads": 2, "num_classes": 10}
    small = timm.create_model("vit_tiny_patch16_224", img_size=96, in_chans=3, **given)
    large = timm.create_model("vit_tiny_patch16_224", img_size=(64, 144), in_chans=5, **given)
    old, new = small.state_dict(), large.state_dict()
    torch.save(old, "a.pth")
    torch.save(new, "b.pth")
    ckptool.transfer(
        "a.pth", "out.pth", like="b.pth", adapt=["pos-embed", "in-chans"], pos_grid="4x9"
    )
    out = torch.load("out.pth")
    meant = layers.resample_abs_pos_embed(old["pos_embed"], [4, 9])
    assert same(out["pos_embed"], meant)
    name = "patch_embed.proj.weight"
    assert same(out[name], manipulate.adapt_input_conv(5, old[name].clone()))
    large.load_state_dict(out)


# Rows.

HEAD: State = {"fc.weight": (6, 4), "fc.bias": (6,)}


def test_classes_by_rows_and_names() -> None:
    source = {key: torch.randn(shape) for key, shape in HEAD.items()}
    Path("names.txt").write_text("cat\ndog\n# a comment\ncow\nhen\nowl\nfox\n")
    Path("map.txt").write_text("fox\n2  # cow\nkitten = cat\nunicorn = -\n")
    out, done = transferred(
        source,
        {"fc.weight": (4, 4), "fc.bias": (4,)},
        adapt="classes",
        classes="map.txt",
        class_names="names.txt",
    )
    for key, value in source.items():
        mean = value.double().mean(0, keepdim=True).float()
        assert same(out[key], torch.cat([value[[5, 2, 0]], mean]))
    assert done.fit
    assert done.fit.adapted[0].how == "3 of 6 classes, 1 new: the mean"


def test_a_detector_has_several_rows_for_a_class() -> None:
    source = {"box.cls_score.weight": torch.randn(6, 4), "box.bbox_pred.weight": torch.randn(24, 4)}
    rows = [0, 4, 2]
    out, _ = transferred(
        source,
        {"box.cls_score.weight": (3, 4), "box.bbox_pred.weight": (12, 4)},
        adapt="classes",
        classes=rows,
    )
    score, boxes = source.values()
    assert same(out["box.cls_score.weight"], score[rows])
    assert same(out["box.bbox_pred.weight"], boxes.reshape(6, 4, 4)[rows].reshape(12, 4))
    anchors = torch.randn(3 * 6, 5, 3, 3)  # RetinaNet: all classes of an anchor follow each other
    out, _ = transferred(
        {"cls_logits.weight": anchors},
        {"cls_logits.weight": (9, 5, 3, 3)},
        adapt="classes",
        classes=rows,
    )
    meant = anchors.reshape(3, 6, 5, 3, 3)[:, rows].reshape(9, 5, 3, 3)
    assert same(out["cls_logits.weight"], meant)


@pytest.mark.parametrize(
    ("lines", "names", "message"),
    [
        (["7"], (), "no row 7 of 6"),
        (["cat"], (), "is a name"),
        (["caat"], ["cat", *"bcdef"], "no class is named"),
        (["a"], ["a", "a", *"cdef"], "several classes are named"),
        (["0"], ["a"], "1 name of 6 classes"),
    ],
)
def test_classes_that_are_not_there(lines: list[str], names: list[str], message: str) -> None:
    source = {key: torch.randn(shape) for key, shape in HEAD.items()}
    with pytest.raises(EditError, match=message):
        transferred(
            source, {"fc.weight": (1, 4)}, adapt="classes", classes=lines, class_names=names
        )


def test_classes_need_the_map(run: Run) -> None:
    source = {key: torch.randn(shape) for key, shape in HEAD.items()}
    with pytest.raises(EditError) as caught:
        transferred(source, {"fc.weight": (2, 4)}, adapt="classes")
    assert caught.value.option == "--classes map.txt"
    line = ["transfer", "source.pth", "o.pth", "--like", "like.pth"]
    assert run(*line, "--classes", "map.txt").code == 2


def test_heads_of_several_numbers_of_classes_are_not_guessed() -> None:
    source = {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(9, 4)}
    target = {"a.weight": (3, 4), "b.weight": (3, 4)}
    with pytest.raises(EditError, match="several numbers of classes"):
        transferred(source, target, adapt="classes", classes=[0, 1, 2])
    out, done = transferred(source, target, adapt="b=classes", classes=[8, 1, 2])
    assert same(out["b.weight"], source["b.weight"][[8, 1, 2]])
    assert done.fit
    assert [each.key for each in done.fit.mismatched] == ["a.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("want", [900, 1500])
def test_a_vocabulary_grows_by_the_mean(want: int, dtype: Any) -> None:
    table, bias = torch.randn(1200, 8).to(dtype), torch.randn(1200).to(dtype)
    source = {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        "predictions.bias": bias,
        "head.weight": torch.randn(5, 8),
    }
    rows = dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"], (want, 8))
    target = {**rows, "predictions.bias": (want,), "head.weight": (3, 8)}
    out, done = transferred(source, target, adapt="vocab")
    for key in target:
        if key == "head.weight":
            continue
        value, new = source[key], max(want - 1200, 0)
        mean = value.double().mean(0, keepdim=True).to(dtype)
        assert same(out[key], torch.cat([value[:want], *[mean] * new]))
    assert out["lm_head.weight"].data_ptr() == out["model.embed_tokens.weight"].data_ptr()
    assert done.fit
    assert [each.key for each in done.fit.mismatched] == ["head.weight"]


# What was not asked for, and what does not fit.


def test_nothing_is_adapted_unasked() -> None:
    source = {"pos_embed": torch.randn(1, 16, 4), "conv.weight": torch.randn(2, 3, 1, 1)}
    target = {"pos_embed": (1, 25, 4), "conv.weight": (2, 1, 1, 1)}
    out, done = transferred(source, target, adapt="in-chans")
    assert list(out) == ["conv.weight"]
    assert done.fit
    assert [each.key for each in done.fit.mismatched] == ["pos_embed"]
    assert transferred(source, target)[0] == {}


def test_a_grid_of_as_many_tokens_is_adapted_where_it_is_given() -> None:
    value = torch.randn(1, 37, 4)
    asked = {"adapt": "pos-embed", "pos_grid": "4x9"}
    out, done = transferred({"pos_embed": value}, {"pos_embed": (1, 37, 4)}, **asked)
    meant = resampled(value, (6, 6), (4, 9), 1)
    torch.testing.assert_close(out["pos_embed"], meant, rtol=1e-5, atol=1e-6)
    assert done.fit
    assert [each.key for each in done.fit.adapted] == ["pos_embed"]
    out, done = transferred(
        {"pos_embed": value}, {"pos_embed": (1, 37, 4)}, adapt="pos-embed", pos_grid="6x6"
    )
    assert same(out["pos_embed"], value)
    assert done.fit
    assert not done.fit.adapted


def test_keys_that_cannot_be_adapted_are_errors() -> None:
    source = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    target = {"a": (5, 7), "b": (4,)}
    with pytest.raises(EditError, match=r"a: \[2, 3\] cannot be adapted to \[5, 7\]"):
        transferred(source, target, adapt="a")
    with pytest.raises(NothingMatched, match="no shape differs in b"):
        transferred(source, target, adapt="b")
    with pytest.raises(EditError, match="is not one of pos-embed, in-chans, classes, vocab"):
        transferred(source, target, adapt="a=rows")
    with pytest.raises(EditError, match="need --like or --model"):
        ckptool.transfer("source.pth", "out.pth", adapt="a")
    with pytest.raises(EditError, match="I64 is not adapted"):
        transferred(
            {"a": torch.zeros(1, 3, 2, 2, dtype=torch.int64)}, {"a": (1, 1, 2, 2)}, adapt="a"
        )


def test_what_was_adapted_is_named_with_both_shapes(run: Run) -> None:
    torch.save({"stem.weight": torch.randn(2, 3, 1, 1)}, "a.pth")
    torch.save({"stem.weight": torch.randn(2, 1, 1, 1)}, "b.pth")
    line = ["transfer", "a.pth", "out.safetensors", "--like", "b.pth", "--adapt", "in-chans,vocab"]
    outcome = run(*line)
    assert "stem.weight  [2, 3, 1, 1]  to [2, 1, 1, 1]  3 channels summed" in outcome.err
    document = json.loads(run(*line, "--force", "--json").out)
    assert document["adapted"] == [
        {
            "key": "stem.weight",
            "kind": "in-chans",
            "here": [2, 3, 1, 1],
            "there": [2, 1, 1, 1],
            "how": "3 channels summed",
        }
    ]
    safetensors = pytest.importorskip("safetensors.torch")
    weight = torch.load("a.pth")["stem.weight"]
    assert same(
        safetensors.load_file("out.safetensors")["stem.weight"], weight.sum(1, keepdim=True)
    )
