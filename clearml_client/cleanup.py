"""Remove old archived tasks of a project, together with every object that they own.

    uv run -m clearml_client.cleanup --project-name X --older-than 30            # lists them, deletes nothing
    uv run -m clearml_client.cleanup --project-name X --older-than 30 --delete   # after asking; in scripts with --yes

The first one prints (ids and addresses are shortened here)

    demo-project: 3 archived tasks, unchanged for more than 30 days
    third (4ccd...), 43 days: 1 model, 1 artifact, 1 image, 284 KB in s3:...; stays: it is published
    second (fc38...), 44 days: 1 model, 1 artifact, 1 image, 284 KB in s3:...
    first (e2b8...), 45 days: 1 model, 1 artifact, 1 image, 284 KB in s3:...
    To delete: 2 tasks, 2 models, 2 artifacts, 2 images, 568 KB in s3:.... To stay: 1 task.
    Nothing was deleted: add --delete.

A task goes as a whole or stays as a whole, with the reason. Its objects go first, each seen gone, and its record
goes last: until then the record says what there is to delete, so that a run that was killed, or whose storage went
away, is finished by the next one, without a journal. (The SDK's own `task.delete()` removes the record first.)
"""

import argparse
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

import clearml_client

clearml_client.prepare_environment()  # before the SDK, which reads variables while it is imported

from clearml_client import configuration, sdk, server
from clearml_client.errors import RunError, escape_unencodable, one_line, plural, redact
from clearml_client.storage import Folder, StorageError, Store, open_store

Doc = dict[str, Any]
PAGE = 500  # what the server gives at once, at most
DELETABLE = {"created", "stopped", "closed", "failed", "completed", "unknown"}  # the others run, wait or are published
PROBE = ".cleanup-probe-"  # and the task's id: what a killed run leaves, the next one writes again, and removes
SESSION = re.compile("offline-[0-9a-f]{32}")  # the id of an offline session, in what it stored
NAME = "clearml_client.cleanup"


class KeepTask(Exception):  # noqa: N818
    """Why a task stays, in one line."""


# --- the ClearML server ---------------------------------------------------------------------------------------------
@cache
def pool() -> ThreadPool:
    return ThreadPool(8)


def ask(call: str, **parameters: Any) -> Doc:
    """One call of the server's API. Raises RunError where there is no answer, KeepTask where it refuses."""
    session = server.session()
    try:
        answer = session.send_request(*call.split("."), json=parameters)
        if answer.status_code in (405, 411):
            raise server.refusal(f"{call}: HTTP {answer.status_code}")
        body = answer.json()
        if answer.status_code == 200:
            return body["data"]  # type: ignore[no-any-return]
        reason = body["meta"]["result_msg"]
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"no answer to {call}: {type(error).__name__}: {one_line(error)}") from error
    raise KeepTask(f"the server refuses {call}: {reason}")


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


# --- tasks and what they own ----------------------------------------------------------------------------------------
@dataclass
class StoredObject:
    """An object that a task owns."""

    kind: str  # model, artifact or image
    address: str
    store: Store
    key: str
    size: int | None = 0  # None: it is gone already


@dataclass
class OldTask:
    """A task that is old enough, and what became of it."""

    id: str
    name: str
    days: int
    objects: list[StoredObject] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # addresses that it points to, of objects that are not its own
    own_inputs: list[str] = field(default_factory=list)  # models of its own that it uses: it went on from a checkpoint
    reason: str = ""  # why it stays
    deleted: bool = False

    def sizes(self) -> Counter[str]:
        """Bytes by store."""
        sizes = Counter[str]()
        for stored in self.objects:
            sizes[stored.store.name] += stored.size or 0
        return sizes

    def __str__(self) -> str:
        kinds = Counter(stored.kind for stored in self.objects if stored.size is not None)
        kinds |= {"already gone": sum(stored.size is None for stored in self.objects), "not its own": len(self.others)}
        return f"{self.name} ({self.id}), {plural(self.days, 'day')}: {sum_up(kinds, self.sizes())}"


def owns(kind: str, task: str, address: str) -> bool:
    """The task's id is in the address of whatever ClearML uploads for it, or the id of the offline session that it was.

    Anything else is a link of somebody's, to a data set or a web page, unless a model of the task says that it is its
    own.
    """
    if kind == "artifact" and SESSION.search(address):
        return True
    return task in address or (kind == "model" and not address.startswith("http"))


