"""A stand-in for a ClearML server: API server, file server and a one-line web page, all on 127.0.0.1.

It answers the calls that clearml 2.1.12 and clearml-agent 3.0.3 make in this project the way the open-source
server (API 2.34) answers them: the same fields, the same refusals, the same error codes. Everything is in
memory except the uploaded files. A call or a parameter that it does not know is answered with 501 and noted in
`ClearMLServer.unknown`, because an invented answer would prove nothing.
"""

import functools
import hashlib
import inspect
import json
import math
import operator
import re
import struct
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jwt
from flask import Flask, Response, abort, request
from werkzeug.exceptions import MethodNotAllowed
from werkzeug.security import safe_join
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

Doc = dict[str, Any]
Handler = Callable[..., Doc]

API_VERSION = (2, 34)
COMPANY = "d1bd92a3b039400cbafc60a7a5b1e52b"  # the company of every open-source server
USER = "dba89b6cc7e18ad770f4e80dc22918df"
USER_NAME = "tester"
SINGLE_VALUE = -(2**31)  # the "iteration" of Logger.report_single_value
DELETED = "__DELETED__"  # put before the id of a deleted task where something still refers to it
PAGE_SIZE = 500

# name: (HTTP code, subcode, message), as in the server's errors.conf
ERRORS = {
    "bad_request": (400, 0, "Bad request"),
    "invalid_id": (400, 10, "Invalid object id"),
    "validation_error": (400, 12, "Validation error"),
    "invalid_task_id": (400, 101, "Invalid task id"),
    "invalid_task_status": (400, 110, "Invalid task status"),
    "task_cannot_be_deleted": (400, 123, "Task cannot be deleted"),
    "events_not_added": (400, 131, "Events not added"),
    "invalid_model_id": (400, 201, "Invalid model id"),
    "invalid_project_id": (400, 401, "Invalid project id"),
    "invalid_queue_id": (400, 701, "Invalid queue id"),
    "task_already_queued": (400, 706, "Failed adding task to queue since task is already queued"),
    "data_validation_error": (400, 800, "Data validation error"),
    "expected_unique_data": (400, 801, "Value combination already exists"),
    "no_credentials": (401, 20, "Unauthorized (missing credentials)"),
    "invalid_credentials": (401, 22, "Unauthorized (invalid credentials)"),
    "invalid_token": (401, 30, "Invalid token"),
}

# The states that each state may change into without `force`.
TRANSITIONS = {
    "created": {"queued", "in_progress"},
    "queued": {"created", "in_progress", "stopped"},
    "in_progress": {"stopped", "failed", "created", "completed"},
    "stopped": {*("closed", "created", "failed", "queued", "in_progress", "published", "publishing", "completed")},
    "closed": {"created", "failed", "published", "publishing", "stopped"},
    "failed": {"created", "stopped", "published", "queued"},
    "publishing": {"published"},
    "published": set(),
    "completed": {"published", "in_progress", "created"},
}
TASK_FIELDS = {
    *("name", "tags", "system_tags", "type", "comment", "parent", "project", "models", "container"),
    *("output_dest", "execution", "hyperparams", "configuration", "script", "runtime"),
}
# Changing only these leaves a task's last_update alone; the changes of a model that set its last_update.
TASK_LABELS = {"name", "comment", "project", "tags", "system_tags"}
MODEL_CONTENT = {"uri", "framework", "design", "labels", "ready", "metadata", "system_tags", "tags"}
MODEL_FIELDS = MODEL_CONTENT | {"name", "task", "comment", "project", "parent"}
UNCOUNTED_METRICS = {":monitor:machine", ":monitor:gpu"}  # their iterations are seconds
# Parameters that make no difference here: for the web page, for a deleting service, for ids of models.
IGNORED = {
    *("method", "model_events", "no_scroll", "move_to_trash", "delete_external_artifacts"),
    *("machine_stats", "timestamp", "is_daemon"),
}
NOT_OPEN_SOURCE = {"workers.get_runtime_properties"}  # asked for by the agent, answered with 404


class Query(NamedTuple):
    """The fields by which a *.get_all call can filter, and those that it leaves out of its answer."""

    lists: tuple[str, ...]  # one of the given values; a name is a pattern everywhere
    dates: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()


QUERIES = {
    "tasks": Query(("id", "system_tags", "status", "project", "parent", "models.input.model"), ("status_changed",)),
    "models": Query(("id", "uri", "task"), hidden=("ui_cache",)),
    "projects": Query(("id",), hidden=("path",)),
    "queues": Query(("id",)),
}

HANDLERS: dict[str, tuple[Handler, str]] = {}


class Request(NamedTuple):
    """One request as it came in: path is "tasks.edit" for a call to the API server, "/a/b" for a file."""

    method: str
    path: str
    data: Any


class ApiError(Exception):
    """A refusal, with the code, subcode and text of the real server."""

    def __init__(self, error: str, extra: str = "", message: str = "", **details: Any) -> None:
        self.code, self.subcode, default = ERRORS[error]
        parts = [
            f"{key}=({', '.join(map(str, value))})" if isinstance(value, list | tuple) else f"{key}={value}"
            for key, value in details.items()
        ]
        text = (message or default) + (f" ({extra})" if extra else "")
        super().__init__(text + (f": {', '.join(parts)}" if parts else ""))


class UnknownCallError(Exception):
    """Something that this stand-in does not know how to answer."""


class _Http10Handler(WSGIRequestHandler):
    """Quiet, and HTTP/1.0, because clearml shares its sockets with forked processes."""

    protocol_version = "HTTP/1.0"

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002
        pass


