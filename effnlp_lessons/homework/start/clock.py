"""Exercise 5 of notebook 00: a small tool that says which part costs more time than its MACs explain."""

import statistics
from collections.abc import Callable

import torch
from torch import Generator

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def macs_or_clock(macs: dict[str, int], runs: dict[str, list[float]], warm_up: int) -> tuple[dict[str, float], str]:
    """MACs per second of every part, and the part whose share of the time most exceeds its share of the MACs.

    A part's time is the median of its runs (seconds) without the first `warm_up` of them.
    """
    seconds = {part: statistics.median(times[warm_up:]) for part, times in runs.items()}
    speed = {part: macs[part] / seconds[part] for part in macs}
    return speed, _most(_excess(macs, seconds))


def _excess(macs: dict[str, int], seconds: dict[str, float]) -> dict[str, float]:
    """Share of the time minus share of the MACs, by part."""
    all_macs, all_seconds = sum(macs.values()), sum(seconds.values())
    return {part: seconds[part] / all_seconds - macs[part] / all_macs for part in macs}


def _most(values: dict[str, float]) -> str:
    return max(values, key=values.get)


def _exchange(
    time: Callable[[list, int], float] = lambda times, warm_up: statistics.median(times[warm_up:]),
    choose: Callable[[dict, dict], str] = lambda macs, seconds: _most(_excess(macs, seconds)),
    per_mac: int = 1,
) -> Answer:
    """The answer with one step exchanged: a part's time, the choice of the part, or the unit of speed."""

    def answer(macs: dict, runs: dict, warm_up: int) -> tuple:
        seconds = {part: time(times, warm_up) for part, times in runs.items()}
        return {part: per_mac * macs[part] / seconds[part] for part in macs}, choose(macs, seconds)

    return answer


PARTS = ("embeddings", "attention", "feed-forward", "norms")


def _draw_runs(odd: bool, warm_up: int | None = None) -> Callable[[Generator], tuple]:
    """MACs (none for embeddings and norms) and run times with slow first runs and a few late disturbances."""

    def draw(generator: Generator) -> tuple:
        first = whole_number(1, 3, generator) if warm_up is None else warm_up
        macs, runs = {}, {}
        for part in PARTS:
            counted = part not in ("embeddings", "norms")
            macs[part] = whole_number(2_000_000, 90_000_000, generator) if counted else 0
            usual = (macs[part] / 3e10 + 2e-4) * (0.4 + 2 * float(torch.rand((), generator=generator)))
            count = 2 * whole_number(1, 3, generator) + int(odd)
            spread = 1 + 0.3 * torch.rand(first + count, generator=generator, dtype=torch.float64)
            spread[:first] *= 9
            spread[first + whole_number(0, count - 1, generator)] *= 6
            runs[part] = [float(f"{usual * factor:.3g}") for factor in spread.tolist()]
        return macs, runs, first

    return draw


def _upper_middle(times: list[float], warm_up: int) -> float:
    return statistics.median_high(times[warm_up:])


def _lower_middle(times: list[float], warm_up: int) -> float:
    return statistics.median_low(times[warm_up:])


MACS_OR_CLOCK = Exercise(
    id="start.macs_or_clock",
    title="MACs or clock?",
    minutes=20,
    difficulty=3,
    reference=macs_or_clock,
    properties=(
        Property("no warm-up run, an odd number of runs", _draw_runs(odd=True, warm_up=0), times=2),
        Property("slow first runs are dropped", _draw_runs(odd=True)),
        Property("an even number of runs", _draw_runs(odd=False)),
    ),
    mistakes=(
        Mistake(
            "The mean instead of the median",
            "One disturbed run pulls the mean up. The median stays: statistics.median.",
            _exchange(time=lambda times, warm_up: statistics.mean(times[warm_up:])),
        ),
        Mistake(
            "The fastest run instead of the median",
            "The fastest run says what is possible, not what is usual. Take the median.",
            _exchange(time=lambda times, warm_up: min(times[warm_up:])),
        ),
        Mistake(
            "The median of the speeds",
            "You take the MACs per second of every run, then the median. The exercise asks for the MACs divided by "
            "the median of the seconds; with an even number of runs the two differ.",
            _exchange(time=lambda times, warm_up: 1 / statistics.median(1 / time for time in times[warm_up:])),
        ),
        Mistake(
            "Warm-up runs are kept",
            "The first `warm_up` runs load code and memory. Drop them: times[warm_up:].",
            _exchange(time=lambda times, warm_up: statistics.median(times)),
        ),
        Mistake(
            "The lower of the two middle runs",
            "With an even number of runs the median is the mean of the two in the middle. torch.median "
            "takes the lower one; statistics.median takes their mean.",
            _exchange(time=_lower_middle),
        ),
        Mistake(
            "The upper of the two middle runs",
            "With an even number of runs the median is the mean of the two in the middle. You take the upper one.",
            _exchange(time=_upper_middle),
        ),
        Mistake(
            "Runs are dropped after sorting",
            "Warm-up runs are the first in time, not the shortest. Drop them before you sort or take the median.",
            _exchange(time=lambda times, warm_up: statistics.median(sorted(times)[warm_up:])),
        ),
        Mistake(
            "The slowest part",
            "You name the part with the largest share of the time. It may have earned it: compare with its "
            "share of the MACs.",
            _exchange(choose=lambda macs, seconds: _most(seconds)),
        ),
        Mistake(
            "The part with the lowest speed",
            "You name the part with the fewest MACs per second. It may take no time worth mentioning. Compare shares.",
            _exchange(choose=lambda macs, seconds: min(macs, key=lambda part: macs[part] / seconds[part])),
        ),
        Mistake(
            "The difference is taken the wrong way round",
            "You name the part that is cheaper on the clock than its MACs say. Take share of time minus share of MACs.",
            _exchange(choose=lambda macs, seconds: min(macs, key=lambda part: _excess(macs, seconds)[part])),
        ),
        Mistake(
            "Seconds are compared with MACs",
            "Seconds and MACs have different units. Divide each by its total first; shares can be compared.",
            _exchange(choose=lambda macs, seconds: max(macs, key=lambda part: seconds[part] - macs[part])),
        ),
        Mistake(
            "FLOPs per second, not MACs per second",
            "Your speeds are twice the expected ones. One MAC is two FLOPs; here MACs are asked for.",
            _exchange(per_mac=2),
        ),
    ),
    hints=(
        "Three steps: one time per part, one speed per part, one name. Embeddings and norms have 0 MACs "
        "and still take time: which step would fail if it divided by MACs?",
        "The time of a part is statistics.median(runs[part][warm_up:]). A share is a part's number divided "
        "by the sum over all parts. Build a dictionary of share of time minus share of MACs, then max(d, "
        "key=d.get).",
        "A neighbour: who spends more of the kitchen's time than of its dishes?\n"
        "  dishes  = {'Ada': 30, 'Ben': 10, 'Eva': 0},  hours = {'Ada': 4, 'Ben': 3, 'Eva': 1}\n"
        "  share of the dishes   .75, .25, 0\n"
        "  share of the hours    .50, .375, .125\n"
        "  difference           -.25, +.125, +.125\n"
        "Ada works longest and has the most negative difference. Ben and Eva tie here; your parts never do.",
    ),
)
