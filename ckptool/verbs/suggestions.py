"""What would help with a checkpoint: functions of its facts, each giving commands that work.

A function gives `Advice`: a reason, a verb with its options, and what the output is called. At the
end the same commands are joined, and each output gets a name beside the input that is still free.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from ckptool import containers
from ckptool.files import paths
from ckptool.files.fileio import MARK
from ckptool.pickles import pruning, safety
from ckptool.pickles.names import Level
from ckptool.pickles.subclasses import as_pickled, class_of
from ckptool.records import dataclass, grouped
from ckptool.state import checkpoint as places, edits, walk
from ckptool.state.wrappers import peeling, without, worn
from ckptool.tensors.tensor import CompositeTensor
from ckptool.text import HIDDEN, argument, counted, listed, percent, quoted, readable
from ckptool.verbs.survey import Beside, Place, Suggestion, Survey

WORTH = 0.1  # share of the file from which what is beside the weights is worth leaving out
LOST = 0.01  # share of the file from which bytes that nothing uses are
LOST_NBYTES = 1 << 20
WORDS = 1 << 10  # below this no share is worth words
MAX_EXPANSION = 4  # of a conversion, as surgery allows it
SMALL = 1 << 20


@dataclass(frozen=True, slots=True)
class Advice:
    """A command in the making: the output is the input's name, `tag` and `suffix`.

    Without a suffix of its own it gets that of the input's container.
    """

    reason: str
    verb: str
    options: tuple[str, ...] = ()
    tag: str = ""
    suffix: str = ""


def suggestions(facts: Survey) -> list[Suggestion]:
    """List what would help, the most useful first; each command works when pasted."""
    path = facts.checkpoint.path
    if paths.is_url(path) and path.endswith(HIDDEN):
        return []  # a command without what lets us in does not work
    advised = (each for rule in ((_part,) if facts.part else _RULES) for each in rule(facts))
    joined = grouped(((each.verb, each.options, each.suffix), each) for each in advised)
    taken: set[str] = set()
    return [
        Suggestion("; ".join(each.reason for each in same), _command(facts, same[0], taken))
        for same in joined.values()
    ]


def _command(facts: Survey, advice: Advice, taken: set[str]) -> str:
    words = ["ckptool", advice.verb, *map(quoted, advice.options)]
    path = facts.checkpoint.path
    if advice.verb == "keys":
        return " ".join([*words, argument(path)])
    if facts.verdict.level is Level.DANGEROUS and advice.suffix != ".safetensors":
        words += [] if "--tensors-only" in advice.options else ["--tensors-only"]
    writer = containers.by_name(facts.checkpoint.container).writer
    suffix = advice.suffix or (writer.default_suffix if writer else ".pth")
    target = _free(_named_after(facts), advice.tag, suffix, taken)
    taken.add(target)
    return " ".join([*words, argument(path), argument(target)])


def _named_after(facts: Survey) -> str:
    """Return the path that an output is named after.

    For files of a set it is that of their folder; a member of an archive is named beside that.
    """
    path = facts.checkpoint.path
    if paths.is_url(path):
        return paths.name_of(path)
    archive = containers.member_of(path)
    if archive:
        return os.path.join(os.path.dirname(archive), os.path.basename(path.rpartition(MARK)[2]))
    if not os.path.isdir(path):
        if len(facts.checkpoint.files) < 2:
            return path
        path = os.path.dirname(path)
    name = os.path.basename(os.path.abspath(path)).lstrip(".") or "checkpoint"
    parent = os.path.normpath(os.path.join(path, os.pardir))
    return os.path.join("" if parent == os.curdir else parent, name)


def _free(path: str, tag: str, suffix: str, taken: set[str]) -> str:
    """Name an output that does not exist yet: beside the input, or here where that is closed."""
    folder, name = os.path.split(path.rstrip(os.sep) or path)
    stem = name
    known = (*containers.suffixes(), ".model")
    while os.path.splitext(stem)[1].lower() in known and os.path.splitext(stem)[0]:
        stem = os.path.splitext(stem)[0]
    if not os.access(folder or ".", os.W_OK):
        folder = ""
    stem += f".{tag}" if tag else ""
    for number in range(1, 1000):
        again = f"-{number}" if number > 1 else ""
        target = os.path.join(folder, f"{stem}{again}{suffix}")
        if target not in taken and not os.path.lexists(target):
            break
    return target


Advised = Iterator[Advice]


def _at(facts: Survey, place: Place) -> tuple[str, ...]:
    """Return the option that chooses a place, where that is needed."""
    if len(facts.places) == 1 and facts.alone:
        return ()
    return ("--at", walk.dotted(place.at) or ".")


def _without(place: Place) -> str:
    """Name what `auto` would remove of the keys of a place, an empty text for nothing."""
    found = place.peeling
    names = [f"`{name}`" for name in (found.prefix, *found.inside, *sorted(found.bookkeeping))]
    return f"without {listed(names[not found.prefix :])}" if found else ""


def _several(facts: Survey) -> Advised:
    """Offer each of several state_dicts, alone and without wrapper prefixes."""
    if len(facts.places) < 2:
        return
    largest = max(place.total.nbytes for place in facts.places)
    likely = [
        place
        for place in facts.places
        if place.total.count > 1 or 2 * place.total.nbytes >= largest
    ]
    for place in likely[:4]:
        name = walk.dotted(place.at) or "."
        peeled = f", {_without(place)}" if place.peeling else ""
        verb = "transfer" if place.peeling or not place.at else "unwrap"
        reason = f"only `{name}`: {counted(place.total.count, 'tensor')}{peeled}"
        yield Advice(reason, verb, _at(facts, place), _word(name))


def _further(facts: Survey) -> Advised:
    """Offer what else is a dict of tensors (a discriminator ...) and is no optimizer's."""
    if facts.place is None or not facts.place.at:
        return
    for each in facts.beside[:40]:
        if (
            each.weights
            and each.tensors
            and not places.is_no_state_dict(each.name)
            and "." not in each.name
        ):
            reason = f"only `{each.name}`: {counted(each.tensors, 'tensor')}"
            yield Advice(reason, "unwrap", ("--at", each.name), _word(each.name))


