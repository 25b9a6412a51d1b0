"""Ask for known vulnerabilities of every pinned version, here and in the images. Exit 1 when there is one.

Where the index serves no advisories (mirrors, air-gapped machines) it says loudly what was not audited, and does not fail.
Further arguments go to pip-audit: make audit ARGS="--ignore-vuln GHSA-...", ARGS="--vulnerability-service osv".
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "constraints.txt", *sorted(ROOT.glob("images/*/constraints.txt"))]


def rounds(files: Iterable[Path]) -> list[list[str]]:
    """Every pin once; pip-audit takes one version of a package at a time."""
    seen: set[str] = set()
    found = []
    for file in files:
        lines = [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
        new = sorted({line for line in lines if "==" in line} - seen)
        seen |= set(new)
        found += [new] if new else []
    return found


def ask(pins: list[str], arguments: list[str]) -> tuple[list[dict[str, Any]], str]:
    """What pip-audit knows of each package, or why it could not be asked."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(pins) + "\n")
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--requirement", file.name, "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--progress-spinner", "off", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip-audit said nothing"]
        return [], said[-1].strip()
    return packages, ""


def verdict(packages: list[dict[str, Any]], num_pins: int, problem: str = "") -> tuple[list[str], int]:
    """The lines to print and the exit code."""
    found = [
        f"VULNERABLE: {package['name']} {package['version']}: {vulnerability['id']}, fixed in "
        f"{', '.join(vulnerability['fix_versions']) or 'no version'}"
        for package in packages
        for vulnerability in package.get("vulns", [])
    ]
    skipped = [package for package in packages if "skip_reason" in package]
    audited = len(packages) - len(skipped)
    lines = list(found)
    if audited < num_pins:
        # "...: NAME (VERSION)" differs from package to package.
        reasons = Counter(package["skip_reason"].rpartition(": ")[0] or package["skip_reason"] for package in skipped)
        reason = problem or (reasons.most_common(1)[0][0] if reasons else "pip-audit left them out")
        lines.append(f"NOT AUDITED: {num_pins - audited} of {num_pins} pinned versions: {reason}.")
    if audited:
        lines.append(f"Audited {audited} pinned versions, {len(found)} known vulnerabilities.")
    return lines, int(bool(found))


def main(arguments: list[str]) -> int:
    packages, problem, num_pins = [], "", 0
    for pins in rounds(FILES):
        some, why = ask(pins, arguments)
        packages, problem, num_pins = packages + some, problem or why, num_pins + len(pins)
    lines, code = verdict(packages, num_pins, problem)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
