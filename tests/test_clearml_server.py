"""The stand-in server against recordings of a real one, against clearml itself, and where it must refuse."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import ChainMap
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from clearml_server import ClearMLServer

DATA = Path(__file__).parent / "data"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ClearMLServer]:
    """A running stand-in; the test fails if it was asked anything that it does not know."""
    server = ClearMLServer(tmp_path / "server")
    server.start()
    yield server
    server.stop()
    assert not server.unknown


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
        headers = {"Content-Type": ctype} | ({"Authorization": self.authorization} if self.authorization else {})
        request = urllib.request.Request(self.server.api_url + path, body.encode() or None, headers, method=method)
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def call(self, name: str, /, **data: Any) -> Any:
        status, answer = self.send(f"/v2.23/{name}", json.dumps(data))
        assert status == 200, answer["meta"]["result_msg"]
        return answer["data"]

    def refusal(self, name: str, /, **data: Any) -> tuple[int, int, str]:
        """The code, the subcode and the text with which a call is refused."""
        status, answer = self.send(f"/v2.23/{name}", json.dumps(data))
        assert status == answer["meta"]["result_code"]
        assert answer["data"] == {}
        return status, answer["meta"]["result_subcode"], answer["meta"]["result_msg"]


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

    def compare(self, recorded: Any, answer: Any, where: str) -> Iterator[str]:
        """Every difference in fields, types, lengths and values, except the values that must differ."""
        name = where.rpartition(".")[2]
        if type(recorded) is not type(answer):
            yield f"{where}: {type(answer).__name__} {answer!r:.80} instead of {recorded!r:.80}"
        elif isinstance(recorded, dict):
            recorded = {self.translated(key): value for key, value in recorded.items()}
            if recorded.keys() != answer.keys():
                missing, extra = recorded.keys() - answer.keys(), answer.keys() - recorded.keys()
                yield f"{where}: missing {sorted(missing)}, extra {sorted(extra)}"
            for key in recorded.keys() & answer.keys():
                yield from self.compare(recorded[key], answer[key], f"{where}.{key}")
        elif isinstance(recorded, list):
            if len(recorded) != len(answer):
                yield f"{where}: {len(answer)} items instead of {len(recorded)}"
            for index, (one, other) in enumerate(zip(recorded, answer, strict=False)):
                yield from self.compare(one, other, f"{where}[{index}]")
        elif isinstance(recorded, str):
            if ID.fullmatch(recorded) and ID.fullmatch(answer):
                self.ids.setdefault(recorded, answer)
            if name not in VARIES and self.translated(recorded) != answer:
                yield f"{where}: {answer!r:.80} instead of {recorded!r:.80}"
        elif name not in VARIES and recorded != answer:
            yield f"{where}: {answer!r} instead of {recorded!r}"

    def run(self) -> Iterator[str]:
        for number, exchange in enumerate(self.exchanges):
            yield from self.step(number, exchange)

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

    def step(self, number: int, exchange: dict[str, Any]) -> Iterator[str]:
        path, asked, recorded = exchange["path"], exchange["request"], exchange["response"]
        self.seed(number)
        where = f"{number} {path.rpartition('/')[2]}"
        if path == "/auth.login":
            keys = {} if exchange["status"] == 200 else {"secret_key": "wrong"}
            status, answer = self.client.log_in(**keys)
        else:
            if exchange["ctype"] == "application/json-lines":
                lines = asked if isinstance(asked, list) else [asked]
                body = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
            else:
                body = json.dumps(asked)
            body = self.translated(body)
            status, answer = self.client.send(path, body, exchange["ctype"], exchange["method"])
        outcome = (status, answer["meta"]["result_subcode"])
        if outcome != (exchange["status"], recorded["meta"]["result_subcode"]):
            yield f"{where}: {outcome}, {answer['meta']['result_msg']}"
        yield from self.compare(recorded["meta"]["endpoint"], answer["meta"]["endpoint"], where + ": endpoint")
        yield from self.compare(recorded["meta"]["result_msg"], answer["meta"]["result_msg"], where + ": message")
        yield from self.compare(recorded["data"], answer["data"], where)


@pytest.mark.parametrize("recording", ["recording", "agent-and-cleanup"])
def test_answers_as_recorded(server: ClearMLServer, recording: str) -> None:
    exchanges = [json.loads(line) for line in (DATA / f"{recording}.jsonl").read_text().splitlines()]
    server.queues.clear()  # the recorded server has a default queue of its own
    differences = list(Replay(server, exchanges).run())
    assert not differences, "\n".join(differences)


# Refusals

NOBODY = "0" * 32
COMPANY = "d1bd92a3b039400cbafc60a7a5b1e52b"
TRANSITION = "Invalid task status (Invalid status change): current_status={}, new_status={}"


@pytest.fixture
def client(server: ClearMLServer) -> Client:
    return Client(server)


@pytest.fixture
def world(server: ClearMLServer) -> dict[str, str]:
    """Ids of a project with a task in each of five states, and of a model of the published one."""
    ids = {"project": server.projects_create("a project")["id"]}
    for state in ("created", "in_progress", "completed", "failed", "published"):
        ids[state] = server.tasks_create(f"{state} task", "training", project=ids["project"])["id"]
        server.tasks[ids[state]]["status"] = state
    ids["model"] = server.models_create("s3://bucket/m.pt", "a model", ready=True, task=ids["published"])["id"]
    return ids


@pytest.mark.parametrize(
    ("name", "data", "subcode", "message"),
    [
        ("tasks.get_by_id", {"task": NOBODY}, 101, f"Invalid task id: ids=({NOBODY})"),
        ("tasks.edit", {"task": NOBODY, "name": "new name"}, 101, f"Invalid task id: id={NOBODY}, company={COMPANY}"),
        ("tasks.started", {"task": NOBODY}, 10, "Invalid object id: task=None"),
        ("tasks.started", {}, 12, "Validation error (error for field 'task': field is required!)"),
        ("tasks.delete", {"task": NOBODY}, 101, f"Invalid task id: id={NOBODY}, company={COMPANY}"),
        (
            "tasks.create",
            {"name": "ab", "type": "training"},
            800,
            "Data validation error: name=String value is too short",
        ),
        (
            "tasks.create",
            {"name": "abc", "type": "training", "project": NOBODY},
            401,
            f"Invalid project id: id={NOBODY}",
        ),
        (
            "tasks.edit",
            {"task": "{completed}", "script": {}},
            110,
            "Invalid task status: expected=created, status=completed",
        ),
        (
            "tasks.edit",
            {"task": "{created}", "name": "x"},
            800,
            "Data validation error: name=String value is too short",
        ),
        ("tasks.started", {"task": "{published}"}, 110, TRANSITION.format("published", "in_progress")),
        ("tasks.completed", {"task": "{created}"}, 110, TRANSITION.format("created", "completed")),
        ("tasks.stopped", {"task": "{completed}"}, 110, TRANSITION.format("completed", "stopped")),
        ("tasks.publish", {"task": "{in_progress}"}, 110, TRANSITION.format("in_progress", "published")),
        (
            "tasks.add_or_update_artifacts",
            {"task": "{completed}", "force": True, "artifacts": [{"key": "k", "type": "t"}]},
            *(110, "Invalid task status: expected=created, status=completed"),
        ),
        (
            "tasks.delete",
            {"task": "{in_progress}"},
            *(123, "Task cannot be deleted (due to status, use force=True): "),
        ),
        (
            "tasks.enqueue",
            {"task": "{created}", "queue": NOBODY},
            701,
            f"Invalid queue id: id={NOBODY}, company={COMPANY}",
        ),
        ("projects.create", {"name": "ab"}, 12, "Validation error (Project name cannot be blank)"),
        ("projects.create", {"name": "a project"}, 801, "Project with the same name already exists: name=a project"),
        ("projects.get_by_id", {"project": NOBODY}, 401, f"Invalid project id: id={NOBODY}"),
        (
            "models.create",
            {"name": "m", "uri": "s3://b/m"},
            800,
            "Data validation error: name=String value is too short",
        ),
        ("models.get_by_id", {"model": NOBODY}, 201, "Invalid model id (no such public or company model): id="),
        ("models.edit", {"model": NOBODY}, 201, f"Invalid model id: company={COMPANY}, id={NOBODY}"),
        (
            "models.delete",
            {"model": "{model}"},
            206,
            "Task that created this model exists (and published, use force=True",
        ),
        ("models.set_ready", {"model": "{model}"}, 203, f"Model is ready: company={COMPANY}, model="),
        (
            "events.get_task_events",
            {"task": "{created}", "event_type": "log", "scroll_id": "x"},
            1104,
            "Invalid scroll id",
        ),
    ],
)
def test_refuses(
    client: Client, world: dict[str, str], name: str, data: dict[str, Any], subcode: int, message: str
) -> None:
    data = {key: value.format(**world) if isinstance(value, str) else value for key, value in data.items()}
    code, found_subcode, found_message = client.refusal(name, **data)
    assert (code, found_subcode) == (400, subcode)
    assert found_message.startswith(message)


def test_force_overrules_the_state(client: Client, world: dict[str, str]) -> None:
    assert client.call("tasks.edit", task=world["completed"], force=True, comment="x")["updated"] == 1
    assert client.call("tasks.started", task=world["completed"], force=True)["started"] == 1
    assert client.call("tasks.delete", task=world["published"], force=True)["updated_models"] == 1


@pytest.mark.parametrize(
    ("authorization", "subcode", "message"),
    [
        ("", 20, "Unauthorized (missing credentials)"),
        ("Digest x", 10, "Unauthorized (bad authentication header type)"),
        ("Basic x", 21, "Unauthorized (malformed credentials)"),
        (
            "Basic " + base64.b64encode(b"some:body").decode(),
            *(22, "Unauthorized (invalid credentials) (failed to locate provided credentials)"),
        ),
        ("Bearer x", 30, "Invalid token (invalid jwt token): reason=Not enough segments"),
    ],
)
def test_refuses_without_the_right_keys(client: Client, authorization: str, subcode: int, message: str) -> None:
    client.authorization = authorization
    assert client.refusal("users.get_current_user") == (401, subcode, message)
    assert client.send("/debug.ping", "")[0] == 200


def test_tokens_expire(server: ClearMLServer, client: Client) -> None:
    expired = (401, 30, "Invalid token (invalid jwt token): reason=Signature has expired")
    assert client.call("users.get_current_user")["user"]["company"] == {"id": COMPANY, "name": "clearml"}
    server.expire_tokens()
    assert client.refusal("users.get_current_user") == expired
    client.log_in()
    client.call("users.get_current_user")
    server.token_lifetime = -1
    client.log_in()
    assert client.refusal("users.get_current_user") == expired


# HTTP


def test_closes_the_connection_after_each_answer(server: ClearMLServer) -> None:
    host, _, port = server.api_url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"GET /debug.ping HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n" * 2)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.0 200")
    assert answer.count(b"HTTP/1.") == 1


@pytest.mark.parametrize("path", ["/debug.ping", "/v2.23/debug.ping", "/v2.9/debug.ping/"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_answers_any_version_and_method(client: Client, path: str, method: str) -> None:
    status, answer = client.send(path, "", method=method)
    assert (status, answer["data"]) == (200, {"msg": "ClearML server"})


def test_refuses_other_paths(client: Client) -> None:
    assert client.send("/nothing", "")[1]["meta"]["result_msg"] == "Invalid request path /nothing"
    assert client.refusal("workers.get_runtime_properties", worker="w")[0] == 404


@pytest.mark.parametrize(
    ("path", "data", "unknown"),
    [
        ("/v2.23/tasks.share", {}, "tasks.share: no such call"),
        ("/v1.5/events.get_task_log", {"task": NOBODY}, "events.get_task_log: only known from version 2.9 on"),
        ("/v2.23/tasks.get_by_id", {"task": NOBODY, "more": 1}, "tasks.get_by_id: parameters ['more']"),
        ("/v2.23/tasks.get_all", {"started_by": "x"}, "tasks.get_all: filter started_by=x"),
        ("/v2.23/tasks.create", {"name": "abc", "type": "training", "report": ""}, "tasks.create: fields ['report']"),
    ],
)
def test_notes_what_it_does_not_know(
    server: ClearMLServer, client: Client, world: dict[str, str], path: str, data: dict[str, Any], unknown: str
) -> None:
    status, answer = client.send(path, json.dumps(data))
    assert (status, answer["meta"]["result_msg"]) == (501, unknown)
    assert server.unknown == [unknown]
    server.unknown.clear()


def test_stops_and_starts_again(server: ClearMLServer, client: Client, world: dict[str, str]) -> None:
    url = server.api_url
    server.stop()
    with pytest.raises(urllib.error.URLError):
        client.call("tasks.get_all")
    server.start()
    assert server.api_url == url
    assert len(client.call("tasks.get_all")["tasks"]) == 5


def test_file_server(server: ClearMLServer, client: Client) -> None:
    def ask(method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        headers["Authorization"] = client.authorization
        request = urllib.request.Request(server.files_url + path, body or None, headers, method=method)
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    part = b'--x\r\nContent-Disposition: form-data; name="a/b c.txt"; filename="b"\r\n\r\nhello\r\n--x--\r\n'
    assert ask("POST", "/", part, **{"Content-Type": "multipart/form-data; boundary=x"}) == (200, b'["a/b c.txt"]')
    assert (server.files_folder / "a" / "b c.txt").read_text() == "hello"
    assert ask("GET", "/a/b%20c.txt") == (200, b"hello")
    assert ask("HEAD", "/a/b%20c.txt") == (200, b"")
    assert ask("DELETE", "/a/b%20c.txt")[0] == 200
    assert ask("GET", "/a/b%20c.txt")[0] == ask("DELETE", "/a")[0] == ask("GET", "/../conftest.py")[0] == 404
    client.authorization = "Bearer x"
    assert ask("GET", "/a/b%20c.txt")[0] == 401
    client.log_in()
    assert ask("PUT", "/a", b"x")[0] == 501
    assert server.unknown == ["file server: PUT /a"]
    server.unknown.clear()


def test_runs_as_a_program() -> None:
    command = [sys.executable, str(DATA.parent / "clearml_server.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        urls = re.findall(r'"(http.*)"', "".join(process.stdout.readline() for _ in range(4)))
        for url, path in zip(urls, ("/debug.ping", "/", "/"), strict=True):
            with urllib.request.urlopen(url + path) as response:
                assert response.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0


# Filters, events, deleting


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({"name": "^task 1$"}, "1"),
        ({"name": "task [12]"}, "12"),
        ({"tags": ["a"]}, "12"),
        ({"tags": ["a", "b"]}, "123"),
        ({"tags": ["__$all", "a", "b"]}, "2"),
        ({"tags": ["__$not", "a"]}, "34"),
        ({"tags": ["-a", "b"]}, "3"),
        ({"tags": ["__$all", "a", "__$not", "b"]}, "1"),
        ({"tags": ["__$or", "a", "__$not", "b"]}, "124"),
        ({"tags": [None]}, "4"),
        ({"tags": ["b", None]}, "234"),
        ({"status": ["created"], "type": ["testing"]}, "4"),
        ({"status_changed": ["<2026-01-31T00:00:00"]}, "1"),
        ({"status_changed": [">=2026-01-31T00:00:00", "<=2026-02-01T00:00:00+00:00"]}, "23"),
        ({"_any_": {"fields": ["name", "comment"], "pattern": "TASK 2|four"}}, "24"),
        ({"order_by": ["-name"]}, "4321"),
        ({"order_by": ["status_changed"]}, "1234"),
        ({"order_by": ["-status_changed", "name"]}, "3214"),
        ({"page": 1, "page_size": 3}, "4"),
    ],
)
def test_filters(server: ClearMLServer, client: Client, filters: dict[str, Any], found: str) -> None:
    days: list[str | None] = ["2026-01-30", "2026-01-31", "2026-02-01", None]
    for number, (tags, day) in enumerate(zip(["a", "ab", "b", ""], days, strict=True), 1):
        fields = {"tags": list(tags), "comment": "number four" if number == 4 else ""}
        task = server.tasks_create(f"task {number}", "testing" if number == 4 else "training", **fields)["id"]
        if day:
            server.tasks[task]["status_changed"] = f"{day}T00:00:00.000000+00:00"
    server.tasks_create("hidden task", "training", system_tags=["hidden"])
    tasks = client.call("tasks.get_all", only_fields=["name"], **filters)["tasks"]
    assert "".join(task["name"].removeprefix("task ") for task in tasks) == found


def test_only_the_requested_fields(client: Client, world: dict[str, str]) -> None:
    asked = ["execution.artifacts", "output.destination", "status"]
    answer = client.call("tasks.get_all", id=[world["created"]], only_fields=asked)
    assert answer == {"tasks": [{"execution": {"artifacts": []}, "status": "created"}]}


def test_projects_have_parents(server: ClearMLServer, client: Client) -> None:
    child = client.call("projects.create", name="parent/child")["id"]
    (parent,) = client.call("projects.get_all", shallow_search=True)["projects"]
    assert (parent["name"], server.projects[child]["path"]) == ("parent", [parent["id"]])


def scalar(task: str, iteration: int, value: float, **more: Any) -> dict[str, Any]:
    event = {"type": "training_stats_scalar", "metric": "loss", "variant": "train", "iter": iteration}
    return {"task": task, "value": value, **event, **more}


def send_events(client: Client, events: list[dict[str, Any]]) -> tuple[int, Any]:
    lines = "\n".join(map(json.dumps, events))
    return client.send("/v2.23/events.add_batch", lines, "application/json-lines", "POST")


def test_long_curves_are_averaged_and_read_in_batches(client: Client, world: dict[str, str]) -> None:
    task = world["in_progress"]
    send_events(client, [scalar(task, number, number % 2) for number in range(100)])
    curve = client.call("events.scalar_metrics_iter_histogram", task=task, samples=10)["loss"]["train"]
    assert (curve["x"], curve["y"]) == (list(range(0, 100, 10)), [0.5] * 10)
    first = client.call("events.get_task_events", task=task, event_type="training_stats_scalar", batch_size=60)
    rest = client.call(
        "events.get_task_events", task=task, event_type="training_stats_scalar", scroll_id=first["scroll_id"]
    )
    assert [event["iter"] for event in first["events"] + rest["events"]] == list(range(100))


def test_events_sum_up_over_batches(server: ClearMLServer, client: Client, world: dict[str, str]) -> None:
    task = world["in_progress"]
    send_events(client, [scalar(task, 1, 4.0), scalar(task, 2, 1.0)])
    send_events(client, [scalar(task, 3, 2.0), scalar(task, 50, 1.0, metric=":monitor:gpu")])
    ((summary,), _) = (variants.values() for variants in server.tasks[task]["last_metrics"].values())
    assert server.tasks[task]["last_iteration"] == 3
    assert {key: summary[key] for key in ("value", "min_value", "max_value", "first_value", "count", "mean_value")} == {
        **{"value": 2.0, "min_value": 1.0, "max_value": 4.0, "first_value": 4.0, "count": 3, "mean_value": 2.33}
    }


def test_events_for_closed_or_unknown_tasks(client: Client, world: dict[str, str]) -> None:
    status, answer = send_events(client, [scalar(world["published"], 1, 1.0)])
    assert (status, answer["meta"]["result_subcode"]) == (400, 131)
    _, answer = send_events(client, [scalar(world["published"], 1, 1.0, allow_locked=True), scalar(NOBODY, 1, 1.0)])
    assert answer["data"] == {"added": 1, "errors": 1, "errors_info": {f"Invalid task id {NOBODY}": 1}}
    assert send_events(client, [])[1]["meta"]["result_subcode"] == 17


@pytest.mark.parametrize(
    ("tags", "worker", "status", "message"),
    [
        (["development"], "", "stopped", "Stopped by tester"),
        ([], "", "stopped", "Stopped by tester"),
        ([], "agent:0", "in_progress", "stopping"),
    ],
)
def test_abort_stops_or_asks_the_agent(
    server: ClearMLServer, client: Client, tags: list[str], worker: str, status: str, message: str
) -> None:
    task = client.call("tasks.create", name="a task", type="training", system_tags=tags)["id"]
    client.call("tasks.started", task=task)
    if worker:
        client.call("workers.status_report", worker=worker, task=task, timestamp=0)
    server.abort(task)
    assert (server.tasks[task]["status"], server.tasks[task]["status_message"]) == (status, message)


def test_deleting_spares_a_model_that_another_task_uses(client: Client, world: dict[str, str]) -> None:
    task = world["in_progress"]
    used, unused = (
        client.call("models.create", name=f"model {number}", uri=f"s3://b/{number}", ready=False, task=task)["id"]
        for number in range(2)
    )
    client.call("tasks.add_or_update_model", task=world["created"], name="in", model=used, type="input")
    child = client.call("tasks.clone", task=task)["id"]
    assert client.call("tasks.delete", task=task, force=True, return_file_urls=True) == {
        **{"deleted": True, "updated_children": 1, "updated_models": 0, "deleted_models": 1},
        "urls": {"model_urls": ["s3://b/1"], "artifact_urls": [], "event_urls": []},
    }
    (kept,) = client.call("models.get_all", id=[used, unused])["models"]
    assert (kept["id"], "task" in kept) == (used, False)
    assert client.call("tasks.get_by_id", task=child)["task"]["parent"] == f"__DELETED__{task}"
    assert client.refusal("models.delete", model=used)[:2] == (400, 205)
    assert client.call("models.delete", model=used, force=True) == {"deleted": True, "url": "s3://b/0"}


def test_reset_empties_a_task(server: ClearMLServer, client: Client, world: dict[str, str]) -> None:
    task = world["in_progress"]
    send_events(client, [scalar(task, 1, 4.0)])
    client.call("tasks.reset", task=task)
    assert server.tasks[task]["status"] == "created"
    assert server.tasks[task]["last_metrics"] == server.events.get(task, {}) == {}


# clearml itself

MAKE = """
import numpy as np
from clearml import OutputModel, Task

