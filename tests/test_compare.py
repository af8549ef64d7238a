"""Comparisons of made-up runs with a known answer."""
from types import SimpleNamespace

import pytest

from vitdistill.config import preset
from vitdistill.runs import RunWriter
from vitdistill.study.compare import choices, load_comparison, one_pair

FILE = """
common: {{preset: demo, epochs: 1, runs_dir: {folder}/runs, work_dir: {folder}/work}}
seeds: [1, 2]
arms:
  plain: {{notebook: e01_baseline_resnet50, {vary}}}
baseline: plain
"""


@pytest.fixture
def begun(tmp_path):
    """Makes a run of the arm `plain`; a result ends it."""
    def make(result=None, **fields):
        config = preset("demo", "baseline", epochs=1, runs_dir=str(tmp_path / "runs"),
                        work_dir=str(tmp_path / "work"), data_hash="1", **fields)
        run = RunWriter.of(config)
        run.begin(config, "made for a test")
        run.add_arm("mine/plain")
        run.append(dict(epoch=0, test_top1=0.5, seconds=1.0))
        if result:
            run.finish(dict(epochs=1, **result))
        return run
    return make


def study(tmp_path, vary="", more=""):
    file = tmp_path / "mine.yaml"
    file.write_text(FILE.format(folder=tmp_path, vary=vary) + more)
    return load_comparison(file)


@pytest.mark.parametrize(("by", "chosen"), [("val_loss", 0.01), ("val_top1", 0.02)])
def test_a_choice_takes_the_smallest_loss_and_the_largest_accuracy(begun, tmp_path, by, chosen):
    for lr, value in ((0.01, 0.3), (0.02, 0.9)):
        for seed in (1, 2):
            begun({"test_top1": 0.5, by: value}, lr=lr, seed=seed)
    comparison = study(tmp_path, "vary: {lr: [.01, .02]}", f"choose: {{field: lr, by: {by}}}\n")
    table = choices(comparison).set_index("lr")
    assert len(table) == 2 and table.chosen[chosen] == "yes" and list(table.chosen).count("yes") == 1


def test_a_run_that_was_started_again_is_the_one_that_counts(begun, tmp_path):
    """Its preset was edited in between, and it has not ended: the earlier result is not today's."""
    begun(dict(test_top1=0.5), seed=1, momentum=0.5)
    later = begun(seed=1)
    begun(dict(test_top1=0.5), seed=2)
    first, second = study(tmp_path).arms["plain"]
    assert (first.name, first.status) == (later.name, "interrupted") and second.config.seed == 2


def test_a_pair_is_of_a_seed_that_both_have_finished():
    one, other = ([SimpleNamespace(arm=arm, config=SimpleNamespace(seed=seed)) for seed in (1, 2, 3)]
                  for arm in ("plain", "taught"))
    pair = one_pair(one, other, [2, 3])
    assert [(run.arm, run.config.seed) for run in pair] == [("plain", 2), ("taught", 2)]
    assert [run.config.seed for run in one_pair(one, other, [])] == [1, 1]  # none is finished
