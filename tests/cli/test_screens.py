"""What people see: no line is wider than the terminal, and off one nothing is cut or folded."""

from __future__ import annotations

import ast
import io
import os
import shutil
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, Outcome, environment, step
from test_cli import SLOWISH, everything

from ckptool.cli.main import main

Run = Callable[..., Outcome]
Show = Callable[..., list[str]]
WIDTH = 80

WIDE = "编码器.层.{}.注意力权重.非常长的名字.非常长的名字.非常长的名字.weight"
LONG = "model.language_model.layers.{}." + "a_module_of_a_long_name." * 6 + "q_proj.weight"
NET = """
import torch

def net(classes=3):
    layers = [torch.nn.Conv2d(3, 128, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    inner = torch.nn.Sequential(*layers, torch.nn.Linear(128, classes))
    return torch.nn.Sequential(torch.nn.Sequential(torch.nn.Sequential(inner)))
"""


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Iterator[Show]:
    """Run a command line on a terminal of so many columns; give the lines it shows."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")

    def shown(*arguments: object, width: int = WIDTH) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        with redirect_stdout(Terminal()) as out, redirect_stderr(out):
            main([str(argument) for argument in arguments])
        return out.getvalue().splitlines()

    return shown


def columns(text: str) -> int:
    """Count what a text takes, as wcwidth does for what is here."""
    return sum(
        0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF")
        for each in text
    )


def too_wide(lines: list[str], width: int = WIDTH) -> list[str]:
    """Return the lines that are too wide, but for commands to paste and for paths."""
    pasted = ("ckptool ", "/", "{i}")  # of a recipe
    over = (line for line in lines if columns(line) > width)
    return [line for line in over if not any(sign in line for sign in pasted)]


def resnet18(prefix: str = "", classes: int = 1000) -> dict[str, torch.Tensor]:
    found = {"conv1.weight": torch.randn(64, 3, 7, 7), **norm("bn1", 64)}
    width = 64
    for layer in range(1, 5):
        for block in range(2):
            inputs = width // (1 if layer == 1 or block else 2)
            at = f"layer{layer}.{block}"
            found[f"{at}.conv1.weight"] = torch.zeros(1).expand(width, inputs, 3, 3)
            found |= norm(f"{at}.bn1", width)
            found[f"{at}.conv2.weight"] = torch.zeros(1).expand(width, width, 3, 3)
            found |= norm(f"{at}.bn2", width)
            if inputs != width:
                found[f"{at}.downsample.0.weight"] = torch.randn(width, inputs, 1, 1)
                found |= norm(f"{at}.downsample.1", width)
        width *= 2
    found |= {"fc.weight": torch.randn(classes, 512), "fc.bias": torch.randn(classes)}
    return {prefix + key: value for key, value in found.items()}


def norm(at: str, width: int) -> dict[str, torch.Tensor]:
    one = torch.randn(width)
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{at}.{name}": one for name in names} | {f"{at}.num_batches_tracked": torch.tensor(0)}


def layers(count: int, start: str = "transformer.h") -> dict[str, torch.Tensor]:
    found = {"transformer.wte.weight": torch.randn(5, 4)}
    for layer in range(count):
        found[f"{start}.{layer}.attn.qkv.weight"] = torch.randn(12, 4).bfloat16()
        found[f"{start}.{layer}.attn.qkv.bias"] = torch.randn(12).bfloat16()
        for expert in range(4):
            found[f"{start}.{layer}.experts.{expert}.w1"] = torch.randn(2, 4)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write checkpoints to look at, and two of another shape."""
    folder = tmp_path_factory.mktemp("screens")
    training = {"epoch": 90, "arch": "resnet18", "best_acc1": 69.76, "args": {"lr": 0.1}}
    files = {
        "dp.pth.tar": {**training, "state_dict": resnet18("module.")},
        "ten.pth": resnet18(classes=10),
        "layers.pth": layers(12),
        "more.pth": layers(12) | {"transformer.h.3.experts.2.w1": torch.randn(3, 4)},
        "wide.pth": {WIDE.format(number): torch.randn(2, 3) for number in range(2)}
        | {"e\u0301tage.한국어.weight": torch.randn(3)},
        "long.pth": {LONG.format(number): torch.randn(2, 3) for number in range(2)},
    }
    for name, content in files.items():
        torch.save(content, folder / name)
    deep: object = {"of_the_innermost": [*range(40)]}
    for level in range(30):
        deep = {f"a_module_of_level_{level}": deep, "hooks": "several words in one value"}
    callback = "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min', 'every_n_epochs': 1}"
    best = {"/home/user/packages/checkpoints/best epoch=0.ckpt": torch.ones(())}
    entries = {"state_dict": layers(3), "callbacks": {callback: best}, "hyper_parameters": deep}
    torch.save(entries, folder / "callbacks.ckpt")
    for name in ("zero3_ranks", "dcp", "sharded_safetensors"):
        shutil.copytree(FIXTURES / "good" / name, folder / name)
    for name in ("dino.pth", "whole_model.pth", "optimizer.pth", "every_dtype.pth", "tied.pth"):
        shutil.copy(FIXTURES / "good" / name, folder / name)
    for name in ("eval_in_namespace.pth", "crc_mismatch.pth", "html_page.pth"):
        shutil.copy(FIXTURES / "hostile" / name, folder / name)
    (folder / "net.py").write_text(NET, encoding="utf-8")
    space: dict[str, torch.nn.Module] = {}
    exec(compile(NET, "net.py", "exec"), space)
    for name in ("one.pth", "two.pth"):
        torch.save(space["net"]().state_dict(), folder / name)  # type: ignore[operator]
    return folder