task = Task.init("Stand-in/Round trip", "first run", tags=["demo"], output_uri=True, auto_connect_frameworks=False)
task.set_comment("a comment")
task.connect({"lr": 0.5}, name="Model")
task.connect_configuration({"layers": [1, 2]}, name="net")
log = task.get_logger()
for epoch in (1, 2):
    log.report_scalar("loss", "train", 1 / epoch, iteration=epoch)
log.report_single_value("accuracy", 0.75)
log.report_table("per class", "test", iteration=2, table_plot=[["digit", "acc"], ["0", "1"]])
log.report_image("wrong", "7 as 1", iteration=2, image=np.zeros((8, 8), dtype=np.uint8))
log.report_text("a line of text")
task.upload_artifact("numbers", {"a": 1}, wait_on_upload=True)
for name, what in (("registered", {"register_uri": "s3://elsewhere/model.pt"}), ("uploaded", {"async_enable": False})):
    with open(f"{name}.pt", "w") as file:
        file.write(name)
    if name == "uploaded":
        what["weights_filename"], what["auto_delete_file"] = file.name, False
    OutputModel(task, name=name, framework="PyTorch", label_enumeration={"zero": 0}).update_weights(**what)
print("the last words")
"""

READ = """
import json
from pathlib import Path
from clearml import Task

