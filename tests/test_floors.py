"""The house: who may import whom, what must not leak, and what is not loaded without need."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
from conftest import environment

import ckptool
from ckptool import containers

PACKAGE = Path(ckptool.__file__).parent
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}

# The rooms, from the ground up: a room imports from rooms below it.
ROOMS = ("documents", "tensors", "files", "pickles", "state", "containers", "model", "verbs", "cli")
GROUND = ("errors.py", "text.py", "records.py", "__init__.py")  # whom everybody may import
TOP = ("__main__.py", "testing.py")  # who may import everybody
ROOT = {*GROUND, *TOP, "py.typed", *ROOMS, "manual"}


def room_of(name: str) -> int:
    """Return the number of the room that a file is in; the ground is below all of them."""
    if name in GROUND:
        return -1
    return len(ROOMS) if name in TOP else ROOMS.index(name.partition("/")[0])


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Yield every module that a source imports, at its top or anywhere inside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield (inner if file_of(inner) else module), node


def file_of(module: str) -> str | None:
    """Give the file of a module of ckptool, None for others."""
    inside = module.removeprefix("ckptool").removeprefix(".").replace(".", "/")
    if module.partition(".")[0] != "ckptool":
        return None
    names = [f"{inside}.py", f"{inside}/__init__.py".lstrip("/")]
    return next((name for name in names if name in FILES), None)


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


@cache
def packages(name: str) -> set[str]:
    """Return the top names of what a file imports."""
    return {module.partition(".")[0] for module, _ in imports(parsed(name))}


@cache
def own_imports(name: str) -> set[str]:
    tree = parsed(name)
    if name == "__init__.py":  # the face names all rooms to checkers, and imports none
        tree = ast.Module([node for node in tree.body if not isinstance(node, ast.If)], [])
    found = {file_of(module) for module, _ in imports(tree)}
    return {each for each in found if each}


@pytest.mark.parametrize("name", FILES)
def test_files_import_from_rooms_below(name: str) -> None:
    for other in own_imports(name):
        assert room_of(other) <= room_of(name), f"{name} imports {other}"


def test_dataclasses_are_those_that_start_fast() -> None:
    for name in FILES.keys() - {"records.py"}:
        source = FILES[name].read_text(encoding="utf-8")
        assert not re.search(r"from dataclasses import .*\bdataclass\b", source), name


def test_the_root_holds_the_rooms_and_the_ground() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"} == ROOT


def test_no_file_imports_itself_by_a_detour() -> None:
    below = {name: own_imports(name) - {name} for name in FILES}
    while below:
        ready = {name for name, others in below.items() if not others & below.keys()}
        assert ready, f"a circle: {sorted(below)}"
        below = {name: others for name, others in below.items() if name not in ready}


# What must not leak: module -> the files that may import it.
OWNERS = {
    r"pickle|_pickle|cPickle|marshal|shelve|dill|cloudpickle|joblib": (),
    r"subprocess|runpy|pty|code|codeop": (),
    r"ctypes": ("files/moves.py",),
    r"logging|warnings": ("model/*.py", "files/http.py", "cli/pictures.py", "cli/talk.py"),
    r"matplotlib": ("cli/pictures.py",),
    r"torch|torchvision|torchaudio|safetensors|timm|transformers|PIL": ("model/*.py",),
    r"numpy": (
        "model/*.py",
        "tensors/differences.py",
        "tensors/numbers.py",
        "tensors/resampling.py",
        "tensors/statistics.py",
    ),
    r"ml_dtypes": ("tensors/numbers.py",),
    r"urllib3|socket|ssl|http|urllib|requests|ftplib|asyncio": (
        "files/http.py",
        "files/connections.py",
        "files/hub.py",
        "files/filename.py",
        "files/patience.py",
    ),
    r"fsspec|s3fs|gcsfs|adlfs": ("files/stores.py",),
    r"click": ("cli/*.py",),
    r"tqdm": ("cli/*.py",),
    r"tempfile|shutil": (
        "files/temporary.py",
        "files/spool.py",
        "cli/talk.py",
        "cli/help.py",
        "testing.py",
    ),
    r"zlib": ("files/*.py", "containers/torch_zip.py"),
    r"zipfile": (),
    r"tarfile": ("files/tars.py",),
    r"gzip": ("files/spool.py",),
}


@pytest.mark.parametrize("modules", OWNERS)
def test_modules_stay_in_their_rooms(modules: str) -> None:
    found = {name for name in FILES for module in packages(name) if re.fullmatch(modules, module)}
    outside = {
        name for name in found if not any(fnmatchcase(name, room) for room in OWNERS[modules])
    }
    assert not outside


# `int` of text takes signs, spaces, `1_000` and all scripts: `text.length` reads what comes from
# outside, where a pattern of ASCII digits has not.
TEXT_NUMBERS = {
    "containers/_folder.py": 2,  # of a file name
    "containers/_others.py": 1,  # of a git-LFS pointer
    "containers/_pickles.py": 1,  # of a numpy dtype
    "containers/_script_source.py": 1,  # an octal escape
    "containers/dcp.py": 1,  # a number already
    "containers/_sets.py": 1,  # of a file name, to sort by
    "containers/_zero_agreement.py": 1,  # a float, which a tensor holds
    "pickles/pickle_reader.py": 1,  # a value, as CPython reads it
    "containers/_json.py": 1,  # a number of JSON as its grammar has it
}


def test_text_from_outside_becomes_a_number_in_one_function() -> None:
    found = Counter(
        name
        for name in FILES
        for node in ast.walk(parsed(name))
        if name.startswith(("files/", "containers/", "pickles/"))
        and isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "int"
    )
    assert found == TEXT_NUMBERS


HEAVY = re.compile(
    r"torch|torchvision|numpy|ml_dtypes|safetensors|timm|urllib3|tqdm|ssl|matplotlib|logging"
)


@pytest.mark.parametrize("name", FILES)
def test_heavy_modules_are_imported_inside_functions(name: str) -> None:
    tree = parsed(name)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    typing = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    for module, node in imports(tree):
        if HEAVY.fullmatch(module.partition(".")[0]) and name != "files/http.py":
            assert id(node) in inside | typing, f"{name} imports {module} at its top"


@cache
def calls(name: str) -> list[tuple[str, ast.Call]]:
    called = (node for node in ast.walk(parsed(name)) if isinstance(node, ast.Call))
    return [(ast.unparse(node.func), node) for node in called]


TALKING = ("__main__.py", "cli/*.py")


@pytest.mark.parametrize("name", FILES)
def test_printing_and_exit_are_for_the_command_line(name: str) -> None:
    if any(fnmatchcase(name, room) for room in TALKING):
        return
    called = {function for function, _ in calls(name)}
    assert not called & {"print", "sys.exit", "exit", "quit", "os._exit", "input"}
    text = FILES[name].read_text(encoding="utf-8")
    assert not re.search(r"sys\.std(out|err|in)|raise SystemExit|isatty", text)


CHANGES = set(
    "rename replace link unlink remove symlink truncate ftruncate write pwrite writev pwritev "
    "sendfile copy_file_range fsync fdatasync chmod fchmod mkdir makedirs rmdir removedirs mkfifo "
    "utime system popen execv execve spawnv startfile".split()
)
# A file may be opened for writing, renamed or removed there alone; beyond it, what is named here.
WRITERS: dict[str, set[str]] = {
    "files/fileio.py": {"os.open", "os.write", "os.pwrite"},  # of a descriptor that publish opened
    "files/stream.py": {"os.write"},  # of a pipe
    # Of what publish made; other ranks than the first open it by its name.
    "files/writing.py": {"os.ftruncate", "os.open", "os.fsync"},
    "files/spool.py": {"os.unlink"},  # of a temporary file that it made
    "files/publish.py": {
        *("os.mkdir", "os.makedirs", "os.rmdir"),
        *("os.chmod", "os.open", "os.fsync", "os.rename"),
    },
    "files/moves.py": {*(f"os.{name}" for name in CHANGES), "os.open"},
    "files/parts.py": {"os.open", "os.unlink"},
    "files/download.py": {"os.makedirs", "os.rmdir", "os.ftruncate"},  # its folder; a part
    "cli/talk.py": {"os.open"},  # of os.devnull
    "cli/main.py": {"open"},  # of os.devnull, and of stdout itself
}


def changes_files(function: str, call: ast.Call) -> bool:
    """Tell whether a call could open for writing, or change what is on disk."""
    if function == "open":
        mode = call.args[1] if len(call.args) > 1 else None
        modes = [*([mode] if mode else []), *(k.value for k in call.keywords if k.arg == "mode")]
        return any(not isinstance(m, ast.Constant) or set(m.value) & set("wax+") for m in modes)
    owner, _, method = function.rpartition(".")
    if owner == "formatter":  # click's, which writes help
        return False
    if owner == "os":
        return method in CHANGES or method == "open"
    return method in {"write_text", "write_bytes", "touch", "rmtree", "hardlink_to", "symlink_to"}


@pytest.mark.parametrize("name", FILES)
def test_only_publish_opens_files_for_writing(name: str) -> None:
    found = {function for function, call in calls(name) if changes_files(function, call)}
    assert found <= WRITERS.get(name, set())


def test_nothing_is_evaluated() -> None:
    running = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "builtins.eval"}
    for name in FILES:
        assert not running & {function for function, _ in calls(name)}, name
        importing = [function for function, _ in calls(name) if "import_module" in function]
        known = ("__init__.py", "cli/main.py", "model/libraries.py", "model/zoo.py")
        assert not importing or name in (*known, "containers/_registry.py"), name


def test_opcodes_stay_in_the_pickle_rooms() -> None:
    """The words of torch's pickles stand in one room, those of pickle in two."""
    for name in FILES:
        text = FILES[name].read_text(encoding="utf-8")
        if name not in ("pickles/pickle_reader.py", "pickles/pickle_writer.py"):
            assert "BINPUT" not in text, name
        words = ("torch_objects", "subclasses", "holdings", "names")
        if name not in {f"pickles/{each}.py" for each in words} and not name.startswith("model/"):
            code = "\n".join(ast.unparse(ast.Constant(each)) for each in literals(name))
            assert "_rebuild_" not in code, name


