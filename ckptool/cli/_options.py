"""The options that all commands which write share, and what they do with a result.

Modules of commands import the engine inside their functions: `--help` loads all of them, and
needs none of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from inspect import cleandoc
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from ckptool.cli import talk
from ckptool.cli._input import INPUT as INPUT, STANDARD, standard_output
from ckptool.cli._request import Request as Request, Told as Told, tell as tell
from ckptool.errors import EditError, NothingMatched, reason
from ckptool.state.edit_options import EDITS, RECIPE_FLAGS
from ckptool.text import parse_size, visible

if TYPE_CHECKING:
    from ckptool.state.edits import Edit

PREFIX = "module."  # the default of edits.strip_prefix, which --help does not load
Function = Callable[..., Any]
Decorator = Callable[[Function], Function]


class Helped(click.Command):
    """A command whose `--help` is not translated: to look for that takes a ms of every start."""

    _help: click.Option | None = None

    def get_help_option(self, ctx: click.Context) -> click.Option:
        """Return the option, the same each time."""
        if self._help is None:
            names = self.get_help_option_names(ctx)
            self._help = at_once(
                *names, text="Show this message and exit.", of=click.Context.get_help
            )
        return self._help


def at_once(*names: str, text: str, of: Callable[[click.Context], str]) -> click.Option:
    """Return an option that prints what it makes of the context, and ends the command."""

    def show(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(of(ctx), color=ctx.color)
            ctx.exit()

    return click.Option(
        names, is_flag=True, is_eager=True, expose_value=False, help=text, callback=show
    )


class Command(Helped):
    """A command with examples in its help: the second paragraph of its docstring.

    All commands that read have the options for how long, and how much memory, they may take.
    """

    def __init__(self, *args: Any, reads: bool = True, **given: Any) -> None:
        super().__init__(*args, **given)
        timeout = click.Option(
            ["--timeout"],
            type=click.IntRange(1, 86_400),
            metavar="SECONDS",
            default=60,
            help="Give up on a server that sends less than 1 KiB/s for this long.",
        )
        what = "Memory that reading metadata may take.  [default: by its size, at most 256MiB]"
        memory = click.Option(["--max-memory"], metavar="SIZE", help=what)
        self.params += [timeout, memory] if reads else []

    def invoke(self, ctx: click.Context) -> Any:
        """Do it under one budget; talk, and ask each server once, as the command line says."""
        if "timeout" not in ctx.params:
            return super().invoke(ctx)
        from ckptool.files import budget, sites

        given = ctx.params
        del given["as_json"]  # as `talk` knows
        talk.hush(given.pop("quiet"))
        seconds, size = given.pop("timeout"), given.pop("max_memory")
        most = None if size is None else parse_size(size, "--max-memory 2GiB")
        manner = sites.Manner(seconds, lambda line: talk.say([visible(line)]), talk.Progress, {})
        with budget.run(most, anew=True), sites.asking(manner):
            return super().invoke(ctx)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write usage, what the command does, examples, options."""
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        with formatter.section("Examples"):
            for line in self._paragraphs()[1].removeprefix("\b\n").splitlines():
                formatter.write(f"{' ' * formatter.current_indent}{line}\n")
        self.format_options(ctx, formatter)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help without the examples, which follow."""
        first, _, *rest = self._paragraphs()
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text("\n\n".join([first, *rest]))

    def _paragraphs(self) -> list[str]:
        return cleandoc(self.help or "").split("\n\n")


class InOrder(Command):
    """A command that knows in which order its options stood."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note the words, and what each option that may be repeated was given, in order."""
        ctx.meta["ckptool.given"] = list(args)
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        given = {name: iter(value) for name, value in values.items() if isinstance(value, list)}
        names = [each.name for each in order if each.name in given]
        ctx.meta["ckptool.ordered"] = [(name, next(given[name])) for name in names]
        return super().parse_args(ctx, args)


class _Containers(click.Choice):  # type: ignore[type-arg]  # click 8.1 has no Choice[str]
    """What `--to` takes: the words of ckptool's containers, then those of plugins."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the word; a plugin is loaded only for one that ckptool does not know."""
        if value not in self.choices:
            from ckptool.containers import plugins

            if any(each.writer and each.word == value for each in plugins()):
                return str(value)
        return str(super().convert(value, param, ctx))


