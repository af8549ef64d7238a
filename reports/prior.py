"""Lists the comparisons that a prior of their kind is fitted to: `python reports/prior.py`.

Writes prior.csv into a folder of runs (default: reports/runs): differences over seeds of the studies in
nbs/studies, largest number of seeds first, without those of which a run stands in a row above. So no
baseline is counted twice. The prior is fitted when a comparison is made (`vitdistill.study.prior`).
"""
import argparse
from pathlib import Path

import pandas as pd

from vitdistill.base import from_root, shipped_names
from vitdistill.runs import find_runs
from vitdistill.study.compare import difference, finished_runs, load_comparison, pairs, unequal
from vitdistill.study.prior import PRIOR_FILE, kind_of


def candidates(comparison):
    """Yields a row for each difference over several seeds whose runs are of one kind."""
    tops, measure = comparison.tops(), comparison.study.measure
    for one, other in pairs(comparison):
        if len(one) > 1 or unequal(comparison, one, other):
            continue
        row = difference(comparison, one, other, tops, "")
        if "std" not in row:
            continue
        by_name = {run.name: run for arm in (*one, *other)
                   for run in finished_runs(comparison.arms[arm]).values()}
        runs = row["runs"].split(", ")
        kind = kind_of([by_name[name] for name in runs], measure)
        if kind is not None:
            yield dict(zip(kind._fields, kind), study=comparison.study.name, arm=one[0], other=other[0],
                       seeds=row["seeds"], std=round(row["std"], 6), runs=runs)


def independent(rows):
    """Returns the rows of which no run stands in a row before."""
    used, kept = set(), []
    for row in sorted(rows, key=lambda row: (-row["seeds"], row["study"], row["arm"], row["other"])):
        if used.isdisjoint(row["runs"]):
            used.update(row["runs"])
            kept.append({key: value for key, value in row.items() if key != "runs"})
    return pd.DataFrame(kept)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", default="reports/runs", help="folder of run folders")
    folder = from_root(parser.parse_args().folder)
    records = [run for run in find_runs(folder) if run.status != "unreadable"]
    rows = []
    for name in sorted(shipped_names("nbs/studies", ".yaml")):
        rows += candidates(load_comparison(name, records))
    frame = independent(rows)
    frame.to_csv(Path(folder) / PRIOR_FILE, index=False)
    print(frame.groupby(["dataset", "measure", "annealed"]).agg(
        comparisons=("seeds", "size"), differences=("seeds", "sum")).to_string())


if __name__ == "__main__":
    main()
