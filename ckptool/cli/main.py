"""The command line: one door for all commands, and for all errors.

stdout is data, stderr is talk. A command is loaded when it is called for, so that `--help` and
`keys` start fast. Exit codes are part of the contract.
"""

from __future__ import annotations

import atexit
import importlib
import io
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

import click

from ckptool import __version__
from ckptool.cli._options import Helped, at_once
from ckptool.cli.talk import (
    complain,
    documents,
    put,
    refusal,
    say_interrupted,
    silence,
    speaks_json,
    spelled,
    without_secrets,
)
from ckptool.errors import CkptoolError, Interrupted, NoSuchCommand, Usage
from ckptool.text import quoted

GROUPS = {
    "Look": ("info", "keys", "show", "check", "diff", "plot"),
    "Models": ("download", "layers", "verify"),
    "Edit": ("strip-prefix", "add-prefix", "unwrap", "transfer", "convert", "average"),
    "Between models": ("match", "recipe"),
    "Manual": ("help",),
}
EXAMPLES = (
    "ckptool info model_best.pth.tar",
    "ckptool strip-prefix model_best.pth.tar clean.pth",
    "ckptool convert clean.pth clean.safetensors",
)
COMPLETION = "_CKPTOOL_COMPLETE"  # the variable of click's shell completion
NOTHING_WRITTEN = "nothing was written"
ROOM = 28 << 20  # of the address space: what is imported, two buffers, a thread
PIPE_CLOSED = 141
SIGNALLED = 128  # and the number of the signal


class _Commands(Helped, click.Group):
    """Commands by name, each in a module of `ckptool.cli`, loaded when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in GROUPS.values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"ckptool.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        if COMPLETION in os.environ:
            from ckptool.cli import completion

            completion.attach(command)
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
        self.format_options(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text("ckptool COMMAND --help says more, ckptool help COMMAND all of it.")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write none with the options: they are above, in groups."""

    def _short(self, ctx: click.Context, name: str) -> str:
        command = self.get_command(ctx, name)
        return command.get_short_help_str(limit=100) if command else ""


def _no_such_command(name: str, known: list[str]) -> NoSuchCommand:
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean `ckptool {close[0]}`?" if close else "ckptool --help lists them"
    return NoSuchCommand(f"there is no command `{name}`", hint=hint)


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.option(
    "--debug", is_flag=True, envvar="CKPTOOL_DEBUG", help="Show the traceback of an error."
)
@click.pass_context
def ckptool(ctx: click.Context, debug: bool) -> None:
    """ckptool: look into PyTorch checkpoints and edit them, without running what is in them."""
    if ctx.invoked_subcommand is None:
        put([ctx.get_help()])


ckptool.params.append(
    at_once(
        *("-V", "--version"),
        text="Show the version and exit.",
        of=lambda _: f"ckptool {__version__}",
    )
)


def main(args: list[str] | None = None) -> int:
    """Run a command line; give its exit code."""
    arguments = sys.argv[1:] if args is None else args
    debug = "--debug" in arguments or bool(os.environ.get("CKPTOOL_DEBUG"))
    arguments = [argument for argument in arguments if argument != "--debug"]
    _prepare_streams()
    _prepare_signals()
    _published().clear()
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    with documents("--json" in options):
        return _run(arguments, debug)


