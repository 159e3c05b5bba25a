"""What the usual limit in our rule is worth on tasks, and on kinds of starts, that had no part in choosing it.

    python recipes/benchmarks/lr_usual_limit.py recipes/benchmarks/results/lr_suggestions.jsonl

For each of them, the three constants of the usual limit (`USUAL`, `GUESS_POWER` and `USUAL_SWEEPS` of `lr_readings`)
are chosen on all others, as those of a grid with the lowest mean regret. Every sweep of a start, the first and its
repeats, is read as the only one, and all starts count alike. The other constants stay.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from lr_starts import LAYERS, MODEL, Case
from lr_suggestions import Results, regret

from ulmfit_tools import lr_readings
from ulmfit_tools.lr_curve import LRCurve
from ulmfit_tools.lr_readings import endurance

USUAL = [0.075, 0.1, 0.125, 0.15, 0.2, 0.275, 0.35]
GUESS_POWER = [0, 1 / 2, 2 / 3, 3 / 4, 1]
USUAL_SWEEPS = [1, 1.5, 2, 3, 4, 6, 8]
FEWEST_RATES = 5  # of a true curve
RARE = ["trec-hum.csv", "sst2-90.csv", "clinc-rare.csv"]

Start = tuple[list[tuple[float, float]], list[LRCurve]]  # the true curve, and the sweeps


def kind_of(case: Case) -> str:
    if case.model != MODEL:
        return case.model
    if case.seed >= 10:
        return "drawn at random"
    if case.task.endswith(".csv"):
        return f"new head, {'a rare class' if case.task in RARE else 'the four other datasets'}"
    if case.trained_head:
        return "trained head"
    return "new head" + f", {case.layers} layers" * (case.layers != LAYERS) + ", fine labels" * ("fine" in case.task)


def read(path: Path) -> dict[Case, Start]:
    """The true curve and the sweeps of each start that has both."""
    results, starts = Results(path), {}
    names = list(Case("", 0, False).key("curve"))[1:]
    for line in results.find(kind="sweep", sweep="ours"):
        case = Case(**{name: line[name] for name in names})
        points = [(point["rate"], point["accuracy"]) for point in results.find(**case.key("curve"))]
        several = results.find(**case.key("sweep", sweep="three")) or [line]
        if len(points) >= FEWEST_RATES:
            starts[case] = points, list(LRCurve.from_json(json.dumps(several[0]["curve"])).sweeps)
    return starts


def regrets(start: Start, constants: tuple[float, float, float]) -> list[float]:
    """In points, of each sweep by itself, with these constants."""
    lr_readings.USUAL, lr_readings.GUESS_POWER, lr_readings.USUAL_SWEEPS = constants
    points, sweeps = start
    return [100 * regret(points, endurance(sweep)) for sweep in sweeps]


def print_left_out(starts: dict[Case, Start], group_of: Callable[[Case], str], title: str) -> None:
    """One row for each group of starts: with constants chosen on the others, with ours, and without a usual limit."""
    ours = lr_readings.USUAL, lr_readings.GUESS_POWER, lr_readings.USUAL_SWEEPS
    grid = list(itertools.product(USUAL, GUESS_POWER, USUAL_SWEEPS))
    means = {case: [np.mean(regrets(start, constants)) for constants in grid] for case, start in starts.items()}
    groups: dict[str, list[Case]] = {}
    for case in starts:
        groups.setdefault(group_of(case), []).append(case)
    print(f"| {title} | starts | chosen on the others: usual, power, sweeps | mean regret | worst | ours | without |")
    print("|---|---|---|---|---|---|---|")
    totals = []
    for group, cases in groups.items():
        others = np.array([means[case] for case in starts if case not in cases])
        chosen = grid[int(others.mean(axis=0).argmin())]
        rows = []
        for constants in (chosen, ours, (1.0, 0.0, 0.0)):
            found = [regrets(starts[case], constants) for case in cases]
            rows.append((float(np.mean([np.mean(one) for one in found])), max(map(max, found))))
        totals.append([len(cases) * mean for mean, _ in rows])
        cells = [group, str(len(cases)), ", ".join(f"{constant:.2g}" for constant in chosen)]
        cells += [f"{rows[0][0]:.2f}", f"{rows[0][1]:.2f}"] + [f"{mean:.2f}, {worst:.2f}" for mean, worst in rows[1:]]
        print(f"| {' | '.join(cells)} |")
    mean = np.sum(totals, axis=0) / len(starts)
    print(f"| all | {len(starts)} | | {mean[0]:.2f} | | {mean[1]:.2f} | {mean[2]:.2f} |")
    best = grid[int(np.array(list(means.values())).mean(axis=0).argmin())]
    print(f"\nThe best on all of them: {', '.join(f'{constant:.2g}' for constant in best)}\n")
    lr_readings.USUAL, lr_readings.GUESS_POWER, lr_readings.USUAL_SWEEPS = ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    starts = read(parser.parse_args().results)
    print_left_out(starts, lambda case: case.task, "task")
    print_left_out(starts, kind_of, "kind of starts")


if __name__ == "__main__":
    main()
