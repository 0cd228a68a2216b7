"""`ckptool plot`: what is in the pictures, judged by their own text and by torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import Outcome, environment

from ckptool.cli import charts, treemap
from ckptool.cli.treemap import Box

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("matplotlib")

Run = Callable[..., Outcome]
Text = tuple[str, Box]


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def entries() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "stem": (8, 3, 3, 3),
        "layer1.0.conv": (16, 8, 3, 3),
        "layer1.1.conv": (16, 16, 3, 3),
        "layer2.0.conv": (32, 16, 3, 3),
        "head": (10, 32),
    }
    made: dict[str, Any] = {}
    for name, shape in shapes.items():
        made[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.1
        made[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    return {**made, "layer1.0.bn.num_batches_tracked": torch.tensor(7)}


def of_svg(path: Path) -> ElementTree.Element:
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def texts(path: Path) -> list[str]:
    return [each.text or "" for each in of_svg(path).iter() if each.tag.endswith("}text")]


def areas(path: Path) -> list[float]:
    """Measure the boxes of the first collection of a picture: those of the modules."""
    groups = of_svg(path).iter()
    first = next(each for each in groups if each.get("id") == "PolyCollection_1")
    found = []
    for each in first.iter():
        if each.tag.endswith("}path"):
            numbers = [float(word) for word in re.findall(r"[\d.]+", each.get("d") or "")]
            xs, ys = numbers[::2], numbers[1::2]
            found.append((max(xs) - min(xs)) * (max(ys) - min(ys)))
    return found


# Sizes.


def test_a_picture_names_its_modules(run: Run, tmp_path: Path, entries: dict[str, Any]) -> None:
    source = saved(tmp_path / "net.pth", {"state_dict": entries, "epoch": 3})
    done = run("plot", source, "-o", tmp_path / "sizes.svg")
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith(f"{tmp_path / 'sizes.svg'}: sizes of 6 layers, 11 tensors, 33.9 KiB")
    words = texts(tmp_path / "sizes.svg")
    assert words[0] == "net.pth"
    assert "11 tensors" in words[1]
    assert "parameters" in words[1]
    assert {"layer1", "layer2.0.conv", "1.conv", "head"} <= set(words)


@pytest.mark.parametrize("by", ["bytes", "parameters"])
def test_areas_are_sizes(run: Run, tmp_path: Path, entries: dict[str, Any], by: str) -> None:
    half = {key: value.half() if "layer1" in key else value for key, value in entries.items()}
    source = saved(tmp_path / "net.pth", half)
    target = tmp_path / "sizes.svg"
    document = run("plot", "--by", by, "--json", source, "-o", target).document
    assert (document["schema"], document["kind"]) == ("plot/1", "sizes")
    sizes: dict[str, int] = {}
    for key, value in half.items():
        module = key.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + (value.nbytes if by == "bytes" else value.numel())
    field = "nbytes" if by == "bytes" else "parameters"
    assert {each["module"]: each[field] for each in document["layers"]} == sizes
    drawn, whole = areas(target), sum(sizes.values())
    assert sorted(area / sum(drawn) for area in drawn) == pytest.approx(
        sorted(size / whole for size in sizes.values()), rel=1e-3, abs=1e-6
    )


def test_depth_folds_and_select_chooses(run: Run, tmp_path: Path, entries: dict[str, Any]) -> None:
    source = saved(tmp_path / "net.pth", entries)
    target = tmp_path / "sizes.svg"
    document = run("plot", "--depth", 1, "--json", source, "-o", target).document
    modules = [each["module"] for each in document["layers"]]
    assert modules == ["stem", "layer1", "layer2", "head"]
    chosen = run("plot", "--select", "head", "--json", "--force", source, "-o", target).document
    assert [each["tensors"] for each in chosen["layers"]] == [["weight", "bias"]]


@pytest.mark.parametrize("count", [1, 2, 7, 500])
def test_boxes_cover_the_area_without_overlaps(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    sizes = sorted((torch.rand(count, generator=generator) ** 6 + 1e-9).tolist(), reverse=True)
    whole = Box(3, 5, 640, 360)
    boxes = [*treemap.squarified(sizes, whole)]
    for box, size in zip(boxes, sizes, strict=True):
        share = box.width * box.height / (whole.width * whole.height)
        assert share == pytest.approx(size / sum(sizes), rel=1e-6, abs=1e-12)
    assert not [*overlaps([("", box) for box in boxes], 1e-6)]
    for box in boxes:
        assert box.x >= 3 - 1e-6
        assert box.y + box.height <= 365 + 1e-6


# Values.


def test_values_are_those_of_torch(run: Run, tmp_path: Path, entries: dict[str, Any]) -> None:
    odd = {**entries, "head.bias": entries["head.bias"].clone()}
    odd["head.bias"][:2] = torch.tensor([math.nan, math.inf])
    source = saved(tmp_path / "net.pth", odd)
    document = run("plot", "--stats", "--json", source, "-o", tmp_path / "v.svg").document
    layers = {each["module"]: each for each in document["layers"]}
    assert set(layers) == {"stem", "layer1.0.conv", "layer1.1.conv", "layer2.0.conv", "head"}
    for name, found in layers.items():
        weight = odd[f"{name}.weight"].double().flatten()
        assert (found["min"], found["max"]) == (weight.min().item(), weight.max().item())
        assert found["mean"] == pytest.approx(weight.mean().item(), rel=1e-9)
        assert found["std"] == pytest.approx(weight.std(correction=0).item(), rel=1e-9)
        for share, value in found["quantiles"].items():
            meant = weight.quantile(float(share)).item()
            assert value == pytest.approx(meant, rel=0.13, abs=0.006)
    assert layers["head"]["not_finite"] == 2
    assert "NaN or infinite in 1 layer" in texts(tmp_path / "v.svg")
    every = run("plot", "--stats", "--select", "*.bias", "--json", source, "-o", tmp_path / "b.svg")
    assert [each["module"] for each in every.document["layers"]][-1] == "head.bias"


# Change.


def test_change_is_that_of_torch(run: Run, tmp_path: Path, entries: dict[str, Any]) -> None:
    moved = {f"module.{key}": value.clone() for key, value in entries.items()}
    moved["module.stem.weight"] += 0.01
    moved["module.head.weight"] *= -2
    moved["module.head.bias"] = moved["module.head.bias"].bfloat16()
    moved["module.layer2.0.conv.weight"] = torch.zeros(3)  # of another shape
    one, other = saved(tmp_path / "a.pth", entries), saved(tmp_path / "b.pth", {"model": moved})
    done = run("plot", "--json", one, other, "-o", tmp_path / "c.svg")
    layers = {each["module"]: each for each in done.document["layers"]}
    for name in ("stem", "head", "layer1.0.conv"):
        pairs = [(entries[f"{name}.{t}"], moved[f"module.{name}.{t}"]) for t in ("weight", "bias")]
        left, right = (torch.cat([pair[at].double().flatten() for pair in pairs]) for at in (0, 1))
        relative = ((left - right).norm() / left.norm()).item()
        cosine = torch.nn.functional.cosine_similarity(left, right, dim=0).item()
        assert layers[name]["relative"] == pytest.approx(relative, rel=1e-9)
        assert layers[name]["cosine"] == pytest.approx(cosine, rel=1e-9)
    assert layers["layer2.0.conv"]["tensors"] == ["bias"]
    assert "not in it: 2 without floats of one shape in both files" in done.document["notes"]
    assert texts(tmp_path / "c.svg")[0] == "a.pth \u2192 b.pth"
    assert "unchanged: 3 layers" in texts(tmp_path / "c.svg")


def test_nothing_in_common(run: Run, tmp_path: Path, entries: dict[str, Any]) -> None:
    one = saved(tmp_path / "a.pth", entries)
    other = saved(tmp_path / "b.pth", {"x": torch.ones(2)})
    done = run("plot", one, other, "-o", tmp_path / "c.svg")
    assert (done.code, done.out) == (2, "")
    assert "error[nothing-matched]" in done.err
    assert not (tmp_path / "c.svg").exists()


# Readable, whatever the size.


def thousand() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"model.decoder.layers.{at}.{name}.weight": torch.randn(shape, generator=generator)
        for at in range(250)
        for name, shape in {
            "self_attention.query_key_value_projection": (8, 24),
            "self_attention.output": (8, 8),
            "mlp.up": (8, 32),
            "norm": (8,),
        }.items()
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Any]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    many = thousand()
    odd = {"$x_1$.<&>": torch.ones(9), "\u5c42.\u6743\u91cd": torch.ones(5), "": torch.ones(2)}
    odd |= {"a\x1b[31m.b\uffff": torch.ones(3), ".".join("d" * 3000): torch.ones(4)}
    return {
        "few": saved(folder / "few.pth", entries),
        "many": saved(folder / "many.pth", many),
        "moved": saved(
            folder / "moved.pth", {k: v * (1 + i % 7) for i, (k, v) in enumerate(many.items())}
        ),
        "odd": saved(folder / "odd.pth", odd),
        "one": saved(folder / "one.pth", {"w": torch.ones(1)}),
    }


def overlaps(boxes: list[Text], least: float) -> Iterator[tuple[str, str]]:
    """Yield pairs of boxes that share more than so much of each side."""
    boxes = sorted(boxes, key=lambda each: each[1].x)
    for at, (word, one) in enumerate(boxes):
        for other, two in boxes[at + 1 :]:
            if two.x > one.x + one.width - least:
                break
            if min(one.y + one.height, two.y + two.height) - max(one.y, two.y) > least:
                yield word, other


LINES = ["few", "many", "odd", "one", "--stats few", "--stats many", "--stats odd", "many moved"]


@pytest.mark.product(4)
@pytest.mark.parametrize("size", ["640x480", "1920x1200", "4000x2500"])
@pytest.mark.parametrize("line", LINES)
def test_no_text_is_over_another_or_off_the_page(
    run: Run,
    tmp_path: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    size: str,
) -> None:
    from ckptool.cli.pictures import Page

    written: list[Text] = []
    pages: list[Any] = []

    def text(
        page: Any, x: float, y: float, word: str, size: float, *, bold: bool = False, **how: Any
    ) -> None:
        wide = page.text_width(word, size, bold=bold)
        if how.get("turned"):
            box = Box(x - 0.72 * size, y - wide / 2, 0.72 * size, wide)
        else:
            left = {"left": 0.0, "center": 0.5, "right": 1.0}[how.get("align", "left")]
            box = Box(x - left * wide, y - 0.72 * size, wide, 0.72 * size)
        written.append((word, box))
        pages.append(page)

    monkeypatch.setattr(Page, "text", text)
    words = [str(models.get(word, word)) for word in line.split()]
    done = run("plot", "--size", size, *words, "-o", tmp_path / "p.png")
    assert done.code == 0, done.err
    assert not [*overlaps(written, 0.3)]
    for word, box in written:
        assert min(box.x, box.y) >= 0, word
        assert box.x + box.width <= pages[0].width, word
        assert box.y + box.height <= pages[0].height, word
    if "many" in line and size != "640x480":
        assert len(written) > 30


def test_names_that_mean_something_elsewhere(
    run: Run, tmp_path: Path, models: dict[str, Path]
) -> None:
    assert run("plot", models["odd"], "-o", tmp_path / "p.svg").code == 0
    assert run("plot", models["odd"], "-o", tmp_path / "p.png").code == 0
    words = texts(tmp_path / "p.svg")
    assert {"$x_1$", "\u5c42"} <= set(words)
    assert not any("\x1b" in word for word in words)


def test_numbers_count_up(run: Run, tmp_path: Path) -> None:
    """Safetensors has 10 before 2."""
    safetensors_torch.save_file(
        {f"layers.{at}.w": torch.ones(2) for at in range(12)}, tmp_path / "x.safetensors"
    )
    done = run("plot", "--json", tmp_path / "x.safetensors", "-o", tmp_path / "p.svg")
    names = [each["module"] for each in done.document["layers"]]
    assert names == [f"layers.{at}" for at in range(12)]


@pytest.mark.parametrize(
    "name", ["dcp", "sharded_safetensors", "script.pt", "every_dtype.pth", "sparse.pth"]
)
def test_any_container_and_dtype(run: Run, good: Path, tmp_path: Path, name: str) -> None:
    assert run("plot", good / name, "-o", tmp_path / "s.svg").code == 0
    assert run("plot", "--stats", good / name, "-o", tmp_path / "v.svg").code in (0, 2)
    assert run("plot", good / name, good / name, "-o", tmp_path / "c.svg").code in (0, 2)


def test_a_file_that_would_run_code_is_drawn_with_a_warning(
    run: Run, hostile: Path, tmp_path: Path
) -> None:
    done = run("plot", hostile / "os_system.pth", "-o", tmp_path / "p.svg")
    assert done.code == 0
    assert "would run code when loaded; nothing was executed" in done.err


# As other commands that write.


@pytest.mark.parametrize(
    ("line", "code", "slug"),
    [
        ("plot few.pth -o p.gif", 2, "edit-error"),
        ("plot few.pth -o there.svg", 5, "output-exists"),
        ("plot few.pth -o no/p.svg", 5, "write-error"),
        ("plot missing.pth -o p.svg", 3, "no-such-file"),
        ("plot few.pth --size 10x10 -o p.svg", 2, "usage"),
        ("plot few.pth --size big -o p.svg", 2, "usage"),
        ("plot few.pth few.pth --stats -o p.svg", 2, "usage"),
        ("plot few.pth", 2, "usage"),
        ("plot few.pth --select nothing -o p.svg", 2, "nothing-matched"),
        ("plot empty.pth -o p.svg", 2, "nothing-matched"),
        ("plot few.svg -o few.svg --force", 5, "same-file"),
    ],
)
def test_what_is_refused(
    run: Run,
    tmp_path: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    code: int,
    slug: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("few.pth").write_bytes(models["few"].read_bytes())
    Path("few.svg").write_bytes(models["few"].read_bytes())
    saved(tmp_path / "empty.pth", {})
    Path("there.svg").write_text("mine")
    before = sorted(os.listdir())
    done = run(*line.split())
    assert (done.code, done.out) == (code, "")
    assert f"error[{slug}]" in done.err
    assert sorted(os.listdir()) == before
    assert Path("there.svg").read_text() == "mine"


def test_force_replaces(run: Run, tmp_path: Path, models: dict[str, Path]) -> None:
    target = tmp_path / "p.pdf"
    target.write_text("old")
    assert run("plot", "--force", models["few"], "-o", target).code == 0
    assert target.read_bytes().startswith(b"%PDF")
    assert os.listdir(tmp_path) == ["p.pdf"]


RC = "axes.facecolor: red\nfont.size: 30\nsavefig.dpi: 10\nbackend: tkagg\nsvg.fonttype: path\n"


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_the_same_bytes_whatever_is_set(
    run: Callable[..., Outcome],
    spawn: Callable[..., Outcome],
    tmp_path: Path,
    models: dict[str, Path],
    suffix: str,
) -> None:
    """The settings of a user, a backend that is not there, a folder that cannot be written."""
    rc = tmp_path / "matplotlibrc"
    rc.write_text(RC)
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    more = {"MATPLOTLIBRC": str(rc), "MPLBACKEND": "nonsense", "MPLCONFIGDIR": str(nowhere / "x")}
    targets = [tmp_path / f"{number}.{suffix}" for number in range(2)]
    for target, plot in zip(targets, (run, partial(spawn, env=environment(more))), strict=True):
        done = plot("plot", models["few"], "-o", target)
        assert done.code == 0, done.err
        assert [line for line in done.err.splitlines() if "sizes of" not in line] == []
    assert targets[0].read_bytes() == targets[1].read_bytes()


def test_matplotlib_is_an_extra(
    spawn: Callable[..., Outcome], tmp_path: Path, models: dict[str, Path]
) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.argv[0] = 'ckptool'; "
        "from ckptool.cli.main import main; sys.exit(main())"
    )
    line = ("plot", models["few"], "-o", tmp_path / "p.svg")
    done = spawn(*line, program=("-c", code))
    assert (done.code, done.out) == (7, "")
    assert "error[missing-extra]: pictures need matplotlib" in done.err
    assert "hint: pip install 'ckptool[plot]'" in done.err
    assert not (tmp_path / "p.svg").exists()


def test_counts_are_short() -> None:
    numbers = {999: "999", 1000: "1 k", 25_557_032: "25.6 M", 7_000_000_000: "7 B"}
    assert [charts.short(number) for number in numbers] == [*numbers.values()]
