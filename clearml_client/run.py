"""Around a run: before Task.init, after it, at its end. The task's own calls stay in the script.

However the run ends, the exit code tells the truth, one line on stderr says what happened and what is saved, the
task has the true status, and nothing waits for ever. Exit codes: 0 all is done and proven; 1 a failure; 2 wrong use;
128 and the signal's number for a run that was stopped, so 130 for Ctrl-C and 143 for SIGTERM or an abort in the web UI.
"""

import atexit
import builtins
import faulthandler
import functools
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn, TypeVar

from clearml import Task
from tqdm import tqdm

from clearml_client import agent, configuration, sdk, server, storage
from clearml_client.errors import RunError, UsageError, call_with_timeout, escape_unencodable, one_line, plural

ranks: Any = None
if int(os.getenv("WORLD_SIZE", "1")) > 1:  # torchrun's processes; it takes torch, which a run of one does without
    from clearml_client import ranks

Step = TypeVar("Step")
Point = tuple[str, str, float, int]  # title, series, value, iteration: the arguments of Logger.report_scalar
STOPS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up", "SIGUSR1": "stopped by SIGUSR1"}
STOPS |= {"SIGXCPU": "out of CPU time"}  # the last three are what batch systems send
SIGNALS = {getattr(signal, name): words for name, words in STOPS.items() if hasattr(signal, name)}
ABORTED = "aborted in the web UI"
SCRIPT = Path(sys.argv[0])
ROOT = Path(__file__).resolve().parent.parent


class Stopped(KeyboardInterrupt):
    """The run was asked to stop. No `except Exception` on its way swallows it."""


class Storage(NamedTuple):
    """A proven place: where objects go, below it the folder for those of this task, and the packages that it takes."""

    root: str = ""
    folder: str = ""
    packages: tuple[str, ...] = ()


class Ending:
    """What is known of the run, for the moment in which it ends."""

    checkpoint: Path | None = None  # to go on from
    folder: Path | None = None  # of the run: what the watchdog writes goes there
    output_uri = ""
    aborted = False
    postponing = False
    code: int | None = None
    reason = ""
    last_resort: threading.Timer | None = None

    def doctor(self) -> str:
        where = "" if Path.cwd() == ROOT else f" --directory {shlex.quote(str(ROOT))}"
        target = f" --output-uri {shlex.quote(self.output_uri)}" if self.output_uri else ""
        return f"uv run{where} -m clearml_client.doctor{target}"

    def saved(self) -> str:
        if not self.checkpoint:
            return ""
        if not SCRIPT.is_file():  # it came from standard input
            return f"; saved: {self.checkpoint}"
        resume = [str(SCRIPT), "--resume", str(self.checkpoint)]
        if SCRIPT.parent != Path():  # as it was started from elsewhere, so it can be again
            resume = ["--project", str(ROOT), str(SCRIPT.absolute()), "--resume", str(self.checkpoint.absolute())]
        return f"; saved, and to go on: uv run {shlex.join(resume)}"

    def tell(self, what: str, code: int, seconds: float = 30) -> None:
        """The last line, and the end after so many seconds: ClearML may wait for a server that is gone."""
        self.code, self.reason = code, one_line(what, 1000)
        self.last_resort = threading.Timer(seconds, os._exit, [code])
        self.last_resort.daemon = True
        self.last_resort.start()
        # Not even the interpreter's lock keeps this one.
        faulthandler.dump_traceback_later(seconds + 5, exit=True, file=2)
        with suppress(OSError, ValueError):
            print(f"{SCRIPT.name}: {self.reason}{self.saved()}", file=sys.stderr, flush=True)

    def stop(self, number: int, _: FrameType | None = None) -> None:
        """The handler of signals, in the main thread: raises Stopped there, once."""
        ignore_signals()  # an impatient second one
        if self.code is not None:  # told already: it ends
            return
        self.tell_signal(number)
        if not self.postponing:
            raise Stopped

    def tell_signal(self, number: int) -> None:
        if lost := ranks.lost() if ranks else "":  # then torchrun stops the others
            self.tell(f"error: {lost}", 1)
        else:
            self.tell(ABORTED if self.aborted else SIGNALS[signal.Signals(number)], 128 + number, 8)

    def stop_anyway(self, number: int) -> None:
        """In a thread: the main one waits for another process, and its handler did not run."""
        if self.code is None:
            self.tell_signal(number)
            with suppress(Exception):
                self.settle(Stopped())
            os._exit(self.code or 1)

    def abort(self) -> None:
        """The SDK's callback, in a thread of its own, after which it would kill the process."""
        self.aborted = True
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

    def hang(self, what: str, seconds: float, stacks: Path) -> NoReturn:
        with open(stacks, "a") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        self.tell(f"error: {what}: no answer for {seconds:g} s; where each thread stands is in {stacks}", 1)
        os._exit(1)

    def settle(self, error: BaseException) -> None:
        """Give the task its true status, by public calls and without the SDK's own way out, which may wait for ever."""
        task = Task.current_task()
        if not task:
            return
        if task.is_offline():
            task.close()
            return
        server.ping()  # or its calls would wait
        if self.code in STOPPED_BY:
            if not self.aborted:
                task.mark_stopped(force=True, status_message=STOPPED_BY[self.code])
        else:
            reason = self.reason if isinstance(error, Stopped) else one_line(f"{type(error).__name__}: {error}", 1000)
            task.mark_failed(status_reason=reason, status_message=reason, force=True)
        task.flush()

    def leave(self, code: int) -> NoReturn:
        """At once: taking torch apart would be a second for nothing."""
        if in_notebook():  # which goes on
            if self.last_resort:
                self.last_resort.cancel()
            faulthandler.cancel_dump_traceback_later()
            self.__dict__.clear()
            raise SystemExit(code)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def in_notebook() -> bool:
    """Jupyter's or IPython's %run."""
    return hasattr(builtins, "__IPYTHON__")


