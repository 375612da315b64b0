"""A stand-in for a ClearML server: API server, file server and a one-line web page, all on 127.0.0.1.

It answers the calls that clearml 2.1.12 and clearml-agent 3.0.3 make in this project the way the open-source
server (API 2.34) answers them: the same fields, the same refusals, the same error codes. Everything is in
memory except the uploaded files. A call or a parameter that it does not know is refused (by 400: the SDK repeats
a call for ever that a 501 answers) and noted in `ClearMLServer.unknown`, because an invented answer proves nothing.
Fields that neither the SDK nor this project reads are left out.
"""

import json
import math
import re
import ssl
import struct
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from copy import deepcopy
from datetime import UTC, datetime
from functools import partial, partialmethod, reduce
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Self

import jwt
import werkzeug
from werkzeug.exceptions import ClientDisconnected
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

Doc = dict[str, Any]
Names = Collection[str]

API_VERSION = "2.34"
COMPANY = "d1bd92a3b039400cbafc60a7a5b1e52b"  # the company of every open-source server
USER = "dba89b6cc7e18ad770f4e80dc22918df"
SINGLE_VALUE = -(2**31)  # the "iteration" of Logger.report_single_value
SERVICES = ("auth", "debug", "events", "models", "projects", "queues", "tasks", "workers")
NOT_OPEN_SOURCE = "workers.get_runtime_properties"  # asked for by the agent, answered with 404
NO_SUCH = {"task": 101, "model": 201, "project": 401, "queue": 701}  # the subcodes of these refusals

OPEN = ("created", "queued", "in_progress")  # the states of a task that has not ended

# The states that each state may change into without `force`.
TRANSITIONS = {
    "created": {"queued", "in_progress"},
    "queued": {"created", "in_progress", "stopped"},
    "in_progress": {"stopped", "failed", "created", "completed"},
    "stopped": {"created", "failed", "queued", "in_progress", "completed"},
    "failed": {"created", "stopped", "queued"},
    "completed": {"in_progress", "created"},
}
TASK_FIELDS = {
    *("name", "tags", "system_tags", "type", "comment", "parent", "project", "models", "container"),
    *("output_dest", "execution", "hyperparams", "configuration", "script", "runtime"),
}
MODEL_FIELDS = {
    *("name", "tags", "system_tags", "task", "comment", "parent", "project"),
    *("uri", "framework", "design", "labels", "ready", "metadata"),
}
UNCOUNTED_METRICS = {":monitor:machine", ":monitor:gpu"}  # their iterations are seconds
# Parameters that make no difference here: for the web page, for a deleting service, for ids of models.
IGNORED = {
    *("method", "model_events", "no_scroll", "move_to_trash", "delete_external_artifacts"),
    *("machine_stats", "timestamp", "is_daemon", "search_hidden", "iteration"),
}
# Parameters of which only this value is known.
SETTLED = [
    *(("public", False), ("publish", False), ("shallow_search", False), ("verify_watched_queue", False)),
    *(("navigate_earlier", True), ("replace_metadata", True), ("key", "iter"), ("order", "asc")),
]
# The fields by which a *.get_all call can ask for some of several values.
FILTERS = {"id", "system_tags", "status", "project", "parent", "models.input.model", "uri", "task"}


class Request(NamedTuple):
    """One request as it came in: path is "tasks.edit" for a call to the API server, "/a/b" for a file."""

    method: str
    path: str
    data: Any


class ApiError(Exception):
    """A refusal, with the text, subcode and code of the real server."""

    def __init__(self, text: str, subcode: int = 0, code: int = 400) -> None:
        super().__init__(text)
        self.subcode, self.code = subcode, code


class _Connection(WSGIRequestHandler):
    """One request, quietly and by HTTP/1.0, because clearml shares its sockets with forked processes."""

    protocol_version = "HTTP/1.0"

    def log(self, *_: Any) -> None:
        pass


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _new_id() -> str:
    return uuid.uuid4().hex


