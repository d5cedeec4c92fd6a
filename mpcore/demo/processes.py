"""Jobs side by side in processes of their own: results, progress, and what goes wrong."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar, cast

from mpcore.errors import StageError

Job = TypeVar("Job")
Result = TypeVar("Result")
#: Hears of the running job how many steps are done, and a note.
Advance = Callable[[int, str], None]
#: Does one job.
Work = Callable[[Job, Advance], Result]


class Processes(Generic[Job, Result]):
    """Does jobs in processes of their own, each with the next job that nobody has begun.

    Results are those of doing the jobs one after the other, if a job depends on nothing but itself.
    Leaving `run` by any way, an error or Ctrl-C too, ends the processes.

    Args:
        prepare: Called once in each process; returns what does a job. Pickled, as jobs and results
            are: a function of a module or a `functools.partial` of one.
        count: How many processes; no more than jobs are started.

    Example:
        >>> from functools import partial
        >>> processes = Processes(partial(_power, 2), count=2)
        >>> processes.run([5, 10], lambda job: lambda done, note: None)
        [32, 1024]
    """

    def __init__(self, prepare: Callable[[], Work[Job, Result]], count: int) -> None:
        self._prepare = prepare
        self._count = count

    def run(self, jobs: Sequence[Job], begin: Callable[[Job], Advance]) -> list[Result]:
        """Does all jobs and returns their results in the order of the jobs.

        Args:
            jobs: What to do; begun in this order.
            begin: Called here when a job begins; returns what hears of its progress.

        Raises:
            StageError: A job raised, with its traceback in the message, or a process ended.
        """
        results: dict[int, Result] = {}
        waiting = list(enumerate(jobs))[::-1]
        running: dict[Connection, tuple[int, Advance]] = {}
        workers: dict[Connection, BaseProcess] = {}
        try:
            for _ in range(min(self._count, len(jobs))):
                connection, worker = self._start()
                workers[connection] = worker
                _hand_over(connection, waiting, running, begin)
            while running:
                for connection in cast(list[Connection], wait(list(running))):
                    index, advance = running[connection]
                    kind, content = _receive(connection, workers[connection], jobs[index])
                    if kind == "advance":
                        advance(*content)
                        continue
                    results[index] = content
                    del running[connection]
                    _hand_over(connection, waiting, running, begin)
        finally:
            for worker in workers.values():
                worker.terminate()
            for worker in workers.values():
                worker.join()
        return [results[index] for index in range(len(jobs))]

    def _start(self) -> tuple[Connection, BaseProcess]:
        # spawned: a fork would copy PyTorch's locks and thread pools in whatever state they are
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        worker = context.Process(target=_work, args=(there, self._prepare), daemon=True)
        worker.start()
        there.close()  # so that the end of the process is the end of the connection
        return here, worker


def _hand_over(
    connection: Connection,
    waiting: list[tuple[int, Job]],
    running: dict[Connection, tuple[int, Advance]],
    begin: Callable[[Job], Advance],
) -> None:
    """Gives a process the next job, if one is left."""
    if waiting:
        index, job = waiting.pop()
        running[connection] = index, begin(job)
        connection.send(job)


def _receive(connection: Connection, worker: BaseProcess, job: object) -> tuple[str, Any]:
    """Returns the next message about a job; raises if the job did or the process ended."""
    try:
        kind, content = connection.recv()
    except (EOFError, OSError):
        worker.join()
        raise StageError(
            f"processes: expected a result of {job}, got the end of its process with exit code "
            f"{worker.exitcode}. A negative code is a signal; -9 is often memory that ran out: "
            f"use fewer processes."
        ) from None
    if kind == "failed":
        raise StageError(
            f"processes: expected a result of {job}, got an error. Mend what its traceback shows:\n"
            f"{content}"
        )
    return kind, content


def _work(connection: Connection, prepare: Callable[[], Work[Job, Result]]) -> None:
    """What a process does until the other end of the connection is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the others
    try:
        work = None
        while True:
            job = connection.recv()
            try:
                work = work or prepare()
                result = work(job, lambda done, note: connection.send(("advance", (done, note))))
                message: tuple[str, Any] = ("done", result)
            except Exception:  # whatever a job raises, the parent says it
                message = ("failed", traceback.format_exc())
            connection.send(message)
    except (EOFError, OSError):  # nobody is there any more
        return


def _power(base: int) -> Work[int, int]:
    return lambda exponent, advance: base**exponent