task = Task.get_task(project_name="Stand-in/Round trip", task_name="first run")
models = task.get_models()["output"]
print(json.dumps({
    "status": task.get_status(),
    "comment": task.comment,
    "tags": task.get_tags(),
    "lr": task.get_parameter("Model/lr", cast=True),
    "net": task.get_configuration_object_as_dict("net"),
    "scalars": task.get_reported_scalars(),
    "points": task.get_all_reported_scalars()["loss"]["train"]["y"],
    "single values": task.get_reported_single_values(),
    "last": task.get_last_scalar_metrics()["loss"]["train"],
    "accuracy": task.get_last_scalar_metrics()["Summary"]["accuracy"]["last"],
    "iteration": task.get_last_iteration(),
    "plots": [[plot["metric"], plot["variant"]] for plot in task.get_reported_plots()],
    "console": task.get_reported_console_output(100),
    "images": [image["url"] for image in task.get_debug_samples("wrong", "7 as 1")],
    "artifact": task.artifacts["numbers"].get(),
    "models": {model.name: model.url for model in models},
    "labels": models[0].labels,
    "weights": Path(models[1].get_local_copy()).read_text(),
}))
"""


def start_sdk(server: ClearMLServer, folder: Path, script: str, **environment: str) -> subprocess.Popen[str]:
    """Start a script with clearml in a HOME of its own; it looks every second whether it was aborted."""
    folder.mkdir(exist_ok=True)
    settings = "sdk.development { report_use_subprocess: false, worker { ping_period_sec: 1 } }\n"
    (folder / "clearml.conf").write_text(server.configuration() + settings)
    (folder / "script.py").write_text(script)
    env = {key: value for key, value in os.environ.items() if not key.startswith(("CLEARML", "TRAINS"))}
    env |= {"HOME": str(folder), **environment}
    return subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_sdk(server: ClearMLServer, folder: Path, script: str, **environment: str) -> str:
    """Run such a script to its end; give back the last line that it wrote."""
    with start_sdk(server, folder, script, **environment) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output.splitlines()[-1]


def test_sdk_reads_back_what_it_wrote(server: ClearMLServer, tmp_path: Path) -> None:
    run_sdk(server, tmp_path / "home", MAKE)
    found = json.loads(run_sdk(server, tmp_path / "other home", READ))
    task_id, task = next(iter(server.tasks.items()))
    uploads = f"{server.files_url}/Stand-in/Round trip/first run.{task_id}"
    console = "".join(found.pop("console"))
    assert all(text in console for text in ("created new task", "a line of text", "the last words"))
    assert found == {
        "status": "completed",
        "comment": task["comment"],
        "tags": ["demo"],
        "lr": 0.5,
        "net": {"layers": [1, 2]},
        "scalars": {"loss": {"train": {"name": "train", "x": [1, 2], "y": [1.0, 0.5]}}},
        "points": [1.0, 0.5],
        "single values": {"accuracy": 0.75},
        "last": {"last": 0.5, "min": 0.5, "max": 1.0},
        "accuracy": 0.75,
        "iteration": 2,
        "plots": [["per class", "test"]],
        "images": [f"{uploads}/metrics/wrong/7%20as%201/wrong_7%20as%201_00000000.jpeg".replace(" ", "%20")],
        "artifact": {"a": 1},
        "models": {"registered": "s3://elsewhere/model.pt", "uploaded": f"{uploads}/models/uploaded.pt"},
        "labels": {"zero": 0},
        "weights": "uploaded",
    }
    assert "a comment" in task["comment"]
    assert len(list(server.files_folder.rglob("*.*"))) == 3 + 1  # artifact, model, image, and the task's folder


OFFLINE = """
from clearml import Task