def _get(doc: Doc, path: str) -> Any:
    value: Any = doc
    for key in path.split("."):
        if isinstance(value, list):
            value = [item.get(key) for item in value]
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value


def _pick(doc: Doc, paths: Iterable[str]) -> Doc:
    """The document reduced to the requested fields; what it does not have is left out."""
    picked: Doc = {}
    for path in paths:
        *parents, last = path.split(".")
        value = _get(doc, path)
        if value is not None:
            reduce(lambda at, key: at.setdefault(key, {}), parents, picked)[last] = value
    return picked


def _matches(doc: Doc, field: str, wanted: Any) -> bool:
    value = _get(doc, field)
    if field == "name":
        return bool(re.search(wanted, value))
    if field == "status_changed" and all(re.match("<[^=]", limit) for limit in wanted):
        return value is not None and all(value < limit[1:] for limit in wanted)  # both in UTC
    if field in FILTERS and not any(item.startswith(("-", "__$")) for item in wanted):
        return not set(wanted).isdisjoint(value if isinstance(value, list) else [value])
    raise NotImplementedError(f"filter {field}={wanted}")


def _curves(events: Iterable[Doc]) -> dict[tuple[str, str], list[Doc]]:
    """The events of each metric and variant, in the order of these names."""
    curves: defaultdict[tuple[str, str], list[Doc]] = defaultdict(list)
    for event in events:
        curves[event["metric"], event["variant"]].append(event)
    return dict(sorted(curves.items()))


def _sum_up(points: Iterable[Doc]) -> Doc:
    """What a task says of its curves."""
    summaries: defaultdict[str, Doc] = defaultdict(dict)
    for (metric, variant), curve in _curves(points).items():
        values = [point["value"] for point in curve]
        summary = {"value": max(curve, key=itemgetter("iter", "timestamp"))["value"]}
        summary |= {"min_value": min(values), "max_value": max(values), "metric": metric, "variant": variant}
        summaries[metric][variant] = summary
    return summaries


def _artifacts(items: Iterable[Doc]) -> list[Doc]:
    """Artifacts with their defaults; one with the same key and mode replaces an earlier one."""
    complete = ({"mode": "output", "display_data": [], **item} for item in items)
    return sorted({(item["key"], item["mode"]): item for item in complete}.values(), key=itemgetter("key"))


def _check_fields(fields: Doc, known: set[str]) -> None:
    if unknown := fields.keys() - known:
        raise NotImplementedError(f"fields {sorted(unknown)}")


