"""The stand-in server against recordings of a real one, and what the product relies on that no recording shows.

That clearml itself works with it, in runs, clones, imports, aborts and outages, is seen wherever it stands in.
"""

import base64
import json
import re
import socket
from collections import ChainMap
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import requests
from clearml_server import COMPANY, HANDLERS, ApiError, ClearMLServer

DATA = Path(__file__).parent / "data"
NOBODY = "0" * 32


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ClearMLServer]:
    """A running stand-in; the test fails if it was asked anything that it does not know."""
    server = ClearMLServer(tmp_path / "server")
    server.start()
    yield server
    server.stop()
    assert not server.unknown


class Client:
    """The HTTP side of clearml: a token for two keys, then calls as GET with a JSON body."""

    def __init__(self, server: ClearMLServer) -> None:
        self.server = server
        self.authorization = ""
        self.log_in()

    def log_in(self, secret_key: str = ClearMLServer.secret_key) -> tuple[int, Any]:
        keys = base64.b64encode(f"{self.server.access_key}:{secret_key}".encode()).decode()
        self.authorization = f"Basic {keys}"
        status, answer = self.send("/auth.login", "")
        if status == 200:
            self.authorization = f"Bearer {answer['data']['token']}"
        return status, answer

    def send(self, path: str, body: str, ctype: str = "application/json", method: str = "GET") -> tuple[int, Any]:
        headers = {"Content-Type": ctype, "Authorization": self.authorization}
        answer = requests.request(method, self.server.api_url + path, data=body.encode(), headers=headers, timeout=60)
        return answer.status_code, answer.json()

    def refusal(self, name: str, **data: Any) -> tuple[int, int, str]:
        """The code, the subcode and the text with which a call is answered."""
        status, answer = self.send(f"/v2.23/{name}", json.dumps(data))
        return status, answer["meta"]["result_subcode"], answer["meta"]["result_msg"]

    def file(self, method: str, path: str, **options: Any) -> tuple[int, bytes]:
        headers = {"Authorization": self.authorization}
        answer = requests.request(method, self.server.files_url + path, headers=headers, timeout=60, **options)
        return answer.status_code, answer.content


@pytest.fixture
def client(server: ClearMLServer) -> Client:
    return Client(server)


# Replaying the recordings

# Times and what depends on them, users, tokens, and the worker, which is a header that was not recorded:
# their types are compared, not their values.
VARIES = {
    *("created", "started", "completed", "published", "added", "updated", "@timestamp", "active_duration"),
    *("last_update", "last_change", "status_changed", "last_worker_report"),
    *("user", "last_changed_by", "token", "scroll_id", "worker"),
}
ID = re.compile(r"\b[0-9a-f]{32}\b")


# How what the recording does not show being made had been made, where that is not seen later.
PRIOR: dict[str, dict[str, Any]] = {
    "tasks": {"name": "earlier task", "type": "training"},
    "models": {"name": "earlier model", "uri": "", "ready": False},
    "projects": {"name": "earlier project"},
    "queues": {"name": "earlier queue"},
}


