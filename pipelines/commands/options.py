"""Arguments and options that several commands share."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from components.rlhf.text.errors import InputError

DEFAULT_PARAMS = Path(__file__).parents[1] / "params" / "movie_reviews.yaml"
PARAMS_ARGUMENT = click.argument(
    "params_file", metavar="[PARAMS]", type=click.Path(path_type=Path), default=DEFAULT_PARAMS
)
SET_OPTION = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a parameter, for example --set ppo.num_iterations=4. May be repeated.",
)

RUN_ARGUMENT = click.argument("run", metavar="[RUN]", type=click.Path(path_type=Path), required=False)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


OF_SERVER = (
    click.option(
        "--host",
        envvar="KF_PIPELINES_ENDPOINT",
        show_envvar=True,
        metavar="URL",
        help="Address of the Kubeflow Pipelines UI or API: http(s)://HOST[:PORT][/PATH].",
    ),
    click.option(
        "--namespace",
        metavar="NAME",
        help="Your profile namespace on a multi-user server, else the namespace of Kubeflow Pipelines. [default: kubeflow]",
    ),
    click.option(
        "--token-file", type=click.Path(path_type=Path), help="File with a bearer token; alternatively, set KFP_TOKEN."
    ),
    click.option(
        "--cookies-file",
        type=click.Path(path_type=Path),
        help="File with session cookies; alternatively, set KFP_COOKIES.",
    ),
    click.option(
        "--ca-bundle",
        type=click.Path(path_type=Path, exists=True),
        help="PEM file with the CA certificate of the server.",
    ),
)


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that name a Kubeflow Pipelines server; they reach the command as `server`, for access_to."""

    @functools.wraps(command)
    def with_access(
        *,
        host: str | None,
        namespace: str | None,
        token_file: Path | None,
        cookies_file: Path | None,
        ca_bundle: Path | None,
        **others: Any,
    ) -> Any:
        def server() -> Any:
            from pipelines.cluster.server import ServerAccess, read_secret_file

            return ServerAccess(
                host=str(host),
                namespace=namespace,
                token=read_secret_file(token_file, "--token-file") or os.environ.get("KFP_TOKEN"),
                cookies=read_secret_file(cookies_file, "--cookies-file") or os.environ.get("KFP_COOKIES"),
                ca_bundle=ca_bundle,
            )

        return command(server=server if host else None, **others)

    for option in reversed(OF_SERVER):
        with_access = option(with_access)
    return with_access


def access_to(server: Callable[[], Any] | None) -> Any:
    """The ServerAccess of server_options. Raises InputError without --host, and for a file with a secret that cannot be read."""
    if server is None:
        raise InputError("Pass the address of Kubeflow Pipelines with --host, or set KF_PIPELINES_ENDPOINT.")
    return server()