STOPPED_BY = {128 + number: words for number, words in SIGNALS.items()}
ending = Ending()


def guarded(main: Callable[[], None]) -> Callable[[], None]:
    """A decorator for the script's main function. Whatever main raises, the run ends as this module promises."""

    @functools.wraps(main)
    def guarded_main() -> None:
        escape_unencodable(line_buffering=True)  # a log file shows each line at once
        outlive_readers()
        if ranks and ranks.RANK:
            ranks.obey({*SIGNALS})
        else:
            listen()
            if ranks:
                ranks.remind(ending.stop_anyway)
        try:
            if ranks:
                ranks.join()
            main()
        except SystemExit as end:
            if not Task.current_task():  # argparse
                raise
            end_early(end)
        except BaseException as error:
            end_early(error)
        if not Task.current_task():  # `finish` has closed it: nothing is left to do
            if not in_notebook():
                atexit._run_exitfuncs()
            ending.leave(0)

    return guarded_main


def outlive_readers() -> None:
    """Where the reader of an output leaves, as `| head -1` does, the rest of it goes nowhere, and the run goes on.

    The SDK forgives what `write` raises, and not what `flush` does for what was not written.
    """

    def lasting(stream: TextIOWrapper, call: Callable[..., Any]) -> Callable[..., Any]:
        def lasting_call(*text: str) -> Any:
            try:
                return call(*text)
            except BrokenPipeError:
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), stream.fileno())
                return sum(map(len, text))

        return lasting_call

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # not a notebook's
            stream.write = lasting(stream, stream.write)  # type: ignore[method-assign]
            stream.flush = lasting(stream, stream.flush)  # type: ignore[method-assign]


