#!/usr/bin/env python
"""Remove old archived tasks of a project, together with every object that they own.

    uv run cleanup.py --project-name X --older-than 30             # lists them and what they own, deletes nothing
    uv run cleanup.py --project-name X --older-than 30 --delete    # does it, after asking; in scripts with --yes

The first one prints (ids and addresses are shortened here)

    demo-project: 3 archived tasks, unchanged for more than 30 days
    third (4ccd...), 43 days: 1 model, 1 artifact, 1 image, 105 KB in http:..., 107 KB in s3:...; stays: it is published
    second (fc38...), 44 days: 1 model, 1 artifact, 1 image, 105 KB in http:..., 107 KB in s3:...
    first (e2b8...), 45 days: 1 model, 1 artifact, 1 image, 105 KB in http:..., 107 KB in s3:...
    To delete: 2 tasks, 2 models, 2 artifacts, 2 images, 211 KB in http:..., 215 KB in s3:.... To stay: 1 task.
    Nothing was deleted: add --delete.

A task goes as a whole or stays as a whole, with the reason. Its objects go first, each seen gone, and its record
goes last: until then the record says what there is to delete, so that a run that was killed, or whose storage went
away, is finished by the next one, without a journal. (The SDK's own `task.delete()` removes the record first.)
"""

import argparse
import json
import logging
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dotenv import load_dotenv
from tqdm import tqdm

PATIENCE = 5  # seconds for a connection; twice that for an answer of a store
SDK_SETTINGS = {
    "api": {"http": {"retries": dict.fromkeys(("total", "connect", "read", "redirect", "status"), 1)}},  # not 240
    "sdk": {"aws": {"boto3": {"connect_timeout": PATIENCE, "read_timeout": 2 * PATIENCE}}},
}

load_dotenv()  # .env beside this file; before `import clearml`, which reads variables while it is imported
try:
    from clearml.backend_api import Session
    from clearml.backend_api.utils import get_http_session_with_retry
    from clearml.config import ConfigSDKWrapper, config_obj
    from clearml.storage.helper import StorageHelper, _HttpDriver

    config_obj.set_overrides(SDK_SETTINGS)
    ConfigSDKWrapper.clear_config_impl()
except Exception as error:  # clearml.conf is at fault, whose text may be in the error, secrets included
    sys.exit(f"cleanup.py: error: clearml does not start ({type(error).__name__}); find out why: uv run doctor.py")

Doc = dict[str, Any]
PAGE = 500  # what the server gives at once, at most
DELETABLE = {"created", "stopped", "closed", "failed", "completed", "unknown"}  # the others run, wait or are published
PROBE = ".cleanup-probe-"  # and the task's id: what a killed run leaves, the next one writes again, and removes
MEANING = {0: "no answer", 401: "wrong keys", 403: "forbidden", 404: "not there"}


class Stays(Exception):  # noqa: N818
    """Why a task stays, in one line."""


class ServerDown(Exception):  # noqa: N818
    """The ClearML server does not answer: nothing more can be done."""


# --- the ClearML server ---------------------------------------------------------------------------------------------
@cache
def pool() -> ThreadPool:
    return ThreadPool(8)


@cache
def http() -> Any:
    """For requests of our own: with the SDK's settings for certificates, but without its patience."""
    return get_http_session_with_retry(total=0, config=config_obj)


@cache
def session() -> Any:
    """The SDK's session with the configured server, which was seen to answer."""
    keys = ("CLEARML_API_ACCESS_KEY", "api.credentials.access_key"), ("CLEARML_API_HOST", "api.api_server")
    if Session._offline_mode or not all(os.getenv(name) or config_obj.get(key, "") for name, key in keys):
        raise ServerDown("no ClearML server is configured, or CLEARML_OFFLINE_MODE is set")
    Session._session_timeout = (PATIENCE, 60.0)
    try:  # first without the SDK, which tries for ever where a certificate is wrong
        http().get(f"{Session.get_api_server_host()}/debug.ping", timeout=PATIENCE).raise_for_status()
        return Session()
    except Exception as error:
        raise ServerDown(f"no session with {Session.get_api_server_host()}: {brief(error)}") from error


