"""Security rules for the pods, roles and Secrets of the built manifests."""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.overlays import BUILDS, OVERLAYS, ROOT, build, containers, copy_manifests, objects, of_kind, pods

PINNED = re.compile(r"[\w./-]+:(?:\d+\.)+\d+(?:@sha256:[0-9a-f]{64})?")


@pytest.mark.parametrize("name", BUILDS)
def test_containers_are_restricted(name: str) -> None:
    for owner, _, pod in pods(name):
        assert pod["automountServiceAccountToken"] is False
        assert pod["serviceAccountName"] != "default"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
        for container in containers(pod):
            where = f"{name}: {owner['metadata']['name']}/{container['name']}"
            security = {**pod["securityContext"], **container["securityContext"]}
            assert PINNED.fullmatch(container["image"]), where
            assert security["runAsNonRoot"] is True and security["runAsUser"] > 0, where
            assert security["readOnlyRootFilesystem"] is True, where
            assert security["allowPrivilegeEscalation"] is False and not security.get("privileged"), where
            assert security["capabilities"] == {"drop": ["ALL"]}, where
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}, where
            for side in ("requests", "limits"):
                assert set(container["resources"][side]) == {"cpu", "memory"}, where
            if owner["kind"] != "Job":
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), where


@pytest.mark.parametrize("name", BUILDS)
def test_services_roles_and_namespaces_are_restricted(name: str) -> None:
    assert {service["spec"].get("type", "ClusterIP") for service in of_kind(name, "Service")} <= {"ClusterIP"}
    assert of_kind(name, "ClusterRole", "ClusterRoleBinding", "Ingress") == []
    for role in of_kind(name, "Role"):
        for rule in role["rules"]:
            assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
            assert rule["resources"] not in (["secrets"], ["configmaps"]) or rule["resourceNames"]
    for namespace in of_kind(name, "Namespace"):
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
        deny_all = [
            p for p in of_kind(name, "NetworkPolicy") if p["spec"]["podSelector"] == {} and "egress" not in p["spec"]
        ]
        assert [(p["metadata"]["namespace"], sorted(p["spec"]["policyTypes"])) for p in deny_all] == [
            (namespace["metadata"]["name"], ["Egress", "Ingress"])
        ]


@pytest.mark.parametrize("name", BUILDS)
def test_only_labeled_pods_may_reach_public_addresses(name: str) -> None:
    """Overlays with an S3 store in the cluster allow public addresses on port 443 only for labeled pods."""
    open_to_all = []
    for policy in of_kind(name, "NetworkPolicy"):
        for peer in [peer for rule in policy["spec"].get("egress", []) for peer in rule["to"]]:
            if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0":
                assert {"169.254.169.254/32", "169.254.0.0/16"} & set(
                    peer["ipBlock"]["except"]
                )  # has the cloud credentials of the node
                assert policy["spec"]["podSelector"] != {}
                open_to_all.append(policy["metadata"]["name"])
    cloud_policies = ["mlflow-to-cloud", "rlhf-tasks-to-cloud"] if name in ("gke", "eks") else []
    assert sorted(open_to_all) == sorted(["rlhf-endpoints", "rlhf-hub", *cloud_policies])


@pytest.mark.parametrize("name", OVERLAYS)
def test_servers_fit_the_quota(name: str) -> None:
    (quota,) = [q for q in of_kind(name, "ResourceQuota") if q["metadata"]["namespace"] == "rlhf"]
    memory = 0.0
    for owner, _, pod in pods(name):
        limits = [container["resources"]["limits"]["memory"] for container in pod["containers"]]
        memory += owner["spec"].get("replicas", 1) * sum(gibibytes(limit) for limit in limits)
    assert memory + 2 <= gibibytes(quota["spec"]["hard"]["limits.memory"])  # a rolling update starts one more server


def gibibytes(quantity: str) -> float:
    return float(quantity[:-2]) / {"Gi": 1, "Mi": 1024}[quantity[-2:]]