def shown(exchange: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The documents, or parts of them, that an exchange shows to have been there."""
    asked, data = exchange["request"], exchange["response"]["data"]
    for kind in PRIOR:
        if kind.removesuffix("s") in data:
            yield kind, data[kind.removesuffix("s")]
        for doc in data.get(kind, []):
            implied = {key: asked[key][0] for key in ("id", "project", "task") if key in asked}
            if "name" in asked:
                implied["name"] = re.sub(r"[\\^$]", "", asked["name"])
            if "status_changed" in asked:
                implied["status_changed"] = doc["last_update"]
            if "id" in implied | doc:
                yield kind, implied | doc
    for queue in data.get("queues", []):
        for entry in queue.get("entries", []):
            yield "tasks", {"id": entry["task"], "status": "queued"}
    for deleted in data.get("succeeded", []):
        artifacts = [{"key": url, "mode": "output", "uri": url} for url in deleted["urls"]["artifact_urls"]]
        yield "tasks", {"id": deleted["id"], "execution": {"artifacts": artifacts}}
        for url in deleted["urls"]["model_urls"]:
            yield "models", {"id": url, "task": deleted["id"], "uri": url}


class Replay:
    """Sends recorded requests in order, with the ids that the stand-in gave out in place of the recorded ones."""

    def __init__(self, server: ClearMLServer, exchanges: list[dict[str, Any]]) -> None:
        self.server, self.client, self.exchanges = server, Client(server), exchanges
        self.ids: dict[str, str] = {}
        making = re.compile(r"\.(create|clone)$")
        self.made = {one["response"]["data"]["id"] for one in exchanges if making.search(one["path"])}

    def translated(self, text: str) -> str:
        return ID.sub(lambda match: self.ids.get(match[0], match[0]), text)

    def learn(self, recorded: Any, answer: Any) -> None:
        """Which of the stand-in's ids stands for which recorded one."""
        if isinstance(recorded, dict) and isinstance(answer, dict):
            for key in recorded.keys() & answer.keys():
                self.learn(recorded[key], answer[key])
        elif isinstance(recorded, list) and isinstance(answer, list):
            for pair in zip(recorded, answer, strict=False):
                self.learn(*pair)
        elif ID.fullmatch(str(recorded)) and ID.fullmatch(str(answer)):
            self.ids.setdefault(recorded, answer)

    def masked(self, value: Any, name: str = "") -> Any:
        """With the stand-in's ids, and of what must differ the type only."""
        if isinstance(value, dict):
            return {self.translated(key): self.masked(item, key) for key, item in value.items()}
        if isinstance(value, list):
            return [self.masked(item) for item in value]
        if name in VARIES:
            return type(value)
        return self.translated(value) if isinstance(value, str) else (type(value), value)

    def seed(self, number: int) -> None:
        """Put into the stand-in what the recorded server already had when it was first asked about it."""
        for kind, doc in shown(self.exchanges[number]):
            docs = getattr(self.server, kind)
            if doc["id"] in self.made or self.exchanges[number]["status"] != 200:
                continue
            if doc["id"] not in docs:
                created = getattr(self.server, f"{kind}_create")(**PRIOR[kind])["id"]
                docs[doc["id"]] = dict(ChainMap(*self.later(number, kind, doc["id"]), docs.pop(created)))
                docs[doc["id"]] |= {"entries": []} if kind == "queues" else {}
            if "entries" in doc:
                docs[doc["id"]]["entries"] = deepcopy(doc["entries"])
        data = self.exchanges[number]["response"]["data"]
        for event in data.get("events", []):
            if event["task"] not in self.made:
                self.server.events[event["task"]].setdefault(json.dumps(event), event)

    def later(self, number: int, kind: str, doc_id: str) -> Iterator[dict[str, Any]]:
        """What the recording shows of a document, up to the first time that it shows all of it."""
        for exchange in self.exchanges[number:]:
            for other_kind, doc in shown(exchange):
                if (other_kind, doc["id"]) == (kind, doc_id):
                    yield doc
                    if "company" in doc:
                        return

    def step(self, number: int) -> None:
        exchange = self.exchanges[number]
        asked, recorded = exchange["request"], exchange["response"]
        self.seed(number)
        if exchange["path"] == "/auth.login":
            keys = {} if exchange["status"] == 200 else {"secret_key": "wrong"}
            status, answer = self.client.log_in(**keys)
        else:
            lines = asked if isinstance(asked, list) else [asked]
            body = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
            sent = self.translated(body)
            status, answer = self.client.send(exchange["path"], sent, exchange["ctype"], exchange["method"])
        self.learn(recorded["data"], answer["data"])
        for name in ("result_subcode", "endpoint", "result_msg"):
            assert self.masked(answer["meta"][name]) == self.masked(recorded["meta"][name]), exchange["path"]
        assert status == exchange["status"]
        assert self.masked(answer["data"]) == self.masked(recorded["data"]), f"{number} {exchange['path']}"


@pytest.mark.parametrize("recording", ["recording", "agent-and-cleanup"])
def test_answers_as_recorded(server: ClearMLServer, recording: str) -> None:
    exchanges = [json.loads(line) for line in (DATA / f"{recording}.jsonl").read_text().splitlines()]
    server.queues.clear()  # the recorded server has a default queue of its own
    replay = Replay(server, exchanges)
    for number in range(len(exchanges)):
        replay.step(number)


# Calls, without HTTP


@pytest.fixture
def calls(tmp_path: Path) -> ClearMLServer:
    """A stand-in that is called directly."""
    return ClearMLServer(tmp_path / "server")


@pytest.fixture
def world(calls: ClearMLServer) -> dict[str, str]:
    """Ids of a project with a task in each of five states, and of a model of the published one."""
    ids = {"project": calls.projects_create("a project")["id"]}
    for state in ("created", "in_progress", "completed", "failed", "published"):
        ids[state] = calls.tasks_create(f"{state} task", "training", project=ids["project"])["id"]
        calls.tasks[ids[state]]["status"] = state
    ids["model"] = calls.models_create("s3://bucket/m.pt", "a model", ready=True, task=ids["published"])["id"]
    return ids


SHORT = "Data validation error: name=String value is too short"
TRANSITION = "Invalid task status (Invalid status change): current_status={}, new_status={}"
CLOSED = "Invalid task status: expected=created, status=completed"
ARTIFACT = {"key": "k", "type": "t"}
REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("tasks.edit", {"task": NOBODY, "name": "new name"}, 101, f"Invalid task id: id={NOBODY}, company={COMPANY}"),
    ("tasks.edit", {"task": "{completed}", "script": {}}, 110, CLOSED),
    ("tasks.add_or_update_artifacts", {"task": "{completed}", "force": True, "artifacts": [ARTIFACT]}, 110, CLOSED),
    ("tasks.create", {"name": "ab", "type": "training"}, 800, SHORT),
    ("tasks.started", {"task": "{published}"}, 110, TRANSITION.format("published", "in_progress")),
    ("tasks.completed", {"task": "{created}"}, 110, TRANSITION.format("created", "completed")),
    ("tasks.stopped", {"task": "{completed}"}, 110, TRANSITION.format("completed", "stopped")),
    ("tasks.publish", {"task": "{in_progress}"}, 110, TRANSITION.format("in_progress", "published")),
    ("tasks.delete", {"task": "{in_progress}"}, 123, "Task cannot be deleted (due to status, use force=True): "),
    ("projects.create", {"name": "a project"}, 801, "Project with the same name already exists: name=a project"),
    ("models.create", {"name": "m", "uri": "s3://b/m"}, 800, SHORT),
]