@cache
def literals(name: str) -> list[str]:
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
        and "\n" not in node.value
    ]


@pytest.mark.parametrize("name", FILES)
def test_containers_are_asked_for_traits_and_not_for_names(name: str) -> None:
    names = {container.name for container in containers.built_in()}
    compared = {
        constant.value
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.Compare | ast.MatchValue)
        for constant in ast.walk(node)
        if isinstance(constant, ast.Constant)
    }
    assert not compared & names


def test_suffixes_are_listed_by_their_container_alone() -> None:
    for name in FILES:
        words = {word for literal in literals(name) for word in literal.split()}
        several = len(words & {*containers.suffixes()}) > 2
        assert several == (name == "containers/torch_zip.py"), name


# What runs without a model loads no library, no network and no bar.

NUMPY = {"numpy", "ml_dtypes"}
UNWANTED = {*NUMPY, *"torch torchvision safetensors timm urllib3 requests tqdm socket ssl".split()}
LOADED = """
import json, os, sys
sys.argv[0] = "ckptool"
code = 0
if sys.argv[1:] == ["import"]:
    import ckptool, ckptool.cli.main
else:
    from ckptool.cli.main import main
    code = main()
with open(os.environ["LOADED"], "w") as file:
    json.dump([code, sorted(sys.modules)], file)
"""
LINES = [
    "import",
    "--help",
    "keys --help",
    "convert --help",
    "transfer --help",
    "keys {g}/model_best.pth.tar",
    "keys --tree {g}/every_dtype.safetensors",
    "keys {g}/plain_legacy.pth",
    "strip-prefix {g}/data_parallel.pth out.pth",
    "add-prefix {g}/plain.pth out.pth",
    "unwrap {g}/model_best.pth.tar out.pth",
    "convert {g}/every_dtype.pth out.pth",
    "convert {g}/plain.pth out.safetensors",
    "convert {g}/dcp out.safetensors",
    "convert {g}/plain.safetensors out.pth",
    "transfer {g}/model_best.pth.tar out.pth --like {g}/plain.pth",
    "match {g}/data_parallel.pth --like {g}/plain.pth",
    "info {g}/model_best.pth.tar",
    "info --json {g}/huge_view.pth",
    "diff --help",
    "diff {g}/model_best.pth.tar {g}/data_parallel.pth",
    "check --help",
    "check --sha256 {g}/plain.pth {g}/plain_legacy.pth {g}/plain.safetensors",
    "convert {g}/model_best.pth.tar out --to dcp",
    "convert {g}/plain.pth out --max-shard-size 300",
    "keys missing.pth",
    # These compute numbers, or gather elements that do not lie in order.
    *(COMPUTING := [
        "convert {g}/strided.pth out.safetensors",
        "convert {g}/big_endian.pth out.safetensors",
        "check --finite --sha256 {g}/plain.pth {g}/plain_legacy.pth {g}/plain.safetensors",
    ]),
]  # fmt: skip


