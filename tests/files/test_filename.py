"""Names from URLs and headers are harmless, and hashes in them are found."""

from __future__ import annotations

from pathlib import Path

import pytest
from downloads import SHA, names

from ckptool.files import filename


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/f.pth", "f.pth"),
        ("/a/my%20net.pth", "my net.pth"),
        ("/a/%E6%A8%A1.pth", "\u6a21.pth"),
        ("/a/..%2F..%2Fetc%2Fpasswd", "passwd"),
        ("/a/..%5C..%5Cx.pth", "x.pth"),
        ("/a/x%00y%0A%1B%5B2J.pth", "x_y__[2J.pth"),
        ("/a/%E2%80%AEhtp.pth", "_htp.pth"),
        ("/a/%FF%FE.pth", "__.pth"),
        ("/a/-rf", "_-rf"),
        ("/a/.bashrc", "bashrc"),
        ("/a/CON.pth", "_CON.pth"),
        ("/a/a:b.pth", "a_b.pth"),
        ("/a/" + "n" * 300 + ".pth", "n" * 251 + ".pth"),
        ("/a/" + "%E6%A8%A1" * 100 + ".pth", "\u6a21" * 83 + ".pth"),
        ("/a/%2e%2e", ""),
        ("/a/..", ""),
        ("/a/", ""),
        ("", ""),
    ],
)
def test_the_name_of_a_url_is_harmless(path: str, name: str, tmp_path: Path) -> None:
    assert filename.of_url(f"https://a.org{path}?b=c/d#e/f") == name
    if name:
        (tmp_path / name).write_bytes(b"")
        assert names(tmp_path) == [name]


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ('attachment; filename="f.pth"', "f.pth"),
        ('attachment; filename="../../etc/x.pth"', "x.pth"),
        ('attachment; filename="/etc/passwd"', "passwd"),
        ('attachment; filename=".."', ""),
        ("attachment; filename*=UTF-8''%E6%A8%A1.pth", "\u6a21.pth"),
        ("attachment; filename*=UTF-8''..%2Fx.pth", "x.pth"),
        ("attachment; filename*=nonsense''x%FF", "x\u00ff"),
        ("attachment", ""),
        ("", ""),
        (';;;=;"', ""),
    ],
)
def test_the_name_in_a_header_is_harmless(header: str, name: str) -> None:
    assert filename.of_disposition(header) == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18-5c106cde.pth", "5c106cde"),
        ("resnet18-5C106CDE.pth", "5c106cde"),
        ("resnet18-5c106cde.pth.tar", "5c106cde"),
        ("a-b-5c106cde", "5c106cde"),
        (f"x-{SHA}a.pth", None),
        ("model-20240115.pth", None),
        ("model-5c106cd.pth", None),
        ("model-5c106cde-v2.pth", None),
        ("model_5c106cde.pth", None),
        ("model-5c106cdg.pth", None),
        ("5c106cde.pth", None),
        ("550e8400-e29b-41d4-a716-44665544abcd.pth", None),
    ],
)
def test_what_counts_as_a_hash(name: str, expected: str | None) -> None:
    assert filename.hash_in(name) == expected


def test_digits_count_in_the_registry() -> None:
    assert filename.hash_of_registry("vgg13-19584684.pth") == "19584684"
    assert filename.hash_of_registry("resnet18_fbgemm_16fa66dd.pth") == "16fa66dd"
    assert filename.hash_of_registry("resnet18.pth") is None
