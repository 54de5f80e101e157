"""kopf as a watcher, against a small HTTP server that lists and watches as the API server does.

The server can do at will what the real one does rarely: break watches, say that a version is too old, stay silent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import kopf
import pytest
from aiohttp import web
from lightkube import AsyncClient

from llmfleet.operator import watch
from llmfleet.operator.cache import Cache
from llmfleet.operator.kinds import WATCHED
from llmfleet.operator.watch import Inbox, Lister, Watches, kopf_settings, resync

Json = dict[str, Any]
PODS = next(watched for watched in WATCHED if watched.kind == "Pod")


class ApiServer:
    """Pods and nothing else; the other kinds are there and empty."""

    def __init__(self) -> None:
        self.pods: dict[str, Json] = {}
        self.version = 0
        self.writes: list[str] = []
        self.lists: list[str] = []
        self.selectors: dict[str, str] = {}
        self.gone_on_watch = False
        self.deaf = False
        self._streams: list[asyncio.Queue[Json | None]] = []

    def put(self, name: str, uid: str = "") -> None:
        """Creates or changes a pod that holds a device."""
        self.version += 1
        kind = "MODIFIED" if name in self.pods else "ADDED"
        self.pods[name] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "n", "uid": uid or name, "resourceVersion": str(self.version)},
            "spec": {
                "nodeName": f"at-{self.version}",
                "containers": [{"name": "c", "resources": {"limits": {"example.com/gpu": "1"}}}],
            },
            "status": {"phase": "Running"},
        }
        self._tell({"type": kind, "object": self.pods[name]})

    def remove(self, name: str) -> None:
        """Deletes a pod."""
        self.version += 1
        pod = self.pods.pop(name)
        pod["metadata"]["resourceVersion"] = str(self.version)
        self._tell({"type": "DELETED", "object": pod})

    def break_watches(self) -> None:
        """Ends all watch connections."""
        for stream in self._streams:
            stream.put_nowait(None)

    def _tell(self, event: Json) -> None:
        if not self.deaf:
            for stream in self._streams:
                stream.put_nowait(event)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        app = web.Application(middlewares=[self._count_writes])
        documents: dict[str, Json] = {"/api": {"versions": ["v1"]}, "/apis": {"groups": []}}
        # kopf does not begin before it has seen the last three, although it does not use them here.
        for kind, group, version, plural in (
            *[(watched.kind, watched.group, watched.version, watched.plural) for watched in WATCHED],
            ("Namespace", "", "v1", "namespaces"),
            ("Event", "", "v1", "events"),
            ("CustomResourceDefinition", "apiextensions.k8s.io", "v1", "customresourcedefinitions"),
        ):
            base = f"/apis/{group}/{version}" if group else f"/api/{version}"
            app.router.add_get(f"{base}/{plural}", self._objects)
            if group and base not in documents:
                served = {"version": version}
                documents["/apis"]["groups"].append({"name": group, "versions": [served], "preferredVersion": served})
            verbs = ["list", "watch", "patch"]
            documents.setdefault(base, {"resources": []})["resources"].append(
                {"name": plural, "singularName": kind.lower(), "kind": kind, "namespaced": True, "verbs": verbs}
            )

        async def discovery(request: web.Request) -> web.Response:
            return _json(documents[request.path])

        for path in documents:
            app.router.add_get(path, discovery)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            self.break_watches()
            await runner.cleanup()

    @web.middleware
    async def _count_writes(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.method != "GET":
            self.writes.append(f"{request.method} {request.path}")
        response: web.StreamResponse = await handler(request)
        return response

    async def _objects(self, request: web.Request) -> web.StreamResponse:
        plural = request.path.rsplit("/", 1)[1]
        self.selectors[plural] = request.query.get("labelSelector", "")
        if "watch" in request.query:
            return await self._watch(request, plural)
        self.lists.append(plural)
        pods = [pod for _, pod in sorted(self.pods.items())] if plural == "pods" else []
        start, limit = int(request.query.get("continue", "0")), int(request.query.get("limit", "0")) or len(pods)
        more = str(start + limit) if start + limit < len(pods) else ""
        meta = {"resourceVersion": str(self.version), "continue": more}
        return _json({"kind": "List", "metadata": meta, "items": pods[start : start + limit]})

    async def _watch(self, request: web.Request, plural: str) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        if self.gone_on_watch and plural == "pods":
            self.gone_on_watch = False
            await response.write(json.dumps({"type": "ERROR", "object": {"code": 410}}).encode() + b"\n")
            return response
        stream: asyncio.Queue[Json | None] = asyncio.Queue()
        self._streams.append(stream)
        since = int(request.query.get("resourceVersion", "0"))
        missed = [pod for pod in self.pods.values() if int(pod["metadata"]["resourceVersion"]) > since]
        for pod in missed if plural == "pods" else []:
            stream.put_nowait({"type": "MODIFIED", "object": pod})
        while (event := await stream.get()) is not None:
            if plural == "pods":
                await response.write(json.dumps(event).encode() + b"\n")
        return response


def _json(body: Json) -> web.Response:
    return web.json_response(body)


@asynccontextmanager
async def watching(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cache]:
    """A cache that kopf keeps current, with the resync beside it."""
    monkeypatch.setattr(watch, "RELIST_RESYNC_S", 0.2)
    monkeypatch.setattr(watch, "DEAD_AFTER_S", 1.0)
    async with api.serving() as url:
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(
            json.dumps(
                {
                    "current-context": "c",
                    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                    "clusters": [{"name": "c", "cluster": {"server": url}}],
                    "users": [{"name": "u", "user": {"token": "t"}}],
                }
            )
        )
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        client = AsyncClient(trust_env=True)
        cache = Cache()
        lister = Lister(client, cache)
        for watched in WATCHED:
            await lister.fill(watched)
        watches = Watches(Inbox(cache, asyncio.get_running_loop()), cache)
        tasks = [asyncio.create_task(watches.run()), asyncio.create_task(resync(lister, watches))]
        try:
            yield cache
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(watches.join)
            await client.close()


async def until(what: str, holds: Any, deadline_s: float = 60) -> None:
    for _ in range(int(deadline_s / 0.05)):
        if holds():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"not within {deadline_s} s: {what}")


async def test_five_thousand_objects_and_their_changes_arrive_and_kopf_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = ApiServer()
    for number in range(5000):
        api.put(f"pod-{number}")
    async with watching(api, tmp_path, monkeypatch) as cache:
        assert len(cache.foreign) == 5000
        await until("kopf has listed", lambda: api.lists.count("pods") >= 2)
        for number in range(0, 5000, 5):
            api.put(f"pod-{number}")
        for number in range(4000, 5000):
            api.remove(f"pod-{number}")
        await until("all deletions arrived", lambda: len(cache.foreign) == 4000)
        await until("all changes arrived", lambda: cache.foreign["n/pod-3995"].node == "at-5800")
        changed = [use for use in cache.foreign.values() if int(use.node.removeprefix("at-")) > 5000]
        assert len(changed) == 800
    assert api.writes == []


async def test_only_our_own_deployments_and_config_maps_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = ApiServer()
    async with watching(api, tmp_path, monkeypatch):
        await until("kopf has listed", lambda: api.lists.count("deployments") >= 2)
    assert api.selectors["deployments"] == "llmfleet.io/component=engine"
    assert api.selectors["configmaps"] == "llmfleet.io/component=routing"
    assert api.selectors["pods"] == ""


async def test_what_vanished_while_the_watch_had_to_begin_anew_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = ApiServer()
    for name in ("stays", "vanishes"):
        api.put(name)
    async with watching(api, tmp_path, monkeypatch) as cache:
        api.put("fresh")
        await until("the watch is open", lambda: "n/fresh" in cache.foreign)
        api.deaf, api.gone_on_watch = True, True
        api.remove("vanishes")
        api.break_watches()
        await until("the deletion is known", lambda: "n/vanishes" not in cache.foreign)
        assert set(cache.foreign) == {"n/stays", "n/fresh"}


async def test_a_watch_that_shows_nothing_more_is_found_dead_and_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = ApiServer()
    api.put("first")
    monkeypatch.setattr(watch, "RESYNC_S", 0.5)
    async with watching(api, tmp_path, monkeypatch) as cache:
        await until("kopf has listed", lambda: api.lists.count("pods") >= 2)
        api.deaf = True
        api.put("unseen")
        await until("the list shows it", lambda: "n/unseen" in cache.foreign)
        api.deaf = False
        before = api.lists.count("nodes")
        await until("kopf lists everything anew", lambda: api.lists.count("nodes") > before + 2)
        api.put("later")
        await until("the new watch works", lambda: "n/later" in cache.foreign)


def test_kopf_has_nowhere_to_write() -> None:
    settings = kopf_settings()
    assert not settings.posting.enabled
    assert settings.scanning.disabled
    assert settings.peering.standalone
    body = kopf.Body({"spec": {"a": 1}})
    assert settings.persistence.diffbase_storage.build(body=body) == {}
    assert settings.persistence.diffbase_storage.fetch(body=body) is None