def sum_up(kinds: Counter[str], sizes: Counter[str]) -> str:
    words = [plural(kinds[kind], kind) for kind in ("task", "model", "artifact", "image") if kinds[kind]]
    words += [f"{kinds[kind]} {kind}" for kind in ("already gone", "not its own") if kinds[kind]]
    return ", ".join(words + [f"{human(size)} in {store}" for store, size in sizes.items() if size]) or "no objects"


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
    stores: dict[str, Store] = field(default_factory=dict)
    linkers: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # address: tasks, by artifact
    images: dict[str, set[str]] = field(default_factory=dict)  # by task; an old task gets no new ones

    def find_linkers(self) -> None:
        for task in get_all("tasks", project=[self.id], only_fields=["id", "execution.artifacts"]):
            for artifact in task.get("execution", {}).get("artifacts", []):
                for address in addresses_in(artifact):
                    self.linkers[address].add(task["id"])

    def old_tasks(self, **more: list[str]) -> list[Doc]:
        """Newest first: a task that uses a model is newer than the one that made it, and goes before it."""
        more |= {"system_tags": ["archived"], "status_changed": [f"<{self.before:%Y-%m-%dT%H:%M:%S}"]}
        fields = ["id", "name", "status", "status_changed", "system_tags", "execution.artifacts", "models.output"]
        return get_all("tasks", project=[self.id], only_fields=fields, **more)

    def survey(self, tasks: list[Doc], leaving: set[str]) -> list[OldTask]:
        """What these tasks own, and why some of them stay. Tasks that are `leaving` keep no other from leaving."""
        linked = {output["model"]: task["id"] for task in tasks for output in task.get("models", {}).get("output", [])}
        ids = [task["id"] for task in tasks]
        models = {model["id"]: model for model in get_all("models", task=ids) + get_all("models", id=[*linked])}
        users = users_of(models)
        reasons = reasons_to_stay(tasks, models, linked, users, leaving)
        owned = addresses_of(tasks, models, linked)
        pointers = self.pointers_to({address for pairs in owned.values() for _, address in pairs}, linked)
        new = [id_ for id_ in ids if id_ not in self.images]
        self.images |= zip(new, progress("images", pool().imap(image_addresses, new), len(new)), strict=True)

        items = []
        for task in tasks:
            id_, changed = task["id"], datetime.fromisoformat(task["status_changed"])
            item = OldTask(id_, task["name"], (datetime.now(UTC) - changed).days, reason=reasons.get(id_, ""))
            item.own_inputs = [model for model in models if id_ in users[model]]
            items.append(item)
            kinds = dict.fromkeys(self.images[id_], "image") | {address: kind for kind, address in reversed(owned[id_])}
            for address, kind in sorted(kinds.items()):
                others = {pointer for pointer in pointers.get(address, ()) if pointer[1] not in {id_, *leaving}}
                self.add(item, kind, address, others)
        return items

    def add(self, item: OldTask, kind: str, address: str, others: set[tuple[str, str]]) -> None:
        """One of the addresses that a task points to. `others` point there, too, each by a kind and from a task."""
        if not owns(kind, item.id, address) or any(owns(*other, address) for other in others):
            item.others.append(address)  # it goes with the last task that owns it
            return
        store, key = self.find_store(address)
        item.objects.append(StoredObject(kind, address, store, key))
        links = [f"task {other} has a link to its {kind} {address}" for _, other in others]
        item.reason = next(filter(None, (item.reason, *links, store.trouble)), "")

    def find_store(self, address: str) -> tuple[Store, str]:
        """The store of an address, as the SDK's configuration has it, and the object's key there."""
        address = sdk.canonical(address)
        scheme, separator, rest = address.partition("://")
        if not separator or scheme == "file":
            path = Path(rest or address)
            path = path.parent.resolve() / path.name  # of a link only the link is removed
            for folder in self.folders:
                if path.is_relative_to(folder):
                    return self.stores.setdefault(str(folder), Folder(str(folder))), str(path)
            return Store("file://", trouble=f"file://{path} is not below a --folder"), str(path)
        base = "/".join(address.split("/")[: 4 if scheme == "s3" else 3])  # s3: with the bucket after host:port
        if scheme == "azure":  # where "not there" and "forbidden" look alike
            return Store(base, trouble="azure:// is no storage that this command knows"), address
        base = next((host for host in sdk.file_servers() if address.startswith(f"{host}/")), base)  # it may have a path
        if base not in self.stores:
            try:
                opened = open_store(address)
            except RunError as error:
                opened = Store(base, trouble=str(error) if base in str(error) else f"{base}: {error}")
            self.stores[base] = self.stores.setdefault(opened.name, opened)
        return self.stores[base], self.stores[base].key(address)

    def pointers_to(self, addresses: set[str], linked: dict[str, str]) -> dict[str, set[tuple[str, str]]]:
        """The kind and the task of whatever points to each address, by artifact or by model."""
        pointers = {address: {("artifact", id_) for id_ in self.linkers[address]} for address in addresses}
        for model in get_all("models", uri=sorted(addresses)):
            pointers[model["uri"]].add(("model", linked.get(model["id"]) or model.get("task") or model["id"]))
        return pointers

    def delete(self, id_: str) -> None:
        """Objects first, each seen gone, then the record. Whatever stops this, the next run goes on with it."""
        if not (tasks := self.old_tasks(id=[id_])):
            raise KeepTask("it is no longer an archived, old task of this project")
        (item,) = self.survey(tasks, leaving=set())  # what was true when it was listed may have changed
        if item.reason:
            raise KeepTask(item.reason)
        pool().map(lambda stored: stored.store.delete(stored.key), item.objects)
        for stored in item.objects:
            session = SESSION.search(stored.address)
            stored.store.tidy(stored.key, session[0] if session else id_)
        for model in item.own_inputs:  # which the server would keep
            ask("models.delete", model=model, force=True, delete_external_artifacts=False)
        ask("tasks.delete", task=id_, delete_external_artifacts=False)  # not force: the server has its say, too
        for address in [*item.others, *(stored.address for stored in item.objects)]:
            self.linkers[address].discard(id_)