def entry() -> None:
    """Run the command line of this process.

    OpenBLAS, which comes with numpy, starts a thread for each core that waits busily at first: for
    nothing here, and beside ours. At the end, objects go with the process: to take each apart takes
    4 ms. Temporary files with names go before, and torch ends as it wants to.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    code = main()
    if "torch" not in sys.modules:
        with suppress(OSError, ValueError, KeyboardInterrupt):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def _prepare_streams() -> None:
    """Escape what a stream cannot encode; give a stream that was closed (`>&-`) somewhere to go."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (it lives as long as we do)
    if isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):  # PYTHONUNBUFFERED
        # An unbuffered text stream takes a short write for a whole one and loses the rest.
        raw = sys.stdout.fileno()
        sys.stdout = open(raw, "w", encoding=sys.stdout.encoding, closefd=False)  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _prepare_signals() -> None:
    """End in order, so that no temporary file stays, unless a signal is to be ignored (nohup)."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _terminated)


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(SIGNALLED + number)


def _run(arguments: list[str], debug: bool) -> int:
    try:
        _refuse_no_room()
        return _invoke(arguments)
    except CkptoolError as error:
        if not error.said_elsewhere:
            complain(_with_hint(error, arguments))
        _trace(error, debug)
        return error.exit_code
    except click.UsageError as error:
        # Others were started with the same arguments.
        others = "--distributed" in arguments and os.environ.get("LOCAL_RANK", "0") != "0"
        return error.exit_code if others else complain(_usage(error, arguments))
    except click.exceptions.Exit as error:
        return error.exit_code
    except KeyboardInterrupt as error:
        message = "; ".join(filter(None, ["interrupted", str(error) or _left(arguments)]))
        return say_interrupted(Interrupted(message, evidence=getattr(error, "__notes__", ())))
    except BrokenPipeError:
        silence()
        return PIPE_CLOSED
    except Exception as error:
        code = complain(refusal(error))
        _trace(error, debug)
        return code


def _refuse_no_room() -> None:
    """Raise `OSError` where the limit of the address space leaves no room for a small run.

    CPython may crash, or turn in circles, where it has no memory for its own small objects
    (`Cannot recover from MemoryErrors while normalizing exceptions`).
    """
    from mmap import mmap

    mmap(-1, ROOM).close()


def _invoke(arguments: list[str]) -> int:
    """Do what click's `main` does, save for its exit codes of Ctrl-C and a closed pipe."""
    completing = os.environ.get(COMPLETION)
    if completing:
        from click.shell_completion import shell_complete

        return shell_complete(ckptool, {}, "ckptool", COMPLETION, completing)
    with ckptool.make_context("ckptool", list(arguments)) as context:
        result: Any = ckptool.invoke(context)
    return result if isinstance(result, int) else 0


def _left(arguments: list[str]) -> str:
    """Return what a command that was interrupted left behind; nothing of one that never writes."""
    if published := _published():
        return f"{published[-1]} was written"
    reading = {*GROUPS["Look"], *GROUPS["Manual"], "layers", "verify"} - {"plot"}
    return "" if set(arguments[:1]) & reading else NOTHING_WRITTEN


def _published() -> list[str]:
    """Return what this process has published: an interruption may come while that is reported."""
    publish = sys.modules.get("ckptool.files.publish")
    return publish.PUBLISHED if publish else []


def _trace(error: BaseException, debug: bool) -> None:
    if debug and not speaks_json():  # stderr has one document
        sys.excepthook(type(error), error, error.__traceback__)


def _usage(error: click.UsageError, arguments: list[str]) -> Usage:
    named = [name for names in GROUPS.values() for name in names if name in arguments[:1]]
    first, *rest = error.format_message().rstrip(".").splitlines() or [""]
    message = f"{first[:1].lower()}{first[1:]}"
    return Usage(message, evidence=rest, hint=" ".join(["ckptool", *named, "--help"]))


def _with_hint(error: CkptoolError, arguments: list[str]) -> CkptoolError:
    """Write the command to paste, or name a file that is spelled like the missing one."""
    if error.option:
        error.hint = f"{_retried(arguments, error.option)}   {error.hint}".rstrip()
    return spelled(error)


# Options of one meaning under other names: what errors call it -> command -> its own.
_OWN_NAMES = {"--prefix": {"convert": "--strip-prefix", "diff": "--ignore-prefix"}}


def _retried(arguments: list[str], option: str) -> str:
    """Write the command that failed with an option, in the place of the same one if it had it."""
    name, _, value = option.partition(" ")
    name = _OWN_NAMES.get(name, {}).get(arguments[0], name)
    same = f"{value.partition('=')[0]}=" if "=" in value else ""  # --model-arg NAME=VALUE
    kept: list[str] = []
    words = iter([without_secrets(word) for word in arguments])
    for word in words:
        if word == "--":  # no option stands behind it
            words = iter([word, *words])
            break
        given = [next(words, "")] if value and word == name else []
        if given and not given[0].startswith(same):
            kept += [word, *given]
        elif not given and word.partition("=")[0] != name:
            kept.append(word)
    return " ".join(
        ["ckptool", *map(quoted, kept), f"{name} {value}".rstrip(), *map(quoted, words)]
    )
