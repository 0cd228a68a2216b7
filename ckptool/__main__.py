"""`python -m ckptool`."""

from __future__ import annotations

from ckptool.cli.main import entry

if __name__ == "__main__":
    entry()