@pytest.fixture(scope="module")
def loaded(
    tmp_path_factory: pytest.TempPathFactory, good: Path
) -> Callable[[str], tuple[int, set[str]]]:
    def load(line: str) -> tuple[int, set[str]]:
        folder = tmp_path_factory.mktemp("loaded")
        subprocess.run(
            [sys.executable, "-c", LOADED, *line.format(g=good).split()],
            cwd=folder,
            env=environment({"LOADED": str(folder / "loaded.json")}),
            capture_output=True,
            timeout=60,
            check=True,
        )
        code, modules = json.loads((folder / "loaded.json").read_text())
        return code, set(modules)

    return load


@pytest.mark.parametrize("line", LINES)
def test_no_library_is_loaded_without_need(
    loaded: Callable[[str], tuple[int, set[str]]], line: str
) -> None:
    code, modules = loaded(line)
    assert code == (3 if "missing" in line else 0)
    assert not modules & (UNWANTED - NUMPY if line in COMPUTING else UNWANTED)
    if not line.startswith(("transfer", "match")):  # they know of --model
        assert not any(module.startswith("ckptool.model.") for module in modules)
    if line == "import" or line.endswith("--help"):
        assert not modules & {
            "ckptool.verbs.surgery",
            "ckptool.containers",
            "ckptool.state.edits",
            "difflib",
        }
    else:
        assert "ckptool.containers" in modules


def test_the_proof_can_fail(loaded: Callable[[str], tuple[int, set[str]]]) -> None:
    """The list of loaded modules is a list: what a command needs is in it."""
    assert "ckptool.verbs.surgery" in loaded(LINES[8])[1]
    assert "ckptool.verbs.surgery" not in loaded(LINES[5])[1]