def endpoint(name: str, version: str = "1.0") -> Callable[[Handler], Handler]:
    """Register a handler for calls of this API version and later; its signature is the list of parameters."""

    def register(handler: Handler) -> Handler:
        HANDLERS[name] = handler, version
        return handler

    return register


def _now() -> str:
    """The time as the server writes it: milliseconds, six digits, UTC."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000).isoformat(timespec="microseconds")


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _new_id() -> str:
    return uuid.uuid4().hex


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _get(doc: Doc, path: str) -> Any:
    value: Any = doc
    for key in path.split("."):
        if isinstance(value, list):
            value = [item.get(key) for item in value]
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value


def _update(doc: Doc, changes: Doc) -> None:
    """Set fields, or remove those whose new value is None: the database keeps no nulls."""
    doc.update(changes)
    for key in [key for key, value in changes.items() if value is None]:
        del doc[key]


def _pick(doc: Doc, paths: Iterable[str]) -> Doc:
    """The document reduced to the requested fields; what it does not have is left out."""
    picked: Doc = {}
    for path in paths:
        *parents, last = path.split(".")
        value = _get(doc, path)
        if value is not None:
            functools.reduce(lambda at, key: at.setdefault(key, {}), parents, picked)[last] = value
    return picked


def _matches(options: Query, doc: Doc, field: str, wanted: Any) -> bool:
    value = _get(doc, field)
    if field == "name":
        return bool(re.search(wanted, value))
    if field in options.lists and not any(item.startswith(("-", "__$")) for item in wanted):
        return not set(wanted).isdisjoint(value if isinstance(value, list) else [value])
    if field in options.dates and all(re.match("<[^=]", limit) for limit in wanted):
        return value is not None and all(_moment(value) < _moment(limit[1:]) for limit in wanted)
    raise UnknownCallError(f"filter {field}={wanted}")


def _curves(events: Iterable[Doc]) -> dict[tuple[str, str], list[Doc]]:
    """The events of each metric and variant, in the order of these names."""
    curves: defaultdict[tuple[str, str], list[Doc]] = defaultdict(list)
    for event in events:
        curves[event["metric"], event["variant"]].append(event)
    return dict(sorted(curves.items()))


def _artifacts(items: Iterable[Doc]) -> list[Doc]:
    """Artifacts with their defaults; one with the same key and mode replaces an earlier one."""
    complete = ({"mode": "output", "display_data": [], **item} for item in items)
    return sorted({(item["key"], item["mode"]): item for item in complete}.values(), key=lambda item: item["key"])


class ClearMLServer:
    """Stand-in for a ClearML server; its state may be read and changed by a test."""

    access_key = "stand-in-access-key"
    secret_key = "stand-in-secret-key"

    def __init__(self, folder: Path) -> None:
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
        self._scrolls: dict[str, Doc] = {}
        self._lock = threading.RLock()
        self._token_secret = _new_id()
        self._apps = {"api": self._api_app(), "files": self._files_app(), "web": Flask("web")}
        self._apps["web"].add_url_rule("/", view_func=lambda: "<title>ClearML</title>")
        self._ports = dict.fromkeys(self._apps, 0)
        self._running: list[tuple[BaseWSGIServer, threading.Thread]] = []
        self.queues_create("default", system_tags=["default"])

    # Starting and stopping

    def start(self) -> None:
        """Serve; after `stop` on the same ports, with the same state."""
        for name, app in self._apps.items():
            port = self._ports[name]
            server = make_server("127.0.0.1", port, app, threaded=True, request_handler=_Http10Handler)
            self._ports[name] = server.server_port
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
            thread.start()
            self._running.append((server, thread))
        self.api_url, self.files_url, self.web_url = (f"http://127.0.0.1:{port}" for port in self._ports.values())

    def stop(self) -> None:
        """Close the ports, as when the server dies."""
        for server, thread in self._running:
            server.shutdown()
            server.server_close()
            thread.join()
        self._running.clear()
        received = (self.requests, self.tasks, self.models, self.events)
        (self.files_folder.parent / "received.txt").write_text(repr(received))  # for the search for secrets

    def configuration(self) -> str:
        """The text of a clearml.conf for this server."""
        return f"""api {{
    api_server: "{self.api_url}"
    web_server: "{self.web_url}"
    files_server: "{self.files_url}"
    credentials {{ access_key: "{self.access_key}", secret_key: "{self.secret_key}" }}
}}
"""

    # What a user does elsewhere

    def abort(self, task_id: str) -> None:
        """Press "Abort" in the web page."""
        with self._lock:
            self._change_status(self._find("task", task_id), "stopped", False, "", f"Stopped by {USER_NAME}")

    # HTTP

    def _api_app(self) -> Flask:
        app = Flask("api")

        @app.route("/", defaults={"path": ""}, methods=["GET", "POST", "PUT"])
        @app.route("/<path:path>", methods=["GET", "POST", "PUT"])
        def call(path: str) -> Response:
            match = re.fullmatch(r"(?:v(\d+\.?\d+)/)?([a-zA-Z_]\w+\.[a-zA-Z_]\w+)/?", path)
            version, name = match.groups() if match else (None, "")
            requested = tuple(map(int, version.split("."))) if version else API_VERSION
            text = ".".join(map(str, requested))
            with self._lock:  # until the answer is text: it holds parts of the state
                data: Doc = {}
                code, subcode, message = 200, 0, "OK"
                try:
                    if not match:
                        raise ApiError("bad_request", message=f"Invalid request path /{path}")
                    data = self._answer(name, requested)
                except ApiError as error:
                    code, subcode, message = error.code, error.subcode, str(error)
                except UnknownCallError as error:
                    code, message = 404, f"Unable to find endpoint for name {name} and version {text}"
                    if name not in NOT_OPEN_SOURCE:
                        code, message = 501, f"{name}: {error}"
                        self.unknown.append(message)
                except Exception as error:
                    self.unknown.append(f"{name}: {error!r}")
                    raise
                actual = HANDLERS[name][1] if name in HANDLERS else None
                call_id = _new_id()
                meta = {
                    **{"id": call_id, "trx": call_id, "error_stack": None, "error_data": {}},
                    "endpoint": {"name": name, "requested_version": text, "actual_version": actual},
                    **{"result_code": code, "result_subcode": subcode, "result_msg": message},
                }
                return Response(json.dumps({"meta": meta, "data": data}), code, mimetype="application/json")

        return app

    def _answer(self, name: str, requested: tuple[int, ...]) -> Doc:
        body = request.get_data()
        if request.mimetype == "application/json-lines":
            data: Doc = {"events": [json.loads(line) for line in body.splitlines()]}
        else:
            data = json.loads(body) if body else {}
        self.requests.append(Request(request.method, name, data))
        handler, version = HANDLERS.get(name, (None, "0.0"))
        if handler is None:
            raise UnknownCallError("no such call")
        if requested < tuple(map(int, version.split("."))):
            raise UnknownCallError(f"only known from version {version} on")
        if name != "debug.ping":
            self._authorize()
        given = {key: value for key, value in data.items() if value is not None and key not in IGNORED}
        parameters = list(inspect.signature(handler).parameters.values())[1:]
        extra = given.keys() - {parameter.name for parameter in parameters}
        if extra and not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            raise UnknownCallError(f"parameters {sorted(extra)}")
        return handler(self, **given)

    def _authorize(self) -> None:
        kind, _, secret = request.headers.get("Authorization", "").partition(" ")
        if not kind:
            raise ApiError("no_credentials")
        if kind == "Basic":
            keys = request.authorization
            if not keys or (keys.username, keys.password) != (self.access_key, self.secret_key):
                raise ApiError("invalid_credentials", "failed to locate provided credentials")
        else:
            try:
                jwt.decode(secret, self._token_secret, algorithms=["HS256"])
            except jwt.InvalidTokenError as error:
                raise ApiError("invalid_token", "invalid jwt token", reason=error) from error

    def _files_app(self) -> Flask:
        app = Flask("files")

        @app.before_request
        def check() -> None:
            self.requests.append(Request(request.method, request.path, None))
            if request.path != "/" or request.method == "POST":
                try:
                    self._authorize()  # since June 2024 the real one asks for a token, too
                except ApiError as error:
                    abort(Response(str(error), 401))

        @app.get("/")
        def ping() -> str:
            return "OK"

        @app.post("/")
        def upload() -> str:
            """Store each part of the form under its name."""
            for name, file in request.files.items():
                target = self.files_folder / name.lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                file.save(target)
            return json.dumps([name.lstrip("/") for name in request.files])

        def stored(path: str) -> Path:
            target = safe_join(str(self.files_folder), path)
            if target is None or not Path(target).is_file():
                abort(Response(f"File {path} not found", 404))
            return Path(target)

        @app.get("/<path:path>")
        def download(path: str) -> Response:
            return Response(stored(path).read_bytes(), mimetype="application/octet-stream")

        @app.delete("/<path:path>")
        def delete(path: str) -> str:
            stored(path).unlink()
            return json.dumps(path)

        @app.errorhandler(MethodNotAllowed)
        def unknown(_: MethodNotAllowed) -> tuple[str, int]:
            self.unknown.append(f"file server: {request.method} {request.path}")
            return "The stand-in does not know this request", 501

        return app

    # Finding

    def _find(self, kind: str, doc_id: str) -> Doc:
        """The document for a call that changes it."""
        docs: dict[str, Doc] = getattr(self, f"{kind}s")
        if doc_id not in docs:
            details = {"company": COMPANY, "id": doc_id} if kind == "model" else {"id": doc_id, "company": COMPANY}
            raise ApiError(f"invalid_{kind}_id", **({"id": doc_id} if kind == "project" else details))
        return docs[doc_id]

    def _check_ids(self, ids: list[str]) -> None:
        """Refuse a call that asks about unknown tasks."""
        if not set(ids) <= self.tasks.keys():
            raise ApiError("invalid_task_id", ids=ids)

    def _get_all(
        self,
        kind: str,
        *,
        only_fields: Collection[str] = (),
        order_by: Sequence[str] = (),
        page: int = 0,
        page_size: int = PAGE_SIZE,
        search_hidden: bool = False,
        **filters: Any,
    ) -> Doc:
        """Any *.get_all: filter, order, cut out a page of 500 at most, reduce to the requested fields."""
        options, docs = QUERIES[kind], list(getattr(self, kind).values())
        if kind in ("tasks", "projects") and not search_hidden and not filters.get("id"):
            docs = [doc for doc in docs if "hidden" not in doc["system_tags"]]
        for field, wanted in filters.items():
            docs = [doc for doc in docs if _matches(options, doc, field, wanted)]
        for field in reversed(order_by):
            with_value = [doc for doc in docs if _get(doc, field.lstrip("-")) is not None]
            without = [doc for doc in docs if _get(doc, field.lstrip("-")) is None]
            key = functools.partial(_get, path=field.lstrip("-"))
            docs = sorted(with_value, key=key, reverse=field.startswith("-")) + without
        page_size = min(page_size, PAGE_SIZE)
        docs = docs[page * page_size : (page + 1) * page_size]
        return {kind: [_pick(doc, only_fields or doc.keys() - set(options.hidden)) for doc in docs]}

    # auth, debug

    @endpoint("auth.login")
    def auth_login(self) -> Doc:
        now = time.time()
        identity = {"user": USER, "company": COMPANY, "role": "admin"}
        claims = {
            "iat": now,
            "exp": int(now + 30 * 24 * 3600),
            "session_id": _new_id(),
            "env": "<unknown>",
            "identity": {**identity, "user_name": USER_NAME, "company_name": "clearml"},
            "api_version": ".".join(map(str, API_VERSION)),
            "server_version": "2.3.0",
            "feature_set": "basic",
        }
        return {"token": jwt.encode(claims, self._token_secret)}

    @endpoint("debug.ping")
    def debug_ping(self) -> Doc:
        return {"msg": "ClearML server"}

    # projects

    @endpoint("projects.create")
    def projects_create(
        self, name: str, description: str = "", tags: Iterable[str] = (), system_tags: Iterable[str] = ()
    ) -> Doc:
        parts = [part.strip() for part in name.split("/") if part]
        name, parent = "/".join(parts), "/".join(parts[:-1])
        known = {project["name"]: project for project in self.projects.values()}
        if name in known:
            message = "Project with the same name already exists"
            raise ApiError("expected_unique_data", message=message, name=name, company=COMPANY)
        if len(parts[-1]) < 3:
            raise ApiError("validation_error", "Project name cannot be blank")
        location: Doc = {"path": []}
        if parent:
            above = known.get(parent) or self.projects[self.projects_create(parent)["id"]]
            location = {"parent": above["id"], "path": [*above["path"], above["id"]]}
        project = {
            **self._owned("project", name),
            **{"basename": parts[-1], "description": description, "featured": 9999},
            **{"tags": sorted(tags), "system_tags": sorted(system_tags)},
            **location,
        }
        self.projects[project["id"]] = project
        return {"id": project["id"]}

    @endpoint("projects.get_by_id")
    def projects_get_by_id(self, project: str) -> Doc:
        return {"project": self._find("project", project)}

    @endpoint("projects.get_all")
    def projects_get_all(self, shallow_search: bool = False, **filters: Any) -> Doc:
        if shallow_search:
            raise UnknownCallError("shallow_search")
        return self._get_all("projects", **filters)

    @staticmethod
    def _owned(kind: str, name: str) -> Doc:
        """What every kind of document has."""
        if len(name.strip()) < 3:
            raise ApiError("data_validation_error", name="String value is too short")
        now = _now()
        doc: Doc = {"id": _new_id(), "company": COMPANY, "name": name.strip(), "created": now, "last_update": now}
        if kind != "queue":
            doc["user"] = USER
        if kind in ("task", "model"):
            doc |= {"last_change": now, "last_changed_by": USER, "last_iteration": 0, "last_metrics": {}}
        return doc

    # tasks: making and changing

    @endpoint("tasks.create")
    def tasks_create(self, name: str, type: str, **fields: Any) -> Doc:  # noqa: A002
        task = {
            **self._owned("task", name),
            **{"type": type, "status": "created", "report_assets": [], "output": {}},
            **{"tags": [], "system_tags": [], "unique_metrics": [], "metric_stats": {}, "hyperparams": {}},
            **{"configuration": {}, "runtime": {}, "container": {}, "models": {"input": [], "output": []}},
            "execution": {**{"test_split": 0, "parameters": {}, "model_desc": {}, "model_labels": {}, "artifacts": []}},
            "script": {"binary": "python", "repository": "", "entry_point": "", "requirements": {}},
        }
        task |= self._task_changes(task, {"type": type, **fields})
        self.tasks[task["id"]] = task
        self._touch_project(task)
        return {"id": task["id"]}

    def _checked(self, fields: Doc, allowed: set[str]) -> Doc:
        """What a caller wants to set, in the form in which it is stored."""
        if unknown := fields.keys() - allowed:
            raise UnknownCallError(f"fields {sorted(unknown)}")
        if len(fields.get("name", "long enough").strip()) < 3:
            raise ApiError("data_validation_error", name="String value is too short")
        for kind in {"project", "task"} & fields.keys():
            self._find(kind, fields[kind])
        sets = {key: sorted(set(fields[key])) for key in ("tags", "system_tags") if key in fields}
        return deepcopy(fields) | sets

    def _task_changes(self, task: Doc, fields: Doc) -> Doc:
        """The same for a task, whose parts are merged with what it has."""
        changes = self._checked(fields, TASK_FIELDS)
        if fields.get("execution", {}).get("parameters"):
            raise UnknownCallError("execution.parameters, which older clients use")
        if "output_dest" in changes:
            changes["output"] = {"destination": changes.pop("output_dest")}
        for key in {"script", "execution", "models", "output"} & changes.keys():
            changes[key] = {**task[key], **changes[key]}
        if "execution" in changes:
            changes["execution"]["artifacts"] = _artifacts(changes["execution"]["artifacts"])
        for key, value in changes.get("script", {}).items():
            changes["script"][key] = value.strip() if isinstance(value, str) and key != "diff" else value
        return changes

    @endpoint("tasks.edit")
    def tasks_edit(self, task: str, force: bool = False, **fields: Any) -> Doc:
        doc = self._find("task", task)
        if not force and doc["status"] != "created":
            raise ApiError("invalid_task_status", expected="created", status=doc["status"])
        changes = self._task_changes(doc, fields)
        changes |= {"last_change": _now(), "last_changed_by": USER}
        if not fields.keys() <= TASK_LABELS:
            changes["last_update"] = changes["last_change"]
        doc |= changes
        self._touch_project(doc)
        return {"updated": 1, "fields": changes}

    def _touch_project(self, task: Doc) -> None:
        if project := self.projects.get(task.get("project", "")):
            project["last_update"] = _now()

    def _touch(self, task: Doc, active: bool = False) -> None:
        """Note that the task changed and, if the call is a sign of life, how long it has been running."""
        now = _now()
        task |= {"last_change": now, "last_changed_by": USER, "last_update": now}
        if active and task["status"] == "in_progress" and "started" in task:
            task["active_duration"] = int((_moment(now) - _moment(task["started"])).total_seconds())

    def _open_task(self, task_id: str) -> Doc:
        """The task, unless it has ended: then its artifacts and models cannot be changed."""
        task = self._find("task", task_id)
        if task["status"] not in ("created", "queued", "in_progress"):
            raise ApiError("invalid_task_status", expected="created", status=task["status"])
        return task

    @endpoint("tasks.set_requirements")
    def tasks_set_requirements(self, task: str, requirements: Doc) -> Doc:
        doc = self._find("task", task)
        doc["script"]["requirements"] = requirements
        self._touch(doc)
        return {"updated": 1, "fields": {}}

    @endpoint("tasks.add_or_update_artifacts", "2.10")
    def tasks_add_or_update_artifacts(self, task: str, artifacts: list[Doc], force: bool = False) -> Doc:
        doc = self._open_task(task)
        doc["execution"]["artifacts"] = _artifacts([*doc["execution"]["artifacts"], *artifacts])
        self._touch(doc)
        return {"updated": 1}

    @endpoint("tasks.add_or_update_model", "2.13")
    def tasks_add_or_update_model(
        self,
        task: str,
        name: str,
        model: str,
        type: str,  # noqa: A002
    ) -> Doc:
        doc = self._open_task(task)
        by_name = {item["name"]: item for item in doc["models"][type]}
        by_name[name] = {"name": name, "model": model, "updated": _now()}
        doc["models"][type] = list(by_name.values())
        self._touch(doc, active=True)
        return {"updated": 1}

    @endpoint("tasks.ping")
    def tasks_ping(self, task: str) -> Doc:
        if task in self.tasks:
            self._touch(self.tasks[task], active=True)
        return {}

    @endpoint("tasks.clone")
    def tasks_clone(self, task: str, new_task_name: str = "", new_task_parent: str = "") -> Doc:
        if task not in self.tasks:
            raise ApiError("invalid_task_id", id=task)
        source = deepcopy(self.tasks[task])
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

    # tasks: asking

    @endpoint("tasks.get_by_id")
    def tasks_get_by_id(self, task: str) -> Doc:
        self._check_ids([task])
        doc = self.tasks[task]
        return {"task": {key: value for key, value in doc.items() if key != "enqueue_status"}}

    @endpoint("tasks.get_all")
    def tasks_get_all(self, **filters: Any) -> Doc:
        return self._get_all("tasks", **filters)

    # tasks: changing state

    def _change_status(
        self,
        task: Doc,
        status: str,
        force: bool = False,
        status_reason: str = "",
        status_message: str = "",
        **changes: Any,
    ) -> Doc:
        current, now = task["status"], _now()
        if not force and status != current and status not in TRANSITIONS[current]:
            details = {"current_status": current, "new_status": status}
            raise ApiError("invalid_task_status", "Invalid status change", **details)
        fields = {
            **{"status": status, "status_reason": status_reason, "status_message": status_message},
            **{"status_changed": now, "last_update": now, "last_change": now, "last_changed_by": USER},
            **changes,
        }
        _update(task, fields)
        if status == "queued":  # from here on it is no longer a run of a developer's machine
            task["system_tags"] = [tag for tag in task["system_tags"] if tag != "development"]
        self._touch_project(task)
        return {"updated": 1, "fields": fields}

    @endpoint("tasks.started")
    def tasks_started(self, task: str, force: bool = False, **why: str) -> Doc:
        if task not in self.tasks:
            raise ApiError("invalid_id", task=None)
        doc = self.tasks[task]
        if doc["status"] == "in_progress" and "started" in doc:
            result = self._change_status(doc, "in_progress", force, **why)
        else:
            result = self._change_status(doc, "in_progress", force, **why, started=_now())
            for key in {"completed", "active_duration"} & doc.keys():
                del doc[key]
        return {**result, "started": 1}

    @endpoint("tasks.stopped")
    def tasks_stopped(self, task: str, force: bool = False, **why: str) -> Doc:
        return self._change_status(self._find("task", task), "stopped", force, **why, completed=_now())

    @endpoint("tasks.failed")
    def tasks_failed(self, task: str, force: bool = False, **why: str) -> Doc:
        return self._change_status(self._find("task", task), "failed", force, **why, completed=_now())

    @endpoint("tasks.completed", "2.2")
    def tasks_completed(self, task: str, force: bool = False, publish: bool = False, **why: str) -> Doc:
        if publish:
            raise UnknownCallError("publish")
        changed = self._change_status(self._find("task", task), "completed", force, **why, completed=_now())
        return {**changed, "published": 0}

    @endpoint("tasks.publish")
    def tasks_publish(self, task: str, force: bool = False, **why: str) -> Doc:
        doc = self._find("task", task)
        models = [self.models[item["model"]] for item in doc["models"]["output"] if item["model"] in self.models]
        if not all(model["ready"] for model in models):
            raise UnknownCallError("of a task whose model is not published")
        return self._change_status(doc, "published", force, **why, published=_now(), output=doc["output"])

    # tasks: deleting

    def _clean_up(self, task: Doc, force: bool, return_file_urls: bool) -> Doc:
        """Remove a task's models and events, and say what was removed."""
        task_id, now = task["id"], _now()
        linked = {item["model"] for item in task["models"]["output"]}
        models = [model for model in self.models.values() if model.get("task") == task_id or model["id"] in linked]
        children = [child for child in self.tasks.values() if child.get("parent") == task_id]
        published_children = [child for child in children if child["status"] == "published"]
        published = [model for model in models if model["ready"]]
        for found, what in ((published_children, "children"), (published, "output models")):
            if found and not force:
                details = {"task": task_id, what.split()[-1]: len(found)}
                raise ApiError("task_cannot_be_deleted", f"has {what}, use force=True", **details)
        inputs = {item["model"] for user in self.tasks.values() for item in user["models"]["input"]}
        drafts = [model for model in models if not model["ready"]]
        urls: dict[str, list[str]] = {"model_urls": [], "artifact_urls": [], "event_urls": []}
        for model in drafts:
            if model["id"] in inputs:
                _update(model, {"task": None, "last_change": now})
            else:
                urls["model_urls"] += [model["uri"]] if model["uri"] else []
                del self.models[model["id"]]
        for model in published:
            _update(model, {"task": DELETED + task_id, "last_change": now})
        for child in children:
            child |= {"parent": DELETED + task_id, "last_change": now}
        outputs = [item for item in task["execution"]["artifacts"] if item["mode"] == "output"]
        urls["artifact_urls"] = sorted({item["uri"] for item in outputs if item.get("uri")})
        self.events.pop(task_id, None)
        return {
            "updated_children": len(children),
            "updated_models": len(published),
            "deleted_models": sum(model["id"] not in self.models for model in drafts),
            "urls": urls if return_file_urls else None,
        }

    @endpoint("tasks.delete")
    def tasks_delete(
        self,
        task: str,
        force: bool = False,
        return_file_urls: bool = False,
        delete_output_models: bool = True,
    ) -> Doc:
        """Remove the record; the files stay for the caller to remove (the stand-in has no deleting service)."""
        doc = self._find("task", task)
        if not delete_output_models:
            raise UnknownCallError("delete_output_models=False")
        if doc["status"] != "created" and "archived" not in doc["system_tags"] and not force:
            details = {"task": task, "expected": "created", "current": doc["status"]}
            raise ApiError("task_cannot_be_deleted", "due to status, use force=True", **details)
        self._dequeue(doc)
        cleaned = self._clean_up(doc, force, return_file_urls)
        del self.tasks[task]
        self._touch_project(doc)
        return {"deleted": True, **cleaned}

    @endpoint("tasks.delete_many")
    def tasks_delete_many(self, ids: list[str], **options: Any) -> Doc:
        succeeded, failed = [], []
        for task in ids:
            try:
                succeeded.append({"id": task, **self.tasks_delete(task, **options)})
            except ApiError as error:
                data = {"id": task, "company": COMPANY}
                codes = [error.code, error.subcode]
                failed.append({"id": task, "error": {"codes": codes, "msg": str(error), "data": data}})
        return {"succeeded": succeeded, "failed": failed}

    # queues and workers

    @endpoint("queues.create", "2.4")
    def queues_create(self, name: str, system_tags: Iterable[str] = ()) -> Doc:
        queue = self._owned("queue", name)
        queue |= {"tags": [], "system_tags": sorted(system_tags), "entries": [], "metadata": []}
        self.queues[queue["id"]] = queue
        return {"id": queue["id"]}

    @endpoint("queues.get_by_id", "2.4")
    def queues_get_by_id(self, queue: str) -> Doc:
        return {"queue": self._find("queue", queue)}

    @endpoint("queues.get_all", "2.4")
    def queues_get_all(self, **filters: Any) -> Doc:
        return self._get_all("queues", **filters)

    @endpoint("queues.get_next_task")
    def queues_get_next_task(self, queue: str) -> Doc:
        doc = self._find("queue", queue)
        if not doc["entries"]:
            return {}
        entry = doc["entries"].pop(0)
        task = self.tasks.get(entry["task"], {})
        if task.get("status") == "stopped":  # an agent ended it after it had been queued again
            task["status"] = "queued"
        return {"entry": entry}

    def _dequeue(self, task: Doc) -> None:
        for queue in self.queues.values():
            queue["entries"] = [entry for entry in queue["entries"] if entry["task"] != task["id"]]

    @endpoint("tasks.enqueue")
    def tasks_enqueue(
        self,
        task: str,
        queue: str = "",
        queue_name: str = "",
        force: bool = False,
        verify_watched_queue: bool = False,
        **why: str,
    ) -> Doc:
        if verify_watched_queue:
            raise UnknownCallError("verify_watched_queue")
        doc = self._find("task", task)
        by_name = {known["name"]: known["id"] for known in self.queues.values()}
        if queue_name and queue_name not in by_name:
            by_name[queue_name] = self.queues_create(queue_name)["id"]
        queue = queue or by_name[queue_name or "default"]
        if any(entry["task"] == task for entry in self._find("queue", queue)["entries"]):
            raise ApiError("task_already_queued", task=task)
        before = str(doc.get("enqueue_status", doc["status"]))
        result = self._change_status(doc, "queued", force, **why, enqueue_status=before)
        self._dequeue(doc)
        self.queues[queue]["entries"].append({"task": task, "added": _now()})
        doc["execution"]["queue"] = result["fields"]["execution.queue"] = queue
        return {**result, "queued": 1}

    @endpoint("tasks.dequeue")
    def tasks_dequeue(self, task: str, new_status: str = "", **why: str) -> Doc:
        doc = self._find("task", task)
        if doc["status"] not in ("queued", "in_progress"):
            return {"dequeued": 1, "updated": 0}
        self._dequeue(doc)
        status = new_status or str(doc.get("enqueue_status", "created"))
        return {"dequeued": 1, **self._change_status(doc, status, True, **why, enqueue_status=None)}

    @endpoint("workers.register", "2.4")
    def workers_register(self, worker: str, queues: list[str]) -> Doc:
        return {}

    @endpoint("workers.unregister", "2.4")
    def workers_unregister(self, worker: str, queues: Iterable[str] = ()) -> Doc:
        return {}

    @endpoint("workers.status_report", "2.4")
    def workers_status_report(self, worker: str, task: str = "", queue: str = "", queues: Iterable[str] = ()) -> Doc:
        if task:
            doc = self._find("task", task)
            self._touch(doc)
            doc |= {"last_worker": worker, "last_worker_report": doc["last_update"]}
        return {}

    # models

    @endpoint("models.create")
    def models_create(self, uri: str, name: str, ready: bool = True, public: bool = False, **fields: Any) -> Doc:
        if public:
            raise UnknownCallError("a public model")
        model = {**self._owned("model", name), "uri": uri, "ready": ready, "metadata": {}}
        model |= {"tags": [], "system_tags": [], "design": {}, "labels": {}}
        model |= self._checked(fields, MODEL_FIELDS)
        self.models[model["id"]] = model
        return {"created": True, "id": model["id"]}

    @endpoint("models.edit")
    def models_edit(self, model: str, **fields: Any) -> Doc:
        doc = self._find("model", model)
        changes = self._checked(fields, MODEL_FIELDS)
        if "uri" in changes:
            changes["ui_cache"] = {}
        changes |= {"last_change": _now(), "last_changed_by": USER}
        if MODEL_CONTENT & changes.keys():
            changes["last_update"] = changes["last_change"]
        doc |= changes
        return {"updated": 1, "fields": changes}

    @endpoint("models.add_or_update_metadata", "2.13")
    def models_add_or_update_metadata(self, model: str, metadata: list[Doc], replace_metadata: bool = False) -> Doc:
        doc = self._find("model", model)
        kept = {} if replace_metadata else doc["metadata"]
        doc["metadata"] = kept | {item["key"]: item for item in metadata}
        doc |= {"last_update": _now(), "last_change": _now()}
        return {"updated": 1}

    @endpoint("models.get_by_id")
    def models_get_by_id(self, model: str) -> Doc:
        found = self._get_all("models", id=[model])["models"]
        if not found:
            why = "no such public or company model"
            raise ApiError("invalid_model_id", why, id=model, company=COMPANY)
        return {"model": found[0]}

    @endpoint("models.get_all")
    def models_get_all(self, **filters: Any) -> Doc:
        return self._get_all("models", **filters)

    @endpoint("models.delete")
    def models_delete(self, model: str, force: bool = False) -> Doc:
        doc = self._find("model", model)
        if not force:
            raise UnknownCallError("without force")
        for item in [item for user in self.tasks.values() for item in user["models"]["input"]]:
            item["model"] = DELETED + model if item["model"] == model else item["model"]
        if task := self.tasks.get(doc.get("task", "")):
            outputs = task["models"]["output"]
            task["models"]["output"] = [item for item in outputs if item["model"] != model]
        del self.models[model]
        return {"deleted": True, "url": doc["uri"]}

    # events: writing

    @endpoint("events.add_batch")
    def events_add_batch(self, events: list[Doc]) -> Doc:
        errors: defaultdict[str, int] = defaultdict(int)
        added: defaultdict[str, list[Doc]] = defaultdict(list)
        for event in events:
            locked_too = event.pop("allow_locked", False)
            if event.setdefault("model_event", False):
                raise UnknownCallError("an event of a model")
            task = self.tasks.get(event["task"])
            if not task or (task["status"] in ("publishing", "published") and not locked_too):
                errors[f"Invalid task id {event['task']}"] += 1
            else:
                self._add_event(event)
                added[event["task"]].append(event)
        if not added:
            details: Doc = dict(errors)
            raise ApiError("events_not_added", **details)
        for task_id, batch in added.items():
            self._sum_up(self.tasks[task_id], batch)
        return {"added": sum(map(len, added.values())), "errors": sum(errors.values()), "errors_info": dict(errors)}

    def _add_event(self, event: Doc) -> None:
        """Store an event; one for the same iteration of the same curve replaces an earlier one."""
        written = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        event |= {"@timestamp": written, "metric": event.get("metric", ""), "variant": event.get("variant", "")}
        event.setdefault("timestamp", int(time.time() * 1000))
        event.setdefault("worker", request.headers.get("X-Clearml-Worker", "<unknown>"))
        if event["type"] == "plot":
            event["plot_len"] = len(event.get("plot_str", ""))
        names = ("task", "iter", "metric", "variant", "key")
        event_id = _new_id() if event["type"] == "log" else _md5("-".join(str(event.get(name)) for name in names))
        self.events[event["task"]][event["type"] + event_id] = event

    def _sum_up(self, task: Doc, batch: list[Doc]) -> None:
        """Bring what a task says about its events up to date."""
        counted = [event.get("iter", 0) for event in batch if event["metric"] not in UNCOUNTED_METRICS]
        task["last_iteration"] = max(task["last_iteration"], 0, *counted)
        scalars = [event for event in batch if event["type"] == "training_stats_scalar"]
        for (metric, variant), points in _curves(scalars).items():
            variants = task["last_metrics"].setdefault(_md5(metric), {})
            self._sum_up_curve(variants.setdefault(_md5(variant), {"metric": metric, "variant": variant}), points)
        self._touch(task, active=True)
        latest: Doc = {}  # of this batch only: the real server forgets the earlier ones, too
        for event in batch:
            stats = latest.setdefault(_md5(event["metric"]), {"metric": event["metric"], "event_stats_by_type": {}})
            by_type = stats["event_stats_by_type"].setdefault(event["type"], {"last_update": 0})
            by_type["last_update"] = max(by_type["last_update"], event["timestamp"])
        task["metric_stats"] = latest

    @staticmethod
    def _sum_up_curve(summary: Doc, points: list[Doc]) -> None:
        candidates = {
            "min": (min(points, key=lambda point: point["value"]), operator.lt),
            "max": (max(points, key=lambda point: point["value"]), operator.gt),
            "first": (min(points, key=lambda point: point.get("iter", 0)), lambda new, old: False),
        }
        for name, (point, better) in candidates.items():
            if f"{name}_value" not in summary or better(point["value"], summary[f"{name}_value"]):
                summary[f"{name}_value"] = point["value"]
                summary[f"{name}_value_iteration"] = point.get("iter", 0)
        last = max(points, key=lambda point: (point.get("iter", 0), point["timestamp"]))
        count, total = summary.get("count", 0), sum(point["value"] for point in points)
        mean = (summary.get("mean_value", 0) * count + total) / (count + len(points))
        summary |= {"value": last["value"], "count": count + len(points), "mean_value": round(mean, 2)}

    # events: reading

    def _events(self, owner: str, event_type: str) -> list[Doc]:
        return [event for event in self.events.get(owner, {}).values() if event["type"] == event_type]

    @endpoint("events.get_task_log", "2.9")
    def events_get_task_log(
        self, task: str, batch_size: int = 500, navigate_earlier: bool = True, order: str = ""
    ) -> Doc:
        self._check_ids([task])
        if not navigate_earlier or order != "asc":
            raise UnknownCallError(f"navigate_earlier={navigate_earlier}, order={order}")
        log = sorted(self._events(task, "log"), key=lambda event: event["timestamp"])
        events = log[-batch_size:]
        return {"events": events, "returned": len(events), "total": len(log)}

    @endpoint("events.get_task_events")
    def events_get_task_events(
        self,
        task: str,
        event_type: str,
        order: str = "asc",
        batch_size: int = 500,
        scroll_id: str = "",
    ) -> Doc:
        """A batch in the order of iterations; the last iteration of a batch is never split."""
        self._check_ids([task])
        events = sorted(self._events(task, event_type), key=lambda event: event.get("iter", 0), reverse=order == "desc")
        done = self._scrolls[scroll_id]["done"] if scroll_id else 0
        end = done + batch_size
        while 0 < end < len(events) and events[end].get("iter") == events[end - 1].get("iter"):
            end += 1
        batch = events[done:end]
        next_id = _new_id()
        self._scrolls[next_id] = {"done": done + len(batch)}
        return {"returned": len(batch), "total": len(events), "scroll_id": next_id, "events": batch}

    @endpoint("events.get_task_plots", "1.8")
    def events_get_task_plots(self, task: str, iters: int = 1) -> Doc:
        self._check_ids([task])
        plots = [
            plot
            for events in _curves(self._events(task, "plot")).values()
            for plot in sorted(events, key=lambda event: -event.get("iter", 0))[:iters]
        ]
        return {"plots": plots, "returned": len(plots), "total": len(plots), "scroll_id": None}

    @endpoint("events.get_task_single_value_metrics")
    def events_get_task_single_value_metrics(self, tasks: list[str]) -> Doc:
        self._check_ids(tasks)
        keys = ("metric", "variant", "value", "timestamp")
        answer = []
        for task in tasks:
            scalars = self._events(task, "training_stats_scalar")
            values = [_pick(event, keys) for event in scalars if event.get("iter") == SINGLE_VALUE]
            if values:
                answer.append({"task": task, "task_name": self.tasks[task]["name"], "values": values})
        return {"tasks": answer}

    @endpoint("events.scalar_metrics_iter_histogram")
    def events_scalar_metrics_iter_histogram(self, task: str, key: str = "iter") -> Doc:
        """Curves in the index's 32-bit floats."""
        self._check_ids([task])
        if key != "iter":
            raise UnknownCallError(f"key={key}")
        answer: defaultdict[str, Doc] = defaultdict(dict)
        scalars = self._events(task, "training_stats_scalar")
        for (metric, variant), events in _curves(event for event in scalars if event["iter"] > SINGLE_VALUE).items():
            if len(events) >= 2000:
                raise UnknownCallError("a curve of so many points that the real server averages them")
            events.sort(key=operator.itemgetter("iter"))
            y = [struct.unpack("f", struct.pack("f", event["value"]))[0] for event in events]
            answer[metric][variant] = {"name": variant, "x": [event["iter"] for event in events], "y": y}
        return answer

    @endpoint("events.debug_images", "2.7")
    def events_debug_images(self, metrics: list[Doc], iters: int = 1, scroll_id: str = "") -> Doc:
        """The images of the newest iterations, then with the scroll id those of earlier ones."""
        tasks = list(dict.fromkeys(metric["task"] for metric in metrics))
        self._check_ids(tasks)
        scroll_id = scroll_id or _new_id()
        before = self._scrolls.setdefault(scroll_id, {})
        answer = []
        for task in tasks:
            wanted = [metric for metric in metrics if metric["task"] == task]
            by_iteration: defaultdict[int, list[Doc]] = defaultdict(list)
            for event in self._events(task, "training_debug_image"):
                asked = any(
                    metric.get("metric", event["metric"]) == event["metric"]
                    and event["variant"] in (metric.get("variants") or [event["variant"]])
                    for metric in wanted
                )
                if asked and event["iter"] < before.get(task, math.inf):
                    by_iteration[event["iter"]].append(event)
            newest = sorted(by_iteration, reverse=True)[:iters]
            if newest:
                before[task] = newest[-1]
            answer.append({"task": task, "iterations": [{"iter": at, "events": by_iteration[at]} for at in newest]})
        return {"metrics": answer, "scroll_id": scroll_id}
