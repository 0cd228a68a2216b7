"""`import ckptool`: what is public and typed, one convention for arguments, results to look at."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import environment

import ckptool
from ckptool import errors
from ckptool.errors import NoSuchKey, NothingMatched
from ckptool.verbs import options

RIGHT = """
from collections.abc import Mapping

import ckptool

listing = ckptool.keys("a.pth", select="head", all=True)
names: list[str] = [key for key in listing]
print(len(listing), "head.weight" in listing, listing["head.weight"].shape)
done: ckptool.Rewrite = ckptool.strip_prefix("a", "b", prefix="m.", force=True, to="safetensors")
renamed: int = done.renamed
fit = ckptool.transfer("a", "b", drop="head", like={"weight": 1}, dry_run=True).fit
filled: float = fit.filled if fit else 0.0
options: ckptool.WriteOptions = {"at": "ema", "sync": False}
ckptool.convert("a", "b", steps=[ckptool.edits.drop("head")], **options)
try:
    equal: bool = ckptool.diff("a", {"w": 1}, map={"a": "b"}).equal
except ckptool.NothingMatched as error:
    print(error.hint)
except (ckptool.FormatError, ckptool.CkptoolError) as error:
    print(error.exit_code)
verified: ckptool.Verification = ckptool.verify("a", "b", "resnet18", devices="cpu", seed=1)
devices: list[str] = [run.device for run in verified]
status: ckptool.Status = ckptool.check("a").status
command: str = ckptool.info("a").suggestions[0].command
document: Mapping[str, object] = listing.to_dict()
"""
WRONG = {
    'ckptool.strip_prefix("a", "b", prefxi=3)': "Unexpected keyword argument",
    'ckptool.keys("a", banana=True)': "Unexpected keyword argument",
    "ckptool.keys(1)": "incompatible type",
    'ckptool.keys("a", sort="weight")': "incompatible type",
    'ckptool.unwrap("a", "b", to="onnx")': "incompatible type",
    'ckptool.strip_prefix("a", "b").rename': "has no attribute",
    'ckptool.keyz("a")': "has no attribute",
    'ckptool.verify("a", "b", "resnet18", device="cpu")': "Unexpected keyword argument",
    'size: str = ckptool.keys("a").nbytes': "Incompatible types",
}


@pytest.mark.thorough
def test_a_script_is_checked_by_mypy(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text("\n".join(["import ckptool", *WRONG]))
    # torch is not ours to check, and takes a quarter of a minute.
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict=true\n[mypy-torch.*]\nfollow_imports=skip\n")
    # Where it is installed, mypy finds it by its py.typed, and refuses that folder in MYPYPATH.
    package = Path(ckptool.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "right.py", "wrong.py"],
        cwd=tmp_path,
        env=environment({} if package.name == "site-packages" else {"MYPYPATH": str(package)}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line for line in lines if not line.startswith("wrong.py")] == []
    for number, (line, message) in enumerate(WRONG.items(), start=2):
        told = [each for each in lines if each.startswith(f"wrong.py:{number}:")]
        assert any(message in each for each in told), (line, done.stdout)


ERRORS = {
    name
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, Exception)
}


def test_checkers_and_python_see_the_same_names() -> None:
    tree = inspect.getsource(ckptool)
    typed = set(re.findall(r"(\w+) as (?=\1\b)", tree))
    assert typed | ERRORS | {"__version__"} == set(ckptool.__all__) == set(dir(ckptool))
    for name in ckptool.__all__:
        assert getattr(ckptool, name) is not None
    with pytest.raises(AttributeError, match="keyz"):
        _ = ckptool.keyz


def test_every_error_is_public() -> None:
    assert {"CkptoolError", "PoorFit", "KeyCollision"} <= ERRORS <= set(ckptool.__all__)


FUNCTIONS = [name for name in ckptool.__all__ if inspect.isfunction(getattr(ckptool, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_public_function_takes_or_gives_anything(name: str) -> None:
    signature = inspect.signature(getattr(ckptool, name))
    annotations = [each.annotation for each in signature.parameters.values()]
    for annotation in [*annotations, signature.return_annotation]:
        assert annotation is not inspect.Signature.empty
        assert "Any" not in re.findall(r"\w+", annotation)


def test_keywords_of_writing_verbs_are_those_of_the_command_line() -> None:
    from ckptool.cli.unwrap import command

    fields = [field.name for field in dataclasses.fields(options.Options)]
    assert list(options.WriteOptions.__annotations__) == fields
    flags = {parameter.name for parameter in command.params} - {
        "paths", "as_json", "quiet", "no_sync", "max_memory", "timeout",
    }  # fmt: skip
    assert flags | {"sync", "parents"} == set(fields)  # OUT/ makes folders


# Examples.


@pytest.fixture
def files(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of small checkpoints, the working directory."""
    for name in "model_best.pth.tar flowers.safetensors plain.pth data_parallel.pth".split():
        shutil.copyfile(good / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_do_what_they_say(files: Path, name: str) -> None:
    function = getattr(ckptool, name)
    if name in ("load_matching", "load_state_dict", "verify"):
        pytest.importorskip("torch")
    first = inspect.getdoc(function).partition("\n")[0]
    assert first.endswith("."), first
    assert not first.partition(" ")[0].endswith("s"), first
    (example,) = doctest.DocTestFinder().find(function, name, globs={"ckptool": ckptool})
    assert example.examples
    told: list[str] = []
    failed = doctest.DocTestRunner(verbose=False).run(example, out=told.append).failed
    assert not failed, "".join(told)


# A string is one pattern.


def test_a_string_is_one_pattern(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    layers = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(12)])
    path = tmp_path / "in.pth"
    torch.save(layers.state_dict(), path)
    wanted = ["10.weight", "10.bias"]
    assert list(ckptool.keys(path, select="10")) == wanted
    done = ckptool.transfer(path, tmp_path / "out.pth", drop="10")
    assert [each.key for each in done.rewrite.dropped] == wanted
    done = ckptool.transfer(path, tmp_path / "kept.pth", keep="10")
    assert list(ckptool.keys(tmp_path / "kept.pth")) == wanted
    assert ckptool.load_matching(layers, path, drop="10").missing == ("10.weight", "10.bias")
    assert ckptool.diff(path, tmp_path / "kept.pth", select="10").equal
    steps = [ckptool.edits.drop("10"), ckptool.edits.keep(name for name in ("11",))]
    ckptool.convert(path, tmp_path / "one.pth", steps=steps)
    assert list(ckptool.keys(tmp_path / "one.pth")) == ["11.weight", "11.bias"]


