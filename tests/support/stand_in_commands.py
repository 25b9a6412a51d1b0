"""Replaces docker, kind and kubectl in tests without a cluster: `python stand_in_commands.py NAME ARGUMENT...`.

What needs no cluster is done by the real kubectl (building overlays, parsing options). Other commands are checked against earlier
calls: an image must be built before it is loaded or pushed. Calls are appended to $CALLS as JSON lines.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

CALLS, KUBECTL = Path(os.environ["CALLS"]), os.environ["KUBECTL"]


def recorded(kind: str) -> list[str]:
    lines = CALLS.read_text().splitlines() if CALLS.exists() else []
    return [value for line in lines for name, value in [json.loads(line)] if name == kind]


def record(kind: str, value: str) -> None:
    with CALLS.open("a") as file:
        file.write(json.dumps([kind, value]) + "\n")


def docker(arguments: list[str]) -> str:
    match arguments:
        case ["build", *options]:
            tag, context = options[options.index("-t") + 1], options[-1]
            file = Path(options[options.index("-f") + 1]) if "-f" in options else Path(context) / "Dockerfile"
            if not file.is_file() or not Path(context).is_dir():
                return f"{file} or {context} does not exist"
            record("built", tag)
        case ["push", image]:
            if image not in recorded("built"):
                return f"{image} was not built"
            record("pushed", image)
        case _:
            return "not supported by tests/support/stand_in_commands.py"
    return ""


def kind(arguments: list[str]) -> str:
    match arguments:
        case ["create", "cluster", "--name", name]:
            record("cluster", name)
        case ["load", "docker-image", *images, "--name", name]:
            missing = [image for image in images if image not in recorded("built")]
            if missing or name not in recorded("cluster"):
                return f"{missing or name} was not created"
            for image in images:
                record("loaded", image)
        case _:
            return "not supported by tests/support/stand_in_commands.py"
    return ""


def kubectl(arguments: list[str]) -> str:
    record("kubectl", " ".join(arguments))
    match arguments:
        case ["apply", "-k", target] if target.startswith("github.com/"):
            record("applied", target)
        case ["apply", "-k", target]:
            done = subprocess.run([KUBECTL, "kustomize", target], capture_output=True, text=True)
            record("applied", done.stdout)
            return done.stderr
        case _:
            done = subprocess.run([KUBECTL, *arguments, "--help"], capture_output=True, text=True)
            words = [word for word in arguments[2 if arguments[0] == "-n" else 0 :] if not word.startswith("-")]
            command = f"kubectl {' '.join(words[:2]) if words[0] in ('rollout', 'auth', 'create') else words[0]} "
            if done.returncode or not any(line.strip().startswith(command) for line in done.stdout.splitlines()):
                return done.stderr or f"{command} is not a kubectl command"
    return ""


if __name__ == "__main__":
    problem = {"docker": docker, "kind": kind, "kubectl": kubectl}[sys.argv[1]](sys.argv[2:])
    if problem:
        sys.exit(f"{' '.join(sys.argv[1:])}: {problem}")