class ClearMLServer:
    """Stand-in for a ClearML server; its state may be read and changed by a test.

    The method `tasks_create` answers the call tasks.create, and has its parameters. A test may replace such a method.
    """

    access_key = "stand-in-access-key"
    secret_key = "stand-in-secret-key"

    def __init__(self, folder: Path, ports: list[int] | None = None) -> None:
        self.files_folder = folder / "files"
        self.files_folder.mkdir(parents=True)
        self.api_url = self.files_url = self.web_url = ""  # known once started
        self.requests: list[Request] = []
        self.unknown: list[str] = []
        self.tasks: dict[str, Doc] = {}
        self.models: dict[str, Doc] = {}
        self.projects: dict[str, Doc] = {}
        self.queues: dict[str, Doc] = {}
        self.events: defaultdict[str, dict[str, Doc]] = defaultdict(dict)  # by task, then by event id
        self._scrolls: dict[str, float] = {}  # how far the answers of each have come
        self._lock = threading.RLock()
        self._ports = [*(ports or []), 0, 0, 0][:3]  # of API, files and web page; 0: a free one
        self._running: list[tuple[BaseWSGIServer, threading.Thread]] = []
        self.renew_secret()
        self.queues_create("default")

    def start(self, tls: ssl.SSLContext | None = None) -> None:
        """Serve; after `stop` on the same ports, with the same state."""
        for number, answer in enumerate((self.answer_api, self.answer_file, self.answer_web)):
            application = werkzeug.Request.application(answer)
            options: Doc = {"threaded": True, "request_handler": _Connection, "ssl_context": tls}
            server = make_server("127.0.0.1", self._ports[number], application, **options)
            self._ports[number] = server.port
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
            thread.start()
            self._running.append((server, thread))
        self.api_url, self.files_url, self.web_url = (f"http://127.0.0.1:{port}" for port in self._ports)

    def stop(self) -> None:
        """Close the ports, as when the server dies."""
        for server, thread in self._running:
            server.shutdown()
            thread.join()
        self._running.clear()
        received = (self.requests, self.tasks, self.models, self.events)
        (self.files_folder.parent / "received.txt").write_text(repr(received))  # for the search for secrets

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Fail the test that asked what the stand-in does not know."""
        self.stop()
        assert not self.unknown, self.unknown

    def configuration(self) -> str:
        """The text of a clearml.conf for this server."""
        return f"""api {{
    api_server: "{self.api_url}"
    web_server: "{self.web_url}"
    files_server: "{self.files_url}"
    credentials {{ access_key: "{self.access_key}", secret_key: "{self.secret_key}" }}
}}
"""

    def revoke_keys(self) -> None:
        """Delete the keys: no login succeeds. A token is good until it expires, or the secret changes."""
        self.access_key = _new_id()

    def renew_secret(self) -> None:
        """Restart with another secret, which voids every token."""
        self._secret = _new_id()

    @property
    def token(self) -> str:
        """What a login gives."""
        claims = {"api_version": API_VERSION, "server_version": "2.3.0", "feature_set": "basic"}
        expires = int(time.time()) + 30 * 24 * 3600
        return jwt.encode({**claims, "exp": expires, "identity": {"user_name": "tester"}}, self._secret)

    def answer_api(self, request: werkzeug.Request) -> werkzeug.Response:
        *_, version, name = f"/{request.path}".split("/")  # /v2.23/tasks.create, /tasks.create
        version = version.removeprefix("v") or API_VERSION
        outcome = ApiError("OK", code=200)
        data: Doc = {}
        with self._lock:  # until the answer is text: it holds parts of the state
            try:
                data = self._answer(request, name, version)
            except ApiError as error:
                outcome = error
            except ClientDisconnected:  # in the middle of a request, as a process that ends does
                outcome = ApiError("half a request")
            except Exception as error:
                outcome = ApiError(f"{name}: {error!r}")
                self.unknown.append(str(outcome))
            meta: Doc = {"id": _new_id(), "trx": "", "endpoint": {"name": name, "requested_version": version}}
            meta |= {"result_code": outcome.code, "result_subcode": outcome.subcode, "result_msg": str(outcome)}
            return werkzeug.Response(json.dumps({"meta": meta, "data": data}), outcome.code)

    def _answer(self, request: werkzeug.Request, name: str, version: str) -> Doc:
        if request.mimetype == "application/json-lines":
            asked: Doc = {"events": [json.loads(line) for line in request.data.splitlines()]}
        else:
            asked = json.loads(request.data or "null") or {}
        self.requests.append(Request(request.method, name, asked))
        if name == NOT_OPEN_SOURCE:
            raise ApiError(f"Unable to find endpoint for name {name} and version {version}", code=404)
        handler: Callable[..., Doc] | None = getattr(self, name.replace(".", "_"), None)
        if not handler or name.partition(".")[0] not in SERVICES:
            raise NotImplementedError("no such call")
        if name != "debug.ping":
            self._authorize(request)
        given = {key: value for key, value in asked.items() if key not in IGNORED and value is not None}
        return handler(**{key: value for key, value in given.items() if (key, value) not in SETTLED})

    def _authorize(self, request: werkzeug.Request) -> None:
        given = request.authorization
        if not given:
            raise ApiError("Unauthorized (missing credentials)", 20, 401)
        if given.type == "basic":
            if (given.username, given.password) != (self.access_key, self.secret_key):
                raise ApiError("Unauthorized (invalid credentials) (failed to locate provided credentials)", 22, 401)
            return
        try:
            jwt.decode(given.token or "", self._secret, ["HS256"])
        except jwt.InvalidTokenError as error:
            raise ApiError(f"Invalid token (invalid jwt token): reason={error}", 30, 401) from error

    def answer_file(self, request: werkzeug.Request) -> werkzeug.Response:
        method, path = request.method, request.path
        self.requests.append(Request(method, path, None))
        if (method, path) == ("GET", "/"):
            return werkzeug.Response("OK")
        try:
            self._authorize(request)  # since June 2024 the real one asks for a token, too
        except ApiError as error:
            return werkzeug.Response(str(error), error.code)
        if method == "POST":
            for name, file in request.files.items():
                target = self.files_folder / name.lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                file.save(target)
            return werkzeug.Response(json.dumps([name.lstrip("/") for name in request.files]))
        if method not in ("GET", "HEAD", "DELETE"):
            self.unknown.append(f"file server: {method} {path}")
            return werkzeug.Response(status=405)
        target = self.files_folder / path.lstrip("/")
        if not target.is_file():
            return werkzeug.Response(f"File {path} not found", 404)
        if method == "DELETE":
            target.unlink()
            return werkzeug.Response(json.dumps(path.lstrip("/")))
        return werkzeug.Response(target.read_bytes())

    def answer_web(self, request: werkzeug.Request) -> werkzeug.Response:
        return werkzeug.Response("<title>ClearML</title>", mimetype="text/html")

    def _find(self, kind: str, doc_id: str) -> Doc:
        docs: dict[str, Doc] = getattr(self, f"{kind}s")
        if doc_id not in docs:
            raise ApiError(f"Invalid {kind} id: id={doc_id}, company={COMPANY}", NO_SUCH[kind])
        return docs[doc_id]

    def _get_all(
        self, kind: str, only_fields: Names = (), order_by: Names = (), page: int = 0, page_size: int = 500, **by: Any
    ) -> Doc:
        """Any *.get_all: filter, order, cut out a page of 500 at most, reduce to the requested fields."""
        docs = list(getattr(self, kind).values())
        for field, wanted in by.items():
            docs = [doc for doc in docs if _matches(doc, field, wanted)]
        for field in reversed([*order_by]):
            docs.sort(key=partial(_get, path=field.lstrip("-")), reverse=field.startswith("-"))
        size = min(page_size, 500)
        docs = docs[page * size : (page + 1) * size]
        return {kind: [_pick(doc, only_fields or doc) for doc in docs]}

    tasks_get_all = partialmethod(_get_all, "tasks")
    models_get_all = partialmethod(_get_all, "models")
    projects_get_all = partialmethod(_get_all, "projects")
    queues_get_all = partialmethod(_get_all, "queues")

    def auth_login(self) -> Doc:
        return {"token": self.token}

    def debug_ping(self) -> Doc:
        return {"msg": "ClearML server"}

    def projects_create(self, name: str, description: str = "") -> Doc:
        name = "/".join(part.strip() for part in name.split("/") if part)
        known = {project["name"] for project in self.projects.values()}
        if name in known:
            raise ApiError(f"Project with the same name already exists: name={name}, company={COMPANY}", 801)
        if any(len(part) < 3 for part in name.split("/")):
            raise ApiError("Validation error (Project name cannot be blank)", 12)
        above = name.rpartition("/")[0]
        if above and above not in known:
            self.projects_create(above)
        return self._add("project", name, description=description)

    def projects_get_by_id(self, project: str) -> Doc:
        return {"project": self._find("project", project)}

    def _add(self, kind: str, name: str, **fields: Any) -> Doc:
        """Make a document, with what every kind of them has, and say its id."""
        if len(name.strip()) < 3:
            raise ApiError("Data validation error: name=String value is too short", 800)
        doc: Doc = {"id": _new_id(), "name": name.strip(), "tags": [], "system_tags": []}
        doc |= {"created": _now(), "last_update": _now()}
        if kind in ("task", "model"):
            doc["last_iteration"] = 0
        getattr(self, f"{kind}s")[doc["id"]] = doc | fields
        return {"id": doc["id"]}

    def tasks_create(self, name: str, type: str, **fields: Any) -> Doc:  # noqa: A002
        task: Doc = {"status": "created", "type": type, "hyperparams": {}, "configuration": {}, "runtime": {}}
        task |= {"container": {}, "output": {}}
        task["execution"] = {"parameters": {}, "model_desc": {}, "model_labels": {}, "artifacts": []}
        task["script"] = {"binary": "python", "repository": "", "entry_point": "", "requirements": {}}
        task["models"] = {"input": [], "output": []}
        return self._add("task", name, **task | self._task_changes(task, fields))

    def _task_changes(self, task: Doc, fields: Doc) -> Doc:
        """What a caller wants to set, in the form in which it is stored: parts are merged with what the task has."""
        _check_fields(fields, TASK_FIELDS)
        changes = dict(fields)
        for key in {"tags", "system_tags"} & fields.keys():
            changes[key] = sorted(set(fields[key]))
        if "output_dest" in changes:
            changes["output"] = {"destination": changes.pop("output_dest")}
        for key in {"script", "execution", "models", "output"} & changes.keys():
            changes[key] = {**task[key], **changes[key]}
        if "execution" in changes:
            changes["execution"]["artifacts"] = _artifacts(changes["execution"]["artifacts"])
        for key, value in changes.get("script", {}).items():
            changes["script"][key] = value.strip() if isinstance(value, str) and key != "diff" else value
        return changes

    def tasks_edit(self, task: str, force: bool = False, **fields: Any) -> Doc:
        doc = self._find("task", task) if force else self._in_state(task, "created")
        doc |= {**self._task_changes(doc, fields), "last_update": _now()}
        return {"updated": 1}

    def _in_state(self, task_id: str, *states: str) -> Doc:
        """The task, for a call that is refused in other states."""
        task = self._find("task", task_id)
        if task["status"] not in states:
            raise ApiError(f"Invalid task status: expected=created, status={task['status']}", 110)
        return task

    def tasks_set_requirements(self, task: str, requirements: Doc) -> Doc:
        self._find("task", task)["script"]["requirements"] = requirements
        return {"updated": 1}

    def tasks_add_or_update_artifacts(self, task: str, artifacts: list[Doc], force: bool = False) -> Doc:
        """Even `force` changes no task that has ended."""
        execution = self._in_state(task, *OPEN)["execution"]
        execution["artifacts"] = _artifacts([*execution["artifacts"], *artifacts])
        return {"updated": 1}

    def tasks_add_or_update_model(self, task: str, name: str, model: str, type: str) -> Doc:  # noqa: A002
        doc = self._in_state(task, *OPEN)
        by_name = {item["name"]: item for item in doc["models"][type]}
        by_name[name] = {"name": name, "model": model, "updated": _now()}
        doc["models"][type] = list(by_name.values())
        return {"updated": 1}

    def tasks_ping(self, task: str) -> Doc:
        if task in self.tasks:
            self.tasks[task]["last_update"] = _now()
        return {}

    def tasks_clone(self, task: str, new_task_name: str = "", new_task_parent: str = "") -> Doc:
        source = deepcopy(self._find("task", task))
        keep = ("tags", "script", "configuration", "hyperparams", "container", "project", "comment")
        fields = {key: source[key] for key in keep if key in source}
        fields["system_tags"] = [tag for tag in source["system_tags"] if tag not in ("development", "archived")]
        fields["models"] = {"input": source["models"]["input"]}
        inputs = [item for item in source["execution"]["artifacts"] if item["mode"] == "input"]
        fields["execution"] = {**source["execution"], "artifacts": inputs}
        fields["execution"].pop("queue", None)
        fields["parent"] = new_task_parent or source.get("parent") or task
        if "destination" in source["output"]:
            fields["output_dest"] = source["output"]["destination"]
        return self.tasks_create(new_task_name or source["name"], source["type"], **fields)

    def tasks_get_by_id(self, task: str) -> Doc:
        doc = self._find("task", task)
        return {"task": {**doc, "last_metrics": _sum_up(self._events(task, "training_stats_scalar"))}}

    def _change_status(
        self, task: Doc, new: str, force: bool = False, status_reason: str = "", status_message: str = "", **more: Any
    ) -> Doc:
        current = task["status"]
        if not force and new != current and new not in TRANSITIONS[current]:
            text = f"Invalid task status (Invalid status change): current_status={current}, new_status={new}"
            raise ApiError(text, 110)
        task |= {"status": new, "status_reason": status_reason, "status_message": status_message, **more}
        task |= dict.fromkeys(("status_changed", "last_update"), _now())
        if new == "queued":  # from here on it is no longer a run of a developer's machine
            task["system_tags"] = [tag for tag in task["system_tags"] if tag != "development"]
        return {"updated": 1}

    def tasks_started(self, task: str, force: bool = False, **why: str) -> Doc:
        doc = self._find("task", task)
        if doc["status"] != "in_progress" or "started" not in doc:
            doc["started"] = _now()
            doc.pop("completed", None)
        return {**self._change_status(doc, "in_progress", force, **why), "started": 1}

    def tasks_stop(self, task: str, force: bool = False, status_reason: str = "") -> Doc:
        """What "Abort" in the web page asks for. An agent sees the message "stopping", and ends its task itself."""
        doc = self._find("task", task)
        if "last_worker" in doc and doc["status"] != "queued" and "development" not in doc["system_tags"]:
            return self._change_status(doc, doc["status"], force, status_reason, "stopping")
        self._dequeue(doc)
        return self._change_status(doc, "stopped", force, status_reason, "Stopped by tester")

    def _end(self, status: str, task: str, force: bool = False, **why: str) -> Doc:
        return self._change_status(self._find("task", task), status, force, **why, completed=_now())

    tasks_stopped = partialmethod(_end, "stopped")
    tasks_failed = partialmethod(_end, "failed")

    def tasks_completed(self, task: str, force: bool = False, **why: str) -> Doc:
        return {**self._end("completed", task, force, **why), "published": 0}

    def tasks_reset(self, task: str, force: bool = False, clear_all: bool = False) -> Doc:
        """What the SDK asks for where a script is started again, and its last task has stored nothing."""
        doc = self._find("task", task)
        if force or clear_all or doc["models"]["output"] or doc["execution"]["artifacts"]:
            raise NotImplementedError("resetting a task that has stored something, or more than its results")
        self.events.pop(task, None)
        for key in ("started", "completed", "last_worker"):
            doc.pop(key, None)
        return self._change_status(doc, "created", False, "reset", "reset", last_iteration=0, runtime={})

    def tasks_delete(self, task: str, force: bool = False) -> Doc:
        """Remove the record; the files stay for the caller to remove (the stand-in has no deleting service)."""
        doc = self._find("task", task)
        if doc["status"] != "created" and "archived" not in doc["system_tags"] and not force:
            raise ApiError(f"Task cannot be deleted (due to status, use force=True): task={task}", 123)
        linked = {item["model"] for item in doc["models"]["output"]}
        models = {id_ for id_, model in self.models.items() if model.get("task") == task or id_ in linked}
        inputs = {item["model"] for user in self.tasks.values() for item in user["models"]["input"]}
        if models & inputs or [id_ for id_ in models if self.models[id_]["ready"]]:
            raise NotImplementedError("deleting a task whose model is published, or the input of another one")
        self.models = {id_: model for id_, model in self.models.items() if id_ not in models}
        self._dequeue(doc)
        self.events.pop(task, None)
        del self.tasks[task]
        return {"deleted": True}

    def queues_create(self, name: str) -> Doc:
        return self._add("queue", name, entries=[], metadata=[])

    def queues_get_by_id(self, queue: str) -> Doc:
        return {"queue": self._find("queue", queue)}

    def queues_get_next_task(self, queue: str) -> Doc:
        entries = self._find("queue", queue)["entries"]
        return {"entry": entries.pop(0)} if entries else {}

    def _dequeue(self, task: Doc) -> None:
        for queue in self.queues.values():
            queue["entries"] = [entry for entry in queue["entries"] if entry["task"] != task["id"]]

    def tasks_enqueue(self, task: str, queue: str = "", queue_name: str = "", force: bool = False, **why: str) -> Doc:
        doc = self._find("task", task)
        by_name = {known["name"]: known["id"] for known in self.queues.values()}
        if queue_name and queue_name not in by_name:
            by_name[queue_name] = self.queues_create(queue_name)["id"]
        queue = queue or by_name[queue_name]
        before = str(doc.get("enqueue_status", doc["status"]))
        result = self._change_status(doc, "queued", force, **why, enqueue_status=before)
        self._dequeue(doc)
        self._find("queue", queue)["entries"].append({"task": task, "added": _now()})
        doc["execution"]["queue"] = queue
        return {**result, "queued": 1}

    def tasks_dequeue(self, task: str, new_status: str = "", **why: str) -> Doc:
        doc = self._find("task", task)
        self._dequeue(doc)
        before = doc.pop("enqueue_status", "")
        return {"dequeued": 1, **self._change_status(doc, new_status or before, True, **why)}

    def workers_register(self, worker: str, queues: Names = ()) -> Doc:
        return {}

    workers_unregister = workers_register

    def workers_status_report(self, worker: str, task: str = "", queue: str = "", queues: Names = ()) -> Doc:
        if task:
            self._find("task", task).update(last_update=_now(), last_worker=worker)
        return {}

    def models_create(self, uri: str, name: str, ready: bool = True, **fields: Any) -> Doc:
        _check_fields(fields, MODEL_FIELDS)
        model = {"uri": uri, "ready": ready, "metadata": {}, "design": {}, "labels": {}, **fields}
        return {"created": True, **self._add("model", name, **model)}

    def models_edit(self, model: str, **fields: Any) -> Doc:
        _check_fields(fields, MODEL_FIELDS)
        self._find("model", model).update(fields)
        return {"updated": 1}

    def models_add_or_update_metadata(self, model: str, metadata: list[Doc]) -> Doc:
        self._find("model", model)["metadata"] = {item["key"]: item for item in metadata}
        return {"updated": 1}

    def models_get_by_id(self, model: str) -> Doc:
        (found,) = self._get_all("models", id=[model])["models"]
        return {"model": found}

    def models_delete(self, model: str, force: bool = False) -> Doc:
        url = self._find("model", model)["uri"]
        if not force:
            raise NotImplementedError("without force")
        for task in self.tasks.values():
            for kind in ("input", "output"):
                task["models"][kind] = [item for item in task["models"][kind] if item["model"] != model]
        del self.models[model]
        return {"deleted": True, "url": url}

    def events_add_batch(self, events: list[Doc]) -> Doc:
        known = [event for event in events if event["task"] in self.tasks]
        if not known:
            raise ApiError("Events not added: Invalid task id", 131)
        for event in known:
            task = self.tasks[event["task"]]
            event.pop("allow_locked", None)
            if event.setdefault("model_event", False) or task["status"] == "published":
                raise NotImplementedError("an event of a model, or of a published task")
            self._add_event(event)
            if event["metric"] not in UNCOUNTED_METRICS:
                task["last_iteration"] = max(task["last_iteration"], event.get("iter", 0))
            task["last_update"] = _now()
        return {"added": len(known), "errors": len(events) - len(known)}

    def _add_event(self, event: Doc) -> None:
        """Store an event; one for the same iteration of the same curve replaces an earlier one."""
        event |= {"metric": event.get("metric", ""), "variant": event.get("variant", "")}
        event.setdefault("timestamp", int(time.time() * 1000))
        event.setdefault("worker", "<unknown>")
        names = ("type", "task", "iter", "metric", "variant", "key")
        event_id = _new_id() if event["type"] == "log" else json.dumps([event.get(name) for name in names])
        self.events[event["task"]][event_id] = event

    def _events(self, task: str, event_type: str) -> list[Doc]:
        self._find("task", task)
        return [event for event in self.events.get(task, {}).values() if event["type"] == event_type]

    def events_get_task_log(self, task: str, batch_size: int = 500) -> Doc:
        log = sorted(self._events(task, "log"), key=itemgetter("timestamp"))
        events = log[-batch_size:]
        return {"events": events, "returned": len(events), "total": len(log)}

    def events_get_task_events(
        self, task: str, event_type: str, order: str = "asc", batch_size: int = 500, scroll_id: str = ""
    ) -> Doc:
        """A batch in the order of iterations."""
        events = sorted(self._events(task, event_type), key=lambda event: event.get("iter", 0), reverse=order == "desc")
        done = int(self._scrolls[scroll_id]) if scroll_id else 0
        batch = events[done : done + batch_size]
        next_id = _new_id()
        self._scrolls[next_id] = done + len(batch)
        return {"returned": len(batch), "total": len(events), "scroll_id": next_id, "events": batch}

    def events_get_task_plots(self, task: str, iters: int = 1) -> Doc:
        plots = [
            plot
            for events in _curves(self._events(task, "plot")).values()
            for plot in sorted(events, key=lambda event: -event.get("iter", 0))[:iters]
        ]
        return {"plots": plots, "returned": len(plots), "total": len(plots), "scroll_id": None}

    def events_get_task_single_value_metrics(self, tasks: list[str]) -> Doc:
        (task,) = tasks
        keys = ("metric", "variant", "value", "timestamp")
        scalars = self._events(task, "training_stats_scalar")
        values = [_pick(event, keys) for event in scalars if event.get("iter") == SINGLE_VALUE]
        return {"tasks": [{"task": task, "task_name": self.tasks[task]["name"], "values": values}] if values else []}

    def events_scalar_metrics_iter_histogram(self, task: str) -> Doc:
        """Curves in the index's 32-bit floats."""
        answer: defaultdict[str, Doc] = defaultdict(dict)
        scalars = self._events(task, "training_stats_scalar")
        for (metric, variant), events in _curves(event for event in scalars if event["iter"] > SINGLE_VALUE).items():
            if len(events) >= 2000:
                raise NotImplementedError("a curve of so many points that the real server averages them")
            events.sort(key=itemgetter("iter"))
            y = [struct.unpack("f", struct.pack("f", event["value"]))[0] for event in events]
            answer[metric][variant] = {"name": variant, "x": [event["iter"] for event in events], "y": y}
        return answer

    def events_debug_images(self, metrics: list[Doc], iters: int = 1, scroll_id: str = "") -> Doc:
        """The images of the newest iterations, then with the scroll id those of earlier ones."""
        (asked,) = metrics
        scroll_id = scroll_id or _new_id()
        before = self._scrolls.get(scroll_id, math.inf)
        by_iteration: defaultdict[int, list[Doc]] = defaultdict(list)
        for event in self._events(asked["task"], "training_debug_image"):
            is_asked = event["metric"] == asked["metric"] and event["variant"] in asked["variants"]
            if is_asked and event["iter"] < before:
                by_iteration[event["iter"]].append(event)
        newest = sorted(by_iteration, reverse=True)[:iters]
        self._scrolls[scroll_id] = min(newest, default=before)
        found = {"task": asked["task"], "iterations": [{"iter": at, "events": by_iteration[at]} for at in newest]}
        return {"metrics": [found], "scroll_id": scroll_id}


if __name__ == "__main__":
    server = ClearMLServer(Path(tempfile.mkdtemp(prefix="clearml-server-")), list(map(int, sys.argv[1:4])))
    server.start()
    print("# For ~/clearml.conf:", server.configuration(), f"# Uploaded files: {server.files_folder}", sep="\n")
    print("# Ctrl-C ends the server.", flush=True)
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
