"""What the usual limit in our rule is worth on starts that had no part in choosing it.

    python recipes/benchmarks/lr_usual_limit.py recipes/benchmarks/results/lr_suggestions.jsonl

For each kind of starts, its two constants (`USUAL` and `USUAL_SWEEPS` of `lr_readings`) are chosen on all other kinds,
as the pair of a grid with the lowest mean regret, each kind counting alike. One sweep. The other constants stay.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
from lr_starts import LAYERS, MODEL, Case
from lr_suggestions import Results, regret

from ulmfit_tools import lr_readings
from ulmfit_tools.lr_curve import LRCurve
from ulmfit_tools.lr_readings import endurance

USUAL = [0.7, 0.9, 1.0, 1.2, 1.4, 1.6, 2.0]
SWEEPS = [0.25, 1 / 3, 0.5, 0.7, 1.0]
FEWEST_RATES = 5  # of a true curve


def kind_of(case: Case) -> str:
    if case.model != MODEL:
        return case.model
    if case.seed >= 10:
        return "drawn at random"
    if case.trained_head:
        return "trained head"
    return "new head" + f", {case.layers} layers" * (case.layers != LAYERS) + ", fine labels" * ("fine" in case.task)


def read(path: Path) -> dict[str, list[tuple[list[tuple[float, float]], LRCurve]]]:
    """By kind of start: the true curve and the sweep of each."""
    results, kinds = Results(path), {}
    names = list(Case("", 0, False).key("curve"))[1:]
    for sweep in results.find(kind="sweep", sweep="ours"):
        case = Case(**{name: sweep[name] for name in names})
        points = [(line["rate"], line["accuracy"]) for line in results.find(**case.key("curve"))]
        if len(points) >= FEWEST_RATES:
            kinds.setdefault(kind_of(case), []).append((points, LRCurve.from_json(json.dumps(sweep["curve"]))))
    return kinds


def regrets(starts: list[tuple[list[tuple[float, float]], LRCurve]], usual: float, sweeps: float) -> list[float]:
    """In points, with these constants; no sweeps: without the usual limit."""
    lr_readings.USUAL, lr_readings.USUAL_SWEEPS = usual, sweeps
    return [100 * regret(points, endurance(curve)) for points, curve in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    kinds = read(parser.parse_args().results)
    print("| starts | | chosen on the others: usual, sweeps | mean regret | worst | without it: mean | worst |")
    print("|---|---|---|---|---|---|---|")
    for kind, starts in kinds.items():

        def on_the_others(pair: tuple[float, float], kind: str = kind) -> float:
            return float(np.mean([np.mean(regrets(kinds[other], *pair)) for other in kinds if other != kind]))

        usual, sweeps = min(itertools.product(USUAL, SWEEPS), key=on_the_others)
        ours, without = regrets(starts, usual, sweeps), regrets(starts, 1.0, 0.0)
        cells = [kind, str(len(starts)), f"{usual:g}, {sweeps:.2g}", f"{np.mean(ours):.2f}", f"{max(ours):.2f}"]
        print(f"| {' | '.join([*cells, f'{np.mean(without):.2f}', f'{max(without):.2f}'])} |")


if __name__ == "__main__":
    main()
