"""Times of several candidates from one interleaved run, and their ratios with a spread.

For: whatever is said to be faster or slower than something else. Candidates take turns (A B A B ...), so that a slow
minute of the machine hits all of them, and a ratio is taken within a round. Not for: what is timed.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

PROCESSOR_TIME = "BENCH_PROCESSOR_TIME"  # an environment variable, so that processes started from here read it too


class Spread(NamedTuple):
    """A median with the lowest and the highest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one number. Raises ValueError for none."""
        if not values:
            raise ValueError("a spread needs at least one value: measure one round or more")
        return cls(statistics.median(values), min(values), max(values))


def interleave(
    candidates: Mapping[str, Callable[[], float]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """What each candidate returns when it is called, `rounds` times in turn; one more round before that warms up."""
    values: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + warm_up):
        for name, run in candidates.items():
            values[name].append(run())
    return {name: found[int(warm_up) :] for name, found in values.items()}


def ratios(values: Sequence[float], yardstick: Sequence[float]) -> Spread:
    """`values` over `yardstick`, round by round. Raises ValueError where there are not as many of them."""
    return Spread.of([value / base for value, base in zip(values, yardstick, strict=True)])


def now() -> float:
    """Seconds by the clock; of this process's processor time where `PROCESSOR_TIME` is set to 1.

    On a machine that others use as well the clock measures them too. Processor time, on one thread, does not: several
    threads wait for each other, and their waiting counts as work.
    """
    return time.process_time() if os.environ.get(PROCESSOR_TIME) == "1" else time.perf_counter()


def seconds(run: Callable[[], object]) -> float:
    """Seconds of one call (`now`), to its end on the GPU where one computes."""
    started = now()
    run()
    torch = sys.modules.get("torch")  # whoever uses a GPU has imported it
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return now() - started
