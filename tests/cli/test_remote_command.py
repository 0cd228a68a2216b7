"""Commands on URLs: all that read take them, say what is slow once, and show no secret."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FIXTURES, Outcome
from far import Far, far_fixture  # noqa: F401  (a fixture)

Run = Callable[..., Outcome]
GOOD = FIXTURES / "good"

COMMANDS = {
    "keys": "keys URL",
    "info": "info URL",
    "check": "check URL",
    "show": "show URL epoch",
    "diff": "diff URL URL",
    "unwrap": "unwrap URL out.pth",
    "strip-prefix": "strip-prefix URL out.pth",
    "add-prefix": "add-prefix URL out.pth --prefix x.",
    "convert": "convert URL out.safetensors",
    "convert, shards": "convert URL out --max-shard-size 400",
    "convert, dcp": "convert URL out --to dcp",
    "transfer": "transfer URL out.pth",
    "transfer, like": "transfer URL out.pth --like URL",
    "average": "average URL URL out.pth",
    "recipe": "recipe r.toml --from URL",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    step = "[[step]]\nrename = [['module.{rest:**}', '{rest:**}']]\n"
    (tmp_path / "r.toml").write_text(f"recipe = 1\n\n{step}")
    return tmp_path


def words(line: str, url: str) -> list[str]:
    return [url if word == "URL" else word for word in line.split()]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "whole"])
@pytest.mark.parametrize("line", COMMANDS.values(), ids=list(COMMANDS))
def test_every_command_that_reads_takes_a_url(
    run: Run, far: Far, here: Path, line: str, ranges: bool
) -> None:
    far.ranges = ranges
    far.put("/f.pth", (GOOD / "model_best.pth.tar").read_bytes())
    url = far.root.replace("//", "//me:secret@") + "/f.pth?token=hidden"
    done = run(*words(line, url))
    expected = run(*words(line.replace("out", "local"), str(GOOD / "model_best.pth.tar")))
    assert done.code == expected.code
    assert done.err.count("sends no ranges") == (not ranges)
    for name in ("out.pth", "out.safetensors"):
        if (here / name).exists():
            assert (here / name).read_bytes() == (here / f"local{name[3:]}").read_bytes()
    as_json = run(*words(line, url), "--json", *(["--force"] if "out" in line else []))
    for text in (done.out, done.err, as_json.out, as_json.err):
        assert "secret" not in text
        assert "hidden" not in text
    if "show" not in line and "recipe" not in line:
        assert f"{far.root}/f.pth?..." in as_json.out


def test_what_is_read_twice_is_asked_once(run: Run, far: Far, here: Path) -> None:
    url = far.put("/f.pth", (GOOD / "plain.pth").read_bytes())
    assert run("diff", url, url).code == 0
    assert len(far.asked) == 1  # it is small
    assert "--in-place replaces a local file" in run("unwrap", url, "--in-place").err


def test_verify_runs_what_is_far_away(run: Run, far: Far, here: Path) -> None:
    import torch

    linear = torch.nn.Linear(4, 3)
    torch.save(linear.state_dict(), here / "f.pth")
    (here / "net.py").write_text("import torch\n\ndef net():\n    return torch.nn.Linear(4, 3)\n")
    url = far.put("/f.pth", (here / "f.pth").read_bytes())
    how = ["--model", "net.py:net", "--input-shape", "2,4", "--device", "cpu"]
    assert run("verify", url, here / "f.pth", *how).code == 0


def test_what_info_suggests_works_here(run: Run, far: Far, here: Path) -> None:
    url = far.put("/deep/model_best.pth.tar", (GOOD / "model_best.pth.tar").read_bytes())
    suggested = run("info", url, "--json").document["suggestions"]
    assert suggested
    for each in suggested:
        _, *command = each["command"].split()
        assert run(*command).code == 0
    assert run("info", url + "?token=1", "--json").document["suggestions"] == []


def test_a_command_to_paste_has_no_secret(run: Run, far: Far, here: Path) -> None:
    far.put("/f.pth", (GOOD / "ema.pth").read_bytes())
    done = run("unwrap", f"{far.root}/f.pth?token=hidden", "out.pth")
    assert done.code == 2
    assert f"hint: ckptool unwrap '{far.root}/f.pth?...' out.pth --at " in done.err


def test_check_says_which_file_without_its_secret(run: Run, far: Far, here: Path) -> None:
    url = far.put("/f.pth", (GOOD / "plain.pth").read_bytes())
    done = run("check", f"{url}?token=hidden", f"{far.root}/no.pth?token=hidden")
    assert done.code == 6
    assert done.out.startswith(f"{url}?...\tok")
    assert f"{far.root}/no.pth?...: error[download-failed]" in done.err
    assert "hidden" not in done.out + done.err


def test_debug_shows_no_query(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    done = run("--debug", "keys", "http://127.0.0.1:9/f.pth?token=hidden")
    assert done.code == 6
    assert "Traceback" in done.err
    assert "hidden" not in done.err


def test_several_urls_go_into_a_folder_by_the_ends_of_their_paths(
    run: Run, far: Far, here: Path
) -> None:
    far.put("/a/model_best.pth.tar", (GOOD / "model_best.pth.tar").read_bytes())
    far.put("/b/plain.pth", (GOOD / "plain.pth").read_bytes())
    root = far.root.replace("//", "//me:secret@")
    urls = [f"{root}/{name}?token=hidden" for name in ("a/model_best.pth.tar", "b/plain.pth")]
    done = run("convert", *urls, f"{root}/no.pth?token=hidden", "out/", "--to", "safetensors")
    assert done.code == 6
    made = here / "out"
    assert sorted(path.name for path in made.iterdir()) == [
        "model_best.safetensors",
        "plain.safetensors",
    ]
    run("convert", GOOD / "plain.pth", "local.safetensors")
    assert (made / "plain.safetensors").read_bytes() == (here / "local.safetensors").read_bytes()
    as_json = run("convert", *urls, "out/", "--json")
    twice = run("convert", urls[0], urls[0], "out/")
    assert (twice.code, as_json.code) == (2, 0)
    listed = run("keys", *urls, f"{root}/no.pth?token=hidden")
    assert listed.code == 6
    assert listed.out.startswith(f"{far.root}/a/model_best.pth.tar?...\t")
    for each in (done, as_json, twice, listed):
        assert "secret" not in each.out + each.err
        assert "hidden" not in each.out + each.err


def test_several_outputs_go_into_a_store(run: Run, here: Path) -> None:
    pytest.importorskip("fsspec")
    names = [GOOD / name for name in ("plain.pth", "model_best.pth.tar")]
    done = run("convert", *names, "memory://many/out/", "--to", "safetensors")
    assert done.code == 0, done.err
    diff = run("diff", names[0], "memory://many/out/plain.safetensors", "-q")
    assert diff.code == 0, diff.err
    assert run("convert", *names, "memory://many/out/", "--to", "safetensors").code == 5
