"""One guard around a run: it checks what the run needs, verifies what it stored, and ends with the true exit code.

How it is used, and what it promises, is in README.md beside this file: however the run ends, one line on stderr says
what happened and what is saved, the task has the true status, and nothing waits for ever.
"""

import errno
import gc
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn
from urllib.parse import unquote

from clearml import Task

from clearml_client import agent, configuration, sdk, server, storage
from clearml_client.ending import SCRIPT, Watcher, ending, in_notebook, limit
from clearml_client.errors import RunError, UsageError, command, escape_unencodable, one_line

# Set by a program with a task that started this one: the SDK would take that task for this run's.
MASTERS = ("CLEARML_PROC_MASTER_ID", "TRAINS_PROC_MASTER_ID")
LIBRARIES = {"azure", "boto3", "botocore", "clearml", "google", "requests", "s3transfer", "urllib3"}
PATIENCE = 60  # seconds for a server to come back
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
MISTAKES = (TypeError, LookupError, AttributeError, AssertionError)  # the script's, wherever they are raised


class guard:  # noqa: N801 - it is used like a function, as contextlib.suppress is
    """Around the whole run, Task.init included.

    Before the block: configuration and server work, or the session is an offline one; the task to resume can go on;
    the queue is there, and an agent will find what the script needs; the storage takes a small object, gives it back
    and deletes it. After the block: the task is complete on the server, with all that it stored.

    `output_uri`: where the run stores everything; by default CLEARML_OUTPUT_URI; "" for the ClearML file server.
    """

    output_uri = ""  # where the run stores everything; "" in an offline session that stores nothing elsewhere
    task_id: str | bool = False  # of the task that is resumed; False: a new one
    kept: Sequence[ModuleType] = ()
    callback = 0  # of the SDK's

    def __init__(
        self, output_uri: str | None = None, offline: bool = False, queue: str | None = None, resume: str = ""
    ) -> None:
        self.given = os.getenv("CLEARML_OUTPUT_URI", "") if output_uri is None else output_uri
        self.offline, self.queue, self.resume = offline, queue, resume
        self.process, self.lost = os.getpid(), LostReports()
        self.stored = ""  # address of what verify_upload has verified

    def __enter__(self) -> "guard":
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("run.guard handles signals, which only the main thread of a process can")
        if ending.used:
            raise SystemExit("run.guard was used before in this process, and a process has one run")
        ending.used = True
        escape_unencodable(line_buffering=True)  # a log file shows each line at once
        survive_broken_pipe()
        if "triton" not in sys.modules and not in_notebook():  # triton tells of all its objects that were not freed
            # The garbage collector skips what is frozen, which saves a second at the end, and forked workers share it.
            # The references make the interpreter clear the script's own modules all the same: a file that is left open
            # in one would lose the rest of what was written to it.
            gc.freeze()
            self.__class__.kept = [sys.modules["__main__"], *agent.own_modules()]
        self.watcher = Watcher()
        try:
            self.prepare()
        except BaseException as error:
            self.leave(error)
        self.callback = sdk.WeightsFileHandler.add_pre_callback(self.skip_without_server)
        for handler in logging.getLogger("clearml").handlers:
            handler.addFilter(self.lost)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self.process:  # a forked child, whose end is its own
            return
        if error and not (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.leave(error)
        try:
            self.finish()
        except BaseException as problem:
            self.leave(problem)
        self.release()

    def leave(self, error: BaseException) -> NoReturn:
        """End a run that is not complete: say why, give the task its status, and leave with the exit code."""
        ending.unwinding.set()
        self.tell(error)
        ending.settle()
        code, stopped = ending.code, ending.status == "stopped"
        if in_notebook():
            self.release()
        if stopped and not Task.running_locally():
            # An agent takes every exit code for a failure, and an interrupt for a stop (clearml-agent 3.0.3).
            sys.excepthook = lambda *_: None
            raise KeyboardInterrupt
        raise SystemExit(code) from None

    def tell(self, error: BaseException) -> None:
        """Say in one line what happened; for a mistake of the script, after its traceback."""
        uri = self.output_uri or self.given
        # Without an argument the doctor looks at CLEARML_OUTPUT_URI, or the file server.
        target = [] if uri.startswith("http") or uri == os.getenv("CLEARML_OUTPUT_URI", "") else ["--output-uri", uri]
        find = f"; find the cause: {command('-m', 'clearml_client.doctor', *target)}"
        if isinstance(error, sdk.ERRORS):
            error = server.refusal(error)
            error.doctor = True
        elif "'DummyModel'" in str(error):  # the SDK's, in an offline session
            error = RunError("OutputModel needs a ClearML server", "offline, task.upload_artifact keeps the file")
        code = getattr(error, "code", 1)
        if isinstance(error, KeyboardInterrupt):
            ending.say("interrupted", 128 + signal.SIGINT, "stopped", seconds=8)
        elif isinstance(error, SystemExit) and isinstance(code, str):
            ending.say(f"error: {code}", 1, "failed")  # of the script: sys.exit("what is wrong")
        elif isinstance(error, SystemExit):
            number = code if isinstance(code, int) and code & 255 else 1  # of 256 the system makes 0
            ending.say(f"error: the script left with sys.exit({code!r})", number, "failed")
        elif isinstance(error, RunError):
            if isinstance(error, UsageError):
                ending.checkpoint = None  # no advice to do the same again
            ending.say(f"error: {error.message()}", code, "failed", find * error.doctor)
        elif isinstance(error, OSError) and error.errno in FULL_DISK:
            ending.say(f"error: cannot write {error.filename or 'a file'}: {error.strerror}", 1, "failed")
        elif raised_in_library(error):
            # Of an upload that fails, the SDK raises no more than "Upload failed", and logs why.
            said = ": ".join([str(error), *self.lost.messages[:1]])
            ending.say(f"error: {one_line(said, 1000)}", 1, "failed", find * bool(self.lost.messages))
        else:
            traceback.print_exception(error)
            ending.say(f"error: {type(error).__name__}, see above", 1, "failed")

    def release(self) -> None:
        """Leave nothing of the guard behind: the process goes on, and a notebook may have another run."""
        self.watcher.close()
        sdk.WeightsFileHandler.remove_pre_callback(self.callback)
        for handler in logging.getLogger("clearml").handlers:
            handler.removeFilter(self.lost)
        if in_notebook():
            ending.reset()

    def prepare(self) -> None:
        """Raise RunError for whatever the run would fail of, in less than a minute whatever is silent."""
        distributed = sys.modules.get("torch.distributed")
        if os.getenv("TORCHELASTIC_RUN_ID") and not (distributed and distributed.is_initialized()):
            raise UsageError("torchrun would start a run in each process: see docs/beyond-one-machine.md")
        if self.queue is not None and (self.offline or self.resume or not self.queue.strip()):
            reason = "not allowed with --offline or --resume" if self.queue.strip() else "an empty name"
            raise UsageError(f"argument --queue: {reason}")
        for variable in MASTERS:
            if not os.getenv(variable, "").startswith(f"{os.getpid()}:"):
                os.environ.pop(variable, None)
        agent.exclude_lock_from_diff()
        configuration.check(self.offline)
        configuration.check_cache()
        asked = "the run to resume is offline" if self.resume.startswith("offline-") else "--offline was given"
        reason = configuration.why_offline(asked * self.offline)
        sdk.be_quiet(offline=bool(reason))
        if reason and self.queue:
            raise UsageError(f"cannot queue an offline session; it is offline because {reason}")
        if reason:
            print(f"ClearML: offline session, because {reason}")
            Task.set_offline(True)
            self.output_uri = self.check_storage(self.given) if self.given else ""
            return
        with explained():
            server.session()  # it answers, and the keys are good
            server.web_page()  # which Task.init prints
        if self.resume and not self.resume.startswith("offline-"):
            self.task_id = self.resume
            check_resumable(self.resume)
        if self.queue:
            agent.check_queue(self.queue)
            agent.check_repository(SCRIPT)
        own = "" if Task.running_locally() else task_at_agent().output_uri
        if own and self.given not in ("", own):
            print(f"Storage: the task's own output destination wins over --output-uri {self.given}")
        uri, source = own or self.given, "the task's output destination" if own else ""
        if not uri:
            with explained():
                uri, source = storage.default_target()
        self.output_uri = self.check_storage(uri, source)

    def check_storage(self, uri: str, source: str = "") -> str:
        what = f"no storage at {uri}"
        with explained(what, source), limit(60, what):
            uri = storage.check_access(uri)
        print(f"Storage: {uri} ({source + ': ' if source else ''}written, read back, deleted)")
        return uri

    @contextmanager
    def verify_upload(self, path: str | Path) -> Iterator[None]:
        """Around the upload of a file: afterwards these very bytes are at an address that the task has recorded.

        The server is waited for first, a minute at most, and the storage is asked whether it is still there. A file has
        two minutes and a second for each 100 KB. Raise RunError, which says where the file is.
        """
        path = Path(path)
        wait_for_server(f"the model is in {path}, and the last reports did not reach the server")
        what = f"the model is in {path}, but not at {self.output_uri or 'the ClearML session'}"
        with explained(what), limit(120 + path.stat().st_size / 1e5, what):
            if self.output_uri:
                storage.open_store(self.output_uri).check_place()  # or the SDK would try for long
            try:
                yield
            except Exception as error:
                if self.output_uri and raised_in_library(error):
                    storage.check_access(self.output_uri)  # knows better why not
                raise
            if task := Task.current_task():
                task.flush(wait_for_uploads=True)  # of one that goes on in the background, the address comes last
            addresses = [address for address in stored_objects() if unquote(address).endswith(f"/{path.name}")]
            if not path.exists():
                cure = "update_weights(..., auto_delete_file=False) keeps it"
                raise RunError(f"{path} was removed before it could be compared with what is stored", cure)
            stores = {address: storage.open_store(address) for address in addresses}
            same = [address for address, store in stores.items() if store.matches(store.key(address), path)]
            if not same:
                raise RunError("what is stored there differs" if addresses else "no address of it is recorded")
        self.stored = same[-1] if self.output_uri else ""
        print(f"Model: {path}")

    def skip_without_server(self, _: object, model: Any) -> Any:
        """Be the SDK's callback before it makes a model of a file that torch.save has written, as it does by default.

        For a server that is away the SDK would wait for hours. Here the training goes on, and the run fails at its end.
        """
        try:
            if not Task.is_offline():
                server.ping()
        except RunError as error:
            self.lost.messages.append(f"{model.local_model_path} was not registered: {error}")
            return None
        return model

    def finish(self) -> None:
        """Close the task, and see that the server has it complete and that all of its objects are there."""
        if not (task := Task.current_task()):
            return
        if task.is_offline():
            what, session = "the ClearML session is not complete", f"{task.get_offline_mode_folder()}.zip"
            last = f"To take the session to a server: {command('clearml-task', '--import-offline-session', session)}"
        else:
            what, last = "the last reports did not reach the server", f"Results: {task.get_output_log_web_page()}"
        wait_for_server(what)
        with limit(180, what):
            with explained(what):
                task.flush(wait_for_uploads=True)
                objects = stored_objects()
            with explained():
                check_objects(objects)
                if self.lost.messages:
                    raise RunError(f"ClearML lost something: {self.lost.messages[0]}")
            with explained(what):
                task.close()
                # An agent, and not this process, completes a task that it runs.
                completed_here = Task.running_locally() and not task.is_offline()
                if completed_here and (status := Task.get_task(task.id).status) != "completed":
                    raise RunError(f"the ClearML server has the task as {status}")
        if not ending.claim(0, "completed", ""):
            raise KeyboardInterrupt  # by a signal that came before; one that comes now is too late
        if ending.checkpoint:
            with suppress(OSError):  # if it stays, the task refuses to be resumed
                ending.checkpoint.unlink()
        if self.stored:
            print(f"Stored: {self.stored}")
        print(last)


class LostReports(logging.Filter):
    """Collect what the SDK could not report or upload in the background: it only logs that, and goes on.

    Let each message through once: the SDK repeats some of them for each try.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if record.levelno >= logging.ERROR and record.name.lower().startswith(("clearml.metrics", "clearml.storage")):
            self.messages.append(message)
        kind = re.sub("[0-9a-f]", "", message)  # the same for other ids and numbers
        is_new = kind not in self.seen
        self.seen.add(kind)
        return is_new


def is_on_server(task_id: str) -> bool:
    return bool(Task.query_tasks(task_filter={"id": [task_id]}))


def check_resumable(task_id: str) -> None:
    """Raise UsageError for a task that must not be touched again, or cannot be."""
    with explained(), limit(60, f"the task {task_id}"):
        status = str(Task.get_task(task_id).status) if is_on_server(task_id) else "not on this server"
    if status in ("completed", "closed", "published", "publishing", "not on this server"):
        cure = "--offline goes on in a new session" if status == "not on this server" else "start a new run"
        raise UsageError(f"cannot resume: the task {task_id} is {status}", cure, str(ending.checkpoint or ""))


def wait_for_server(what: str) -> None:
    """Wait for the server, a minute at most, and see that it still has the task. Else RunError with these words."""
    if Task.is_offline():
        return
    with explained(what), limit(120, what):
        server.ping(PATIENCE)
        server.session.cache_clear()  # its token is void if the server was restarted with another secret
        if not is_on_server(Task.current_task().id):
            raise RunError("somebody has deleted the task on the ClearML server")


def task_at_agent() -> Task:
    """Return the task that an agent has this process run. Raise UsageError where its id is left over."""
    variable = configuration.variable_in_use("CLEARML_TASK_ID")
    task_id, unset = os.environ[variable], f"unset {variable}"
    if not is_on_server(task_id):
        raise UsageError(f"there is no task {task_id}, which {variable} names: {unset}")
    task = Task.get_task(task_id)
    named = f"the task {task.name} ({task.id}), which {variable} names"
    if task.status not in ("created", "queued", "in_progress"):
        raise UsageError(f"{named}, is {task.status}: {unset}")
    print(f"ClearML: this run is {named}")
    return task


def stored_objects() -> dict[str, int]:
    """Return address and size of the task's own objects; any other address is a link of somebody's."""
    task = Task.current_task()
    # An offline session has an artifact itself, and says by `stored` where else it is.
    artifacts = task.artifacts.values()
    sizes = {(artifact.metadata or {}).get("stored", artifact.url): artifact.size or 0 for artifact in artifacts}
    if not task.is_offline():
        sizes |= dict.fromkeys([model.url for model in task.models["output"]], 0)  # the record has no size
    return {address: size for address, size in sizes.items() if address and task.id in address}


def check_objects(objects: dict[str, int]) -> None:
    """Raise RunError for one that is not at its address, or has another size."""
    for address, size in objects.items():
        with explained(f"cannot see whether {address} is complete"):
            store = storage.open_store(address)
            found = store.size(store.key(address))
        if found is None:
            raise RunError(f"{address} is missing")
        if size not in (0, found):
            raise RunError(f"{address} has {found} bytes, and not {size}")


# --- what went wrong --------------------------------------------------------------------------------------------------
@contextmanager
def explained(what: str = "", source: str = "") -> Iterator[None]:
    """Raise a RunError with these words before it, also for what the SDK or a store's library raises in the block.

    `source`: who said what was tried. The doctor can tell more about the cause.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RunError):
            known = error
        elif isinstance(error, TimeoutError) or raised_in_library(error):
            known = server.refusal(error) if isinstance(error, sdk.ERRORS) else RunError(one_line(error))
        else:
            raise
        wrapped = RunError(f"{what}: {known}" if what else str(known), known.cure, known.source or source)
        wrapped.code, wrapped.doctor = known.code, True
        raise wrapped from error


def raised_in_library(error: BaseException) -> bool:
    """Tell whether the SDK or a store's library raised it for a reason that is not the script's."""
    names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = any(name.partition(".")[0] in LIBRARIES for name in names) and not isinstance(error, MISTAKES)
    return inside or type(error).__name__ == "OutOfMemoryError"  # of torch's kinds of devices


def survive_broken_pipe() -> None:
    """Where the reader of an output leaves, as `| head -1` does, let the rest of it go nowhere: the run goes on."""

    def survive(stream: TextIOWrapper, call: Callable[..., Any], *text: str) -> Any:
        try:
            return call(*text)
        except BrokenPipeError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # not a notebook's
            stream.write = partial(survive, stream, stream.write)  # type: ignore[method-assign]
            stream.flush = partial(survive, stream, stream.flush)  # type: ignore[method-assign]