FILES = (
    "dp.pth.tar callbacks.ckpt layers.pth wide.pth long.pth dino.pth whole_model.pth "
    "optimizer.pth tied.pth every_dtype.pth zero3_ranks dcp sharded_safetensors "
    "eval_in_namespace.pth crc_mismatch.pth html_page.pth absent.pth"
).split()
EACH = (
    "keys {}",
    "keys --no-fold {}",
    "keys --all {}",
    "keys --tree {}",
    "keys --stats {}",
    "keys --stats --at . {}",
    "info {}",
    "check {}",
    "check --finite --sha256 {} dp.pth.tar",
    "diff {} ten.pth",
    "diff --ignore-prefix auto {} layers.pth",
    "show {} epoch",
    "show {} module.conv1.weight",
    "strip-prefix -n {} out.pth",
    "add-prefix -n {} out.pth",
    "unwrap -n {} out.pth",
    "transfer -n {} out.pth",
    "transfer -n {} out.pth --like ten.pth",
    "transfer -n {} out.pth --like layers.pth --drop fc",
    "convert -n {} out.safetensors",
    "convert -n {} out/ --max-shard-size 20",
    "convert -n {} out.pth --dtype bf16 --drop no.such.key",
    "average -n {} dp.pth.tar out.pth",
    "keys {} layers.pth",
    "strip-prefix -n {} dp.pth.tar out/",
    "match {} --like ten.pth",
    "recipe torchvision-vit-to-timm --from {} --like layers.pth",
)
ONCE = (
    "recipe --list",
    "recipe torchvision-vit-to-timm",
    "recipe llama-2-7b-meta-to-hf",
    "diff layers.pth more.pth",
    "diff dp.pth.tar ten.pth --ignore-prefix auto",
    "show callbacks.ckpt hyper_parameters",
    "transfer -n more.pth out.pth --like layers.pth",
    "check .",
    "diff one.pth two.pth",
    "diff --all dino.pth optimizer.pth",
    "plot one.pth",
    "layers --model net.py:net --input-shape 1,3,32,32",
    "layers --model net.py:net --input-shape 1,3,32,32 one.pth",
    "verify one.pth two.pth --model net.py:net --input-shape 1,3,32,32",
    "verify one.pth one.pth --model net.py:net --input-shape 1,3,32,32",
    "help",
    "help exit-codes",
    "help writing",
    "help terminal",
    "help no-such-topic",
    "--help",
    "keys --help",
    "transfer --help",
    "keys",
    "keys --no-such-option dp.pth.tar",
    "no-such-command",
)


