"""How a run ends, whoever ends it: the script, a signal, an abort in the web UI, or a call that does not come back."""

import atexit
import builtins
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial, wraps
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

from clearml import Task

from clearml_client import sdk, server
from clearml_client.errors import RunError, command, one_line

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
SIGNALS |= {signal.SIGUSR1: "stopped by SIGUSR1", signal.SIGXCPU: "out of CPU time"}  # of batch systems
WAKE_UP = signal.SIGURG  # of our own: it does nothing to who does not listen
LIMITS = {"init": 120, "execute_remotely": 120}  # seconds for a call of clearml.Task
SILENT = 5  # seconds that the main thread waits for the server without a word
LAST_RESORT = 30  # seconds in which a run that has failed must end
SCRIPT = Path(sys.argv[0])
OWN_STEPS, INTERRUPTIBLE = {"guard.__enter__", "guard.__exit__"}, {"guard.prepare", "guard.finish"}


class Ending:
    """The one end of a run. Who says it first decides how it ends."""

    def __init__(self) -> None:
        self.checkpoint: Path | None = None  # to go on from
        self.used = False  # by a guard
        self.task: Task | None = None  # the run's, also when it is closed
        self.aborted = False  # in the web UI
        self.call = ""  # of LIMITS, in which the main thread is
        self.unwinding = threading.Event()  # the main thread is on its way out
        self.claiming, self.settling = threading.Lock(), threading.Lock()
        self.code, self.status, self.reason = 0, "", ""
        self.last_resort: threading.Timer | None = None  # it ends the process

    def say(self, what: str, code: int, status: str, hint: str = "", seconds: float = 0) -> bool:
        """Print the last line, and see that the process ends in so many seconds. Return False if it was said before."""
        if not self.claim(code, status, one_line(what, 1000)):
            return False
        self.last_resort = start_timer(seconds or LAST_RESORT, partial(abandon, code))
        with suppress(OSError, ValueError):
            below_bar = "\n" * sys.stderr.isatty()
            print(f"{below_bar}{SCRIPT.name}: {self.reason}{hint}{self.saved()}", file=sys.stderr, flush=True)
        return True

    def claim(self, code: int, status: str, reason: str) -> bool:
        """Decide the end. Return False if it is decided."""
        with self.claiming:
            if self.status:
                return False
            self.code, self.status, self.reason = code, status, reason
        return True

    def reset(self) -> None:
        """Forget the run: a notebook goes on, and may have another one."""
        if self.last_resort:
            self.last_resort.cancel()
        self.__init__()  # type: ignore[misc]

    def saved(self) -> str:
        """Return how to go on from the checkpoint. At an agent nobody can: its folder goes."""
        if not self.checkpoint or not Task.running_locally():
            return ""
        script, checkpoint = SCRIPT, self.checkpoint
        if script.parent != Path():  # as it was started from elsewhere, so it can be again
            script, checkpoint = script.absolute(), checkpoint.absolute()
        return f"; saved, and to go on: {command(str(script), '--resume', str(checkpoint))}"

    def settle(self) -> None:
        """Give the task its status by public calls: the SDK's own way out sets another, and may wait for ever."""
        task = Task.current_task() or self.task
        if not self.settling.acquire(blocking=False) or not task:
            return
        with suppress(Exception):  # the line is said, and the server may be what failed
            if task.is_offline():
                with redirect_stdout(StringIO()):  # nothing comes after the last line
                    task.close()
                return
            sdk.disarm(task)
            try:
                server.ping()  # or the calls would wait
            except RunError:
                if not in_notebook():  # which may have other runs
                    sdk.drop_reports()
                return
            if self.status == "failed":
                task.mark_failed(status_reason=self.reason, status_message=self.reason, force=True)
            elif not self.aborted:
                task.mark_stopped(force=True, status_message=self.reason)
            task.flush()
            if in_notebook():  # where the next Task.init would return this one
                sdk.close_unchanged(task)

    def end_hung(self, what: str, seconds: float) -> None:
        """End a run that waits for something for too long; the stacks of all threads tell where."""
        folder = self.checkpoint.parent if self.checkpoint else Path(tempfile.gettempdir())
        stacks = folder / f"stacks-{os.getpid()}.txt"
        with suppress(OSError), open(stacks, "w") as file:  # of a full disk
            faulthandler.dump_traceback(file)
        what = f"error: {what}: no answer for {seconds:g} s; the stacks of all threads are in {stacks}"
        if self.say(what, 1, "failed", seconds=5):
            self.settle()
            abandon(1)


def in_notebook() -> bool:
    """Tell Jupyter and IPython's %run, where the process goes on."""
    return hasattr(builtins, "__IPYTHON__")


def start_timer(seconds: float, call: Callable[[], None]) -> threading.Timer:
    """Call this in so many seconds, unless the timer is cancelled, or the process has ended."""
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    return timer


ending = Ending()