def _together(*options: Decorator) -> Decorator:
    """Make one decorator of those of several options."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


# Of what a command prints, which `talk` knows.
answers = _together(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
    click.option("-q", "--quiet", is_flag=True, help="Only data, errors and warnings."),
)
# Of how prefixes are removed.
strips = _together(
    click.option("--anywhere", is_flag=True, help="Also inside keys, as whole components."),
    click.option("--keep-bookkeeping", is_flag=True, help="Keep a wrapper's own entries."),
)
no_sync = click.option(
    "--no-sync", is_flag=True, help="Do not fsync: faster, but a power loss can lose the file."
)
_IN_PLACE = click.option("--in-place", is_flag=True, help="Replace IN; takes no OUT.")
_WRITES = (
    click.option("--at", metavar="NAME", help="Where the state_dict sits (dotted; . is the top)."),
    click.option(
        "--to",
        type=_Containers(["torch", "safetensors", "dcp"]),
        help="Output format, whatever the suffix; dcp (a folder): convert, average.",
    ),
    click.option(
        "--drop-beside",
        multiple=True,
        metavar="NAME",
        help="Leave out other entries of the file: optimizer, '*scheduler*'.",
    ),
    click.option("--keep-records", is_flag=True, help="Keep extra records of a torch zip."),
    click.option("--force", is_flag=True, help="Replace an existing OUT (otherwise an error)."),
    _IN_PLACE,
    click.option("-n", "--dry-run", is_flag=True, help="Print the plan, write nothing."),
    answers,
    click.option(
        "--tensors-only",
        is_flag=True,
        help="Write tensors and plain values (numbers, strings, lists, dicts) only.",
    ),
    click.option("--untie", is_flag=True, help="Write tied tensors as copies."),
    click.option(
        "--allow-expand",
        is_flag=True,
        help="Allow an output over 4 times the size of the input (views made full).",
    ),
    click.option(
        "--map-location", metavar="DEVICE", help="Tag every storage with a device: cpu, cuda:0."
    ),
    no_sync,
)


def refuse_idle(needs: Mapping[str, str]) -> None:
    """Raise a usage error for an option that was given and does nothing.

    `needs` maps names of parameters to those of which one must be given too, or, after `not `,
    must not.
    """
    context = click.get_current_context()
    options = {each.name: each.opts[0] for each in context.command.params}

    def given(name: str) -> bool:
        return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE

    for name, others in needs.items():
        if not given(name):
            continue
        unwanted = others.startswith("not ")
        names = others.removeprefix("not ").split()
        if any(map(given, names)) == unwanted:
            verb = "has no effect with" if unwanted else "has no effect without"
            what = " or ".join(options[each] for each in names)
            raise click.UsageError(f"{options[name]} {verb} {what}")


def writes(function: Function) -> Function:
    """Add IN, OUT and the shared options to a command, which gets them as one `Request`."""

    @wraps(function)
    def gathered(paths: tuple[str, ...], **given: Any) -> Any:
        sources, target = (paths[:-1], paths[-1]) if len(paths) > 1 else (paths, None)
        is_set = bool(given.get("max_shard_size")) or given["to"] == "dcp"
        whole = target is None or given["in_place"]
        folder = not whole and _is_folder(len(sources) > 1, str(target), is_set)
        if folder and given.get("distributed"):
            raise click.UsageError("--distributed writes one output: name it")
        request = replace(_request(sources, target, given), folder=folder, is_set=is_set)
        return function(request, **given)

    argument = click.argument("paths", metavar="IN... OUT", nargs=-1, required=True)
    return _together(argument, *_WRITES)(gathered)


def _is_folder(several: bool, target: str, is_set: bool) -> bool:
    """Check whether outputs go into OUT by the names of inputs; else OUT is the output."""
    if target.endswith(("/", os.sep)):
        return several or not is_set
    if several and target == STANDARD:
        raise click.UsageError("several inputs need a folder as the output: - is a pipe for one")
    if several:
        what = f"several inputs need a folder as the output, which ends in a slash: {target}/"
        raise click.UsageError(what)
    return False


def combines(function: Function) -> Function:
    """Add IN IN... OUT and the shared options to a command of several inputs."""

    @wraps(function)
    def gathered(paths: tuple[str, ...], **given: Any) -> Any:
        if len(paths) < 2 and not given["in_place"]:
            raise click.UsageError("name an output OUT last")
        return function(_request(paths[:-1] or paths, paths[-1], given), **given)

    argument = click.argument("paths", metavar="IN IN... OUT", nargs=-1, required=True)
    in_place = click.option("--in-place", is_flag=True, hidden=True)  # refused: it has several
    others = [each for each in _WRITES if each is not _IN_PLACE]
    return _together(argument, *others, in_place)(gathered)


def edits(*options: str) -> Decorator:
    """Give a command options for edits; for all that there are where none is named."""
    specs = {spec.option: spec for spec in EDITS}
    made = [
        click.option(spec.option, multiple=True, metavar=spec.metavar, help=spec.help)
        for spec in (specs[option] for option in options or specs)
    ]
    return _together(*made)


def edits_in_order(given: dict[str, Any]) -> list[Edit]:
    """Make the edits of a command line, an `InOrder`, and take them out of what was given.

    Several in a row, such as --keep, make one edit, whatever other options stand between.
    """
    specs = {spec.name: spec for spec in EDITS}
    ordered = click.get_current_context().meta["ckptool.ordered"]
    asked = [pair for pair in ordered if pair[0] in specs]
    steps = []
    for name, group in groupby(asked, lambda pair: pair[0]):
        spec, texts = specs[name], [text for _, text in group]
        flags = {flag: given[flag] for flag in spec.flags}
        for each in [texts] if spec.together else [[text] for text in texts]:
            steps.append(spec.parse(patterns(each) if spec.selects else each, **flags))
    for name in (*specs, *RECIPE_FLAGS):
        given.pop(name, None)
    return steps


def _request(sources: Sequence[str], target: str | None, given: dict[str, Any]) -> Request:
    """Take what all commands share out of what was given."""
    from ckptool.verbs.options import WriteOptions

    context = click.get_current_context()
    read = [INPUT.convert(each, None, context) for each in sources]
    given["sync"] = not given.pop("no_sync")
    given["drop_beside"] = patterns(given["drop_beside"])
    options = {name: given.pop(name) for name in WriteOptions.__annotations__ if name in given}
    if target is None and not options["in_place"]:
        raise click.UsageError("name an output OUT, or use --in-place")
    if target == STANDARD and not options["in_place"]:
        target = standard_output(is_data=not options["dry_run"])
    return Request(read, target, options)


def run(
    request: Request, verb: Callable[..., Any], told: Callable[[Any], Told] = Told, **arguments: Any
) -> int:
    """Call a verb of the library and say what was done; for several inputs, one after the other."""

    def call(source: str, target: str | None, **more: Any) -> Told:
        with talk.Progress(target or source, quiet=request.silent) as progress:
            options = {**request.options, **arguments, **more}
            return told(verb(source, target, progress=progress.begin, **options))

    if request.folder:
        from ckptool.cli import _batch

        return _batch.run(request, call)
    done = call(request.sources[0], request.target)
    if not request.silent:
        tell(request, done)
    return 0


def patterns(given: Sequence[str]) -> list[str]:
    """Read patterns; `@file` stands for one pattern a line."""
    found: list[str] = []
    for text in given:
        if not text.startswith("@"):
            found.append(text)
            continue
        try:
            with open(text[1:], encoding="utf-8") as lines:
                read = [line.strip() for line in lines]
        except (OSError, UnicodeDecodeError) as error:
            why = reason(error) if isinstance(error, OSError) else "it is not UTF-8 text"
            raise EditError(f"the pattern file {text[1:]} cannot be read: {why}") from None
        named = [line for line in read if line and not line.startswith("#")]
        if not named:
            raise NothingMatched(f"the pattern file {text[1:]} holds no pattern")
        found += named
    return found
