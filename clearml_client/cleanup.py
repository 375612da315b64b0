"""Remove old archived tasks of a ClearML project, together with every object that they own.

    python -m clearml_client.cleanup --project-name demo-project --older-than 30            # list, delete nothing
    python -m clearml_client.cleanup --project-name demo-project --older-than 30 --delete   # ask; in a cron job: --yes

What goes: archived tasks whose status has not changed for --older-than days, each with its models, artifacts, debug
images, images of plots, and all else in its own folder, <output destination>/<project>/<task name>.<task id>/. A run
that was killed between an upload and its record leaves such an unrecorded object. The ClearML file server cannot list
a folder, and some keys may not: then only recorded objects go. Where the keys are why, the task's line says so.

What stays, each with its reason: a task that is published, queued or running, or a ClearML dataset; a task with a
published model or child, with a model that another task uses, or an object that one links to; a task with an object or
a folder in Azure, outside of each --folder, or in a store that cannot be asked. An object of several tasks goes
with the last of them. What is only a link, to a data set, say, stays.

After a kill or a failure of a store, run it again. The record of a task is deleted only after its objects are gone, so
that the next run finds what is left. (The SDK's own Task.delete() deletes the record first.)

Exit code 0: all is done, and what stays does so for a good reason; 1: a failure (in --json "failed" is true
for a task that could not be deleted), or you did not confirm; 2: wrong use.
"""

import json
import os
import re
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tqdm import tqdm

import clearml_client

clearml_client.prepare_environment()  # before the SDK, which reads variables while it is imported

from clearml_client import configuration, sdk, server
from clearml_client.errors import (
    DENIED,
    RunError,
    UsageError,
    command,
    diagnose,
    escape_unencodable,
    one_line,
    plural,
    redact,
)
from clearml_client.storage import Folder, StorageError, Store, open_store

Doc = dict[str, Any]
PAGE = 500  # what the server gives at once, at most
DELETABLE = {"created", "stopped", "closed", "failed", "completed", "unknown"}  # the others run, wait or are published
SESSION = re.compile("offline-[0-9a-f]{32}")  # the id of an offline session, in what it stored
NAME = "clearml_client.cleanup"
open_once = cache(open_store)


class KeepTask(RunError):  # noqa: N818
    """A good reason for a task to stay, which is no failure."""