def _word(name: str) -> str:
    """Make a part of a file name of the name of a place."""
    return "".join(c if c.isalnum() and c.isascii() else "_" for c in name)[:40] or "top"


def _prefixes(facts: Survey) -> Advised:
    place = facts.place
    if place is None or place.module or facts.state is None:
        return
    if not place.peeling:
        yield from _prefix_inside(facts, place)
        return
    auto = () if place.peeling.only_default else ("--prefix", "auto")
    reason = "; ".join(worn(facts.state.entries, removable=True))
    yield Advice(reason, "strip-prefix", (*auto, *_at(facts, place)), "stripped")


def _prefix_inside(facts: Survey, place: Place) -> Advised:
    """Offer to take `module` out of the inside of keys, where that makes no two the same."""
    wanted = edits.DEFAULT_PREFIX
    inside = [line for line in place.worn if f".{wanted}`" in line]
    if not inside:
        return
    bare = {without(key, [wanted], 0) for key in place.keys}
    if len(bare) == len(place.keys):
        yield Advice(inside[0], "strip-prefix", ("--anywhere", *_at(facts, place)), "stripped")


def _weights(facts: Survey) -> Advised:
    """Offer the state_dict alone, with the share of what would be left behind."""
    place = facts.place
    program = facts.checkpoint.program
    if place is None or not (place.at or place.module or program):
        return
    heavy = _heavy(facts)
    if program:
        reason = "only the state_dict, as a torch file"
    elif place.module:
        name = place.module.rpartition(".")[2]
        some = "a part of " if facts.state and facts.state.missing else ""
        reason = f"{some}the state_dict of the model, which loads without the code of `{name}`"
    elif heavy:
        share = percent(sum(each.nbytes for each in heavy) / facts.checkpoint.nbytes)
        takes = "takes" if len(heavy) == 1 else "take"
        reason = f"{listed(each.name for each in heavy)} {takes} {share} of the file"
    else:
        reason = "only the weights"
    if heavy or not place.peeling:
        yield Advice(reason, "unwrap", _at(facts, place), "weights")
    if place.peeling and not facts.framework_prefix:
        reason = f"only the weights, {_without(place)}"
        yield Advice(reason, "transfer", _at(facts, place), "clean")


