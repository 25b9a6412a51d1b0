import zipfile
from pathlib import Path

import pytest

from components.import_model.license import license_of
from components.rlhf.artifacts.manifest import write_manifest


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\nlicense: mit\n", "apache-2.0"),
        ('---\r\nlicense: "mit"\r\n---\r\n', "mit"),
        ("---\nlicense:\n- cc-by-4.0\ntags: [a]\n---\n", "cc-by-4.0"),
        ("---\nlicense: other\nlicense_name: a-community-license\nlicense_link: LICENSE\n---\n", "a-community-license"),
        ("---\nlicense: <script>alert(1)</script>\n---\n", ""),
        (f"---\nlicense: {'a' * 200}\n---\n", ""),
        ("# Model\nlicense: mit\n", ""),
        ("---\ntags: [a]\n---\n", ""),
        ("", ""),
    ],
)
def test_license_in_the_metadata_of_a_card(tmp_path: Path, card: str, expected: str) -> None:
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert license_of(tmp_path) == expected


def test_folder_without_a_card_states_none(tmp_path: Path) -> None:
    assert license_of(tmp_path) == ""
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff")
    assert license_of(tmp_path) == "mit"


def test_artifact_keeps_the_license_of_its_source(tmp_path: Path) -> None:
    write_manifest(tmp_path, kind="base_model", facts={"license": "mit"})
    assert license_of(tmp_path) == "mit"
    (tmp_path / "manifest.json").write_text("{}")
    assert license_of(tmp_path) == ""


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("License: Apache-2.0", "Apache-2.0"),
        ("License: BSD\nLicense-Expression: MIT OR Apache-2.0", "MIT OR Apache-2.0"),
        ("License: Permission is hereby granted,\n free of charge", ""),
        ("Author: License", ""),
    ],
)
def test_license_in_the_metadata_of_a_wheel(tmp_path: Path, fields: str, expected: str) -> None:
    with zipfile.ZipFile(tmp_path / "one.whl", "w") as archive:
        archive.writestr("one-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: one\n{fields}\n\nLicense: text\n")
    assert license_of(tmp_path / "one.whl") == expected


def test_broken_wheel_states_none(tmp_path: Path) -> None:
    (tmp_path / "one.whl").write_text("no archive")
    assert license_of(tmp_path / "one.whl") == ""