def end_early(error: BaseException) -> NoReturn:
    """Say it, give the task its status, leave."""
    ignore_signals()
    hint = f"; find the cause: {ending.doctor()}"
    if ranks and ending.code is None and (lost := ranks.lost_by(error)):
        error, hint = RunError(lost), ""
        if ranks.RANK and ranks.stopping.wait(1):  # rank 0 tells
            ending.leave(1)
    code = error.code if isinstance(error, RunError | SystemExit) and isinstance(error.code, int) else 1
    if ending.code is not None:  # a signal has told already
        code = ending.code
    elif isinstance(error, sdk.ERRORS):
        ending.tell(f"error: {server.refusal(error)}{hint}", code)
    elif isinstance(error, SystemExit):
        ending.tell(f"error: the script left with sys.exit({error.code!r})", code)
    elif isinstance(error, ValueError) and raised_by_sdk(error):
        ending.tell(f"error: ClearML: {one_line(error, 1000)}{hint}", code)
    elif isinstance(error, OSError) and error.strerror and not error.filename:  # a disk that is full, and the like
        ending.tell(f"error: cannot write into {ending.folder}: {error.strerror}{hint}", code)
    elif isinstance(error, RunError | OSError) or type(error).__name__ == "OutOfMemoryError":
        ending.tell(f"error: {one_line(error.whole() if isinstance(error, RunError) else error, 1000)}{hint}", code)
    else:  # a defect, and no user's mistake
        traceback.print_exception(error)
        ending.tell(f"error: {type(error).__name__}, see above", code)
    with suppress(Exception):
        ending.settle(error)
    ending.leave(code)


def raised_by_sdk(error: BaseException) -> bool:
    """The SDK raises ValueError for much that is the set-up's fault."""
    return sdk.FOLDER in traceback.extract_tb(error.__traceback__)[-1].filename


def ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def listen() -> None:
    for number in SIGNALS:
        if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, ending.stop)


