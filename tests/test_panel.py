"""The consumer panel over the fixtures and some mutations, and the proof that it would complain."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import FIXTURES, sampled

import ckptool
from ckptool.verbs.checked import Checked, Status

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

import panel


@pytest.fixture(scope="module")
def asked() -> Iterator[panel.Panel]:
    made = panel.Panel()
    yield made
    made.close()


@pytest.mark.thorough
def test_no_fixture_is_ok_of_which_a_consumer_looks_up_more(asked: panel.Panel) -> None:
    for path in sampled(panel.fixtures(), 4):
        assert list(panel.complaints(path, asked)) == []


def test_nor_is_a_mutation(asked: panel.Panel, tmp_path: Path) -> None:
    cases = list(panel.drawn(400, 11))
    for name, write in sampled(cases, 8):
        place = tmp_path / name.replace("/", "_")
        place.mkdir()
        assert list(panel.complaints(write(place), asked)) == [], name
    assert not asked.died


def test_consumers_look_names_up_and_run_none(asked: panel.Panel) -> None:
    said = asked.ask(FIXTURES / "hostile/os_system.pth")
    for who in ("weights_only=False", "weights_only=False, in Python", "zipfile"):
        assert said[who]["names"] == ["os.system"]
    assert said["weights_only=True"]["names"] == []
    said = asked.ask(FIXTURES / "hostile/bare_pickle.pkl")
    for who in ("pickle in C", "pickle in Python"):
        assert said[who]["names"] == ["posix.system"]
    assert all(each["ran"] == [] for each in said.values())
    assert not (FIXTURES / "hostile/ckptool-was-executed").exists()


def test_it_complains_of_a_check_that_is_blind(
    asked: panel.Panel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ckptool, "check", lambda path: Checked(str(path), Status.OK, ""))
    checkpoint = panel.containers.read(FIXTURES / "good/plain.pth")
    monkeypatch.setattr(panel.containers, "read", lambda path, alone: checkpoint)
    for name in ("os_system.pth", "legacy_os_system.pth", "tar_os_system.tar", "bare_pickle.pkl"):
        found = list(panel.complaints(FIXTURES / "hostile" / name, asked))
        assert any("looks up" in each and "system" in each for each in found), name
    twisted = tmp_path / "model.pth"
    twisted.write_bytes((FIXTURES / "good/plain.pth").read_bytes())
    assert list(panel.complaints(twisted, asked)) == []
