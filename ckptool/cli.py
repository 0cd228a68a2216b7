"""The command line: one door for all commands, and for all errors.

stdout is data, stderr is talk. A command is loaded when it is called for, so that `--help` and
`keys` start fast. Exit codes are part of the contract.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from types import FrameType
from typing import Any

import click

from ckptool import __version__
from ckptool.errors import CkptoolError, EditError
from ckptool.talk import complain, say

GROUPS = {
    "Look": ("keys",),
    "Edit keys": ("strip-prefix", "add-prefix", "unwrap", "transfer", "convert"),
}
EXAMPLES = (
    "ckptool keys model_best.pth.tar",
    "ckptool strip-prefix model_best.pth.tar clean.pth",
    "ckptool convert clean.pth clean.safetensors",
)
BUG = 70
INTERRUPTED = 130
PIPE_CLOSED = 141
TERMINATED = 143


class _Commands(click.Group):
    """Commands by name, each in a module of `ckptool.commands`, loaded when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in GROUPS.values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"ckptool.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.list_commands(ctx):
            raise _no_such_command(name, self.list_commands(ctx))
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_text(self.help or "")
        formatter.write_paragraph()
        formatter.write_text("usage: ckptool COMMAND ...")
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self._short(ctx, name)) for name in names], col_max=20)
        with formatter.section("Examples"):
            for example in EXAMPLES:
                formatter.write_text(example)
        formatter.write_paragraph()
        formatter.write_text("ckptool COMMAND --help says more; exit codes are in the README.")

    def _short(self, ctx: click.Context, name: str) -> str:
        command = self.get_command(ctx, name)
        return command.get_short_help_str(limit=100) if command else ""


def _no_such_command(name: str, known: list[str]) -> EditError:
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean `ckptool {close[0]}`?" if close else "ckptool --help lists them"
    return NoSuchCommand(f"there is no command `{name}`", hint=hint)


class NoSuchCommand(EditError):
    """A command that ckptool does not have."""


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--debug", is_flag=True, hidden=True, envvar="CKPTOOL_DEBUG")
@click.version_option(__version__, "-V", "--version", message="ckptool %(version)s")
@click.pass_context
def ckptool(ctx: click.Context, debug: bool) -> None:
    """ckptool: look into PyTorch checkpoints and edit them, without running what is in them."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: list[str] | None = None) -> int:
    """Run a command line; give its exit code."""
    arguments = sys.argv[1:] if args is None else args
    debug = "--debug" in arguments or bool(os.environ.get("CKPTOOL_DEBUG"))
    arguments = [argument for argument in arguments if argument != "--debug"]
    # The tree of a checkpoint lives to the end: looking for garbage in it is time lost.
    gc.disable()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = _run(arguments, debug)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _pipe_closed()


def entry() -> None:
    """Run the command line of this process."""
    sys.exit(main())


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def _pipe_closed() -> int:
    """Let the interpreter flush to nowhere at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    return PIPE_CLOSED


def _run(arguments: list[str], debug: bool) -> int:
    try:
        result: Any = ckptool.main(arguments, prog_name="ckptool", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except CkptoolError as error:
        if debug:
            raise
        complain(error)
        return error.exit_code
    except click.UsageError as error:
        say([_usage(error)])
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        say(["interrupted; nothing was written"])
        return INTERRUPTED
    except (BrokenPipeError, SystemExit):
        raise
    except Exception as error:
        if debug:
            raise
        say(
            [
                f"error[bug]: {type(error).__name__}: {error}",
                "hint: this is a defect in ckptool; CKPTOOL_DEBUG=1 shows where",
            ]
        )
        return BUG


def _usage(error: click.UsageError) -> str:
    command = error.ctx.command_path if error.ctx else "ckptool"
    message = error.format_message().rstrip(".")
    return f"error[usage]: {message[:1].lower()}{message[1:]}\nhint: {command} --help"
