"""Processes side by side: what goes wrong, and how many there are.

That the demo's numbers are those of one process is tested with its report.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from functools import partial

import pytest
from mpcore.demo import experiment
from mpcore.demo.experiment import make_settings
from mpcore.demo.processes import Processes
from mpcore.errors import StageError


def work(job, advance):
    advance(1, "begun")
    if job == "odd":
        raise ValueError("an odd job")
    if job == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return job.upper()


def prepare(function):
    return function


@pytest.mark.parametrize(
    ("job", "count", "message"),
    [
        (
            "odd",
            1,
            r"a result of odd, got an error\. Mend .*:\n(.*\n)+ValueError: an odd job",
        ),
        ("killed", 2, r"a result of killed, got the end of its process with exit code -9\."),
    ],
)
def test_error_in_one_process_is_told_and_ends_the_others(job, count, message):
    processes = Processes(partial(prepare, work), count)
    heard = []
    with pytest.raises(StageError, match=f"^processes: expected {message}"):
        processes.run([job, "fine", "fine too"], lambda name: lambda *news: heard.append(news))
    assert (1, "begun") in heard
    assert multiprocessing.active_children() == []


def test_interrupt_ends_the_processes():
    def advance(done, note):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Processes(partial(prepare, work), 1).run(["a", "b"], lambda job: advance)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("cores", "options", "expected"),
    [
        (2, {}, 2),
        (1, {}, 1),
        (64, {}, 4),
        (2, {"threads": 2}, 1),
        (2, {"threads": 8}, 1),
        (8, {"quick": True}, 1),
        (1, {"processes": 3}, 3),
        (8, {"quick": True, "processes": 2}, 2),
    ],
)
def test_processes_are_as_many_as_there_are_cores_for(cores, options, expected, monkeypatch):
    monkeypatch.setattr(experiment, "_cores", lambda: cores)
    assert make_settings(**options).processes == expected