@pytest.mark.parametrize(("name", "data", "subcode", "message"), REFUSED)
def test_refuses_as_the_real_server_does(
    calls: ClearMLServer, world: dict[str, str], name: str, data: dict[str, Any], subcode: int, message: str
) -> None:
    data = {key: value.format(**world) if isinstance(value, str) else value for key, value in data.items()}
    with pytest.raises(ApiError, match=f"^{re.escape(message)}") as refusal:
        HANDLERS[name][0](calls, **data)
    assert (refusal.value.code, refusal.value.subcode) == (400, subcode)


def test_force_overrules_the_state(calls: ClearMLServer, world: dict[str, str]) -> None:
    assert calls.tasks_edit(world["completed"], force=True, comment="x")["updated"] == 1
    assert calls.tasks_started(world["completed"], force=True)["started"] == 1
    assert calls.tasks_delete(world["published"], force=True)["updated_models"] == 1


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({"name": "^task 1$"}, "1"),
        ({"status": ["created", "failed"], "system_tags": ["archived"]}, "4"),
        ({"status_changed": ["<2026-01-31T00:00:00"]}, "1"),
        ({"order_by": ["-status_changed", "name"]}, "3214"),
        ({"page": 1, "page_size": 3}, "4"),
    ],
)
def test_finds_orders_and_pages_tasks(calls: ClearMLServer, filters: dict[str, Any], found: str) -> None:
    for number, day in enumerate(("2026-01-30", "2026-01-31", "2026-02-01", None), 1):
        task = calls.tasks_create(f"task {number}", "training", system_tags=[] if day else ["archived"])["id"]
        if day:
            calls.tasks[task]["status_changed"] = f"{day}T00:00:00.000000+00:00"
    calls.tasks_create("hidden task", "training", system_tags=["hidden"])
    tasks = calls.tasks_get_all(only_fields=["name"], **filters)["tasks"]
    assert "".join(task["name"].removeprefix("task ") for task in tasks) == found


def test_a_page_has_500_at_most(calls: ClearMLServer) -> None:
    for number in range(501):
        calls.tasks_create(f"task {number}", "training")
    assert [len(calls.tasks_get_all(page=page, page_size=1000)["tasks"]) for page in (0, 1)] == [500, 1]