# Python objects where a file may be named.


def test_state_dicts_and_models_are_taken_for_files(files: Path) -> None:
    torch = pytest.importorskip("torch")
    state = ckptool.load_state_dict("plain.pth")
    assert ckptool.diff(state, "plain.pth").equal
    assert ckptool.diff("plain.pth", {"epoch": 3, "state_dict": state}, right_at="state_dict").equal
    state["classifier.bias"] = state["classifier.bias"] + 1
    assert [change.key for change in ckptool.diff("plain.pth", state)] == ["classifier.bias"]

    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    assert not ckptool.diff(model, other).equal
    assert ckptool.load_matching(other, model).filled == 1.0
    assert ckptool.diff(model, other).equal
    assert ckptool.load_matching(other, model.state_dict(), drop="0").missing == (
        "0.weight", "0.bias",
    )  # fmt: skip


def test_a_transfer_takes_models_and_state_dicts(files: Path) -> None:
    torch = pytest.importorskip("torch")
    source = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    with torch.device("meta"):
        empty = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5))
    done = ckptool.transfer(source, "out.pth", like=empty, min_match=0.1)
    assert (done.rewrite.written, done.rewrite.source) == (2, "(Sequential)")
    assert ckptool.transfer(source, "same.pth", like=source.state_dict()).fit.filled == 1.0
    whole = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5))
    done = ckptool.transfer(source, "whole.pth", model=whole, init_missing=True, min_match=0.1)
    assert done.rewrite.added == 2
    written = ckptool.load_state_dict("whole.pth")
    assert torch.equal(written["1.weight"], whole[1].weight)
    assert torch.equal(written["0.weight"], source[0].weight)
    with pytest.raises(ckptool.EditError, match="in-place"):
        ckptool.transfer(source, in_place=True)
    with pytest.raises(ckptool.BadInput, match="model already"):
        ckptool.transfer(source, "x.pth", model=whole, model_args={"width": 8})