@contextmanager
def starting(offline: bool = False, earlier: str = "", queue: str = "") -> Iterator[str]:
    """Around Task.init: the configuration can be read, a server answers, or the session is an offline one.

    Gives the id of the `earlier` task, if it can be gone on with: a session cannot, and a finished task must not.
    With a `queue`, it is there, and an agent will find what the script needs.
    Signals wait until the task is whole: half made it could not be marked as stopped. Raises RunError, in less than
    two minutes whatever is silent.
    """
    configuration.check(offline)
    configuration.check_cache()
    reason = configuration.why_offline(offline)
    resumed = "" if reason or earlier.startswith("offline-") else earlier
    if reason and queue:
        raise UsageError(f"cannot queue: no agent gets an offline session, and it is one, because {reason}")
    if queue and ranks and ranks.NODES > 1:
        raise UsageError(f"cannot queue: an agent is one machine, and these are {ranks.NODES}")
    if reason:
        print(f"ClearML: offline session, because {reason}")
        Task.set_offline(True)
    sdk.be_quiet(offline=bool(reason))
    leave_lock_out()
    if not reason:
        try:
            server.ping()
            server.web_page()  # which Task.init prints
        except RunError as error:
            raise RunError(f"{error.whole()}; or go without: --offline") from error
        if resumed:
            refuse_finished(resumed)
        if queue:
            agent.check_queue(queue)
            agent.check_repository(SCRIPT)
    if ranks and ranks.NODES == 1 and Task.running_locally():
        agent.record_launch(SCRIPT, ranks.RANKS)
    try:
        with postponed(), watchdog(60, "no task from the ClearML server"):
            yield resumed
            listen()  # again: the SDK has handlers of its own, which kill threads that hold locks
    except (RunError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise server.refusal(error) from error
    if not reason and (task := Task.current_task()):
        task.register_abort_callback(ending.abort)


def leave_lock_out() -> None:
    """Keep uv.lock, which uv completes in the checkout, out of the uncommitted changes that ClearML stores.

    .gitattributes gives the lock the diff driver `pins`; here, for git as the SDK calls it, that driver shows nothing.
    """
    count = int(os.getenv("GIT_CONFIG_COUNT") or 0)
    os.environ[f"GIT_CONFIG_KEY_{count}"] = "diff.pins.textconv"
    os.environ[f"GIT_CONFIG_VALUE_{count}"] = "true"
    os.environ["GIT_CONFIG_COUNT"] = str(count + 1)


def refuse_finished(task_id: str) -> None:
    """Raises RunError, of exit code 2, for a task that must not be touched again, or cannot be."""
    with watchdog(60, "no answer about the task that is resumed"):
        task = Task.get_task(task_id)
    status = str(task.status) if task else "deleted"
    if status in ("completed", "closed", "published", "publishing", "deleted"):
        models = [model.url for model in task.models["output"]] if task else []
        where = f"; its model: {', '.join(models)}" if models else ""
        raise UsageError(f"cannot resume: the task {task_id} is {status}{where}")


@contextmanager
def leaving(task: Task, queue: str) -> Iterator[None]:
    """Around Task.execute_remotely, which ends this process with exit code 0 once the task is in the queue,
    and prints its page. Raises RunError where it does not get there.
    """
    if ranks:
        ranks.share(None)  # ends the others
    try:
        with watchdog(120, f"the task did not get into the queue {queue}"):
            yield
    except (*sdk.ERRORS, ValueError) as error:
        reason = f"the task did not get into the queue {queue}: {one_line(error)}"
        with suppress(Exception):
            task.mark_failed(status_reason=reason, status_message=reason, force=True)
        raise RunError(reason) from error


@contextmanager
def postponed() -> Iterator[None]:
    """Signals wait for the end of the block. The watchdog tells of them at once, and ends the wait."""
    masks = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if masks else set()
    ending.postponing = True  # another thread may take a signal for this one
    try:
        yield
    finally:
        ending.postponing = False
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if ending.code is not None:
        raise Stopped


@contextmanager
def watchdog(seconds: float, what: str) -> Iterator[None]:
    """Ends the process, with exit code 1 and the stacks of all threads, where the block takes longer.

    A thread of Python's does it, and says so in one line; where even the interpreter's lock is held, faulthandler's own
    thread does it, five seconds later. A signal that is blocked meanwhile ends the process within eight seconds.
    """
    folder = ending.folder if ending.folder and ending.folder.is_dir() else Path(tempfile.gettempdir())
    stacks = folder / f"stacks-{os.getpid()}.txt"
    done = threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + seconds
        while not done.wait(0.2):
            if time.monotonic() > deadline:
                ending.hang(what, seconds, stacks)
            waiting = signal.sigpending() & SIGNALS.keys() if hasattr(signal, "sigpending") else set()
            if waiting and ending.code is None:
                ending.tell_signal(min(waiting))

    thread = threading.Thread(target=watch, daemon=True, name="watchdog")
    with open(stacks, "w") as file:
        faulthandler.dump_traceback_later(seconds + 5, exit=True, file=file)
        thread.start()
        try:
            yield
        finally:
            done.set()
            faulthandler.cancel_dump_traceback_later()
            thread.join(1)
            stacks.unlink(missing_ok=True)


def prove_storage(task: Task, output_uri: str = "") -> Storage:
    """The place for this task's objects, in which a small one was just written, read, compared and deleted.

    That is `output_uri`, else what the task has (a clone's, or the project's), else the configuration's default, else
    the ClearML file server; an offline session without `output_uri` has none, and gets an empty one. Raises RunError
    within 15 s where it does not work.
    """
    offline = task.is_offline()
    ending.output_uri = output_uri
    root, source = output_uri, ""
    if not root and not offline:
        project = task.get_project_object()
        root = task.output_uri or (project and project.default_output_destination)
        if not root:
            root, source = storage.default_target()
        if not root:
            root, source = storage.file_server(), configuration.origin(configuration.FILES, "from api.api_server")
    if not root:
        return Storage()
    try:
        with watchdog(60, f"no storage at {root}"):
            call_with_timeout(15, f"no storage at {root}", lambda: storage.check_access(root))
    except TimeoutError as error:
        raise RunError(one_line(error)) from error
    except RunError as error:
        raise RunError(f"no storage at {root}: {error}", error.cure, error.source or source) from error
    root = root.rstrip("/") if "://" in root else f"file://{Path(root).expanduser().absolute()}"
    folder = f"{root}/{folder_name(task, root)}"
    print(f"Storage: {folder} (written, read back, deleted)")
    scheme = root.partition(":")[0]
    return Storage(root, folder, (storage.PACKAGES[scheme][0],) if scheme in storage.PACKAGES else ())


def folder_name(task: Task, root: str) -> str:
    """The folder below which the SDK puts the task's artifacts, so that all objects of a run lie in one.

    A plain one where a part of its name is too long for a disk, and on the file server where the SDK has quoted letters
    of it: there it quotes them once more, in the addresses of artifacts and not in those of models.
    """
    name = sdk.run_folder(task)
    if max(map(len, name.split("/"))) > 200 or (root.startswith("http") and "%" in name):
        project, name = (re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:80] for text in (task.get_project_name(), task.name))
        return f"{project}/{name}.{task.id}"
    return name