task = Task.init("Stand-in", "offline run", auto_connect_frameworks=False)
task.get_logger().report_scalar("loss", "train", 0.25, iteration=7)
task.upload_artifact("numbers", {"a": 1}, wait_on_upload=True)
task.close()
print(task.get_offline_mode_folder())
"""

MANAGE = """
import json, os
from clearml import Task
from clearml.backend_api.session.client import APIClient

imported = Task.get_task(task_id=Task.import_offline_session(os.environ["SESSION"]))
archived = {"system_tags": ["archived"], "status_changed": ["<2026-01-31T00:00:00"]}
many = Task.query_tasks(project_name="Many tasks", task_filter=archived)
imported.set_archived(True)
seen = {
    "imported": imported.get_reported_scalars()["loss"]["train"]["y"],
    "artifact": imported.artifacts["numbers"].get(),
    "many": len(set(many)),
    "first page": len(Task.get_tasks(project_name="Many tasks")),
    "in silence": len(APIClient().tasks.get_all(name="^task ")),
    "not archived": Task.query_tasks(task_filter={"system_tags": ["-archived"]}),
    "gone": Task.get_task(task_id=many[0]).delete(raise_on_error=True),
    "deleted": imported.delete(raise_on_error=True),
}
print(json.dumps({key: bool(value) if key in ("gone", "deleted") else value for key, value in seen.items()}))
"""


def test_sdk_imports_queries_archives_and_deletes(server: ClearMLServer, tmp_path: Path) -> None:
    project = server.projects_create("Many tasks")["id"]
    for number in range(520):
        fields = {"project": project, "system_tags": ["archived"]}
        task = server.tasks[server.tasks_create(f"task {number}", "training", **fields)["id"]]
        task["status_changed"] = "2026-01-30T23:59:59.000000+00:00" if number else "2026-01-31T00:00:00.000000+00:00"
    session = run_sdk(server, tmp_path / "home", OFFLINE, CLEARML_OFFLINE_MODE="1")
    assert not server.requests
    assert json.loads(run_sdk(server, tmp_path / "home", MANAGE, SESSION=f"{session}.zip")) == {
        "imported": [0.25],
        "artifact": {"a": 1},
        "many": 519,
        "first page": 500,
        "in silence": 500,
        "not archived": [],
        "gone": True,
        "deleted": True,
    }
    assert len(server.tasks) == 519
    assert not [path for path in server.files_folder.rglob("*") if path.is_file()]


STOPPABLE = """
import time
from clearml import Task

task = Task.init("Stand-in", "endless run", auto_connect_frameworks=False, auto_resource_monitoring=False)
while True:
    time.sleep(0.1)
"""


def test_sdk_obeys_an_abort_and_survives_an_outage(server: ClearMLServer, tmp_path: Path) -> None:
    """The token expires and the server dies for a moment; then the run is aborted in the web page."""
    with start_sdk(server, tmp_path / "home", STOPPABLE) as process:
        eventually(lambda: any(task["status"] == "in_progress" for task in server.tasks.values()))
        server.expire_tokens()
        server.stop()
        seen = len(server.requests)
        time.sleep(1)
        server.start()
        eventually(lambda: any(request.path == "auth.login" for request in server.requests[seen:]))
        (task_id,) = server.tasks
        server.abort(task_id)
        output, _ = process.communicate(timeout=60)
    assert "USER ABORTED" in output
    assert process.returncode != 0
    assert server.tasks[task_id]["status"] == "stopped"