def users_of(models: dict[str, Doc]) -> defaultdict[str, set[str]]:
    """The tasks that have each model as an input."""
    users = defaultdict[str, set[str]](set)
    for user in get_all("tasks", **{"models.input.model": [*models]}, only_fields=["id", "models.input"]):
        for model in user["models"]["input"]:
            users[model["model"]].add(user["id"])
    return users


def addresses_of(tasks: list[Doc], models: dict[str, Doc], linked: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Kind and address of each model and artifact, by task."""
    owned: dict[str, list[tuple[str, str]]] = {task["id"]: [] for task in tasks}
    for model in models.values():
        owned[linked.get(model["id"]) or model["task"]].append(("model", model.get("uri") or ""))
    for task in tasks:
        artifacts = task.get("execution", {}).get("artifacts", [])
        outputs = [artifact for artifact in artifacts if artifact["mode"] != "input"]
        owned[task["id"]] += [("artifact", address) for artifact in outputs for address in addresses_in(artifact)]
    return {id_: [pair for pair in pairs if pair[1]] for id_, pairs in owned.items()}


def addresses_in(artifact: Doc) -> set[str]:
    """Its own address, and the `stored` of its metadata: the SDK takes no file:// link as an artifact's own."""
    metadata = dict(pair for pair in artifact.get("display_data") or [] if len(pair) == 2)
    stored = metadata.get("stored", "")
    return {address for address in (artifact.get("uri"), stored if "://" in stored else "") if address}


def reasons_to_stay(
    tasks: list[Doc], models: dict[str, Doc], linked: dict[str, str], users: dict[str, set[str]], leaving: set[str]
) -> dict[str, str]:
    """By task: it is in use, or published, or a part of it is. Tasks that are `leaving` use nothing."""
    reasons: dict[str, str] = {}
    for model in models.values():
        owner = linked.get(model["id"]) or model["task"]
        foreign = {model.get("task") or owner, *users[model["id"]]} - {owner} - leaving
        if model.get("ready") or foreign:
            why = "published" if model.get("ready") else f"used by task {min(foreign)}"
            reasons[owner] = f"its model {model['name']} ({model['id']}) is {why}"
    ids = [task["id"] for task in tasks]
    for child in get_all("tasks", parent=ids, status=["published", "publishing"], only_fields=["id", "parent"]):
        reasons[child["parent"]] = f"its child {child['id']} is published"
    for task in tasks:
        if "dataset" in task["system_tags"]:
            reasons[task["id"]] = "it is a ClearML dataset, for clearml-data to delete"
        if task["status"] not in DELETABLE:
            reasons[task["id"]] = f"it is {task['status'].replace('in_progress', 'running')}"
    return reasons


def measure(item: OldTask) -> None:
    """The sizes of a task's objects. A store that cannot be asked is a reason to stay."""
    for stored in item.objects:
        try:
            stored.size = stored.store.size(stored.key)
        except StorageError as error:
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
        prog=f"python -m {NAME}",
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
  python -m clearml_client.cleanup --project-name demo-project --older-than 30
  python -m clearml_client.cleanup --project-name demo-project --older-than 30 --delete
  python -m clearml_client.cleanup --project-name demo-project --older-than 30 --delete --yes --json     # in a cron job
  python -m clearml_client.cleanup --project-name demo-project --folder /mnt/models --delete   # file:// objects, too
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


def say(text: str) -> None:
    """One line, past the progress bar."""
    tqdm.write(" ".join(redact(text).split()))
    sys.stdout.flush()


def confirmed() -> bool:
    with suppress(EOFError):
        return input("Delete them for good? [yes/no] ").strip().lower() == "yes"
    return False


def as_doc(item: OldTask) -> Doc:
    sizes = {redact(store): size for store, size in item.sizes().items()}
    objects = {redact(stored.address): stored.size for stored in item.objects}
    doc = {"id": item.id, "name": redact(item.name), "days": item.days, "deleted": item.deleted}
    doc |= {"reason": redact(item.reason), "bytes": sizes, "objects": objects}
    return {**doc, "not_its_own": [*map(redact, item.others)]}


def progress(what: str, steps: Iterable[Any], total: int) -> Iterator[Any]:
    """A bar, on a terminal only."""
    return iter(tqdm(steps, what, total, leave=False, disable=None if total > 1 else True))


def list_items(project: Project, name: str, age: float) -> list[OldTask]:
    project.find_linkers()
    tasks = project.old_tasks()
    items = project.survey(tasks, leaving={task["id"] for task in tasks})
    for _ in progress("sizes", pool().imap(measure, items), len(items)):
        pass
    say(f"{name}: {plural(len(items), 'archived task')}, unchanged for more than {age:g} days")
    for item in items:
        say(f"{item}{item.reason and f'; stays: {item.reason}'}")
    return items


def delete_items(project: Project, items: list[OldTask]) -> None:
    down = ""
    for item in progress("tasks", items, len(items)):
        try:
            if down:
                raise KeepTask(down)
            project.delete(item.id)
            item.deleted, item.reason = True, ""
            say(f"deleted {item}")
        except (KeepTask, StorageError) as error:
            item.reason = str(error)
        except RunError as error:  # the server
            item.reason = down = str(error)
        if item.reason:
            say(f"left {item.name} ({item.id}): {item.reason}")


def total(items: list[OldTask]) -> str:
    kinds = Counter(stored.kind for item in items for stored in item.objects if stored.size is not None)
    kinds["task"] = len(items)
    return sum_up(kinds, sum((item.sizes() for item in items), Counter[str]())) if items else "0 tasks"


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
                print(f"{NAME}: error: no project {args.project_name!r} on the server", file=sys.stderr)
                return 2
            project = Project(found[0]["id"], datetime.now(UTC) - timedelta(days=args.older_than), args.folder)
            items = list_items(project, args.project_name, args.older_than)
        except (RunError, KeepTask) as error:
            hint = "find the cause: uv run -m clearml_client.doctor"
            what = error.whole() if isinstance(error, RunError) else error
            print(f"{NAME}: error: {one_line(what, 1000)}; {hint}", file=sys.stderr)
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
        print(json.dumps(document, indent=2), file=output)
    return int(args.delete and not all(item.deleted for item in items))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(f"{NAME}: stopped; the same command again goes on from here")
    except OSError as error:  # of the output: `| head` has seen enough, or the disk with the log is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"{NAME}: error: {one_line(error)}")
