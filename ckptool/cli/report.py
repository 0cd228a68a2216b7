"""Result values -> text or JSON; returns strings, prints and opens nothing.

Everything that comes from a file is escaped here: control, escape and bidirectional characters,
and what no encoding can hold. Our own words are ASCII.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ckptool import containers
from ckptool.cli import screen
from ckptool.pickles import safety
from ckptool.pickles.names import Level
from ckptool.pickles.tree import Node
from ckptool.state import walk
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.wrappers import peeling, worn
from ckptool.tensors.tensor import TENSORS
from ckptool.text import argument, counted, listed, percent, quoted, readable, shape, visible

if TYPE_CHECKING:  # they take time to load, and no command needs them all
    from ckptool.state.adapting import Adapted
    from ckptool.verbs.casting import Cast
    from ckptool.verbs.combining import Averaged
    from ckptool.verbs.fitting import Fit, Mismatch
    from ckptool.verbs.listing import Entry, Listing
    from ckptool.verbs.plotting import Plot
    from ckptool.verbs.surgery import Rewrite


def key_rows(entries: Sequence[Entry]) -> list[str]:
    """List tensors for programs: key, dtype, shape, bytes, with tabs between."""
    return [
        f"{visible(key)}\t{info.dtype.label}\t{shape(info.shape)}\t{info.nbytes}"
        for key, info in entries
    ]


def key_table(entries: Sequence[Entry], width: int, *, fold: bool = True) -> list[str]:
    """List tensors for people: those of a kind in each of several layers as one."""
    from ckptool.verbs.listing import rows

    head, *listed = rows(entries)
    return folded_table(head, listed, width) if fold else screen.listed(head, listed, width)


def folded_table(
    head: Sequence[str],
    rows: Sequence[tuple[str, ...]],
    width: int,
    key: int = 0,
    right: Sequence[int] = (),
    spare: Sequence[int] = (),
) -> list[str]:
    """Write a table for people, with a column for how often where rows were folded."""
    from ckptool.cli.folding import rows_folded

    rows = rows_folded(rows, key)
    if rows and len(rows[0]) > len(head):
        right, head = (*right, len(head)), (*head, "")
    return screen.listed(head, rows, width, right, spare, key)


def key_names(entries: Sequence[Entry]) -> list[str]:
    """List keys alone."""
    return [visible(key) for key, _ in entries]


def tree_table(entries: Sequence[Entry], depth: int | None, width: int | None) -> list[str]:
    """List modules with the count, size and share of what is under them."""
    totals: dict[str, list[int]] = {"": [0, 0]}
    for key, info in entries:
        steps = key.split(".")
        for level in range(min(len(steps), (depth or len(steps)) + 1)):
            here = totals.setdefault(".".join(steps[:level]), [0, 0])
            here[0] += 1
            here[1] += info.nbytes
    whole = totals[""][1] or 1
    lines = []
    for path in _preorder(totals):
        count, nbytes = totals[path]
        name = path.rpartition(".")[2] or "(all)"
        indent = "  " * (path.count(".") + 1) if path else ""
        size = readable(nbytes) if width else str(nbytes)
        label = indent + visible(name) if width else visible(path or ".")
        lines.append((label, str(count), size, f"{100 * nbytes / whole:.1f} %"))
    return screen.listed(("MODULE", "TENSORS", "SIZE", "SHARE"), lines, width, right=(1, 2, 3))


def _preorder(paths: Iterable[str]) -> list[str]:
    """Put each module before what is in it, in the order in which modules first appear."""
    places: dict[str, tuple[int, ...]] = {"": ()}
    for number, path in enumerate(paths):
        if path:
            places[path] = (*places[path.rpartition(".")[0]], number)
    return sorted(places, key=places.__getitem__)


def container_title(name: str) -> str:
    """Name a container for people."""
    return containers.by_name(name).title


def listing_lines(found: Listing, *, every: bool) -> list[str]:
    """Return what a listing shows, what is around it, and what would help."""
    lines = [_file_line(found)]
    lines += [f"it is only {visible(found.part.text)}"] if found.part else []
    state = found.state
    if state is None:
        if found.entries and not every:
            lines.insert(0, "no state_dict in it: these are all tensors, by their path")
    else:
        others = sum(1 for value in state.entries.values() if not isinstance(value, TENSORS))
        if others:
            are = "is not a tensor" if others == 1 else "are not tensors"
            lines.append(f"{counted(others, 'more entry')} of the state_dict {are}")
        lines += map(visible, (*state.missing, *state.notes))
        verb = "transfer" if state.module else "strip-prefix"
        hint = prefix_line(found.checkpoint.path, state.entries, verb, _taken(found))
        lines += [hint] if hint else []
    return [*lines, *map(visible, found.checkpoint.notes)]


def _file_line(found: Listing) -> str:
    parts = [visible(found.checkpoint.program) or container_title(found.checkpoint.container)]
    if found.checkpoint.shards:
        parts.append(counted(len(found.checkpoint.shards), "shard"))
    if found.state is not None and (found.state.at or found.state.module):
        parts.append(f"state_dict{_whereabouts(found.state.module, found.state.at)}")
    parts.append(counted(len(found.entries), "tensor"))
    parts.append(readable(found.nbytes))
    line = f"{visible(found.checkpoint.path)}: {', '.join(parts)}"
    return f"{line}; also contains: {listed(found.beside)}" if found.beside else line


def plot_lines(plot: Plot, target: str) -> list[str]:
    """Return what a picture shows."""
    size = f"{counted(plot.tensors, 'tensor')}, {readable(plot.nbytes)}"
    line = f"{visible(target)}: {plot.kind} of {counted(len(plot.layers), 'layer')}, {size}"
    return [line, *map(visible, plot.notes)]


def danger_lines(checkpoint: Checkpoint) -> list[str]:
    """Return what loading a file elsewhere would run; nothing where it would run nothing."""
    verdict = safety.judge_file(checkpoint)
    if verdict.level is not Level.DANGEROUS:
        return []
    first = f"{visible(checkpoint.path)} would run code when loaded; nothing was executed"
    lines = safety.evidence_of(verdict, checkpoint)
    return [first, *(f"    {visible(line)}" for line in lines)]


def _taken(found: Listing) -> str:
    """Write the options with which a command takes what was listed."""
    options = (
        "--tensors-only " if safety.judge_file(found.checkpoint).level is Level.DANGEROUS else ""
    )
    if found.state and found.at is not None:
        options += f"--at {quoted(found.at)} "
    return options


def prefix_line(
    path: str, entries: Mapping[str, Node], verb: str = "strip-prefix", options: str = ""
) -> str:
    """Describe the wrappers that all or some keys have, and what removes them; empty for none."""
    lines, found = worn(entries), peeling(entries)
    if found:
        auto = "" if verb == "transfer" or found.only_default else " --prefix auto"
        removable = worn(entries, removable=True)
        others = [line for line in lines if line not in removable]
        what = "; ".join(removable)
        command = f"ckptool {verb}{auto} {options}{argument(path)} OUT   removes it"
        lines = [f"{what}: {command}", *others]
    return visible("; ".join(lines))


def counts_line(result: Rewrite) -> str:
    """Count what a rewrite did, or would do."""
    return in_words(counts(result))


def counts(result: Rewrite) -> dict[str, int]:
    """Return the counts of a rewrite by their words."""
    found = {"read": result.read, "renamed": result.renamed, "dropped": len(result.dropped)}
    found |= {"added": result.added} if result.added else {}
    return found | {"would write" if result.dry_run else "written": result.written}


def in_words(counts: Mapping[str, int]) -> str:
    """Write counts in a line."""
    return ", ".join(f"{word} {count}" for word, count in counts.items())


def rewrite_lines(result: Rewrite, *, fold: bool = False) -> list[str]:
    """Return what a rewrite changed and left behind, for people."""
    lines = []
    if result.bare and (result.at or result.module):
        behind = f"; not written: {listed(result.not_carried)}" if result.not_carried else ""
        lines.append(f"took the state_dict{_whereabouts(result.module, result.at)}{behind}")
    elif result.not_carried:
        lines.append(f"not written: {listed(result.not_carried)}")
    lines += map(visible, result.said)
    lines += [cast_line(cast, result.source) for cast in result.casts]
    lines += _dropped_lines(result, fold=fold)
    return lines + [visible(note) for note in result.notes]


def cast_line(cast: Cast, source: str) -> str:
    """Say what a cast did, what it left as it was, and what it could not keep."""
    parts = [f"cast {counted(cast.tensors, 'tensor')} to {cast.to}"]
    if not cast.tensors:
        parts = [f"no tensor to cast to {cast.to}: that changes nothing"]
    kept = [f"{count} {visible(label)}" for label, count in cast.kept.items()]
    if cast.quantized or cast.scales:
        kept.append(f"{cast.quantized} quantized with {counted(cast.scales, 'scale')}")
    parts += [f"not cast: {', '.join(kept)}"] if kept else []
    if cast.total is not None:
        parts += filter(None, [cast.lost("became")])
    elif cast.tensors:
        command = f"ckptool check --as {cast.to.lower()} {argument(source)}"
        parts.append(f"`{visible(command)}` counts what overflows or becomes zero or subnormal")
    return "; ".join(parts)


def _whereabouts(module: str, at: Sequence[str] | None) -> str:
    """Describe what a state_dict is of, and where it is."""
    of = f" of the whole model `{visible(module.rpartition('.')[2])}`" if module else ""
    return of + (f" at `{visible(walk.dotted(tuple(at)))}`" if at else "")


def written_lines(result: Rewrite, counts: str = "") -> list[str]:
    """Return lines that describe what was written, with counts."""
    return [*([] if result.dry_run else [_output(result)]), counts or counts_line(result)]


def output_line(result: Rewrite) -> str:
    """Describe an output in a line, with what is not as it was."""
    found = counts(result)
    changed = {word: found.get(word, 0) for word in ("renamed", "dropped", "added")}
    shown = in_words({word: count for word, count in changed.items() if count})
    return f"{_output(result)}; {shown}" if shown else _output(result)


def _output(result: Rewrite) -> str:
    size = f"{counted(result.tensors, 'tensor')}, {readable(result.tensor_nbytes)}"
    if result.shards:
        size = f"{counted(len(result.shards), 'shard')}, {size}"
    where = "" if result.bare else _whereabouts("", result.at)
    return f"{visible(result.target)}: {size}{where}"


def average_lines(result: Averaged) -> list[str]:
    """Say what was averaged with which weights, and what is as the last file has it."""
    count, sources = len(result.keys), result.sources
    factors = [f"{weight:g}" for weight in result.weights]
    alike = len(set(factors)) == 1
    weights = f"each with weight {factors[0]}" if alike else f"with weights {', '.join(factors)}"
    lines = [f"averaged {counted(count, 'tensor')} of {counted(len(sources), 'file')}, {weights}"]
    for what, keys in result.last.items():
        lines.append(f"as in {visible(sources[-1])}: {len(keys)} {visible(what)}: {listed(keys)}")
    return lines


def average_counts(result: Averaged) -> str:
    """Count what an average did, or would do."""
    done = result.rewrite
    verb = "would write" if done.dry_run else "written"
    dropped = f"dropped {len(done.dropped)}, " if done.dropped else ""
    return (
        f"read {len(result.sources)} x {done.read}, averaged {len(result.keys)}, "
        f"last file's {result.from_last}, {dropped}{verb} {done.written}"
    )


TIED = "tied, stored once (--untie writes each)"


def _dropped_lines(result: Rewrite, *, fold: bool) -> list[str]:
    """Name what was dropped, by reason."""
    from ckptool.state.edits import SHAPE_DIFFERS

    by_reason: dict[str, list[tuple[str, str]]] = {}
    for dropped in result.dropped:
        reason, more = dropped.reason, ""
        if reason.startswith("tied to "):
            reason, more = TIED, f"= {reason.removeprefix('tied to ')}"
        elif dropped.shape is not None:
            more = shape(dropped.shape)
        by_reason.setdefault(reason, []).append((dropped.name, more))
    lines = []
    for reason, named in by_reason.items():
        if reason == SHAPE_DIFFERS:
            continue  # the lines of the fit show both shapes
        why = "" if reason == "dropped as asked" else f" ({visible(reason)})"
        what = f"{len(named)} {TIED}" if reason == TIED else f"dropped {len(named)}{why}"
        lines.append(f"{what}: {_named(named, fold=fold)}")
    return lines


def _named(names: Iterable[tuple[str, str]], *, fold: bool) -> str:
    """Write keys in a line, each with what is behind it; repetitions as one where they fold."""
    shown = [(visible(name), visible(more)) for name, more in names]
    if fold:
        from ckptool.cli.folding import names_folded

        return names_folded(shown)
    return listed(" ".join(filter(None, each)) for each in shown)


OWN = "from the model's own initialisation"


def fit_lines(
    fit: Fit,
    *,
    added: Sequence[str] = (),
    ruled: bool = False,
    model: bool = False,
    width: int | None = None,
) -> list[str]:
    """Return how a checkpoint fits the target: shapes that differ, and what stays unfilled.

    Entries that were `added` came from the model's own initialisation instead, or by rules. With
    a width, which a terminal has, repetitions fold.
    """
    lines = []
    if fit.adapted:
        adapted = [(each, [f"to {shape(each.there)}", each.how]) for each in fit.adapted]
        lines += ["adapted:", *_fit_table(adapted, width)]
    if fit.mismatched:
        where = f"in {visible(fit.target)}"
        differ = [(each, [f"here, {shape(each.there)} {where}"]) for each in fit.mismatched]
        lines += ["dropped, shape differs:", *_fit_table(differ, width)]
    unfilled = [*(each.key for each in fit.mismatched), *fit.missing]
    total = len(fit.matched) + len(unfilled)

    def named(keys: Iterable[str]) -> str:
        return _named(((key, "") for key in keys), fold=width is not None)

    rest = f"; {'initialised' if ruled else OWN}: {named(added)}" if added else ""
    if others := [key for key in unfilled if key not in added]:
        rest += f"; not filled: {named(others)}"
    share = f"{percent(fit.filled)} of the parameters"
    lines.append(f"fills {len(fit.matched)} of {total} tensors, {share}{rest}")
    if model and others and not added:
        lines.append(
            "load_state_dict(strict=False) leaves these as the model has them; "
            "--init-missing writes them too"
        )
    return lines


def _fit_table(
    found: Iterable[tuple[Adapted | Mismatch, Sequence[str]]], width: int | None
) -> list[str]:
    """Align keys with their shapes and what becomes of them, indented."""
    rows = [(visible(each.key), shape(each.here), *what) for each, what in found]
    if width is not None:
        from ckptool.cli.folding import rows_folded

        rows = rows_folded(rows)
    return [f"    {line}" for line in screen.table(rows, width and width - 4)]