def test_events_come_in_batches(calls: ClearMLServer, world: dict[str, str]) -> None:
    for number in range(100):
        calls.events[world["created"]][str(number)] = {"type": "plot", "iter": number}
    first = calls.events_get_task_events(world["created"], "plot", batch_size=60)
    rest = calls.events_get_task_events(world["created"], "plot", scroll_id=first["scroll_id"])
    assert [event["iter"] for event in first["events"] + rest["events"]] == list(range(100))


def test_deleting_spares_a_model_that_another_task_uses(calls: ClearMLServer, world: dict[str, str]) -> None:
    task = world["in_progress"]
    used, unused = (calls.models_create(f"s3://b/{name}", name, False, task=task)["id"] for name in ("used", "unused"))
    calls.tasks_add_or_update_model(task=world["created"], name="in", model=used, type="input")
    assert calls.tasks_delete(task, force=True)["deleted_models"] == 1
    assert unused not in calls.models
    assert "task" not in calls.models_get_by_id(used)["model"]
    assert calls.models_delete(used, force=True) == {"deleted": True, "url": "s3://b/used"}


# HTTP


@pytest.mark.parametrize(
    ("authorization", "subcode", "message"),
    [
        ("", 20, "Unauthorized (missing credentials)"),
        ("Bearer x", 30, "Invalid token (invalid jwt token): reason=Not enough segments"),
    ],
)
def test_refuses_without_a_token(client: Client, authorization: str, subcode: int, message: str) -> None:
    client.authorization = authorization
    assert client.refusal("queues.get_all") == (401, subcode, message)


def test_closes_the_connection_after_each_answer(server: ClearMLServer) -> None:
    host, _, port = server.api_url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"GET /debug.ping HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n" * 2)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.0 200")
    assert answer.count(b"HTTP/1.") == 1


@pytest.mark.parametrize(
    ("path", "data", "unknown"),
    [
        ("/v2.23/tasks.share", {}, "tasks.share: no such call"),
        ("/v1.5/events.get_task_log", {"task": NOBODY}, "events.get_task_log: only known from version 2.9 on"),
        ("/v2.23/tasks.get_by_id", {"task": NOBODY, "more": 1}, "tasks.get_by_id: parameters ['more']"),
        ("/v2.23/tasks.get_all", {"started_by": "x"}, "tasks.get_all: filter started_by=x"),
        ("/v2.23/tasks.get_all", {"status": ["-created"]}, "tasks.get_all: filter status=['-created']"),
        ("/v2.23/models.delete", {"model": "{model}"}, "models.delete: without force"),
        ("/v2.23/tasks.create", {"name": "abc", "type": "training", "report": ""}, "tasks.create: fields ['report']"),
    ],
)
def test_notes_what_it_does_not_know(
    server: ClearMLServer, client: Client, path: str, data: dict[str, Any], unknown: str
) -> None:
    server.tasks_create("a task that a filter can be asked of", "training")
    model = server.models_create("s3://bucket/m.pt", "a model")["id"]
    status, answer = client.send(path, json.dumps(data).replace("{model}", model))
    assert (status, answer["meta"]["result_msg"]) == (501, unknown)
    assert server.unknown == [unknown]
    server.unknown.clear()


def test_the_file_server_stores_and_deletes(server: ClearMLServer, client: Client) -> None:
    path = "/a/b%20c.txt"
    assert client.file("POST", "/", files={"a/b c.txt": b"hello"}) == (200, b'["a/b c.txt"]')
    assert (server.files_folder / "a/b c.txt").read_text() == "hello"
    assert [client.file(method, path) for method in ("GET", "HEAD")] == [(200, b"hello"), (200, b"")]
    assert [client.file("DELETE", each)[0] for each in ("/a", path, path)] == [404, 200, 404]
    assert [client.file("GET", each)[0] for each in (path, "/%2e%2e/conftest.py")] == [404, 404]


def test_the_file_server_refuses_without_a_token_and_notes_what_it_does_not_know(
    server: ClearMLServer, client: Client
) -> None:
    assert client.file("PUT", "/a", data=b"x")[0] == 501
    assert server.unknown == ["file server: PUT /a"]
    server.unknown.clear()
    client.authorization = "Bearer x"
    assert client.file("GET", "/a")[0] == 401