@pytest.mark.parametrize("file", FILES)
def test_no_line_is_wider_than_the_terminal(
    folder: Path, show: Show, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.chdir(folder)
    for line in EACH[:: step(2)] if file not in ("dp.pth.tar", "wide.pth") else EACH:
        shown = show(*line.format(file).split())
        assert shown, line
        assert too_wide(shown) == [], line.format(file)
        assert not any("error[bug]" in each for each in shown), shown


@pytest.mark.parametrize("line", ONCE)
def test_no_line_of_a_command_is_wider(
    folder: Path, show: Show, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    shown = show(*line.split())
    assert too_wide(shown) == [], line
    assert not any("error[bug]" in each for each in shown), shown


@pytest.mark.parametrize("file", ["dp.pth.tar", "layers.pth", "wide.pth", "long.pth"])
def test_off_a_terminal_every_key_is_whole(folder: Path, run: Run, file: str) -> None:
    found = torch.load(folder / file)
    keys = list(found.get("state_dict", found))
    path = folder / file
    assert [line.split("\t")[0] for line in run("keys", path).out.splitlines()] == keys
    assert [line.split("\t")[0] for line in run("keys", "--stats", path).out.splitlines()] == keys
    lines = run("diff", "--at", ".", path, FIXTURES / "good" / "optimizer.pth").out.splitlines()
    entries = [f"state_dict.{key}" for key in keys] if "state_dict" in found else keys
    assert {line.split("\t")[1] for line in lines} >= set(entries)
    lines = run("add-prefix", "-n", path, "out.pth").out.splitlines()
    assert [line for line in lines if line.startswith("- ")] == [f"- {key}" for key in keys]


def test_keys_with_spaces_and_paths_keep_their_rows(folder: Path, show: Show) -> None:
    head, *rows = show("keys", "-q", "--all", folder / "callbacks.ckpt")
    assert max(map(columns, [head, *rows])) <= WIDTH
    assert all(row[head.index("DTYPE") :].startswith(("F32", "BF16")) for row in rows)


def test_a_deep_value_goes_on_below_its_name(folder: Path, show: Show) -> None:
    lines = show("show", folder / "callbacks.ckpt", "hyper_parameters")
    assert lines[:3] == ["{", "  'a_module_of_level_29': {", "    'a_module_of_level_28': {"]
    assert max(map(columns, lines)) <= WIDTH
    wanted = repr(torch.load(folder / "callbacks.ckpt")["hyper_parameters"])
    said, wanted = ("".join(text.split()) for text in ("".join(lines), wanted))
    assert ast.literal_eval(said) == ast.literal_eval(wanted)


# Folding.


def test_what_repeats_is_a_row(folder: Path, show: Show) -> None:
    _, *rows = show("keys", "-q", folder / "layers.pth")
    assert [row.split() for row in rows] == [
        "transformer.wte.weight F32 [5, 4] 80 B".split(),
        "transformer.h.{0-11}.attn.qkv.weight BF16 [12, 4] 96 B x 12".split(),
        "transformer.h.{0-11}.attn.qkv.bias BF16 [12] 24 B x 12".split(),
        "transformer.h.{0-11}.experts.{0-3}.w1 F32 [2, 4] 32 B x 48".split(),
    ]
    assert len(show("keys", "-q", "--no-fold", folder / "layers.pth")) == 74
    assert len(show("keys", "-q", "--stats", folder / "layers.pth")) == 74


def test_what_is_otherwise_in_one_layer_has_its_own_row(folder: Path, show: Show) -> None:
    rows = show("keys", "-q", folder / "more.pth", "--select", "*.w1")[1:]
    assert [row.split()[0] for row in rows] == [
        "transformer.h.{0-2,4-11}.experts.{0-3}.w1",
        "transformer.h.3.experts.{0-1,3}.w1",
        "transformer.h.3.experts.2.w1",
    ]
    assert [row.split("B")[1].strip() for row in rows] == ["x 44", "x 3", ""]


def test_a_plan_folds_renames_and_drops(folder: Path, show: Show) -> None:
    assert show("strip-prefix", "-nq", folder / "dp.pth.tar", "o.pth")[0].split("  ") == [
        "module.* -> *",
        "122 keys",
    ]
    lines = show("transfer", "-nq", folder / "layers.pth", "o.pth", "--drop", "*.bias")
    assert lines[0] == "- transformer.h.{0-11}.attn.qkv.bias  12 keys"
    path = folder / "layers.pth"
    rule = "transformer.h.{i}.attn.qkv=blocks.{i}.one"
    lines = show("convert", "-nq", path, "o.pth", "--rename", rule)
    assert lines[0] == "transformer.h.{0-11}.attn.qkv.* -> blocks.{0-11}.one.*  24 keys"
    rule = "transformer.wte=embedding"  # one key is no repetition
    assert show("convert", "-nq", path, "o.pth", "--rename", rule)[:2] == [
        "- transformer.wte.weight",
        "+ embedding.weight",
    ]


def test_a_difference_folds(folder: Path, show: Show) -> None:
    lines = show("diff", "-q", folder / "layers.pth", folder / "ten.pth")
    (row,) = [line for line in lines if "experts" in line]
    assert "transformer.h.{0-11}.experts.{0-3}.w1" in row
    assert row.endswith("x 48")


def test_lists_of_transfer_fold(folder: Path, show: Show) -> None:
    path = folder / "layers.pth"
    said = show("transfer", "-n", path, "o.pth", "--drop", "*.bias", width=200)
    assert "dropped 12: transformer.h.{0-11}.attn.qkv.bias [12] x 12" in said
    said = show("transfer", "-n", "--min-match", 0, path, "o.pth", "--like", folder / "more.pth")
    assert "    transformer.h.3.experts.2.w1  [2,4]  here, [3, 4] in" in "\n".join(said)


def emulated(text: str, width: int) -> list[str]:
    """Return what a terminal shows of plain text, carriage returns and line feeds."""
    lines, row, column = [""], 0, 0
    for character in text:
        if character == "\r":
            column = 0
        elif character == "\n":
            row += 1
        else:
            if column == width:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            line = lines[row].ljust(column)
            lines[row] = line[:column] + character + line[column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]


AS_IT_APPEARS = f"""
import os, signal, sys
from ckptool.files import copying
from tqdm import tqdm
copying.WORKERS = 1
display = tqdm.display
def interrupted(bar, *args, **kwargs):
    tqdm.display = display
    display(bar, *args, **kwargs)
    sys.stderr.write("^C")
    os.kill(os.getpid(), signal.SIGINT)
tqdm.display = interrupted
{SLOWISH}"""


@pytest.mark.skipif(sys.platform == "win32", reason="terminals are those of POSIX")
@pytest.mark.parametrize("program", [SLOWISH, AS_IT_APPEARS], ids=["by a key", "as it appears"])
def test_an_interrupted_bar_goes_away(
    program: str, tmp_path: Path, make_safetensors: Callable[..., Path]
) -> None:
    """The terminal writes ^C behind the bar, on a line of its own where the bar fills its own."""
    import fcntl
    import termios

    make_safetensors(tmp_path / "in.safetensors", {"module.weight": [16 << 20]})
    ours, theirs = terminal(columns=60)
    process = subprocess.Popen(
        [sys.executable, "-c", program, "strip-prefix", "in.safetensors", "out.safetensors"],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment(),
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    late = threading.Timer(60, process.kill)  # what hangs fails
    late.start()
    if program == SLOWISH:
        while b"%|" not in shown:
            shown += os.read(ours, 65536)
        os.write(ours, b"\x03")
    shown += everything(ours)
    assert process.wait(timeout=60) == 130
    late.cancel()
    lines = ["^C", "interrupted; nothing was written", ""]
    assert emulated(shown.decode(), 60) == lines


def terminal(columns: int) -> tuple[int, int]:
    """Open a terminal of so many columns: our side, and that of the program."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return ours, theirs


@pytest.mark.skipif(sys.platform == "win32", reason="terminals are those of POSIX")
def test_the_size_is_that_of_the_terminal(folder: Path) -> None:
    """No variable says it; the last word has the terminal itself."""
    ours, theirs = terminal(columns=60)
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptool", "keys", "dp.pth.tar"],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment(),
    )  # fmt: skip
    os.close(theirs)
    lines = everything(ours).decode().replace("\r\n", "\n").splitlines()
    assert process.wait(timeout=60) == 0
    assert max(columns(line) for line in lines if "ckptool " not in line) <= 60
    assert any(columns(line) > 55 for line in lines)