# --- the ClearML server ---------------------------------------------------------------------------------------------
def get_all(kind: str, **filters: Any) -> list[Doc]:
    """Get all documents, page by page. An empty filter matches nothing here, and everything on the server."""
    docs: list[Doc] = []
    while [] not in filters.values():
        found = server.call(f"{kind}.get_all", **filters, order_by=["-created"], page=len(docs) // PAGE, page_size=PAGE)
        docs += found[kind]
        if len(found[kind]) < PAGE:
            break
    return docs


def image_addresses(task: str) -> set[str]:
    """Find debug images and images of plots. SDK 2.1.12 deletes the first 100 only, and one image a plot."""
    found: set[str] = set()
    for kind in ("training_debug_image", "plot"):
        request = {"task": task, "event_type": kind, "order": "desc", "batch_size": 1000}
        seen, total = 0, 1
        while seen < total:  # newest first: a scroll that has come to iteration 0 would begin again
            data = server.call("events.get_task_events", **request)
            for event in data["events"]:
                found.add(event.get("url") or "")
                with suppress(ValueError, AttributeError, TypeError, KeyError):  # a plot is whatever somebody sent
                    images = json.loads(event.get("plot_str") or "{}")["layout"]["images"]
                    found |= {str(image.get("source")) for image in images}
            request["scroll_id"] = data["scroll_id"]
            seen, total = seen + data["returned"], data["total"] if data["returned"] else 0
    return {address for address in found if "://" in address[:20]}  # not what a plot holds itself, data:image/png;...


# --- tasks and what they own ----------------------------------------------------------------------------------------
def find_store(address: str, folders: list[Path]) -> tuple[Store, str]:
    """Find the store of an address, as the SDK's configuration has it, and the key there. Raise RunError."""
    address = sdk.canonical(address)
    scheme, separator, rest = address.partition("://")
    if not separator or scheme == "file":
        path = Path(rest or address)
        path = path.parent.resolve() / path.name  # of a link only the link is removed
        folder = next((folder for folder in folders if path.is_relative_to(folder)), None)
        if not folder:
            raise KeepTask(f"file://{path} is not below a --folder")
        with suppress(OSError):  # it cannot be listed, or is gone
            if not any(folder.iterdir()):  # all its objects would count as missing, and their records would go
                raise StorageError(f"{folder} is empty: is it mounted?", "mount it, or put any file there")
        return Folder(str(folder)), str(path)
    if scheme == "azure":  # where "not there" and "forbidden" look alike
        raise KeepTask("azure:// is no storage that this command knows")
    base = "/".join(address.split("/")[: 4 if scheme == "s3" else 3])  # s3: with the bucket after host:port
    base = next((host for host in sdk.file_servers() if address.startswith(f"{host}/")), base)  # it may have a path
    store = open_once(base)
    return store, store.key(address)


@contextmanager
def named(store: Store) -> Iterator[None]:
    """Put the store's name before what it says no to."""
    try:
        yield
    except StorageError as error:
        raise StorageError(f"{store.name}: {error}", error.cure, error.source) from error


@dataclass
class StoredObject:
    kind: str  # model, artifact, image or unrecorded object
    address: str
    store: Store
    key: str
    size: int | None  # None: it is gone already

    def delete(self) -> None:
        with named(self.store):
            self.store.delete(self.key)


@dataclass
class OldTask:
    """A task that is old enough, and what became of it."""

    id: str
    name: str
    days: int
    models: list[str] = field(default_factory=list)
    objects: list[StoredObject] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # addresses that it points to, of objects that are not its own
    not_listed: str = ""  # why a folder could not be listed
    reason: RunError | None = None  # why it stays
    deleted: bool = False

    def keep(self, reason: str | RunError) -> None:
        self.reason = self.reason or (reason if isinstance(reason, RunError) else KeepTask(reason))

    def __str__(self) -> str:
        text = f"{self.name} ({self.id}), {plural(self.days, 'day')}"
        if self.objects or self.others or not self.reason:  # else the reason may be why none was counted
            text += f": {sum_up([self])}"
        return f"{text}; {self.not_listed}" if self.not_listed else text


def sum_up(tasks: list[OldTask]) -> str:
    """Count what these tasks own by kind, and its bytes by store."""
    kinds, sizes = Counter[str](), Counter[str]()
    for task in tasks:
        kinds["linked object"] += len(task.others)
        for stored in task.objects:
            kinds["missing object" if stored.size is None else stored.kind] += 1
            sizes[stored.store.name] += stored.size or 0
    words = [plural(count, kind) for kind, count in sorted(kinds.items()) if count]
    words += [f"{tqdm.format_sizeof(size, 'B')} in {store}" for store, size in sizes.items() if size]
    return ", ".join(words) or "no objects known"


def owns(kind: str, task: str, address: str) -> bool:
    """Tell an object of the task from a link. What ClearML uploads has the id of the task in its address, or that of
    the offline session that it was; a model of the task may be anywhere but on the web."""
    is_session = kind == "artifact" and SESSION.search(address)
    return bool(is_session) or task in address or (kind == "model" and not address.startswith("http"))


def folder_of(doc: Doc, project: str) -> str:
    """Build the address of the task's folder as SDK 2.1.12 does; "" where there is none that could be listed."""
    root = doc.get("output", {}).get("destination") or ""
    path = quote(f"{project}/{doc['name'][:95]}.{doc['id']}/", safe="'[]{}()$^,.; -_+-=/")
    return f"{root.rstrip('/')}/{path}" if root and not root.startswith("http") else ""


def addresses_in(doc: Doc, modes: tuple[str, ...] = ("input", "output")) -> set[str]:
    """Get those of a task's artifacts, and the `stored` of their metadata: the SDK takes no file:// link as one."""
    found = set()
    for artifact in doc.get("execution", {}).get("artifacts", []):
        if artifact["mode"] in modes:
            metadata = dict(pair for pair in artifact.get("display_data") or [] if len(pair) == 2)
            found |= {artifact.get("uri"), metadata.get("stored")}
    return {address for address in found if address and "://" in address}


@dataclass
class Project:
    """The tasks of one project that are archived and whose status has not changed since a day."""

    id: str
    name: str
    before: datetime
    folders: list[Path]
    linkers: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # address: tasks, by artifact
    deleted: set[str] = field(default_factory=set)
    pool: ThreadPool = field(default_factory=partial(ThreadPool, 8))

    def old_tasks(self, **more: list[str]) -> list[Doc]:
        """Get them, newest first: a task that uses a model is newer than the one that made it, and goes before it."""
        more |= {"system_tags": ["archived"], "status_changed": [f"<{self.before:%Y-%m-%dT%H:%M:%S}"]}
        fields = ["id", "name", "status", "status_changed", "system_tags", "execution.artifacts", "models.output"]
        return get_all("tasks", project=[self.id], only_fields=[*fields, "output.destination"], **more)

    def inspect(self, doc: Doc, leaving: set[str]) -> OldTask:
        """Find the task's objects, in its record and in its folders, and why it stays. It stays where a store cannot be
        asked. Tasks that are `leaving` keep no other from leaving."""
        id_, age = doc["id"], datetime.now(UTC) - datetime.fromisoformat(doc["status_changed"])
        task, leaving = OldTask(id_, doc["name"], age.days), {id_, *leaving}
        if doc["status"] not in DELETABLE:
            task.keep(f"it is {doc['status'].replace('in_progress', 'running')}")
        if "dataset" in doc["system_tags"]:
            task.keep("it is a ClearML dataset, for clearml-data to delete")
        for child in get_all("tasks", parent=[id_], status=["published", "publishing"], only_fields=["id"]):
            task.keep(f"its child {child['id']} is published")
        outputs = [output["model"] for output in doc.get("models", {}).get("output", [])]
        models = {model["id"]: model for model in get_all("models", task=[id_]) + get_all("models", id=outputs)}
        task.models = [*models]
        users = get_all("tasks", **{"models.input.model": [*models]}, only_fields=["id"])
        for user in {user["id"] for user in users} | {model.get("task") or id_ for model in models.values()}:
            if user not in leaving:
                task.keep(f"a model of it is used by task {user}")
        for model in models.values():
            if model.get("ready"):
                task.keep(f"its model {model['name']} ({model['id']}) is published")
        kinds = dict.fromkeys(image_addresses(id_), "image") | dict.fromkeys(addresses_in(doc, ("output",)), "artifact")
        kinds |= {model["uri"]: "model" for model in models.values() if model.get("uri")}
        try:
            kinds |= dict.fromkeys(self.find_unrecorded(task, folder_of(doc, self.name), kinds), "unrecorded object")
            pointers = {
                address: {("artifact", linker) for linker in self.linkers.get(address, ())} for address in kinds
            }
            for model in get_all("models", uri=[address for address, kind in kinds.items() if kind != "image"]):
                if model["id"] not in models:
                    pointers[model["uri"]].add(("model", model.get("task") or model["id"]))
            for address, kind in sorted(kinds.items()):
                others = {(how, other) for how, other in pointers[address] if other not in leaving}
                if not owns(kind, id_, address) or any(owns(*other, address) for other in others):
                    task.others.append(address)  # it goes with the last task that owns it
                    continue
                for _, other in others:
                    task.keep(f"task {other} has a link to its {kind} {address}")
                store, key = find_store(address, self.folders)
                with named(store):
                    task.objects.append(StoredObject(kind, address, store, key, store.size(key)))
        except RunError as error:
            task.keep(error)
        return task

    def find_unrecorded(self, task: OldTask, own: str, recorded: Iterable[str]) -> list[str]:
        """List the task's folders, its own first: what no record has was left by a run that was killed before it."""
        end = f".{task.id}/"
        known = [address for address in recorded if end in address]
        found = {self.place(address): "" for address in known}
        for folder in sorted({address.partition(end)[0] + end for address in known} | {own} - {""}):
            store, key = find_store(folder, self.folders)
            prefix = key.rstrip("/") + "/"
            try:
                with named(store):
                    keys = store.list(prefix)
            except StorageError as error:
                if diagnose(error).words != DENIED:
                    raise
                keys, task.not_listed = [], str(error)  # a permission that all the rest can do without
            for key in keys:
                address = folder + key.removeprefix(prefix)
                place = self.place(address)
                if place[-1] == key:  # not where a link leads out of the folder
                    found.setdefault(place, address)
        return [*filter(None, found.values())]

    def place(self, address: str) -> tuple[str, str, str]:
        """Tell where an object is, however its address is spelled: s3://host:port/bucket/key, or s3://bucket/key."""
        store, key = find_store(address, self.folders)
        return store.url, store.name.rpartition("/")[2], key

    def delete(self, id_: str) -> None:
        """Delete the objects, see each gone, and then delete the record. Whatever stops this, the next run goes on."""
        docs = self.old_tasks(id=[id_])
        if not docs:
            raise KeepTask("it is no longer an archived, old task of this project")
        task = self.inspect(docs[0], self.deleted)  # what was true when it was listed may have changed
        if task.reason:
            raise task.reason
        self.pool.map(StoredObject.delete, task.objects)
        for stored in task.objects:
            session = SESSION.search(stored.address)
            stored.store.tidy(stored.key, session[0] if session else id_)
        for model in task.models:  # the server would keep one that the task itself has used, as after a resumed run
            server.call("models.delete", model=model, force=True, delete_external_artifacts=False)
        server.call("tasks.delete", task=id_, delete_external_artifacts=False)  # not force: the server has its say, too
        self.deleted.add(id_)


# --- the command ----------------------------------------------------------------------------------------------------
def parse_args() -> Namespace:
    parser = ArgumentParser(prog=f"python -m {NAME}", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--project-name", required=True, help="the project, by its whole name; not those below it")
    parser.add_argument("--older-than", type=float, default=30, metavar="DAYS", help="days in the same status (30)")
    parser.add_argument("--delete", action="store_true", help="delete, after asking; without it nothing is deleted")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    folders = "where file:// objects may be deleted (repeatable); on a mounted disk, a folder below the mount point"
    parser.add_argument("--folder", type=Path, action="append", default=[], help=folders)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    args = parser.parse_args()
    args.folder = [path.expanduser().resolve() for path in args.folder]
    if not 0 <= args.older_than <= 36500:
        parser.error(f"argument --older-than: {args.older_than:g} is not between 0 and 36500")
    for path in args.folder:
        if not path.is_dir() or path == Path(path.anchor):
            parser.error(f"argument --folder: {path} is no folder, or the root folder")
    if args.delete and not args.yes and not sys.stdin.isatty():
        parser.error("--delete needs a terminal to ask on, or --yes")
    return args


def say(text: str) -> None:
    tqdm.write(" ".join(redact(text).split()))  # past the progress bar
    sys.stdout.flush()


def list_tasks(project: Project, age: float) -> list[OldTask]:
    for doc in get_all("tasks", project=[project.id], only_fields=["id", "execution.artifacts"]):
        for address in addresses_in(doc):
            project.linkers[address].add(doc["id"])
    docs = project.old_tasks()
    found = project.pool.imap(partial(project.inspect, leaving={doc["id"] for doc in docs}), docs)
    tasks = [*tqdm(found, "listed", len(docs), leave=False, disable=None)]  # a bar, on a terminal only
    since = f"{age:g} day{'' if age == 1 else 's'}"
    say(f"{project.name}: {plural(len(tasks), 'archived task')}, unchanged for more than {since}")
    for task in tasks:
        say(f"{task}; stays: {task.reason}" if task.reason else str(task))
    ready = [task for task in tasks if not task.reason]
    kept = plural(len(tasks) - len(ready), "task")
    say(f"To delete: {plural(len(ready), 'task')}, {sum_up(ready)}. To stay: {kept}.")
    return tasks


def delete_tasks(project: Project, tasks: list[OldTask]) -> None:
    for task in tqdm(tasks, "deleted", leave=False, disable=None):  # a bar, on a terminal only
        try:
            project.delete(task.id)
            task.deleted, task.reason = True, None
            say(f"deleted {task}")
        except RunError as error:
            task.reason = error
            say(f"left {task.name} ({task.id}): {error}")
            if isinstance(error, server.NoAnswerError):
                break  # no other task need be tried
    gone = [task for task in tasks if task.deleted]
    say(f"Deleted: {plural(len(gone), 'task')}, {sum_up(gone)}. Left: {plural(len(tasks) - len(gone), 'task')}.")


def as_doc(task: OldTask) -> Doc:
    doc: Doc = {"id": task.id, "name": redact(task.name), "days": task.days, "deleted": task.deleted}
    doc |= {"failed": not isinstance(task.reason, KeepTask | None), "reason": redact(task.reason or "")}
    doc |= {"not_its_own": [*map(redact, task.others)], "not_listed": redact(task.not_listed)}
    return doc | {"objects": {redact(stored.address): stored.size for stored in task.objects}}


def main() -> int:
    escape_unencodable()
    args = parse_args()
    output = sys.stdout
    with redirect_stdout(sys.stderr if args.json else output):
        try:
            configuration.check()
            if reason := configuration.why_offline():
                raise RunError(f"no ClearML server: {reason}")
            found = get_all("projects", name=f"^{re.escape(args.project_name)}$", search_hidden=True)
            if not found:
                raise UsageError(f"no project {args.project_name!r} on the server")
            since = datetime.now(UTC) - timedelta(days=args.older_than)
            project = Project(found[0]["id"], found[0]["name"], since, args.folder)
            tasks = list_tasks(project, args.older_than)
        except RunError as error:
            find = f"; find the cause: {command('-m', 'clearml_client.doctor')}"
            hint = "" if isinstance(error, UsageError) else find
            print(f"{NAME}: error: {one_line(error.message(), 1000)}{hint}", file=sys.stderr)
            return error.code
        if tasks and args.delete and (args.yes or input("Type yes to delete them for good: ").strip().lower() == "yes"):
            delete_tasks(project, tasks)
        elif tasks:
            say("Nothing was deleted." if args.delete else "Nothing was deleted: add --delete.")
    if args.json:
        document = {"project": args.project_name, "older_than": args.older_than, "tasks": [*map(as_doc, tasks)]}
        print(json.dumps(document, indent=2), file=output)
    return int(args.delete and not all(task.deleted or isinstance(task.reason, KeepTask) for task in tasks))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, EOFError):
        sys.exit(f"{NAME}: stopped; the same command again goes on from here")
    except OSError as error:  # of the output: `| head` has seen enough, or the disk with the log is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"{NAME}: error: {one_line(error)}")
