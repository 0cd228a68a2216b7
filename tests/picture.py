"""Draw the picture of the README: what ckptool says of a ResNet-50, as a terminal shows it, in SVG.

`python tests/picture.py` writes `.github/terminal.svg` anew. The checkpoint is torchvision's model
as the ImageNet example of PyTorch saves it, DataParallel and optimizer included. A run of text is
placed by its column and stretched to its width, so that columns align in any font.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from test_docs import ROOT, on_terminal

PICTURE = ROOT / ".github" / "terminal.svg"
COLUMNS = 100
COMMANDS = (
    "ckptool info model_best.pth.tar",
    "ckptool transfer model_best.pth.tar resnet50.safetensors",
    "ckptool check resnet50.safetensors",
)
WIDTH, HEIGHT, MARGIN = 8.4, 19, 18  # of a character, of a line, around all, in pixels
BAR = 34  # the title bar
COLOURS = {"31": "#ff7b72", "32": "#7ee787", "33": "#e3b341", "36": "#76e3ea"}
STYLE = (
    "text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,'Liberation Mono',monospace;"
    "fill:#d5dbe2;white-space:pre}.bold{font-weight:700}.prompt{fill:#79c0ff}"
)
SGR = re.compile(r"\x1b\[([\d;]*)m")


def save_resnet50(path: Path) -> None:
    import torch
    from torchvision.models import resnet50

    model = torch.nn.DataParallel(resnet50())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"state_dict": model.state_dict(), "best_acc1": torch.tensor(76.13)}
    whole = {"epoch": 90, "arch": "resnet50", **state, "optimizer": optimizer.state_dict()}
    torch.save(whole, path)


def recorded() -> list[tuple[str, list[str]]]:
    """Run the commands on a terminal; return each with the lines that it shows."""
    os.environ.pop("NO_COLOR", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_resnet50(folder / "model_best.pth.tar")
        return [
            (command, on_terminal(command, folder, columns=COLUMNS, term="xterm-256color"))
            for command in COMMANDS
        ]


def drawn(sessions: Sequence[tuple[str, list[str]]]) -> str:
    """Return the SVG of commands and what they showed."""
    lines = [line for session in sessions for line in (*_session(*session), [])][:-1]
    width = round(COLUMNS * WIDTH + 2 * MARGIN)
    height = BAR + len(lines) * HEIGHT + 2 * MARGIN
    said = "; ".join(command for command, _ in sessions)
    rows = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(said)}</title><style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" rx="10" fill="#161b22" stroke="#57606a"/>',
        *(
            f'<circle cx="{20 + 20 * place}" cy="{BAR / 2}" r="6" fill="{fill}"/>'
            for place, fill in enumerate(("#ff5f56", "#ffbd2e", "#27c93f"))
        ),
    ]
    for number, runs in enumerate(lines):
        y = BAR + MARGIN + number * HEIGHT
        rows += [_text(column, y, text, style) for column, text, style in runs]
    return "\n".join([*rows, "</svg>", ""])


Run = tuple[int, str, str]  # a column, a text without spaces around it, its attributes


def _session(command: str, shown: Sequence[str]) -> Iterator[list[Run]]:
    yield [(0, "$", ' class="prompt"'), (2, command, ' class="bold"')]
    for line in shown:
        cells = list(_cells(line))
        for start in range(0, max(1, len(cells)), COLUMNS):  # as a terminal wraps
            yield list(_runs(cells[start : start + COLUMNS]))


def _cells(line: str) -> Iterator[tuple[str, str]]:
    """Yield the characters of a line, each with its attributes."""
    codes: list[str] = []
    for place, part in enumerate(SGR.split(line)):
        if place % 2:
            codes = [] if part in ("", "0") else [*codes, *part.split(";")]
        else:
            yield from ((character, _style(codes)) for character in part)


def _runs(cells: Sequence[tuple[str, str]]) -> Iterator[Run]:
    """Cut a row where two spaces stand, or where its attributes change."""
    text = "".join(character for character, _ in cells)
    for words in re.finditer(r"\S+(?: \S+)*", text):
        column = words.start()
        for style, same in groupby(cells[column : words.end()], key=itemgetter(1)):
            run = "".join(character for character, _ in same)
            yield column, run, style
            column += len(run)


def _style(codes: Sequence[str]) -> str:
    fills = [COLOURS[code] for code in codes if code in COLOURS]
    bold = ' class="bold"' if "1" in codes else ""
    return bold + (f' style="fill:{fills[-1]}"' if fills else "")


def _text(column: int, y: int, text: str, style: str) -> str:
    x, length = MARGIN + column * WIDTH, len(text) * WIDTH
    place = f'x="{x:.1f}" y="{y}" textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs"'
    return f"<text {place}{style}>{escape(text, quote=False)}</text>"


if __name__ == "__main__":
    PICTURE.write_text(drawn(recorded()), encoding="utf-8")
