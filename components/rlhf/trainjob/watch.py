"""Watching objects: the list, then every change, across reconnections and outages."""

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from components.rlhf.trainjob.api import Api, ApiError, Object, Outage, explain

SERVER_SECONDS = 300  # after which the server ends a watch, and another one continues it
GONE = 410  # the resource version is too old to continue from


@dataclass(frozen=True)
class Change:
    """An object as it is now, or as it was when it was deleted."""

    item: Object
    deleted: bool = False


def watch(
    api: Api,
    path: str,
    resource: str,
    selector: Mapping[str, str],
    stop: threading.Event,
    initial: Iterable[Object] = (),
) -> Iterator[Change]:
    """Every object that the selector (fieldSelector or labelSelector) matches, then its changes, until stop is set.

    initial are objects that the caller knows: their deletion before the first list is a change too. Raises InputError if the server
    refuses, and RetryableError after a long outage.
    """
    known = {item["metadata"]["uid"]: item for item in initial}
    version, outage = "", Outage(api)
    while not stop.is_set():
        try:
            if not version:
                version, items = list_objects(api, path, selector)
                for uid in known.keys() - items.keys():
                    yield Change(known[uid], deleted=True)
                known = items
                yield from map(Change, items.values())
            started, count = time.monotonic(), 0
            for kind, item in _events(api, path, {**selector, "resourceVersion": version}):
                count += 1
                outage.end()
                if kind == "ERROR":
                    raise ApiError(int(item.get("code") or 0), str(item.get("message")))
                version = item["metadata"]["resourceVersion"]
                if kind == "BOOKMARK":
                    continue
                deleted = kind == "DELETED"
                uid = item["metadata"]["uid"]
                known = {key: value for key, value in known.items() if key != uid} | ({} if deleted else {uid: item})
                yield Change(item, deleted)
            if not count and time.monotonic() - started < 1:  # a server that ends every watch at once
                stop.wait(api.pause(0))
        except ApiError as error:
            if error.status == GONE:
                version = ""
            elif error.is_transient:
                outage.wait(str(error), stop)
            else:
                raise explain(error, "watch", resource, api.namespace) from None


def list_objects(api: Api, path: str, selector: Mapping[str, str]) -> tuple[str, dict[str, Object]]:
    """The resource version of the list, and its objects by uid. Raises ApiError."""
    answer = api.request("GET", path, query=selector)
    return answer["metadata"]["resourceVersion"], {item["metadata"]["uid"]: item for item in answer.get("items") or []}


def _events(api: Api, path: str, query: Mapping[str, str]) -> Iterator[tuple[str, Object]]:
    options: dict[str, str | int] = {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": SERVER_SECONDS}
    for line in api.lines(path, {**query, **options}, read_seconds=SERVER_SECONDS + 30.0):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            yield str(event["type"]), dict(event["object"])
        except (ValueError, TypeError, KeyError):  # the connection broke within a line
            raise ApiError(0, "the stream of changes broke off") from None