def test_no_secret_is_committed() -> None:
    run = subprocess.run(["git", "ls-files", "manifests"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [name for name in run.stdout.split() if "/secrets/" in name and not name.endswith(".gitignore")]
    assert files and all(name.endswith(".example") for name in files)
    for name in files:
        for value in re.findall(
            r"(?:SECRET_ACCESS_KEY|PASSWORD|secretKey)\"?[=:] ?\"?([^\"\n]+)", (ROOT / name).read_text()
        ):
            assert re.fullmatch(r"CHANGE-ME|@[A-Z0-9_]+@", value), name
    run = subprocess.run(
        ["git", "check-ignore", "manifests/overlays/kind/secrets/rlhf-s3.env"], cwd=ROOT, capture_output=True
    )
    assert run.returncode == 0


def test_make_secrets_creates_private_matching_passwords(tmp_path: Path) -> None:
    manifests = copy_manifests(tmp_path)
    script, folder = manifests / "make-secrets.sh", manifests / "overlays" / "kind" / "secrets"
    subprocess.run([script, "kind"], check=True)
    files = {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".env", ".json")}
    assert set(files) == {path.name.removesuffix(".example") for path in folder.glob("*.example")}
    assert not any(re.search(r"@[A-Z0-9_]+@", text) for text in files.values())
    password = files["rlhf-postgres.env"].strip().removeprefix("POSTGRES_PASSWORD=")
    assert len(password) == 48 and f"mlflow:{password}@postgres:5432" in files["rlhf-mlflow-backend.env"]
    (key,) = re.findall("SECRET_ACCESS_KEY=(.+)", files["rlhf-s3.env"])
    assert len(key) == 48 and f'"{key}"' in files["identities.json"] and key != password
    assert stat.S_IMODE(os.stat(folder / "rlhf-s3.env").st_mode) == 0o600
    second = subprocess.run([script, "kind"], capture_output=True, text=True)
    assert second.returncode == 1 and "exists; delete it" in second.stderr
    assert files["rlhf-s3.env"] == (folder / "rlhf-s3.env").read_text()
    wrong = subprocess.run([script, "mars"], capture_output=True, text=True)
    assert (
        wrong.returncode == 2 and "expected the name of an overlay: eks gke kind multi-user standalone" in wrong.stderr
    )


@pytest.mark.slow
def test_checkov(tmp_path: Path) -> None:
    """In a separate environment, because its pins conflict with those of kfp-rlhf."""
    uv = shutil.which("uv") or str(ROOT / ".venv" / "bin" / "uv")
    for name in OVERLAYS:
        (tmp_path / f"{name}.yaml").write_text(build(name))
    checkov = [uv, "tool", "run", "--from", "checkov==3.3.30", "checkov"]
    if not Path(uv).exists() or subprocess.run([*checkov, "--version"], capture_output=True).returncode != 0:
        pytest.skip("checkov could not be installed: the manifests were not checked with it")
    run = subprocess.run(
        [*checkov, "--config-file", ROOT / ".checkov.yaml", "-d", tmp_path], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def rows(page: str, header: str) -> set[tuple[str, ...]]:
    table = page[page.index(header) :].split("\n\n")[0].splitlines()[2:]
    return {tuple(cell.strip().strip("`") for cell in line.strip("|").split("|")) for line in table}


def test_readme_lists_every_permission_and_network_policy() -> None:
    page = (ROOT / "manifests" / "README.md").read_text()
    listed = rows(page, "| Role | API group")
    granted = {
        (role["metadata"]["name"], group or "core", resource, ", ".join(rule.get("resourceNames", [])) or "any", verb)
        for name in BUILDS
        for role in of_kind(name, "Role")
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert {row[:5] for row in listed} == granted and all(len(row[5]) > 20 for row in listed)
    policies = {row[0]: row for row in rows(page, "| NetworkPolicy | selects")}
    assert set(policies) == {p["metadata"]["name"] for name in BUILDS for p in of_kind(name, "NetworkPolicy")}
    accounts = {a["metadata"]["name"] for name in BUILDS for a in objects(name) if a["kind"] == "ServiceAccount"}
    assert accounts == {"mlflow", "s3", "postgres", "rlhf-runner"}


MODELS = {"RlhfBaseModel", "RlhfSftModel", "RlhfRewardModel", "RlhfPolicy"}


def test_disk_table_counts_the_models_that_a_stage_reads_and_writes() -> None:
    """KFP's launcher downloads every input whole."""
    page = (ROOT / "manifests" / "README.md").read_text()
    listed = rows(page[page.index("<!-- disk -->") :], "| stage | inputs")
    expected = set()
    for path in (ROOT / "components").glob("*/component.yaml"):
        (spec,) = yaml.safe_load(path.read_text())["components"].values()
        counts = []
        for kind in ("inputDefinitions", "outputDefinitions"):
            artifacts = spec.get(kind, {}).get("artifacts", {})
            titles = {name: a["artifactType"]["schemaTitle"].removeprefix("system.") for name, a in artifacts.items()}
            # The base model of reward_model may be a reward model, so that its type is Artifact.
            models = sum(
                title in MODELS or (name, title) == ("base_model", "Artifact") for name, title in titles.items()
            )
            counts.append(f"{models} M" if models else "0")
        expected.add((path.parent.name, *counts))
    assert listed == expected - {("notify", "0", "0")}