def abandon(code: int) -> None:
    """End the process and its workers without waiting for anything."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


@contextmanager
def limit(seconds: float, what: str) -> Iterator[None]:
    """End the process, with exit code 1 and the stacks of all threads, where the block takes longer."""
    timer = start_timer(seconds, partial(ending.end_hung, what, seconds))
    faulthandler.dump_traceback_later(seconds + 10, exit=True, file=2)  # where even the interpreter's lock is held
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


class Watcher:
    """A thread that sees signals and an abort in the web UI; and limits for calls of the SDK.

    The number of a signal arrives in a socket, whatever the main thread waits for. Then the main thread is interrupted,
    so that `finally` and `atexit` do their work; where it does not react, the watcher ends the process.
    """

    def __init__(self) -> None:
        self.receiver, self.sender = socket.socketpair()
        self.receiver.settimeout(0.2)
        self.sender.setblocking(False)
        self.open, self.raising = True, False
        self.earlier = {number: signal.getsignal(number) for number in (*SIGNALS, WAKE_UP)}
        if self.earlier[signal.SIGHUP] is signal.SIG_IGN:  # nohup
            del self.earlier[signal.SIGHUP]
        self.earlier_fd = signal.set_wakeup_fd(self.sender.fileno(), warn_on_full_buffer=False)
        self.handle_signal()
        self.methods = {name: Task.__dict__[name] for name in LIMITS}
        for name in LIMITS:
            setattr(Task, name, self.limited(name))
        sys.excepthook = partial(hide_broken_connection, os.getpid(), sys.excepthook)
        # Until a child has handlers of its own, a signal to it would come to this process's socket.
        block, unblock = partial(self.mask, signal.SIG_BLOCK), partial(self.mask, signal.SIG_UNBLOCK)
        os.register_at_fork(after_in_child=self.restore_signals_in_child)
        os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=unblock)
        threading.Thread(target=self.watch, daemon=True, name="guard").start()

    def handle_signal(self, _: int = 0, frame: FrameType | None = None) -> None:
        """Handle a signal in the main thread. The watcher has it already, and says when to stop.

        Not in the guard's own first and last steps, which would not catch what is raised here.
        """
        for number in self.earlier:
            signal.signal(number, self.handle_signal)
        names = {each.f_code.co_qualname for each, _ in traceback.walk_stack(frame)}
        in_own_steps = names & OWN_STEPS and not names & INTERRUPTIBLE
        if self.raising and not ending.unwinding.is_set() and not in_own_steps:
            self.raising = False  # once: what runs then must not be interrupted
            raise KeyboardInterrupt  # no `except Exception` on its way swallows it

    def limited(self, name: str) -> Any:
        """Return this method of clearml.Task with its limit: by itself it may wait for a server for ever."""
        earlier = getattr(Task, name)

        @wraps(earlier)
        def call(*arguments: Any, **options: Any) -> Any:
            ending.call = name
            try:
                with limit(LIMITS[name], f"Task.{name} waits for the ClearML server, or for git"):
                    return earlier(*arguments, **options)
            finally:
                ending.call = ""
                self.interrupt()  # to listen again: Task.init has set handlers of its own

        return staticmethod(call) if name == "init" else call

    def interrupt(self) -> None:
        """Have `handle_signal` called in the main thread, also where it waits."""
        if self.open:
            signal.pthread_kill(threading.main_thread().ident or 0, WAKE_UP)

    def mask(self, how: int) -> None:
        if self.open:
            signal.pthread_sigmask(how, SIGNALS)

    def restore_signals_in_child(self) -> None:
        """In a forked process, signals are its own; but Ctrl-C is this process's, which ends its workers."""
        if self.open:
            signal.set_wakeup_fd(-1)
            for number, earlier in self.earlier.items():
                # A function, which a program that the child starts does not inherit, as it would SIG_IGN.
                signal.signal(number, (lambda *_: None) if number == signal.SIGINT else earlier)

    def close(self) -> None:
        self.open = False
        signal.set_wakeup_fd(self.earlier_fd)
        for number, earlier in self.earlier.items():
            signal.signal(number, earlier)
        for name, method in self.methods.items():
            setattr(Task, name, method)
        self.sender.close()

    def watch(self) -> None:
        while self.open:
            with suppress(TimeoutError):
                for number in self.receiver.recv(1):
                    if number in SIGNALS:
                        self.stop(signal.Signals(number))
            if sdk.asked_at and time.monotonic() - sdk.asked_at > SILENT:
                sdk.asked_at = 0  # once
                print("waiting for the ClearML server")
            if not ending.task and not ending.call and (task := Task.current_task()):
                ending.task = task
                if not task.is_offline():
                    # It asks the server, and signals must be seen meanwhile.
                    register = partial(task.register_abort_callback, self.abort)
                    threading.Thread(target=register, daemon=True, name="guard-abort").start()
        self.receiver.close()

    def stop(self, number: signal.Signals) -> None:
        """Say it, and interrupt the main thread."""
        words = "aborted in the web UI" if ending.aborted else SIGNALS[number]
        # By SIGTERM torchrun ends the other processes of a run of which one has failed.
        failed = words == "terminated" and "TORCHELASTIC_RUN_ID" in os.environ
        words += " by torchrun" * failed
        if not ending.say(words, 128 + number, "failed" if failed else "stopped", seconds=8):
            return
        deadline = time.monotonic() + 4
        while ending.call == "init" and time.monotonic() < deadline:
            time.sleep(0.1)  # half made, a task could not be marked as stopped
        self.raising, unwinding = True, ending.unwinding
        for _ in range(20):
            self.interrupt()
            if unwinding.wait(0.1):
                return
        ending.settle()
        atexit._run_exitfuncs()
        abandon(ending.code)

    def abort(self) -> None:
        """Be the SDK's callback, after which it would kill the process."""
        ending.aborted = True
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)


def hide_broken_connection(process: int, earlier: Callable[..., None], kind: type[BaseException], *more: Any) -> None:
    """Be `sys.excepthook`: where a worker's connection to this process breaks, the run ends, and says so itself."""
    if os.getpid() == process or not issubclass(kind, (ConnectionError, EOFError)):
        earlier(kind, *more)
