"""Work for two threads, done by whichever is free."""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

Job = Callable[[], object]


class Jobs:
    """Jobs of several kinds, done by a thread of its own and by its caller, where that would wait.

    Jobs of one kind are done one at a time, in the order in which they were put; where their kind
    is "" in any order and at once.
    """

    def __init__(self, name: str) -> None:
        """The thread, which is called `name`, begins with the first job."""
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._waiting: dict[str, deque[Job]] = {}
        self._busy: set[str] = set()
        self._left = 0
        self._error: BaseException | None = None
        self._ends = False
        self._changed = threading.Condition()

    def put(self, kind: str, job: Job) -> None:
        """Have a job done; a job may put others. Raises as `help`."""
        with self._changed:
            self._check()
            self._waiting.setdefault(kind, deque()).append(job)
            self._left += 1
            self._changed.notify()
            if self._thread.ident is None:
                self._thread.start()

    def help(self) -> None:
        """Do one job, or wait until another has ended.

        Raises:
            BaseException: what a job raised in the other thread.
        """
        with self._changed:
            self._check()
            found = self._next()
            if found is None and self._left:
                self._changed.wait()
                self._check()
        if found is not None:
            self._do(*found)

    def finish(self) -> None:
        """Have all jobs done; raises as `help`."""
        while self._left:
            self.help()
        self._check()

    def close(self) -> None:
        """End the thread; what has not begun is not done."""
        with self._changed:
            self._ends = True
            self._left -= sum(map(len, self._waiting.values()))
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _next(self) -> tuple[str, Job] | None:
        for kind, jobs in self._waiting.items():
            if jobs and kind not in self._busy:
                if kind:
                    self._busy.add(kind)
                return kind, jobs.popleft()
        return None

    def _do(self, kind: str, job: Job) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error  # for the other thread as well
            raise
        finally:
            with self._changed:
                self._busy.discard(kind)
                self._left -= 1
                self._changed.notify_all()

    def _work(self) -> None:
        found = None
        while True:
            with self._changed:
                while not self._ends and self._error is None and (found := self._next()) is None:
                    self._changed.wait()
                if found is None or self._ends or self._error is not None:
                    return
            with suppress(BaseException):  # the caller is told
                self._do(*found)