def _heavy(facts: Survey) -> list[Beside]:
    """List what together takes a good part of the file, the largest first."""
    ordered = sorted(facts.beside, key=lambda each: -each.nbytes)
    whole = facts.checkpoint.nbytes
    heavy = [each for each in ordered if each.nbytes >= 0.05 * whole]
    return heavy if sum(each.nbytes for each in heavy) >= WORTH * whole else []


def _inner(facts: Survey) -> Advised:
    """Offer the weights named as the module inside a framework's own names them."""
    place, prefix = facts.place, facts.framework_prefix
    if place is None or not prefix or facts.framework is None:
        return
    before = place.peeling.prefix
    inside = [key for key in place.keys if key.startswith(before + prefix)]
    options = ["--unwrap"] if place.at or place.module else []
    if len(inside) < len(place.keys):
        options += ["--keep", before + prefix.rstrip(".")]
    if before:
        options += ["--strip-prefix", "auto"]
    options += ["--strip-prefix", prefix]
    if peeling([key.removeprefix(before + prefix) for key in inside]).prefixes:
        options += ["--strip-prefix", "auto"]
    reason = f"what is under `{before + prefix}`, for the module itself"
    yield Advice(reason, "convert", (*options, *_at(facts, place)), "inner")


def _safety(facts: Survey) -> Advised:
    if facts.verdict.level is Level.DANGEROUS:
        if _fits_safetensors(facts):
            yield Advice("tensors in a container that cannot name code", *_SAFETENSORS)
        elif facts.total.count and _stays_without_objects(facts):
            reason = "the tensors and plain values, without what would run"
            yield Advice(reason, "convert", ("--tensors-only",), "tensors")
    elif facts.verdict.level is Level.FOREIGN and _holds_dicts(facts):
        remade = containers.by_name(facts.checkpoint.container).traits.remade
        if remade and safety.judge_tree(facts.checkpoint.tree).level is Level.PLAIN:
            return  # what is written names none of it
        if not _stays_without_objects(facts):
            return  # what holds weights is never to be left out
        names = listed((str(name) for name in facts.verdict.foreign), 2)
        reason = f"what torch.load(weights_only=True) accepts, without {names}"
        yield Advice(reason, "convert", ("--tensors-only",), "tensors")


def _stays_without_objects(facts: Survey) -> bool:
    """Check that --tensors-only leaves weights, and leaves out no tensor of the state_dict."""
    entries = facts.state.entries.values() if facts.state else ()
    if any(isinstance(each, CompositeTensor) and class_of(each) for each in entries):
        return False
    if any(place.module for place in facts.places):
        return True
    kept, _, _ = pruning.only_plain(facts.checkpoint.tree)
    return any(walk.tensors(kept)) or any(as_pickled(each) is not each for each in entries)


def _whole_model(facts: Survey) -> bool:
    """Return whether the file needs the code of a model to load, as a copy of it would."""
    return not facts.checkpoint.program and any(place.module for place in facts.places)


def _holds_dicts(facts: Survey) -> bool:
    """Return whether the file holds a state_dict itself, not only modules that would give one."""
    return not facts.checkpoint.program and any(not place.module for place in facts.places)


_SAFETENSORS = ("convert", (), "", ".safetensors")