def ask(call: str, **parameters: Any) -> Doc:
    """One call of the server's API."""
    try:
        answer = session().send_request(*call.split("."), json=parameters)
        body: Doc = answer.json()
    except ServerDown:
        raise
    except Exception as error:
        raise ServerDown(f"no answer to {call}: {brief(error)}") from error
    if answer.status_code != 200:
        raise Stays(f"the server refuses {call}: {body['meta']['result_msg']}")
    return body["data"]  # type: ignore[no-any-return]


def get_all(kind: str, **filters: Any) -> list[Doc]:
    """Every document, page by page. A list in which nothing is looked for matches nothing, not everything."""
    docs: list[Doc] = []
    if any(value in ([], set()) for value in filters.values()):
        return docs
    while not docs or len(docs) % PAGE == 0:
        page = ask(f"{kind}.get_all", **filters, order_by=["-created"], page=len(docs) // PAGE, page_size=PAGE)[kind]
        docs += page
        if not page:
            break
    return docs


def image_addresses(task: str) -> set[str]:
    """Debug images, and plots that are images. SDK 2.1.12 deletes the first 100 only, and one image a plot."""
    found: set[str] = set()
    for kind in ("training_debug_image", "plot"):
        seen, scroll = 0, dict[str, str]()
        while True:  # newest first: a scroll that has come to iteration 0 would begin again
            request = {"task": task, "event_type": kind, "order": "desc", "batch_size": 1000, **scroll}
            data = ask("events.get_task_events", **request)
            for event in data["events"]:
                found.add(event.get("url") or "")
                with suppress(ValueError, AttributeError, TypeError, KeyError):  # a plot is whatever somebody sent
                    images = json.loads(event.get("plot_str") or "{}")["layout"]["images"]
                    found |= {str(image.get("source")) for image in images}
            seen, scroll = seen + data["returned"], {"scroll_id": data["scroll_id"]}
            if not data["returned"] or seen >= data["total"]:
                break
    return {address for address in found if "://" in address[:20]}  # not what a plot holds itself, data:image/png;...


# --- stores: each tells "missing" from "forbidden" and "no answer" --------------------------------------------------
def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def http_status(error: BaseException) -> int:
    """What boto3, Google's library, requests and the file system mean, as an HTTP status; 0: there was no answer."""
    if isinstance(error, OSError) and error.errno and not hasattr(error, "response"):
        return {FileNotFoundError: 404, PermissionError: 403}.get(type(error), 500)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return int(response["ResponseMetadata"]["HTTPStatusCode"])
    return int(getattr(response, "status_code", 0) or getattr(error, "code", 0) or 0)


@dataclass
class Store:
    """A place for objects. A subclass knows how to talk to it, and raises whatever its library raises."""

    name: str
    client: Any = None
    trouble: str = ""  # why nothing more is asked of it

    def size(self, key: str) -> int:
        raise NotImplementedError

    def write(self, key: str) -> None:
        raise NotImplementedError

    def remove(self, key: str) -> None:
        raise NotImplementedError

    def parent(self, key: str) -> str:
        return key.rpartition("/")[0]

    def tidy(self, key: str, task: str) -> None:
        pass

    def attempt(self, verb: str, action: Callable[[str], Any], key: str) -> Any:
        """What the action returns; None where there is no such object; Stays where that cannot be known."""
        if self.trouble:
            raise Stays(self.trouble)
        try:
            return action(key)
        except Exception as error:
            if (status := http_status(error)) == 404:
                return None
            reason = f"{self.name}: cannot {verb}: {MEANING.get(status, 'refused')} ({brief(error)})"
            if status == 0:
                self.trouble = reason
            raise Stays(reason) from error

    def look(self, key: str) -> int | None:
        size: int | None = self.attempt("look", self.size, key)
        return size

    def erase(self, key: str) -> None:
        """Remove the object and see it gone."""
        self.attempt("delete", self.remove, key)
        if self.look(key) is not None:
            raise Stays(f"{self.name}: {key} was deleted, but is still there")

    def prove(self, key: str, task: str) -> None:
        """That objects beside this one can be written, seen, deleted and missed."""
        probe = "/".join(filter(None, (self.parent(key), PROBE + task)))
        self.attempt("write", self.write, probe)
        if self.look(probe) is None:
            raise Stays(f"{self.name}: a probe object was written, but is not there: no such bucket?")
        self.erase(probe)


class S3(Store):
    def size(self, key: str) -> int:
        return int(self.client.meta.client.head_object(Bucket=self.client.name, Key=key)["ContentLength"])

    def write(self, key: str) -> None:
        self.client.meta.client.head_bucket(Bucket=self.client.name)  # some stores make a missing one
        self.client.meta.client.put_object(Bucket=self.client.name, Key=key, Body=b"probe")

    def remove(self, key: str) -> None:
        self.client.meta.client.delete_object(Bucket=self.client.name, Key=key)


class GCS(Store):
    def size(self, key: str) -> int:
        blob = self.client.blob(key)
        blob.reload(timeout=PATIENCE, retry=None)
        return int(blob.size)

    def write(self, key: str) -> None:
        self.client.blob(key).upload_from_string("probe", timeout=PATIENCE, retry=None)

    def remove(self, key: str) -> None:
        self.client.blob(key).delete(timeout=PATIENCE, retry=None)


class FileServer(Store):
    """Its keys are paths as they stand in the record: of artifacts and images quoted, of models (SDK 2.1.12) not."""

    def send(self, method: str, path: str, **options: Any) -> Any:
        headers = session().add_auth_headers({"Accept-Encoding": "identity"})
        for spelling in dict.fromkeys((path, quote(path))):
            url = f"{self.name}/{spelling}"
            answer = http().request(method, url, headers=headers, timeout=2 * PATIENCE, **options)
            if answer.status_code != 404:
                break
        answer.raise_for_status()
        return answer

    def size(self, key: str) -> int:
        return int(self.send("HEAD", key).headers.get("Content-Length", 0))

    def write(self, key: str) -> None:
        self.send("POST", "", files={key: (key, b"probe")})

    def remove(self, key: str) -> None:
        self.send("DELETE", key)

    def parent(self, key: str) -> str:
        return ""  # a folder made for the probe would stay


class Folder(Store):
    def size(self, key: str) -> int:
        return Path(key).lstat().st_size

    def write(self, key: str) -> None:
        Path(key).write_bytes(b"probe")

    def remove(self, key: str) -> None:
        Path(key).unlink()

    def parent(self, key: str) -> str:
        return str(next(folder for folder in Path(key).parents if folder.is_dir()))

    def tidy(self, key: str, task: str) -> None:
        """Remove the folders that were the task's own and are empty now."""
        with suppress(OSError):  # not empty
            for folder in Path(key).parents:
                if task in str(folder) and folder.exists():
                    folder.rmdir()


STORES: dict[str, Store] = {}


def find_store(address: str, folders: list[Path]) -> tuple[Store, str]:
    """The store of an address, as the SDK's configuration has it, and the object's key there."""
    address = StorageHelper._canonize_url(address)
    scheme, separator, rest = address.partition("://")
    if not separator or scheme == "file":
        path = Path(rest or address)
        path = path.parent.resolve() / path.name  # of a link only the link is removed
        for folder in folders:
            if path.is_relative_to(folder):
                return STORES.setdefault(str(folder), Folder(str(folder))), str(path)
        return Store("file://", trouble=f"file://{path} is not below a --folder"), str(path)
    if scheme in ("http", "https"):
        for host in _HttpDriver.get_file_server_hosts():
            if address.startswith(host.rstrip("/") + "/"):
                return STORES.setdefault(host, FileServer(host.rstrip("/"))), address[len(host.rstrip("/")) + 1 :]
        host = f"{scheme}://{rest.partition('/')[0]}"
        return Store(host, trouble=f"{host} is not a file server of this configuration"), address
    base = "/".join(address.split("/")[: 4 if scheme == "s3" else 3])  # s3: with the bucket after host:port
    if base not in STORES:
        opened = open_bucket(scheme, base, address)
        STORES[base] = STORES.setdefault(opened.name, opened)
    return STORES[base], address[len(STORES[base].name) :].lstrip("/")


def open_bucket(scheme: str, base: str, address: str) -> Store:
    """By the SDK, with its configuration. What it only logs is the reason where it cannot."""
    words: list[str] = []
    log = logging.getLogger("clearml.storage")

    def listen(record: logging.LogRecord) -> bool:
        words.append(record.getMessage())
        return False

    log.addFilter(listen)
    try:
        if scheme not in ("s3", "gs"):
            return Store(base, trouble=f"{scheme}:// is no storage that this script knows")
        helper = StorageHelper.get(address)
        if not helper:
            return Store(base, trouble=f"{base}: {' '.join(words) or 'no access'}")
        if not address.startswith(helper.base_url.rstrip("/") + "/"):  # the SDK compares beginnings
            return Store(base, trouble=f"{base}: clearml.conf's entry for {helper.base_url} would be used")
        return {"s3": S3, "gs": GCS}[scheme](helper.base_url.rstrip("/"), helper._container.bucket)
    except Exception as error:
        return Store(base, trouble=f"{base}: {brief(error)}")
    finally:
        log.removeFilter(listen)


# --- tasks and what they own ----------------------------------------------------------------------------------------
@dataclass
class Thing:
    """An object that a task owns."""

    kind: str  # model, artifact or image
    address: str
    store: Store
    key: str
    size: int | None = 0  # None: it is gone already


@dataclass
class Item:
    """A task that is old enough, and what became of it."""

    id: str
    name: str
    days: int
    things: list[Thing] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # addresses that it points to, of objects that are not its own
    own_inputs: list[str] = field(default_factory=list)  # models of its own that it uses: it went on from a checkpoint
    reason: str = ""  # why it stays
    deleted: bool = False

    def sizes(self) -> Counter[str]:
        """Bytes by store."""
        sizes = Counter[str]()
        for thing in self.things:
            sizes[thing.store.name] += thing.size or 0
        return sizes

    def __str__(self) -> str:
        kinds = Counter(thing.kind for thing in self.things if thing.size is not None)
        kinds |= {"already gone": sum(thing.size is None for thing in self.things), "not its own": len(self.others)}
        return f"{self.name} ({self.id}), {plural(self.days, 'day')}: {sum_up(kinds, self.sizes())}"


def owns(kind: str, task: str, address: str) -> bool:
    """ClearML puts the task's id into the address of whatever it uploads. Anything else is a link of somebody's, to a
    data set or a web page, unless a model of the task says that it is its own."""
    return task in address or (kind == "model" and not address.startswith("http"))


def sum_up(kinds: Counter[str], sizes: Counter[str]) -> str:
    words = [plural(kinds[kind], kind) for kind in ("task", "model", "artifact", "image") if kinds[kind]]
    words += [f"{kinds[kind]} {kind}" for kind in ("already gone", "not its own") if kinds[kind]]
    return ", ".join(words + [f"{human(size)} in {store}" for store, size in sizes.items() if size]) or "no objects"


def plural(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def human(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


@dataclass
class Project:
    """The tasks of one project that are archived and whose status has not changed since a day."""

    id: str
    before: datetime
    folders: list[Path]
    linkers: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # address: tasks, by artifact
    images: dict[str, set[str]] = field(default_factory=dict)  # by task; an old task gets no new ones

    def find_linkers(self) -> None:
        for task in get_all("tasks", project=[self.id], only_fields=["id", "execution.artifacts"]):
            for artifact in task.get("execution", {}).get("artifacts", []):
                self.linkers[artifact.get("uri")].add(task["id"])

    def old_tasks(self, **more: list[str]) -> list[Doc]:
        """Newest first: a task that uses a model is newer than the one that made it, and goes before it."""
        more |= {"system_tags": ["archived"], "status_changed": [f"<{self.before:%Y-%m-%dT%H:%M:%S}"]}
        fields = ["id", "name", "status", "status_changed", "system_tags", "execution.artifacts", "models.output"]
        return get_all("tasks", project=[self.id], only_fields=fields, **more)

    def survey(self, tasks: list[Doc], leaving: set[str]) -> list[Item]:
        """What these tasks own, and why some of them stay. Tasks that are `leaving` keep no other from leaving."""
        ids = [task["id"] for task in tasks]
        linked = {output["model"]: task["id"] for task in tasks for output in task.get("models", {}).get("output", [])}
        models = {model["id"]: model for model in get_all("models", task=ids) + get_all("models", id=[*linked])}
        users = defaultdict[str, set[str]](set)
        for user in get_all("tasks", **{"models.input.model": [*models]}, only_fields=["id", "models.input"]):
            for model in user["models"]["input"]:
                users[model["model"]].add(user["id"])
        published = get_all("tasks", parent=ids, status=["published", "publishing"], only_fields=["id", "parent"])
        children = {child["parent"]: child["id"] for child in published}

        owned: dict[str, list[tuple[str, str]]] = {id_: [] for id_ in ids}
        reasons: dict[str, str] = {}
        for model in models.values():
            owner = linked.get(model["id"]) or model["task"]
            owned[owner].append(("model", model.get("uri") or ""))
            foreign = {model.get("task") or owner, *users[model["id"]]} - {owner} - leaving
            if model.get("ready") or foreign:
                why = "published" if model.get("ready") else f"used by task {min(foreign)}"
                reasons[owner] = f"its model {model['name']} ({model['id']}) is {why}"
        for task in tasks:
            artifacts = task.get("execution", {}).get("artifacts", [])
            owned[task["id"]] += [("artifact", item.get("uri") or "") for item in artifacts if item["mode"] != "input"]
            if task["id"] in children:
                reasons[task["id"]] = f"its child {children[task['id']]} is published"
            if "dataset" in task["system_tags"]:
                reasons[task["id"]] = "it is a ClearML dataset, for clearml-data to delete"
            if task["status"] not in DELETABLE:
                reasons[task["id"]] = f"it is {task['status'].replace('in_progress', 'running')}"
        addresses = {address for pairs in owned.values() for _, address in pairs} - {""}
        pointers = {address: {("artifact", id_) for id_ in self.linkers[address]} for address in addresses}
        for model in get_all("models", uri=sorted(addresses)):
            pointers[model["uri"]].add(("model", linked.get(model["id"]) or model.get("task") or model["id"]))
        new = [id_ for id_ in ids if id_ not in self.images]
        self.images |= zip(new, progress("images", pool().imap(image_addresses, new), len(new)), strict=True)

        items = []
        for task in tasks:
            id_, changed = task["id"], datetime.fromisoformat(task["status_changed"])
            item = Item(id_, task["name"], (datetime.now(UTC) - changed).days, reason=reasons.get(id_, ""))
            item.own_inputs = [model for model in models if id_ in users[model]]
            items.append(item)
            kinds = dict.fromkeys(self.images[id_], "image") | {address: kind for kind, address in reversed(owned[id_])}
            for address, kind in sorted(kinds.items()):
                if not address:
                    continue
                others = {(kind, id_) for kind, id_ in pointers.get(address, ()) if id_ not in {task["id"], *leaving}}
                if not owns(kind, id_, address) or any(owns(*other, address) for other in others):
                    item.others.append(address)  # it goes with the last task that owns it
                    continue
                for _, other in others:
                    item.reason = item.reason or f"task {other} has a link to its {kind} {address}"
                store, key = find_store(address, self.folders)
                item.things.append(Thing(kind, address, store, key))
                item.reason = item.reason or store.trouble
        return items

    def delete(self, id_: str) -> None:
        """Objects first, each seen gone, then the record. Whatever stops this, the next run goes on with it."""
        if not (tasks := self.old_tasks(id=[id_])):
            raise Stays("it is no longer an archived, old task of this project")
        (item,) = self.survey(tasks, leaving=set())  # what was true when it was listed may have changed
        if item.reason:
            raise Stays(item.reason)
        for thing in {thing.store.name: thing for thing in reversed(item.things)}.values():
            thing.store.prove(thing.key, id_)
        pool().map(lambda thing: thing.store.erase(thing.key), item.things)
        for thing in item.things:
            thing.store.tidy(thing.key, id_)
        for model in item.own_inputs:  # which the server would keep
            ask("models.delete", model=model, force=True, delete_external_artifacts=False)
        ask("tasks.delete", task=id_, delete_external_artifacts=False)  # not force: the server has its say, too
        for address in [*item.others, *(thing.address for thing in item.things)]:
            self.linkers[address].discard(id_)


def measure(item: Item) -> None:
    """The sizes of a task's objects. A store that cannot be asked is a reason to stay."""
    for thing in item.things:
        try:
            thing.size = thing.store.look(thing.key)
        except Stays as error:
            item.reason = item.reason or str(error)


# --- the command ----------------------------------------------------------------------------------------------------
def days(text: str) -> float:
    if not 0 <= (number := float(text)) <= 36500:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 36500")
    return number


def folder(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not path.is_dir() or path == Path(path.anchor):
        raise argparse.ArgumentTypeError(f"{text} is no folder, or the root of all")
    return path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Remove old archived tasks of a ClearML project together with every object that they own: models, "
        "artifacts, debug images, plots. Without --delete it only lists them.",
        epilog="""\
what goes:
  A task that is archived, whose status changed more than --older-than days ago, as a whole: its objects first, each
  seen gone, and its record last. Objects are found with clearml.conf and the AWS_... and GOOGLE_... variables, in S3
  and compatible stores, Google Cloud Storage, the ClearML file server and folders.

what stays, with the reason:
  - a task that is published, queued or running, or that is a ClearML dataset
  - a task with a published model or child, or with a model that another task uses
  - a task with an object in a store where a probe object cannot be written, seen, deleted and missed just now
  - a task with a file:// object that is not below a --folder
  - an object that another task or model points to: it goes with the last of them
  - an address that does not belong to the task, such as a link to a data set

killed, or the storage broke down:
  Run it again. The record of a task goes last, so the next run finds what is left of it.

exit code:
  0: all is done, 1: something is left, each with its reason, 2: wrong use

examples:
  cleanup.py --project-name demo-project --older-than 30
  cleanup.py --project-name demo-project --older-than 30 --delete
  cleanup.py --project-name demo-project --older-than 30 --delete --yes --json > cleanup.json     # in a cron job
  cleanup.py --project-name demo-project --folder /mnt/models/clearml --delete                    # file:// objects, too
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--project-name", required=True, help="the project, by its whole name; not those below it")
    parser.add_argument(
        "--older-than", type=days, default=30, metavar="DAYS", help="since the last change of status (30)"
    )
    parser.add_argument("--delete", action="store_true", help="delete, after asking; without it nothing is deleted")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--folder",
        type=folder,
        action="append",
        default=[],
        help="where file:// objects may be deleted; may be given again. Of a disk that may not be mounted name a "
        "folder on it: where nothing is mounted, everything looks gone",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    args = parser.parse_args()
    if args.delete and not args.yes and not sys.stdin.isatty():
        parser.error("--delete asks on a terminal; here is none, so add --yes")
    return args


def hide(text: str) -> str:
    """Without passwords in addresses."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def say(text: str) -> None:
    """One line, past the progress bar."""
    tqdm.write(hide(" ".join(text.split())))
    sys.stdout.flush()


def confirmed() -> bool:
    with suppress(EOFError):
        return input("Delete them for good? [yes/no] ").strip().lower() == "yes"
    return False


def as_doc(item: Item) -> Doc:
    objects = {thing.address: thing.size for thing in item.things}
    doc = {"id": item.id, "name": item.name, "days": item.days, "deleted": item.deleted, "reason": item.reason}
    return {**doc, "bytes": item.sizes(), "objects": objects, "not_its_own": item.others}


def progress(what: str, steps: Iterable[Any], total: int) -> Iterator[Any]:
    """A bar, on a terminal only."""
    return iter(tqdm(steps, what, total, leave=False, disable=None if total > 1 else True))


def list_items(project: Project, name: str, age: float) -> list[Item]:
    project.find_linkers()
    tasks = project.old_tasks()
    items = project.survey(tasks, leaving={task["id"] for task in tasks})
    for _ in progress("sizes", pool().imap(measure, items), len(items)):
        pass
    say(f"{name}: {plural(len(items), 'archived task')}, unchanged for more than {age:g} days")
    for item in items:
        say(f"{item}{item.reason and f'; stays: {item.reason}'}")
    return items


def delete_items(project: Project, items: list[Item]) -> None:
    down = ""
    for item in progress("tasks", items, len(items)):
        try:
            if down:
                raise Stays(down)
            project.delete(item.id)
            item.deleted, item.reason = True, ""
            say(f"deleted {item}")
        except Stays as error:
            item.reason = str(error)
        except ServerDown as error:
            item.reason = down = str(error)
        if item.reason:
            say(f"left    {item.name} ({item.id}): {item.reason}")


def total(items: list[Item]) -> str:
    kinds = Counter(thing.kind for item in items for thing in item.things if thing.size is not None)
    kinds["task"] = len(items)
    return sum_up(kinds, sum((item.sizes() for item in items), Counter[str]())) if items else "0 tasks"


def main() -> int:
    args = parse_args()
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "1")
    output = sys.stdout
    with redirect_stdout(sys.stderr if args.json else output):
        try:
            found = get_all("projects", name=f"^{re.escape(args.project_name)}$", search_hidden=True)
            if not found:
                print(f"cleanup.py: error: no project {args.project_name!r} on the server", file=sys.stderr)
                return 2
            project = Project(found[0]["id"], datetime.now(UTC) - timedelta(days=args.older_than), args.folder)
            items = list_items(project, args.project_name, args.older_than)
        except (ServerDown, Stays) as error:
            print(f"cleanup.py: error: {error}", file=sys.stderr)
            return 1
        ready = [item for item in items if not item.reason]
        say(f"To delete: {total(ready)}. To stay: {plural(len(items) - len(ready), 'task')}.")
        if items and args.delete and (args.yes or confirmed()):
            delete_items(project, items)
            gone = [item for item in items if item.deleted]
            say(f"Deleted: {total(gone)}. Left: {plural(len(items) - len(gone), 'task')}.")
        elif items:
            say("Nothing was deleted." if args.delete else "Nothing was deleted: add --delete.")
    if args.json:
        document = {"project": args.project_name, "older_than": args.older_than, "tasks": [*map(as_doc, items)]}
        print(hide(json.dumps(document, indent=2)), file=output)
    return int(args.delete and not all(item.deleted for item in items))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("cleanup.py: stopped; the same command again goes on from here")
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
