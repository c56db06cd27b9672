"""Two programs that take turns in one process: the ratio of their times."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

Run = Callable[[], object]
"""One call is what is timed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measured ratio."""

    name: str
    """What is compared with what."""

    ratio: float
    """Median of the pairs' ratios."""

    spread: tuple[float, float]
    """Smallest and largest ratio of a pair."""

    def print(self, *, as_json: bool) -> None:
        """Print a line."""
        if as_json:
            print(json.dumps(asdict(self)))
        else:
            low, high = self.spread
            print(f"{self.name}: {self.ratio:.2f} ({low:.2f} to {high:.2f})", flush=True)


def nothing() -> None:
    """Nothing is to be done."""


def speed_over(
    name: str,
    ours: Run,
    peer: Run,
    *,
    pairs: int,
    before: tuple[Run, Run] = (nothing, nothing),
    warm: int = 2,
    work: int = 1,
) -> Row:
    """How often as fast `ours` is as `peer`: peer's seconds over ours, pair by pair.

    Which of the two begins changes from pair to pair; `warm` pairs come first and do not count.
    What is in `before` is called each time before the one or the other, and is not timed. `ours`
    does `work` times as much as `peer`: where both take about as long, what else the machine does
    falls on both alike.
    """
    ratios = []
    for number in range(pairs + warm):
        times = {}
        for which in (0, 1) if number % 2 else (1, 0):
            before[which]()
            times[which] = seconds((ours, peer)[which])
        ratios.append(work * times[1] / times[0])
    return row(name, ratios[warm:])


def row(name: str, ratios: list[float]) -> Row:
    """Median and range of `ratios`."""
    spread = round(min(ratios), 3), round(max(ratios), 3)
    return Row(name=name, ratio=round(statistics.median(ratios), 3), spread=spread)


def seconds(run: Run) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
