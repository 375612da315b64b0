"""The stand-in server against recordings of a real one, and what the product relies on that no recording shows.

That clearml itself works with it, in runs, clones, imports, aborts and outages, with revoked keys, is seen wherever it
stands in.
"""

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clearml_server
import pytest
import requests
from clearml_server import ApiError, ClearMLServer
from conftest import HANGS, Machine
from stores import free_port

DATA = Path(__file__).parent / "data"

# Times, tokens, and the worker, which is a header that was not recorded: their types are compared, not their values.
VARIES = {"created", "started", "completed", "added", "updated", "last_update", "status_changed", "token", "scroll_id"}
VARIES |= {"worker"}
# What neither the SDK nor this project reads.
UNREAD = {
    *("company", "user", "last_change", "last_changed_by", "last_worker_report", "active_duration", "enqueue_status"),
    *("updated_children", "updated_models", "deleted_models", "urls", "ui_cache"),
    *("fields", "metric_stats", "unique_metrics", "report_assets", "test_split", "plot_len", "@timestamp"),
    *("last_metrics", "basename", "featured", "path", "parent", "errors_info"),
}
# What the calls that made the earlier things need beyond a name.
PRIOR: dict[str, dict[str, Any]] = {"tasks": {"type": "training"}, "models": {"uri": "", "ready": False}}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ClearMLServer]:
    with ClearMLServer(tmp_path / "server") as running:
        yield running


def send(server: ClearMLServer, path: str, body: str, method: str = "GET", **options: Any) -> tuple[int, Any]:
    answer = requests.request(method, server.api_url + path, data=body.encode(), timeout=60, **options)
    return answer.status_code, answer.json()


def put_what_was_there(server: ClearMLServer) -> None:
    """What the recorded server had before, as far as its answers show it."""
    server.queues.clear()  # the recorded server has a default queue of its own
    for line in (DATA / "before.jsonl").read_text().splitlines():
        kind, doc = json.loads(line)
        if kind == "events":
            server.events[doc["task"]][line] = doc
        else:
            docs = getattr(server, kind)
            made = getattr(server, f"{kind}_create")(name="earlier", **PRIOR.get(kind, {}))["id"]
            docs[doc["id"]] = docs.pop(made) | doc


def masked(value: Any, name: str = "") -> Any:
    """Of what must differ the type only."""
    if name in VARIES:
        return type(value)
    if isinstance(value, dict):
        return {key: masked(item, key) for key, item in value.items() if key not in UNREAD}
    if isinstance(value, list):
        return [masked(item) for item in value]
    return type(value), value


@pytest.mark.parametrize("recording", ["recording", "agent-and-cleanup"])
def test_answers_as_recorded(server: ClearMLServer, recording: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in gives out the recorded ids, so that what was asked later can be asked as it was."""
    exchanges = [json.loads(line) for line in (DATA / f"{recording}.jsonl").read_text().splitlines()]
    new_id = clearml_server._new_id
    put_what_was_there(server)
    for number, exchange in enumerate(exchanges):
        asked, recorded = exchange["request"], exchange["response"]
        ids = [recorded["data"][key] for key in ("id", "scroll_id") if recorded["data"].get(key)]
        for queue in recorded["data"].get("queues", []):
            if "entries" in queue:  # what was enqueued meanwhile is in no recording
                server.queues[queue["id"]]["entries"] = [*queue["entries"]]
        monkeypatch.setattr(clearml_server, "_new_id", lambda ids=ids: ids[0] if ids else new_id())
        lines = asked if isinstance(asked, list) else [asked]
        body = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        if exchange["path"] == "/auth.login":
            secret = server.secret_key if exchange["status"] == 200 else "wrong"
            more: dict[str, Any] = {"auth": (server.access_key, secret)}
        else:
            more = {"headers": {"Authorization": f"Bearer {server.token}", "Content-Type": exchange["ctype"]}}
        status, answer = send(server, exchange["path"], body, exchange["method"], **more)
        where = f"{number} {exchange['path']}"
        assert status == exchange["status"], where
        assert answer["meta"]["result_subcode"] == recorded["meta"]["result_subcode"], where
        assert masked(answer["data"]) == masked(recorded["data"]), where


@pytest.mark.parametrize(
    ("path", "data", "words"),
    [
        ("/v2.23/tasks.share", {}, "no such call"),
        ("/v2.23/tasks.ping", {"task": "x", "more": 1}, "unexpected keyword argument 'more'"),
        ("/v2.23/models.create", {"name": "model", "uri": "", "public": True}, "fields ['public']"),
        ("/v2.23/queues.get_all", {"started_by": "x"}, "filter started_by=x"),
    ],
)
def test_notes_what_it_does_not_know(server: ClearMLServer, path: str, data: dict[str, Any], words: str) -> None:
    headers = {"Authorization": f"Bearer {server.token}"}
    status, answer = send(server, path, json.dumps(data), headers=headers)
    assert (status, [answer["meta"]["result_msg"]]) == (400, server.unknown)
    assert words in server.unknown.pop()


def test_a_second_project_of_one_name_is_refused(server: ClearMLServer) -> None:
    """Two runs that start at once rely on it: the SDK of the second one then asks for the project again."""
    server.projects_create("a project")
    with pytest.raises(ApiError, match="already exists") as refusal:
        server.projects_create("a project")
    assert (refusal.value.code, refusal.value.subcode) == (400, 801)


def test_the_file_server_wants_a_token_and_notes_what_it_does_not_know(server: ClearMLServer) -> None:
    """That it stores and deletes is seen wherever files are stored there."""
    (server.files_folder / "a").touch()
    url, headers = f"{server.files_url}/a", {"Authorization": f"Bearer {server.token}"}
    assert requests.put(url, headers=headers, timeout=60).status_code == 405
    assert server.unknown.pop() == "file server: PUT /a"
    codes = [requests.get(url, headers=these, timeout=60).status_code for these in (headers, {})]
    assert codes == [200, 401]


def test_half_a_request_of_a_process_that_ends_is_none(server: ClearMLServer) -> None:
    with socket.create_connection(("127.0.0.1", int(server.api_url.rpartition(":")[2]))) as client:
        client.sendall(b"GET /tasks.edit HTTP/1.0\r\nContent-Length: 100\r\n\r\n{")
        client.shutdown(socket.SHUT_WR)
        while client.recv(10_000):
            pass
    assert not server.unknown
    assert not server.requests


def test_as_a_script_it_prints_the_configuration_for_it(machine: Machine) -> None:
    ports = [free_port() for _ in range(3)]
    script = machine.start("tests/clearml_server.py", *ports)
    script.wait_for("# Ctrl-C ends the server.")
    machine.configure(script.stdout)
    assert [f":{port}" in script.stdout for port in ports] == [True] * 3
    run = machine.train("--dry-run")
    assert "Stored: http" in run.stdout
    script.signal(signal.SIGINT)
    script.waiting.join(HANGS)
    assert (script.returncode, script.stderr) == (0, "")