def _fits_safetensors(facts: Survey) -> bool:
    place = facts.place
    limit = max(MAX_EXPANSION * facts.checkpoint.nbytes, SMALL)
    return (
        place is not None
        and facts.alone
        and not place.unfit
        and facts.total.nbytes <= limit
        and containers.by_name(facts.checkpoint.container).traits.strides
    )


def _lost(facts: Survey) -> Advised:
    """Offer to leave out bytes that nothing uses; a torch file carries storages whole."""
    if _much(facts, facts.unused) and _fits_safetensors(facts):
        reason = f"{readable(facts.unused)} of storage that no tensor uses"
        yield Advice(reason, *_SAFETENSORS)
    unread = facts.checkpoint.unread_nbytes
    single = len(facts.checkpoint.files) == 1 and not facts.checkpoint.program
    harmless = facts.verdict.level is not Level.DANGEROUS
    if _much(facts, unread) and single and harmless and not _whole_model(facts):
        names = listed(facts.checkpoint.unread, 3)
        reason = f"{readable(unread)} that nothing refers to ({names})"
        yield Advice(reason, "convert", (), "new")


def _much(facts: Survey, nbytes: int) -> bool:
    share = nbytes / facts.checkpoint.nbytes
    return nbytes >= LOST_NBYTES or (nbytes >= WORDS and share >= LOST)


def _portable(facts: Survey) -> Advised:
    """Offer what loads on other machines: little-endian, and without device tags."""
    fits = _fits_safetensors(facts)
    devices = [device for device in facts.devices if device != "cpu"]
    if fits and facts.checkpoint.byteorder != "little":
        yield Advice("its numbers are big-endian", *_SAFETENSORS)
    elif devices and (fits or facts.verdict.level is not Level.DANGEROUS):
        reason = f"tagged {listed(devices, 3)}: torch.load needs map_location on other machines"
        yield Advice(reason, "convert", ("--map-location", "cpu"), "cpu")


def _newer(facts: Survey) -> Advised:
    """Offer a torch zip of today for what older torch or another tool wrote."""
    if facts.verdict.level is Level.DANGEROUS or _whole_model(facts):
        return
    container = containers.by_name(facts.checkpoint.container)
    if container.library != "torch":
        if not container.library and not facts.checkpoint.program:
            one = "one file" if container.traits.beside_files else "a torch zip"
            yield Advice(f"{one}, which torch.load reads", "convert", (), "one")
        return
    reasons = []
    if not container.traits.memory_mapped:
        reasons.append("the legacy container cannot be memory-mapped")
    elif facts.deflated:
        reasons.append("deflated records cannot be memory-mapped")
    if facts.checkpoint.protocol not in (None, 2):
        said = facts.checkpoint.protocol or "0 or 1"
        reasons.append(f"torch.load(weights_only=True) reads protocol 2, this is {said}")
    for reason in reasons:
        yield Advice(reason, "convert", (), "new")


def _ranks(facts: Survey) -> Advised:
    """Offer what all ranks wrote together, where a file is one of theirs."""
    if len(facts.checkpoint.files) == 1 and containers.is_joined(facts.checkpoint.path):
        yield Advice("the weights of all ranks, joined", "convert", (), "joined", ".pth")


def _part(facts: Survey) -> Advised:
    yield from _ranks(facts)
    if facts.total.count:
        yield Advice("what is in this part: all tensors, by their path", "keys", ("--all",))


def _nothing(facts: Survey) -> Advised:
    if not facts.places and facts.total.count:
        yield Advice("no state_dict in it: all tensors, by their path", "keys", ("--all",))


# The order in which what helps is shown.
_RULES: tuple[Callable[[Survey], Advised], ...] = (
    _ranks,
    _several,
    _prefixes,
    _inner,
    _weights,
    _further,
    _safety,
    _lost,
    _portable,
    _newer,
    _nothing,
)
