"""The committed list of comparisons that the moderated intervals borrow from."""
import json
import sys

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "reports"))
from prior import independent

LISTED = pd.read_csv(ROOT / "reports/runs/prior.csv")


def accuracies(study, arm, epochs):
    """Test accuracies by seed, read off the run folders that name an arm."""
    found = {}
    for file in (ROOT / "reports/runs").glob("*/arms.json"):
        if f"{study}/{arm}" in json.loads(file.read_text()):
            result = json.loads((file.parent / "result.json").read_text())
            if result["epochs"] == epochs:
                found[int(file.parent.name.split("-s")[-1].split("-")[0])] = result["test_top1"]
    return pd.Series(found)


@pytest.mark.parametrize("study, arm, seeds", [("small_third", "hard", 8), ("small_confirm", "hard", 3)])
def test_a_listed_scatter_is_that_of_its_runs(study, arm, seeds):
    row = LISTED.query("study == @study and arm == @arm and other == 'plain'").iloc[0]
    gaps = (accuracies(study, arm, 16) - accuracies(study, "plain", 16)).dropna()
    assert len(gaps) == row.seeds == seeds
    assert np.std(gaps, ddof=1) == pytest.approx(row["std"], abs=1e-6)


def test_a_shared_baseline_counts_once():
    def row(arm, seeds, *runs):
        return dict(study="s", arm=arm, other="plain", seeds=seeds, std=0.01, runs=list(runs))
    kept = independent([row("a", 2, "a1", "p1", "a2", "p2"), row("b", 3, "b1", "p1", "b2", "p2", "b3", "p3"),
                        row("c", 2, "c8", "p8", "c9", "p9")])
    assert kept.arm.tolist() == ["b", "c"]  # most seeds first; `a` shares its plain runs with `b`