@contextmanager
def delivering(path: Path, address: str, name: str = "model") -> Iterator[None]:
    """Around recording a file and uploading it: its very bytes are at `address` afterwards.

    The server is waited for first, a minute at most, and the store is asked, so that one that is gone is told of at
    once and in its own words. A file has two minutes and a second for each 100 KB. Without an address (an offline
    session without storage) nothing is looked for. Raises RunError, which says where the file is.
    """
    what = f"the {name} is in {path}, but not at {address or 'the server'}"
    try:
        wait_for_server(f"the {name} is in {path}, and the last reports did not reach the server")
        with watchdog(120 + path.stat().st_size / 1e5, what):
            store = storage.open_store(address) if address else None
            if store:
                store.size(store.key(address))
            yield
            if store and not store.matches(store.key(address), path):
                raise RunError(f"{what}: what the store gives back is not what was uploaded")
    except storage.StorageError as error:
        raise RunError(f"{what}: {error}", error.cure, error.source) from error
    except sdk.ERRORS as error:
        raise RunError(f"{what}: {server.refusal(error)}") from error
    except ValueError as error:  # the SDK's "Upload failed": the store may know more
        reason = asked(address) if address else ""
        raise RunError(f"{what}: {reason or one_line(error)}") from error


def asked(address: str) -> str:
    """What a store says that does not work, or nothing."""
    try:
        store = storage.open_store(address)
        store.size(store.key(address))
    except RunError as error:
        return str(error)
    return ""


def wait_for_server(otherwise: str) -> None:
    """Until the server answers, a minute at most; then RunError, which says what is not done."""
    if Task.is_offline():
        return
    try:
        server.ping(patience=60)
    except RunError as error:
        raise RunError(f"{error}; {otherwise}", error.cure) from error


def finish(task: Task, points: Iterable[Point] = ()) -> None:
    """Close the task, and see on the server that it is complete and that it has each of these points.

    Of an offline session it prints the command that takes it to a server. Raises RunError, after two minutes at most.
    """
    if task.is_offline():
        session = f"{task.get_offline_mode_folder()}.zip"
        task.close()
        print(f"To take the session to a server: uv run clearml-task --import-offline-session {shlex.quote(session)}")
        return
    wait_for_server("the last reports did not reach it")
    expected = list(points)
    with watchdog(180, "the last reports did not reach the ClearML server"):
        for pause in (0.2, 1, 2, 5, 10, 20, 20):
            task.flush(wait_for_uploads=True)
            lost = missing(task, expected)
            if not lost:
                break
            time.sleep(pause)
        else:
            raise RunError(f"{plural(len(lost), 'value')} did not reach the ClearML server")
        look_for_objects(task)
        task.close()
        # An agent, and not this process, completes a task that it runs.
        if Task.running_locally() and (status := Task.get_task(task.id).status) != "completed":
            raise RunError(f"the ClearML server has the task as {status}")


def progress(steps: Sequence[Step]) -> Iterator[Step]:
    """Each step, with a bar on a terminal only (of rank 0 only), past the stderr that ClearML records."""
    with open(2, "w", closefd=False) as terminal:
        yield from tqdm(steps, file=terminal, disable=True if ranks and ranks.RANK else None, leave=False)


def look_for_objects(task: Task) -> None:
    """Raises RunError for an artifact or a model of this task that is not where its record says."""
    urls = {f"artifact {name}": artifact.url for name, artifact in task.artifacts.items()}
    urls |= {f"model {model.name}": model.url for model in task.models["output"]}
    for name, url in urls.items():
        if url and task.id in url:  # anything else is a link of somebody's
            store = storage.open_store(url)
            if store.size(store.key(url)) is None:
                raise RunError(f"the {name} is not at {url}")


def missing(task: Task, points: list[Point]) -> list[Point]:
    """The points that the server does not have."""
    if not points:
        return []
    known = task.get_reported_scalars()
    steps = {(title, name): set(curve["x"]) for title, group in known.items() for name, curve in group.items()}
    # Of more than 5,000 points the server gives averages, and nothing can be said.
    return [point for point in points if len(seen := steps.get(point[:2], set())) < 5000 and point[3] not in seen]