def test_verify_takes_models_and_state_dicts(files: Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    torch.save(model.state_dict(), "saved.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    how: dict[str, Any] = {"devices": "cpu", "input_shapes": "4,3"}
    found = ckptool.verify("saved.pth", model.state_dict(), model, **how)
    assert found.identical
    assert [run.device for run in found] == ["cpu"]
    assert (found.model, found.candidate) == ("Sequential", "(state_dict)")
    changed = {"0.weight": before["0.weight"], "0.bias": before["0.bias"] + 1}
    assert not ckptool.verify(model, changed, model, **how).identical
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ckptool.DoesNotLoad, match="into `Sequential`"):
        ckptool.verify(model, {"0.weight": before["0.weight"]}, model, **how)


def test_what_is_in_memory_leaves_no_file_behind(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    (files / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(files / "temporary"))
    ckptool.diff({"w": torch.zeros(2)}, {"w": torch.ones(2)})
    with pytest.raises(ckptool.BadInput, match="cannot be saved"):
        ckptool.diff({"w": torch.zeros(2), "hook": lambda: None}, "plain.pth")
    assert list((files / "temporary").iterdir()) == []


# Results.


def test_a_listing_reads_like_a_dict(files: Path) -> None:
    listing = ckptool.keys("model_best.pth.tar")
    assert len(listing) == 8
    assert list(listing) == [key for key, _ in listing.entries]
    assert "module.classifier.bias" in listing
    assert "classifier.bias" not in listing
    assert listing["module.classifier.bias"].shape == (10,)
    with pytest.raises(KeyError):
        listing["classifier.bias"]


def test_results_print_in_a_line(files: Path) -> None:
    results: list[object] = [
        ckptool.read("model_best.pth.tar"),
        ckptool.keys("model_best.pth.tar"),
        ckptool.keys("model_best.pth.tar").state,
        ckptool.info("model_best.pth.tar"),
        ckptool.check("model_best.pth.tar"),
        ckptool.diff("plain.pth", "flowers.safetensors"),
        ckptool.unwrap("model_best.pth.tar", "out.pth"),
        ckptool.transfer("model_best.pth.tar", "fit.pth", like="flowers.safetensors"),
        ckptool.average(["model_best.pth.tar", "plain.pth"], "mean.pth"),
    ]
    for result in results:
        assert len(repr(result)) < 200, repr(result)[:300]
        assert "\n" not in repr(result)


def test_a_listing_is_a_table_in_a_notebook(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    keys = ["<script>", *(f"key{number}" for number in range(150))]
    torch.save({key: torch.zeros(1) for key in keys}, tmp_path / "many.pth")
    html = ckptool.keys(tmp_path / "many.pth")._repr_html_()
    assert html.startswith("<table>")
    assert "&lt;script&gt;" in html
    assert "<script>" not in html
    assert "and 51 more" in html
    assert html.count("<tr>") == 102  # the head, 100 tensors, the count of others


VERBS: dict[str, tuple[str, Callable[[], Any]]] = {
    "keys": ("keys model_best.pth.tar", lambda: ckptool.keys("model_best.pth.tar")),
    "info": ("info model_best.pth.tar", lambda: ckptool.info("model_best.pth.tar")),
    "check": ("check plain.pth", lambda: ckptool.check("plain.pth")),
    "diff": (
        "diff plain.pth flowers.safetensors",
        lambda: ckptool.diff("plain.pth", "flowers.safetensors"),
    ),
    "unwrap": (
        "unwrap -n model_best.pth.tar out.pth",
        lambda: ckptool.unwrap("model_best.pth.tar", "out.pth", dry_run=True),
    ),
    "average": (
        "average -n plain.pth model_best.pth.tar mean.pth",
        lambda: ckptool.average(["plain.pth", "model_best.pth.tar"], "mean.pth", dry_run=True),
    ),
    "transfer": (
        "transfer -n model_best.pth.tar out.pth --like flowers.safetensors",
        lambda: ckptool.transfer(
            "model_best.pth.tar", "out.pth", like="flowers.safetensors", dry_run=True
        ),
    ),
}


@pytest.mark.parametrize("name", VERBS)
def test_to_dict_is_the_json_of_the_command(
    run: Callable[..., Any], files: Path, name: str
) -> None:
    line, verb = VERBS[name]
    document = run(*line.split(), "--json").document
    result = verb()
    assert result.to_dict() == document
    assert dataclasses.is_dataclass(result)


# Hints of a second file name its own option.


def test_a_wrong_place_in_a_second_file_names_its_option(
    run: Callable[..., Any], good: Path, tmp_path: Path
) -> None:
    dino, ema = good / "dino.pth", good / "ema.pth"
    out = tmp_path / "out.pth"
    done = run("transfer", ema, out, "--at", "model", "--like", dino, "--like-at", "teachr")
    assert done.err.endswith(" --like-at teacher\n")
    done = run("diff", dino, ema, "--left-at", "teachr", "--right-at", "model")
    assert done.err.endswith(" --left-at teacher\n")
    done = run("diff", ema, dino, "--left-at", "model", "--right-at", "teachr")
    assert done.err.endswith(" --right-at teacher\n")
    done = run("diff", ema, dino, "--at", "modl")
    assert done.err.endswith(" --at model\n")
    with pytest.raises(NoSuchKey) as caught:
        ckptool.diff(dino, ema, left_at="teachr")
    assert "--left-at" in caught.value.option


def test_tensors_without_a_state_dict_name_the_option_too(
    run: Callable[..., Any], good: Path, tmp_path: Path
) -> None:
    done = run("transfer", good / "plain.pth", tmp_path / "o.pth", "--like", good / "optimizer.pth")
    assert "--like-at NAME chooses" in done.err
    assert " --at" not in done.err


def test_a_wrong_place_in_a_candidate_names_its_option(
    run: Callable[..., Any], good: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    line = ["verify", "--model", "resnet18", "--device", "cpu", "--at", "model"]
    done = run(*line, good / "ema.pth", good / "dino.pth", "--candidate-at", "teachr")
    assert done.err.endswith(" --candidate-at teacher\n")
    done = run(*line, good / "ema.pth", good / "ema.pth")
    assert "--candidate-at" in done.err


def test_nothing_matched_is_public(files: Path) -> None:
    with pytest.raises(ckptool.NothingMatched) as caught:
        ckptool.keys("plain.pth", select="classifer")
    assert isinstance(caught.value, NothingMatched)
