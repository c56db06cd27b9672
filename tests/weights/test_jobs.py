"""Jobs of two threads: order, what waits for what, errors."""

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from megatron_jam.weights.jobs import Jobs


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    made = Jobs("helper")
    yield made
    made.close()


def test_each_kind_in_its_order_and_one_at_a_time(jobs: Jobs) -> None:
    """Jobs that put others, done by both threads."""
    done: dict[str, list[int]] = {"a": [], "b": []}
    running: dict[str, int] = {"a": 0, "b": 0}
    threads: set[int] = set()

    def work(kind: str, number: int) -> None:
        running[kind] += 1
        assert running[kind] == 1, "two at once"
        threads.add(threading.get_ident())
        time.sleep(0.001)
        done[kind].append(number)
        running[kind] -= 1
        if kind == "a":
            jobs.put("b", partial(work, "b", number))

    for number in range(50):
        jobs.put("a", partial(work, "a", number))
    jobs.finish()
    assert done == {"a": list(range(50)), "b": list(range(50))}
    assert len(threads) == 2


def test_the_caller_does_what_nobody_has_begun(jobs: Jobs) -> None:
    """While the other thread is held up: jobs without a kind, and those of other kinds."""
    begun, free = threading.Event(), threading.Event()
    done: list[tuple[str, bool]] = []

    def hold() -> None:
        begun.set()
        assert free.wait(60)
        done.append(("hold", False))

    def note(name: str) -> None:
        done.append((name, threading.current_thread() is threading.main_thread()))

    jobs.put("a", hold)
    assert begun.wait(60)
    for name in ("a", "", "b", ""):
        jobs.put(name, partial(note, name))
    for _ in range(3):
        jobs.help()
    assert sorted(done) == [("", True), ("", True), ("b", True)], "the other a waits for the first"
    free.set()
    jobs.finish()
    assert [name for name, _ in done[3:]] == ["hold", "a"]


def fail() -> None:
    raise OSError("no room")


def test_an_error_in_the_other_thread_is_the_callers(jobs: Jobs) -> None:
    """Wherever it asks next, and nothing more is done."""
    jobs.put("a", fail)
    while jobs._error is None:
        time.sleep(0.001)
    done: list[int] = []
    for ask in (jobs.help, jobs.finish, partial(jobs.put, "b", partial(done.append, 1))):
        with pytest.raises(OSError, match="no room"):
            ask()
    jobs.close()
    assert done == []


def test_an_error_in_the_last_job_is_not_lost(jobs: Jobs) -> None:
    jobs.put("a", fail)
    with pytest.raises(OSError, match="no room"):
        jobs.finish()


def test_what_has_not_begun_when_it_is_closed_is_not_done() -> None:
    jobs = Jobs("helper")
    begun, free, done = threading.Event(), threading.Event(), []

    def hold() -> None:
        begun.set()
        assert free.wait(60)
        done.append("held")

    jobs.put("a", hold)
    jobs.put("a", partial(done.append, "late"))
    assert begun.wait(60)
    threading.Timer(0.05, free.set).start()
    jobs.close()
    jobs.finish()  # there is nothing to wait for
    assert done == ["held"]


def test_without_jobs_there_is_no_thread() -> None:
    before = threading.active_count()
    jobs = Jobs("helper")
    jobs.finish()
    jobs.close()
    assert threading.active_count() == before
