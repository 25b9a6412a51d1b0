"""The images, each built once for all tests."""

import contextlib
import os
import re
import uuid
from collections.abc import Iterator

import pytest

from tests.support.podman import NO_NETWORK, SETTINGS, build, make_base, podman

SELF_TEST_CACHED = re.compile(r"RUN python /opt/selftest/selftest\.py .*\n--> Using cache")


@pytest.fixture(scope="session")
def settings_of_podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("podman") / "containers.conf"
    file.write_text(SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_CONF", str(file))
        yield


@contextlib.contextmanager
def built(image: str, *arguments: str) -> Iterator[tuple[str, str]]:
    """The tag of an image built with every step of its Dockerfile, and the output of the build."""
    tag = f"localhost/kfp-rlhf/{image}:test-{uuid.uuid4().hex[:8]}"
    try:
        try:
            make_base()
            said = build(image, tag, *arguments)
        except RuntimeError as error:
            reason = NO_NETWORK.search(str(error))
            if not reason:
                raise
            pytest.skip(f"NO IMAGE WAS BUILT OR RUN: no network ({reason.group()})")
        assert "stages show --help" in said or SELF_TEST_CACHED.search(said)
        yield tag, said
    finally:
        podman("untag", tag, check=False)  # its layers stay, for the next build
        podman("image", "prune", "--force", "--filter", "until=168h", check=False)


@pytest.fixture(scope="session")
def trainer(settings_of_podman: None) -> Iterator[str]:
    """The tag of a trainer image, built with every step of its Dockerfile."""
    given = os.environ.get("RLHF_TEST_TRAINER_IMAGE")
    if given:  # an image that was built before
        yield given
        return
    with built("trainer", "--build-arg", "REVISION=0123abc", "--build-arg", "VERSION=9.8.7") as (tag, _):
        yield tag


@pytest.fixture(scope="session")
def tools(settings_of_podman: None) -> Iterator[str]:
    """The tag of a tools image."""
    with built("tools") as (tag, _):
        yield tag


@pytest.fixture(scope="session")
def rollout(settings_of_podman: None) -> Iterator[str]:
    """The tag of a rollout image with torch and vLLM for CPUs."""
    with built("rollout", "--build-arg", "DEVICE=cpu") as (tag, _):
        yield tag
