"""The pages that people read: numbers against the records, sentences against their numbers, and how long they are."""
import functools
import io
import json
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from conftest import ROOT
from forked_notebooks import analyse
from test_notebooks import EXPERIMENTS, execute
from vitdistill.analysis import settings
from vitdistill.architectures import litv2_scatter
from vitdistill.config import Config, config_hash, load, run_name, save
from vitdistill.grids import grid_cells, not_here
from vitdistill.launch import configure, notebook_names
from vitdistill.layers import HiLo
from vitdistill.models import create
from vitdistill.report import write_page
from vitdistill.runs import find_runs

RECORDS = ROOT / "reports/runs"
TAUGHT = dict(experiment="distilled", teacher="vit_tiny_patch16_224", distillation="hard")
ANEW = "Sentences to be written anew"


@functools.cache
def records():
    return find_runs(RECORDS)


def unlinked(text):
    """A page whose numbers lead nowhere."""
    return re.sub(r"\[([^\]]*)\]\(#[^)]*\)", r"\1", text)


def study(folder, **parameters):
    """The text of the study's page, as the notebook writes it."""
    analyse("a02_study", folder / "a02.ipynb", out=str(folder), **parameters)
    return (folder / "study.md").read_text()


@pytest.fixture(scope="module")
def page():
    """The committed one, which test_reports_are_what_their_records_say holds against the records byte for byte."""
    return ROOT / "reports", (ROOT / "reports/study.md").read_text()


def top(text):
    """What stands before the first heading of details."""
    return text.split("\n## 1. ")[0]


def words(text):
    """The words of a page's prose: without its title, pictures, captions, tables and the targets of links."""
    captions = r"\*[^*][^*]*\*$"
    prose = [part for part in text.split("\n\n")[1:] if not re.match(r"\s*(!\[|\||" + captions + ")", part)]
    return len(re.sub(r"\]\([^)]*\)", "", " ".join(prose)).split())


def arms_of(names):
    """The two arms of a list of runs: a new arm begins where the seed doesn't grow."""
    arms, last = [[]], 0
    for name in names:
        seed = int(re.search(r"-s(\d+)-", name)[1])
        if seed <= last:
            arms.append([])
        arms[-1].append((seed, name))
        last = seed
    return [dict(arm) for arm in arms]


def test_no_sentence_has_lost_its_number(page):
    assert ANEW not in page[1]


def test_the_page_for_a_browser_is_the_same_page(page, tmp_path):
    """study.html is one file: study.md with every one of its pictures inside."""
    shutil.copytree(ROOT / "reports/figures", tmp_path / "figures")
    write_page(page[1], tmp_path, "study")
    text = (tmp_path / "study.html").read_text()
    assert text.count('src="data:image/png;base64,') == text.count("<img") == page[1].count("![") > 5


def test_paragraphs_stand_apart(page):
    """A tag at the end of a line takes the line's end with it, and glues two paragraphs."""
    assert not re.search(r"[^\n]\n[*A-Z]", page[1])


def test_the_top_of_the_study_is_read_in_three_minutes(page):
    head, sections = top(page[1]), re.split(r"\n## ", page[1])
    assert len(head.split()) <= 500 and head.count("![") <= 2 and head.count("\n|---|") == 1  # captions, table and all
    answers = re.findall(r"^\d\. (\*\*.*)$", head, re.M)
    assert len(answers) == 5 and all(answer.count("](#") == 1 for answer in answers)  # one number each
    unsettled = head.split("**What this does not settle**")[1]
    assert len(re.findall(r"^- ", unsettled, re.M)) == 5
    for section in sections[1:9]:  # each answered by one sentence
        answer = section.split("\n\n")[1]
        assert len(re.findall(r"\.(?= |$)", answer)) == 1 and len(answer.split()) <= 50, answer
    for section in sections:
        assert len(re.findall(r"^\| ", section, re.M)) <= 9, section[:40]  # a head and eight rows
        assert not section[:1].isdigit() or section.count("![") == section.count("\n|---") == 1, section[:40]
    assert words(next(s for s in sections if s.startswith("Discussion"))) <= 305


def test_links_and_pictures_of_the_study_are_there(page):
    folder, text = page
    anchors = set(re.findall(r'<a id="(\w+)">', text))
    targets = set(re.findall(r"\]\(([^)]+)\)", text))
    assert {target[1:] for target in targets if target.startswith("#")} == anchors and len(anchors) > 10
    for target in (t for t in targets if not t.startswith("#")):
        assert (ROOT / "reports" / target).exists() or (folder / target).exists(), target


def of_images(one, other):
    """Of two runs: the difference at the last epoch whose decisions both have, with its score interval."""
    epoch = max(set.intersection(*({p.name for p in (RECORDS / name).glob("predictions*")} for name in (one, other))))
    arrays = [np.load(RECORDS / name / epoch) for name in (one, other)]
    first, second = (a["test_class_decision"] == a["test_label"] for a in arrays)
    n, lost, won = len(first), (first & ~second).sum(), (second & ~first).sum()
    half = 1.96 * np.sqrt(lost + won - (won - lost) ** 2 / n) / n  # Wald's: of so many images, Tango's to the digit
    gap = (won - lost) / n
    return 100 * gap, 100 * (gap - half), 100 * (gap + half)


def test_differences_of_the_study_are_those_of_the_records(page):
    """Each `+x.x (low to high)` is computed anew from the accuracies, or decisions, of the runs that it links to."""
    sources = {key: re.findall(r"\[([^\]]+)\]\(runs/", line)
               for key, line in re.findall(r'^- <a id="(\w+)"></a>(.*)$', page[1], re.M)}
    told = re.findall(r"\[([+-]\d+\.\d) \((-?\d+\.\d) to (-?\d+\.\d)\)\]\(#(\w+)\)", page[1])
    assert len(told) > 20
    for mean, low, high, key in told:
        *before, one, other = arms_of(sources[key])  # before: two arms whose difference is taken off
        both = sorted(one.keys() & other.keys())
        ended = all((RECORDS / name / "result.json").is_file() for arm in (one, other) for name in arm.values())
        if len(both) == 1 or not ended:
            images = of_images(one[both[0]], other[both[0]])
            assert [float(x) for x in (mean, low, high)] == pytest.approx(images, abs=0.0501)
            continue
        read = lambda name: json.loads((RECORDS / name / "result.json").read_text())["test_top1"]
        gaps = 100 * np.array([read(other[seed]) - read(one[seed]) for seed in both])
        if before:
            gaps -= 100 * np.array([read(before[1][seed]) - read(before[0][seed]) for seed in sorted(one)])
        half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
        found = gaps.mean(), gaps.mean() - half, gaps.mean() + half
        assert [float(x) for x in (mean, low, high)] == pytest.approx(found, abs=0.0501), (key, sources[key][0])


def test_every_number_of_the_study_leads_to_its_runs(page):
    """Shares and differences in its prose, correlations aside."""
    parts = page[1].split("\n## How it was done")[0].split("\n\n")
    prose = [part for part in parts if part[0] not in "|!" and not part.startswith("*Figure 4")]
    alone = re.sub(r"\[[^\]]*\]\([^)]*\)", "", "\n".join(prose))
    found = re.findall(r".{30}(?<![\w.,])(?:[+-]\d+\.\d+|\d+\.\d%).{9}", alone)
    assert not [text for text in found if "correlate by" not in text]


def test_every_picture_says_whom_it_shows(page):
    for name in re.findall(r"\]\(figures/(\w+)\.png\)", page[1].split(". HiLo and LITv2\n")[0]):
        words_of = " ".join(re.findall("<!-- (.*?) -->", (page[0] / f"figures/{name}.svg").read_text()))
        assert re.search(r"(resnet\d|ResNet-\d|deit_|vit_).*images", words_of), name
        if name == "agreement_reliability":  # plain, taught, and of the others the worst and the best calibrated
            arms = pd.read_csv(page[0] / "tables/study_calibration.csv").set_index("arm").ece
            others = arms.drop(["labels alone", "taught"])
            assert all(arm in words_of for arm in ("labels alone", "taught", others.idxmax(), others.idxmin()))
            assert words_of.count("ECE ") == 4


def test_students_are_held_against_the_answers_that_they_were_given(page):
    """Out of fold, of images that a teacher had not seen; of one teacher, all; counted anew from the arrays."""
    table = pd.read_csv(page[0] / "tables/study_sides.csv").set_index(["answers", "arm"])

    def said_by(run):  # of training images
        config = load(RECORDS / run / "config.yaml")
        card = json.loads((RECORDS / run / "result.json").read_text())["teacher_card"]
        folders = [Path(weights).parts[-2] for weights in (config.teacher_weights, config.fold_weights) if weights]
        if len(folders) == 1:
            folders = [run.name for run in records() if run.config.experiment == "adopted_teacher"
                       and run.result["weights_hash"] == card["weights_hash"]]
        parts = ("val",) if len(folders) == 2 else ("train", "val")
        teachers = [np.load(RECORDS / folder / "predictions.npz") for folder in folders]
        return {image: said for t in teachers for part in parts
                for image, said in zip(t[f"{part}_image"], t[f"{part}_class_decision"])}

    folds, one = "the teachers of folds", "one teacher"
    for answers, arm, told in ((folds, "taught, out of fold", "26.8%"), (folds, "labels alone", "7.6%"),
                               (one, "taught", "21.0%"), (one, "taught, soft targets at tau 4", "19.0%"),
                               (one, "labels alone", "8.7%")):
        heard = "taught, out of fold" if answers == folds else "taught"
        answer = said_by(table.runs[answers, heard].split(", ")[0])
        assert len(answer) == (10_000 if answers == folds else 50_000)  # each image has one
        shares = []
        for name in table.runs[answers, arm].split(", "):
            run = np.load(RECORDS / name / "predictions.npz")
            given = np.array([answer[image] for image in run["train_image"]])
            apart = given != run["train_label"]
            shares.append((run["train_class_decision"] == given)[apart].mean())
        assert table.with_teacher[answers, arm] == pytest.approx(np.mean(shares), abs=1e-9)
        assert f"{np.mean(shares):.1%}" == told and told in page[1]


def test_the_study_says_how_much_faster_hilo_is(page):
    """One sentence at 64 x 64 tokens, as the record of the bench has it; the table tells LITv2's runs, as a07 does."""
    section = page[1].split(". HiLo and LITv2\n")[1].split("\n## ")[0]
    table = pd.read_csv(page[0] / "tables/hilo_goal.csv")
    row = table[(table.contender == "HiLo, alpha 0.5") & (table.tokens == 64 * 64)].iloc[0]
    sentence = r"64 x 64 tokens (\S+) times \((\S+) to (\S+)\) as fast .*? what (\S+) times .* is (\S+): reached"
    told = re.search(sentence, section)
    columns = "faster (times)", "low", "high", "fewer multiply-adds (times)", "goal, 0.6 of that"
    assert list(told.groups()) == [f"{row[name]:.1f}" for name in columns] and row["goal met"] == "yes"
    rows = pd.read_csv(page[0] / "tables/hilo_students.csv")
    answers = re.findall(r"^\| (.+) \| \[(\S+) .+\]\(\S+\) \| .+ \| (.+) \| (\S+) \| (\d+) \|$", section, re.M)
    right = [f"{100 * share:.1f}%" if share == share else "–" for share in rows["teacher, test"]]
    assert answers == [(row.what, f"{100 * row.difference:+.1f}", row.answer, share, str(row.pairs))
                       for row, share in zip(rows.itertuples(), right)]


def test_the_study_says_what_can_found_of_the_noise(page):
    arms = pd.read_csv(ROOT / "reports/tables/can_arms.csv").query("data == 'cifar100'").set_index("arm")
    told = re.search(r"than none would \(of its variance \[(\S+)\]\(\S+\) is explained by the arm \*CAN\*", page[1])
    explained = float(arms.loc["CAN", "noise explained"].split(" ± ")[0])
    assert told[1] == f"{explained:.1f}" and explained < 0 and "arm *hardly" not in page[1]
    learned = float(arms.loc["noise loss of unit variance", "noise explained"])
    assert learned > 0.1 and f"Of *noise loss of unit variance* {learned:.1f} is explained" in unlinked(page[1])


def test_back_tests_are_of_all_pairs(page):
    """Of either learning rate, which the finding names, for on it the error depends."""
    table = pd.read_csv(page[0] / "tables/study_forecasts.csv")
    logs = table[(table.law == "logarithm") & (table.schedule == "T_max 2,000")].set_index(["lr", "arm"]).error
    assert {(0.02, "taught"), (0.02, "labels alone"), (0.005, "taught"), (0.005, "labels alone")} <= set(logs.index)
    section = page[1].split("## 4. ")[1].split("## 5. ")[0]
    assert "right at 0.02" in section and "too low at 0.005" in section
    assert logs[0.02][["labels alone", "taught"]].abs().max() < 0.01 and logs[0.005].max() < -0.015
    assert set(table.arm) >= set(pd.read_csv(page[0] / "tables/study_pairs.csv").arm)


def test_nothing_is_drawn_at_a_rejected_learning_rate(page):
    rejected = pd.read_csv(page[0] / "tables/study_pairs.csv").query("rejected")
    assert len(rejected) > 2 and set(rejected.lr) == {0.005} and set(rejected.schedule) == {"annealed"}
    drawn = pd.read_csv(page[0] / "tables/study_forest.csv").runs.tolist()
    assert drawn and not set(drawn) & set(rejected.runs)
    told = len(pd.read_csv(page[0] / "tables/study_pairs.csv")) - len(rejected)
    dots = re.findall("<use .*fill: #444444", (page[0] / "figures/study_chance.svg").read_text())
    assert len(dots) == told
    assert not (page[0] / "figures/study_budgets.png").exists()  # until budgets at the chosen rate are run


def test_study_page_without_runs_says_so(tmp_path):
    text = study(tmp_path, reports=str(tmp_path / "none"))
    assert f"No finished runs on cifar100 in {tmp_path / 'none'}" in text and ANEW not in text


def record(root, curve, seed=1, right=None, planned=None, **over):
    """A run folder with this accuracy by epoch; `right`: of 1,000 test images, decided rightly at the last epoch."""
    c = Config(**{"dataset": "digits", "epochs": planned or len(curve), "seed": seed, **over})
    folder = root / "runs" / run_name(c)
    save(c, folder / "config.yaml")
    frame = pd.DataFrame(dict(epoch=np.arange(len(curve)), test_top1=curve, train_top1=curve))
    frame.to_csv(folder / "metrics.csv", index=False)
    if right is not None:
        np.savez(folder / f"predictions-{len(curve):04d}.npz", test_image=np.arange(1000),
                 test_label=np.zeros(1000, int), test_class_decision=(np.arange(1000) >= right).astype(int),
                 test_class_confidence=np.ones(1000))
    if len(curve) == c.epochs and right is None:
        result = dict(hash=config_hash(c), test_top1=float(curve[-1]), train_top1=0.9, val_top1=over.pop("held", None))
        (folder / "result.json").write_text(json.dumps({k: v for k, v in result.items() if v is not None}))
    return folder


def tell(folder, **more):
    """Let a record's result say more."""
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | more))


def test_study_chooses_by_held_out_images(tmp_path):
    """Of two learning rates the better on held-out images is chosen, whatever test images say; neither is an arm."""
    for lr, held_out, test in (0.01, 0.4, 0.1), (0.1, 0.3, 0.9):
        tell(record(tmp_path, [0.05, test], lr=lr), val_top1=held_out)
    text = study(tmp_path, reports=str(tmp_path / "runs"), dataset="digits")
    choices = pd.read_csv(tmp_path / "tables/study_choices.csv").set_index("lr")
    assert choices.chosen.to_dict() == {0.01: "yes", 0.1: "no"} and "90.0%" not in text.split("## 2.")[0]
    assert not len(pd.read_csv(tmp_path / "tables/study_arms.csv"))


def test_sentences_that_no_longer_fit_are_found(tmp_path):
    """Where the arm out of fold comes to lie below, the page says which sentence is to be written anew."""
    folds = dict(TAUGHT, teacher_weights="a", fold_weights="b")
    for seed in 1, 2, 3:
        record(tmp_path, [0.1, 0.5 + seed / 1000], seed)
        record(tmp_path, [0.1, 0.55 + seed / 500], seed, **TAUGHT)
        record(tmp_path, [0.1, 0.4 + seed / 500], seed, **folds)
    text = study(tmp_path, reports=str(tmp_path / "runs"), dataset="digits")
    assert ANEW in text and "says higher of taught, out of fold less labels alone, its interval says lower" in text
    assert "-9.8 (" in text  # 0.4 + 0.002 - 0.5 - 0.001, in points


def test_a_gain_at_several_lengths_has_its_section(tmp_path):
    for seed in 1, 2:
        for epochs, gain in (2, 0.01), (4, 0.03):
            for way, top1 in ({}, 0.5), (TAUGHT, 0.5 + gain + seed / 500):
                record(tmp_path, [0.1] * (epochs - 1) + [top1], seed, lr=0.02, **way)
    text = study(tmp_path, reports=str(tmp_path / "runs"), dataset="digits")
    section = text.split("Does the gain grow with length?")[1]
    rows = re.findall(r"^\| (\d) epochs \| \[\+(\d\.\d) .*\| (\d) \|$", section, re.M)
    assert rows == [("2", "1.3", "2"), ("4", "3.3", "2")] and (tmp_path / "figures/study_budgets.png").is_file()


def test_the_long_run_is_told_as_far_as_it_has_come(tmp_path):
    """150 epochs of three made-up arms: by epoch, image by image, the published shape, and what a line foretold."""
    epoch = np.arange(1, 151)
    long = dict(t_max=2000, planned=150)
    plain = 0.72 * (1 - np.exp(-epoch / 15))
    record(tmp_path, plain, right=720, **long)
    record(tmp_path, plain + 0.01, right=732, **long, **TAUGHT)
    published = np.maximum(0.01, -0.112 + 0.139 * np.log(epoch))
    record(tmp_path, published, right=586, allow_untrained=True, **long, **TAUGHT)
    text = study(tmp_path, reports=str(tmp_path / "runs"), dataset="digits")
    section = text.split("## 2. ")[1].split("## 3. ")[0]
    assert "After 150 epochs the taught student lies above the plain one" in section
    assert "+1.2 (" in section and "only the taught one on 12" in section and "McNemar's exact p 0.00049" in section
    for mark in 25, 50, 100, 150:
        assert f"{plain[mark - 1]:.1%}" in section
    assert re.search(r"is not seen in \*taught\*: \+1\.0 points", section)
    assert re.search(r"is seen in \*taught, head never trained\*: -13\.\d points", section)
    assert re.search(r"leaves the student at \[58\.\d%\]\(#\w+\) after 150 epochs: \[-13\.\d \(-1", section)
    assert pd.read_csv(tmp_path / "tables/study_forest.csv").interval.tolist() == ["over test images"] * 2  # each once
    table = pd.read_csv(tmp_path / "tables/study_long.csv").set_index("arm")
    known = np.polyfit(np.log(epoch[:90]), plain[:90], 1)
    expected = np.polyval(known, np.log(epoch[90:])) - plain[90:]
    assert table.rest_error["labels alone"] == pytest.approx(expected.mean(), abs=1e-4)
    assert f"{100 * expected.mean():+.1f}, {100 * expected[-1]:+.1f}" in section
    assert table.slope["taught, head never trained"] == pytest.approx(0.1347, abs=1e-4)


def test_the_long_runs_beginning_is_named_as_such(tmp_path):
    record(tmp_path, [0.04, 0.09], t_max=2000, planned=150)
    record(tmp_path, [0.04], t_max=2000, planned=150, **TAUGHT)
    section = study(tmp_path, reports=str(tmp_path / "runs"), dataset="digits").split("## 2. ")[1].split("## 3. ")[0]
    assert "Too early to say" in section and "now at epoch 1 of 150" in section
    assert "is told at epoch 150" in section


def test_the_long_run_says_something_at_epoch_twenty_one(tmp_path):
    """Plain has 34 epochs and taught 21: told by accuracies without an interval, and image by image with decisions."""
    epoch, line = np.arange(1, 35), lambda n: -0.1 + 0.16 * np.log(epoch[:n])
    for where, right, at in ("by_epoch", (None, None), 21), ("decided", (500, 480), 20):
        folder = tmp_path / where
        for top1, n, hits, way in (line(34), 34, right[0], {}), (line(21) - 0.02, 21, right[1], TAUGHT):
            made = record(folder, top1, planned=150, t_max=2000, right=hits, **way)
            for file in made.glob("predictions-*.npz"):
                file.rename(made / "predictions-0020.npz")  # of an epoch that both have behind them
        section = study(folder, reports=str(folder / "runs"), dataset="digits").split("## 2. ")[1].split("## 3. ")[0]
        assert f"After {at} epochs" in section and "is told at epoch 150" in section and "Too early" not in section
        told = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", section)  # without links
        slopes = re.search(r"log lines of epochs 1 to (\d+) rise by ([\d.]+) \(plain.*?and ([\d.]+) \(taught", told)
        assert [float(x) for x in slopes.groups()] == [at, 0.16, 0.16]
        assert f"line of the taught one ({-0.112 + 0.139 * np.log(at):.1%} there)" in section
        assert "have not set this student back by anything like 13.6 points" in section
        rise = 100 * (line(at)[-5:].mean() - line(at)[-10:-5].mean())
        assert f"plain one has on average {rise:+.1f} points, the taught one {rise:+.1f}, beside" in told
        if where == "decided":
            interval = re.search(r"lies below the plain one .*\[-2\.0 \((-[\d.]+) to (-[\d.]+)\)\]", section)
            assert -3.2 < float(interval[1]) < -2.9 and -1.4 < float(interval[2]) < -1.2
            assert "only the plain one is right on 20 of them, only the taught one on 0 " in section
            assert "McNemar's exact p 1.9e-06" in section
        else:
            assert "the plain student has 38.7% and the taught one 36.7%: [-2.0](#" in section
            assert "there is no interval" in section and "McNemar" not in section


def test_study_tells_smoothed_labels_from_a_teacher(tmp_path):
    """Smoothed labels are an arm of their own beside the plain one, and no teacher's."""
    for top1, spread, way in (0.5, 0, {}), (0.6, 0.001, dict(label_smoothing=0.1)), (0.8, 0.003, TAUGHT):
        for seed in 1, 2, 3:
            record(tmp_path, [0.1, top1 + seed * spread], seed, **way)
    study(tmp_path, reports=str(tmp_path / "runs"), dataset="digits")
    pairs, forest = (pd.read_csv(tmp_path / f"tables/study_{name}.csv") for name in ("pairs", "forest"))
    differences = dict(zip(pairs.arm, pairs.difference))
    assert differences == pytest.approx({"taught": 0.306, "labels alone, labels smoothed by 0.1": 0.102})
    control = forest[forest.question.str.startswith("Controls")].iloc[0]
    assert control.arm == "labels alone, labels smoothed by 0.1" and control.difference == pytest.approx(0.102)


def test_taught_deits_have_their_section_without_a_plain_one(tmp_path):
    usual = dict(TAUGHT, teacher_weights="a", teacher_hash="a", student="deit_tiny_patch16_224", data_fraction=0.2)
    two = usual | dict(student="deit_tiny_distilled_patch16_224", experiment="deit", token="distillation")
    for seed in 1, 2:
        for way, top1 in (usual, 0.50 + seed / 100), (two, 0.52 + seed / 80):
            tell(record(tmp_path, [0.1, top1], seed, **way), teacher_top1=0.7)
    text = study(tmp_path, reports=str(tmp_path / "runs"), dataset="digits")
    assert re.search(r"^\| a token of its own for hard labels \| \[\+2\.\d", text, re.M)


def test_arms_still_to_come_have_their_place(tmp_path):
    """No table grows beyond eight rows, other images have rows of their own, DeiT's recipe is no arm here."""
    usual = dict(TAUGHT, teacher_weights="a", teacher_hash="a")
    folds = dict(usual, fold_weights="b", teacher_hash="b")
    ways = ({}, 0.5), (usual, 0.51), (folds, 0.52), (folds | dict(fold_answers="seen"), 0.515), \
           (folds | dict(fold_answers="drawn"), 0.505), (TAUGHT | dict(allow_untrained=True), 0.3)
    part, deit = dict(data_fraction=0.2), dict(student="deit_tiny_patch16_224", lr=0.02)
    two = dict(deit, student="deit_tiny_distilled_patch16_224", experiment="deit", token="distillation")
    for seed in 1, 2:
        for lr, t_max in (0.02, 0), (0.02, 2000), (0.005, 0), (0.005, 2000):
            for way, top1 in ways[:2] if lr == 0.005 else ways:
                record(tmp_path, [0.1, top1 + seed * (top1 - 0.3) / 100], seed, lr=lr, t_max=t_max, **part, **way)
        for way, top1 in ways[:2]:
            record(tmp_path, [0.1, top1 + seed / 100], seed, lr=0.02, split_seed=1, **part, **way)
            record(tmp_path, [0.1, top1 + seed / 100], seed, **part, **way, **deit)
        record(tmp_path, [0.1, 0.505 + seed / 80], seed, **part, **usual | deit | dict(distillation="soft"))
        tell(record(tmp_path, [0.1, 0.53 + seed / 80], seed, **part, **usual | two), token_cosines=[0.1, 0.5, 0.8])
        convnet = record(tmp_path, [0.1, 0.52 + seed / 70], seed, **part, **usual | two | dict(teacher="regnety_002"))
        tell(convnet, teacher_top1=0.65, teacher_card=dict(top1_held_out=0.65, n_train=44_000, weights_hash="y"))
        record(tmp_path, [0.1, 0.2, 0.3, 0.51], seed, **part, **deit)  # twice as long
        record(tmp_path, [0.1, 0.4], seed, **part, **deit | dict(mixup=0.2))  # of the same model
        pupil = record(tmp_path, [0.1, 0.53 + seed**2 / 500], seed, lr=0.02, **part, **usual | dict(alpha=0.9))
        tell(pupil, teacher_card=dict(top1_held_out=0.8, top1_train_views=0.9))
        control = usual | dict(alpha=0.9, teacher_hash="s")
        pupil = record(tmp_path, [0.1, 0.52 + seed**2 / 500], seed, lr=0.02, **part, **control)
        tell(pupil, teacher_card=dict(top1_held_out=0.75, top1_train_views=0.9))
        other = record(tmp_path, [0.1, 0.52 + seed / 500], seed, lr=0.02, **part, **usual | dict(teacher="resnet18"))
        tell(other, teacher_card=dict(top1_held_out=0.4, n_train=44_000, weights_hash="r"))
    for run in find_runs(tmp_path / "runs"):
        if run.config.teacher == TAUGHT["teacher"] and run.config.alpha == 0.5:
            tell(run.folder, teacher_top1=0.7, teacher_card=dict(top1_held_out=0.7, n_train=44_000, weights_hash="v"))
    held = dict(data_fraction=0.1, val_rows="0:99")
    weights = f"out/work/{record(tmp_path, [0.1, 0.5], 21, **deit, **held).name}/model"
    on = dict(student_size=48, student_head="keep", student_weights=weights, weights_hash="w")
    record(tmp_path, [0.1, 0.6], 21, **deit | on, **held)
    vit = dict(student="vit_tiny_patch16_224", distillation="can", experiment="pretrain")
    for name, given, probe in ("c", {}, 0.6), ("m", dict(weights=[0, 1, 0], mask=0.75, sigma=0.0), 0.5):
        encoder = record(tmp_path, [0.1, 0.1], objective_kwargs=given, **vit)
        tell(encoder, encoder_hash=name, linear_val_top1=probe, linear_test_top1=probe)
    teacher = record(tmp_path, [0.1, 0.8], student=vit["student"], experiment="teacher", weights_hash="c")
    tell(teacher, held_out_top1=0.8, train_views_top1=0.9)
    tell(record(tmp_path, [0.1, 0.75], student=vit["student"], experiment="teacher"), held_out_top1=0.75,
         train_views_top1=0.9)
    text = study(tmp_path, reports=str(tmp_path / "runs"), dataset="digits")
    for section in re.split(r"\n## ", text):
        assert len(re.findall(r"^\| ", section, re.M)) <= 9, section[:40]
    weak = "resnet18 at 224 px, trained on 44,000 images, has 40.0% of held-out images right. That is no more"
    assert weak in unlinked(text)
    third = text.split("## 3. ")[1].split("## 4. ")[0]
    assert "*swapped folds* less *out" in third and "*labels drawn as folds err* (a control) less *out" in third
    arms = pd.read_csv(tmp_path / "tables/study_arms.csv")
    assert set(arms.student) == {"resnet50 (imagenet stem)"}
    assert set(pd.read_csv(tmp_path / "tables/study_pairs.csv").part) == {1, 2}
    assert "## 9. And the other way round" in text
    hard = re.search(r"^\| hard labels \| \[(.*?)\]", text.split("## 9. ")[1], re.M)
    assert hard[1].startswith("+1.0")  # of the students that see no mixed images
    assert "only cropped and mirrored" in text and "alone, hard labels add [+1.0" in text
    assert re.search(r"and soft ones \[\+0\.9 .* With a token of their own hard labels add \[\+3\.4 \(", text)
    ninth = text.split("## 9. ")[1].split("## 10. ")[0]
    assert re.search(r"by it instead of regnety_002, which has \[65.0%\].* right, a student .* gains \[\+0\.7 ", ninth)
    assert "*mixup* 0.2: [-1" in ninth
    assert re.search(r"Labels alone, deit_tiny_patch16_224 has \[.*?after 2 epochs and .*?after 4 epochs", ninth)
    assert "cosine of [0.10]" in ninth
    assert re.search(r"has \[50.0%\].* before it goes on, \[60.0%\].* after 2 epochs at 48 px \(bicubic\)", ninth)
    assert ninth.count("![") == ninth.count("\n|---") == 1
    prose = re.sub(r"^\|.*$", "", ninth, flags=re.M)
    assert not re.findall(r"(?<![\[\w.,(])[+-]\d+\.\d", prose)  # each leads to its runs
    tenth = text.split("## 10. ")[1].split("## Disc")[0]
    assert "that CAN pre-trained" in tenth and "80.0%" in tenth and re.search(r"lie \[\+3\.2 \(", tenth)
    by_probe = "| CAN over MAE | +10.0 | above, by less than published | +70.0 | +6.8 | 1 |"  # +70.0: fine-tuned
    assert by_probe in tenth and "![" in tenth
    assert "from scratch, 2 epochs, as many passes without pre-training: it has 75.0% of test" in unlinked(tenth)
    assert re.search(r"lies \[\+5\.0 \(no .* from one from scratch, 2 epochs \(1 seed\)", tenth)
    assert re.search(r"CAN's students lie \[\+1\.0 \(.* from those of one from scratch, 2 epochs", tenth)
    rows = re.findall(r"^\| resnet50.*$", text.split("## 1. ")[1].split("## 2. ")[0], re.M)
    assert ["part 2" in row for row in rows] == [False] * (len(rows) - 1) + [True]


def test_litv2s_answers_have_their_place(tmp_path):
    """Its gain beside a DeiT's, its students beside the plain ones; what such runs make untrue is no longer said."""
    usual = dict(TAUGHT, teacher_weights="a", teacher_hash="a")
    convnet = dict(usual, teacher="mobilenetv2_100", teacher_hash="m")
    ways = [({}, 0.35, 0), (usual, 0.361, 0.001), (usual | dict(fold_weights="b", teacher_hash="b"), 0.371, 0.001),
            (usual | dict(distillation="soft", temperature=4.0), 0.38, 0.001),
            (usual | dict(allow_untrained=True, teacher_hash="u"), 0.3, -0.001), (convnet, 0.36, 0.002)]
    litv2, deit = (dict(student=name, optimizer="adamw", lr=lr, t_max=0) for name, lr in
                   (("litv2_cifar", 0.002), ("deit_tiny_patch16_224", 0.001)))
    deit["student_kwargs"] = dict(img_size=32, patch_size=4, embed_dim=256, depth=5, num_heads=4)  # that costs as much
    cifar = dict(dataset="cifar100", data_fraction=0.2, lr=0.02, t_max=0)
    for model, held_out in (litv2, 0.6), (deit, 0.3):
        tell(record(tmp_path, [0.1, held_out], experiment="teacher", **cifar | model), held_out_top1=held_out)
    for seed in 1, 2, 3:
        for way, top1, slope in ways:
            record(tmp_path, [0.1, top1 + seed * (0.001 + slope)], seed, **cifar | dict(student="resnet18") | way)
        for way, top1, slope in *ways[:2], *ways[4:]:  # of another setting, of which no rival is counted
            other = cifar | dict(student="resnet18", t_max=2000)
            record(tmp_path, [0.1, top1 + seed * (0.001 + slope)], seed, **other | way)
        for model, alone, gain in (litv2, 0.4 + (seed == 3) / 1000, 0.02), (deit, 0.3, 0.05):
            record(tmp_path, [0.1, alone + seed / 100], seed, **cifar | model)
            taught = alone + gain + seed / (100 if gain > 0.03 else 90)
            record(tmp_path, [0.1, taught], seed, **cifar | dict(convnet) | model)
            name, held_out = model["student"], 0.6 if gain == 0.02 else 0.3
            pupil = record(tmp_path, [0.1, 0.36 + seed / 400], seed, **cifar | dict(student="resnet18"),
                           **usual | dict(teacher=name, teacher_hash=name))
            tell(pupil, teacher_card=dict(top1_held_out=held_out, n_train=44_000, weights_hash=name))
    for run in find_runs(tmp_path / "runs"):
        if run.config.teacher in ("mobilenetv2_100", TAUGHT["teacher"]):
            tell(run.folder, teacher_card=dict(top1_held_out=0.7, n_train=44_000, weights_hash=run.config.teacher))
    encoder = record(tmp_path, [0.1, 0.1], **cifar | dict(student="vit_tiny_patch16_224", experiment="pretrain",
                                                          distillation="can"))
    tell(encoder, encoder_hash="c", linear_val_top1=0.2, linear_test_top1=0.2)
    weak = record(tmp_path, [0.1, 0.3], **cifar | dict(student="vit_tiny_patch16_224", experiment="teacher",
                                                       weights_hash="c"))
    tell(weak, held_out_top1=0.4)  # it has taught none, for on test images it is below the plain student
    longer = record(tmp_path, [0.1, 0.1, 0.1, 0.1, 0.1, 0.31], **cifar | dict(student="vit_tiny_patch16_224",
                                                                             experiment="teacher"))
    tell(longer, held_out_top1=0.31)  # as is its control, of as many passes
    text = study(tmp_path, reports=str(tmp_path / "runs"), dataset="cifar100")
    section = text.split(". HiLo and LITv2\n")[1].split("\n## ")[0]
    assert re.search(r"^\| the gain of LITv2 less that of DeiT \| \[-2\.8 \(", section, re.M)
    assert re.search(r"^\| LITv2 less DeiT, labels alone \| \[.* \| higher \| higher \| – \| 3 \|$", section, re.M)
    assert re.search(r"^\| the gain of LITv2 less that of DeiT \| \[.* \| lower \| lower \| – \| 3 \|$", section, re.M)
    taught = r"^\| a ResNet taught by LITv2, less alone \| \[\+1\.3 .* \| higher \| 60\.0% \| 3 \|$"
    assert re.search(taught, section, re.M)
    assert "| a ResNet taught by DeiT, less alone | – | less than the usual teacher's | not answered" in section
    assert "less by DeiT" not in section
    weaker = "that has 30.0% of test images right is no better than the plain ResNet, which has 35.2%"
    assert weaker in unlinked(section)
    assert text.count("A convnet's students gain too") == 1 and "a convnet as teacher" not in text
    waiting = re.search(r"^- Not run yet.*$", text, re.M)[0]
    assert "can_students" not in waiting and not re.search("litv2(?!_alpha)", waiting)
    section = text.split(". Does a teacher teach that never saw ImageNet?\n")[1].split("\n## ")[0]
    assert "has 30.0% of test images right. The plain resnet18 has 35.2%" in unlinked(section)
    assert "not answered" in section and "was not to teach" in section
    assert "scratch, 6 epochs, as many passes without pre-training: it has 31.0%" in unlinked(section)
    assert "what would settle most" not in text.split("**The question.**")[0] and "which grids" not in text


README = (ROOT / "README.md").read_text()
MACHINE = "intel-r-xeon-r-processor-2-cores-amx"  # on which the README's costs were measured
PARTS = dict(e00_teacher="teacher", e01_baseline_resnet50="baseline", e02_distilled_resnet50="distilled",
             e03_deit_from_regnet="deit", e04_adopted_teacher="teacher", e06_pretrain="pretrain")
RECIPES = re.findall(r"^papermill (.+)$", README, re.M)
TINY_VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)


def given_of(recipe):
    """The template of a recipe and the parameters that it gives, as papermill reads them."""
    said = shlex.split(recipe)
    names = {said[i + 1]: said[i + 2] for i, word in enumerate(said) if word == "-p"}
    numbers = {name: yaml.safe_load(value) for name, value in names.items()}
    return re.search(r"/(\w+)\.ipynb", said[0])[1], numbers


def test_readme_is_decided_in_one_screen():
    first = README.split("## Two commands")[0]
    bullets = re.findall(r"^- (.*)$", first, re.M)
    assert first.count("![") == 1 and len(bullets) == 4
    assert all(len(re.findall(r"\(\S+ to \S+\)", bullet)) <= 1 for bullet in bullets)
    assert len(README.split("```")[0].split()) <= 210  # captions and all, to the first command
    assert len(re.search(r"\n\n(.+?)\n\n", README)[1].split()) <= 25
    assert len(re.findall(r"^\| ", README.split("## Results")[1].split("## ")[0], re.M)) == 7  # a head and six rows


def test_readme_shows_the_forest_until_the_long_run_has_twenty_epochs():
    """Then Figure 4 is the picture that leads: both arms at the paper's own size."""
    long = [run.epochs_done for run in records()
            if run.config.data_fraction == 1 and run.config.dataset == "cifar100" and not run.config.allow_untrained
            and run.config.experiment in ("baseline", "distilled")]
    led_by = "figure4" if len(long) > 1 and min(long) >= 20 else "study_forest"
    assert re.search(r"!\[.*\]\(reports/figures/(\w+)\.png\)", README)[1] == led_by


def test_the_readmes_picture_is_told_by_its_record():
    """Its caption has the epoch, the difference and the interval of the study's."""
    study_page = (ROOT / "reports/study.md").read_text()
    caption = r"to epoch (\d+): taught less plain is (\S+) points \((\S+ to \S+ over test images)\)"
    epoch, gap, interval = re.search(caption, study_page).groups()
    first = " ".join(README.split("## Two commands")[0].split())
    small = re.search(r"a small ResNet-50, annealed: \[(\S+) \(", study_page)[1]
    assert f"small ResNet-50s ({small})" in first
    beyond = re.search(r"one pair must differ by (\S+) to be told from a seed's chance", study_page)[1]
    assert "which is at the edge" in study_page and f"one seed (chance: up to {beyond})" in first
    assert f"{gap} ({interval})" in first and f"epoch {epoch} of 150" in first
    size, at = re.search(r"at the paper's size by \[(\S+) \([^)]*\)\]\([^)]*\) at epoch (\d+)", study_page).groups()
    assert re.search(rf"\[{re.escape(size)}\]\(\S+\) at the paper's size, epoch {at}, closing; ", first)
    assert "From there the gap has been closing" in study_page


def test_links_of_the_readme_are_there():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.M)
            named = re.findall(r'<a id="(\w+)">', (ROOT / path).read_text())
            assert anchor in [*named, *(re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings)], target


def test_accuracies_of_the_readme_are_those_of_the_study():
    arms = pd.read_csv(ROOT / "reports/tables/study_arms.csv")
    known = {f"{top1:.1%}" for top1 in arms.top1}
    rows = README.split("## Results")[1].split("## ")[0]
    told = re.findall(r"\| (\d+\.\d%) \|", rows)
    assert len(told) == 6 and set(told) <= known
    sources = {key: re.findall(r"\[([^\]]+)\]\(runs/", line) for key, line in
               re.findall(r'^- <a id="(\w+)"></a>(.*)$', (ROOT / "reports/study.md").read_text(), re.M)}
    linked = re.findall(r"\| (\d+\.\d%) \|.*\| \[(\d+)\]\(reports/study\.md#(\w+)\) \|", rows)
    assert [top for top, *_ in linked] == told
    for top, seeds, key in linked:
        tops = [json.loads((RECORDS / name / "result.json").read_text())["test_top1"] for name in sources[key]]
        assert (f"{np.mean(tops):.1%}", str(len(tops))) == (top, seeds)
    assert "only the out-of-fold, the soft and the untrained head's row stay" in rows
    pairs = pd.read_csv(ROOT / "reports/tables/study_pairs.csv")
    stay = set(pairs.arm[pairs.holm <= 0.05])
    assert {"taught, out of fold", "taught, soft targets at tau 4", "taught, head never trained"} < stay
    assert "taught" not in stay


def test_the_readme_says_which_images_the_small_runs_learned():
    """Most of them one subset, some another, on which out of fold and soft answers add as much, as the study holds."""
    parts = pd.read_csv(ROOT / "reports/tables/study_pairs.csv").part
    assert parts.eq(1).sum() > parts.ne(1).sum() > 0 and "most of them one subset of CIFAR-100" in README
    answers = re.findall(r"^[13]\. \*\*.*$", (ROOT / "reports/study.md").read_text(), re.M)
    assert len(answers) == 2 and all("as much on other images" in told for told in answers)
    assert README.split("## Two commands")[0].count("as much on other images") == 2


def test_bench_rows_of_the_readme_are_measured():
    bench = pd.read_csv(ROOT / f"reports/bench/{MACHINE}.csv").set_index("contender").images_per_second
    rows = re.findall(r"^\| .+ \| (\d+) \|$", README.split("## What it costs")[1], re.M)
    contenders = ["bare", "vitdistill plain", "vitdistill full memo", "vitdistill empty memo", "naive distilled"]
    assert [int(row) for row in rows] == [round(bench[name]) for name in contenders]


def test_what_the_readme_says_is_faster_was_measured():
    """Each `ratio (low to high)` that leads to a file of reports/bench is a row of its ratios."""
    told = re.findall(r"\[(\S+) \((\S+) to (\S+)\)\]\(reports/bench/(\S+)\.txt\)", README)
    recipes = [f"{machine}-recipe" for machine in (MACHINE, "amd-epyc-2-cores-avx512-bf16")]
    ratios = {MACHINE: "full memo / naive distilled"} | dict.fromkeys(recipes, "recipe / timm recipe")
    assert [file for *_, file in told] == list(ratios)
    for *numbers, file in told:
        row = pd.read_csv(ROOT / f"reports/bench/{file}-ratios.csv").set_index("ratio").loc[ratios[file]]
        assert numbers == [f"{row[name]:.3g}" for name in ("median", "low", "high")]


def test_the_library_lines_of_the_readme_run(tmp_path, monkeypatch, capsys):
    """Eight lines, as they stand; their work folder aside."""
    lines = README.split("## As a library")[1].split("```python\n")[1].split("```")[0]
    assert len(lines.splitlines()) <= 9
    where = f"allow_untrained=True, work_dir={str(tmp_path)!r}, padding=0"
    seen = {}
    exec(lines.replace("allow_untrained=True", where), seen)
    assert seen["loss"].isfinite() and {"label", "teacher"} <= set(seen["parts"])
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in seen["setup"].student.parameters())
    assert "1438 images x 1 views" in (said := capsys.readouterr().out) and "images that it held out" in said


def test_the_loss_of_the_readme_is_both_cross_entropies():
    from torch.nn.functional import cross_entropy
    lines, seen = README.split("The loss alone")[1].split("```python\n")[1].split("```")[0], {}
    exec(lines, seen)
    halves = [cross_entropy(seen["student"], y) for y in (seen["labels"], seen["teacher"].argmax(1))]
    assert seen["loss"].item() == pytest.approx(sum(halves).item() / 2, rel=1e-6)


def test_watching_as_the_readme_does(tmp_path, monkeypatch, capsys):
    """Names that fit one run each of the demo's, among which a DeiT's has `distilled` too."""
    lines = README.split("From any other notebook")[1].split("```python\n")[1].split("```")[0]
    deit = dict(TAUGHT, experiment="deit", student="deit_tiny_distilled_patch16_224", teacher="regnety_002")
    for made in {}, TAUGHT, deit, dict(experiment="teacher", student="vit_tiny_patch16_224"):
        record(tmp_path, [0.1, 0.5], **made)
    seen = {}
    exec(lines.replace("'out/demo/runs'", repr(str(tmp_path / "runs"))).replace("\ncompare", "\nfig = compare"), seen)
    assert "distilled-resnet50-vit_tiny" in capsys.readouterr().out and len(seen["fig"].axes[0].lines) == 2


def beside(question):
    """(answer, seeds) of a row of the README's second table: of the one whose question has these words."""
    table = README.split("### Beside it")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| (.+) \| (\S+(?: and \d)?) \|$", table, re.M)
    (answer, seeds), = ((answer, seeds) for asked, answer, seeds in rows if question in asked)
    return answer, seeds


def points(row):
    """A row of a table of differences as the README writes it: with its interval, where there is one."""
    interval = "" if np.isnan(row.low) else f" ({100 * row.low:.1f} to {100 * row.high:.1f})"
    return f"{100 * row.difference:+.1f}{interval}"


def of_table(name, *rows):
    """Rows of a table of reports/, by its first column, in this order."""
    frame = pd.read_csv(ROOT / f"reports/tables/{name}.csv")
    return frame.set_index(frame.columns[0]).loc[[*rows]]


def test_the_readme_says_what_hilo_saves():
    """As the table of its record has it, at the sizes that are named."""
    answer, _ = beside("What does a HiLo layer save")
    faster = r"\[(\S+) times \((\S+) to (\S+)\)\]\(reports/tables/hilo_goal.md\)[^;]*? at (\S+) px"
    told = re.findall(faster, answer)
    table = pd.read_csv(ROOT / "reports/tables/hilo_goal.csv")
    table = table[table.contender == "HiLo, alpha 0.5"].set_index("image (px)")
    assert {size for *_, size in told} == {"1,024", "384"} and table["goal met"][224] == "not resolved"
    for *numbers, size in told:
        row = table.loc[int(size.replace(",", ""))]
        assert numbers == [f"{row[name]:.1f}" for name in ("faster (times)", "low", "high")]
    networks = pd.read_csv(ROOT / "reports/tables/hilo_networks.csv").set_index(["contender", "image (px)"])
    beside_it = pd.read_csv(ROOT / "reports/tables/hilo_faster.csv").set_index(["than", "image (px)"])
    named = [("ViT-S, 10 blocks", 1024), ("ViT-S, 10 blocks", 224), ("ResNet-34", 1024)]
    columns = ["faster (times)", "low", "high"]
    whole = ["{:.2f} times ({:.2f} to {:.2f})".format(*beside_it.loc[one, columns]) for one in named]
    layers = [part for part in create("litv2_s", 1, 224).modules() if isinstance(part, HiLo)]
    heads = {layer.low_heads for layer in layers if layer.window > 1}
    told = re.search(r"where (\d+) of 12 heads do the latter, is \[", answer)
    assert heads == {int(told[1])}
    assert re.findall(r"\[([^\]]+)\]\(reports/tables/hilo_faster.md\)", answer) == whole
    assert re.search("fast as a ViT-S at 1,024 px and .* at 224 px, with .* as a ResNet-34 at 1,024 px", answer)
    told = re.search(r"with \[(\S+) times\]\(\S+\) its memory", answer)
    memory = networks["memory (MB / image)"]
    for size in (224, 1024):
        assert f"{memory['LITv2-S', size] / memory['ViT-S, 10 blocks', size]:.1f}" == told[1]


def test_the_readme_says_what_changes_a_deit():
    """As the tables of Tables 9, 8, 3 and 2 have it, with their seeds; none of the three claims is resolved."""
    told, seeds = beside("augmentation help a small DeiT")
    tried = pd.read_csv(ROOT / "reports/tables/deit_choices.csv")
    tried = tried.query("choice == 1 and padding == 4 and lr == 0.00025")
    best, *strengths = tried.sort_values("mixup").held_out_top1
    assert len(strengths) == 3 and best > strengths[0] > strengths[1] > strengths[2]
    assert re.findall(r"(\d+\.\d)%", told) == [f"{100 * top:.1f}" for top in (best, strengths[2])]
    assert told.startswith("None of three") and set(tried.seeds) == {int(seeds)}
    told, seeds = beside("lose by one change")
    rows = of_table("deit_one_changed", "repeats", "lr, optimizer, weight_decay", "cutmix", "randaugment")
    costs = re.search(r"\[(\S+) by repeated augmentation\].* (\S+) by SGD, (\S+) by cutmix, (\S+) by RandAugment", told)
    assert [*costs.groups()] == [f"{-100 * lost:.1f}" for lost in rows.difference] and set(rows.seeds) == {int(seeds)}
    told, seeds = beside("a convnet's hard labels add to it")
    teachers = "mobilenetv2_100 instead of vit_tiny_patch16_224 as teacher"
    claims = of_table("deit_claims", "hard labels", "hard labels and a token", teachers)
    assert re.findall(r"\[([+-][^\]]+)\]", told) == [points(claim) for _, claim in claims.iterrows()]
    assert set(claims.pairs) == {int(seeds)} and (claims.low < 0).all() and (claims.high > 0).all()
    assert told.startswith("Underpowered, for three seeds see gains of 2 points")
    assert (claims.detectable[:2] > 0.019).all()


def test_the_readme_says_what_a_teacher_adds_to_litv2():
    """As a07's table has it, an interval where several seeds have run."""
    alone, *taught = (row for _, row in of_table(
        "hilo_students", "LITv2 less DeiT, labels alone", "LITv2, taught less alone", "DeiT, taught less alone",
        "the gain of LITv2 less that of DeiT").iterrows())
    for question, rows in ("better student than a DeiT", [alone]), ("hard labels add to these two", taught):
        told, seeds = beside(question)
        assert re.findall(r"\[([+-][^\]]+)\]", told) == [points(row) for row in rows]
        assert {row.pairs for row in rows} == {int(seeds)}
    assert (alone.answer, *(row.answer for row in taught)) == ("higher", "higher", "not resolved", "not resolved")
    assert told.endswith("is not resolved.")
    for _, tried in pd.read_csv(ROOT / "reports/tables/hilo_choices.csv").groupby("student"):
        assert len(tried) == 4 and tried.lr.min() < tried.lr[tried.chosen == "yes"].item() < tried.lr.max()
    told, seeds = beside("attend to averages matter")
    shares = pd.read_csv(ROOT / "reports/tables/hilo_shares.csv")
    assert shares.alpha[0] == 0 and set(shares.seeds) == {int(seeds)} and len(shares) == 7
    more = shares.iloc[1:]
    ends = [f"{100 * gaps.min():.1f} to {100 * gaps.max():.1f}" for gaps in (more.difference, more.published)]
    assert told.startswith("Not resolved") and more.difference.min() > 0
    assert re.search(r"scatter by \[(\S+)\]", told)[1] == f"{100 * litv2_scatter(records())['std']:.1f}"
    assert re.findall(r"\d\.\d to \d\.\d", told) == ends


def test_the_readme_says_what_teachers_without_imagenet_add():
    """LITv2 from scratch and what CAN pre-trained: how good they are, and what their students gain."""
    by_two = of_table("hilo_students", *(f"a ResNet taught by {which}" for which in (
        "LITv2, less alone", "DeiT, less alone", "LITv2, less by DeiT")))
    by_can = of_table("can_students", "CAN", "from scratch, 80 epochs",
                      "after 60 epochs of labels on crops and colours")
    for question, rows, right in (("What do the two, from scratch", by_two, by_two["teacher, test"].dropna()),
                                  ("first without labels (by CAN)", by_can[:1], by_can.teacher_test)):
        told, seeds = beside(question)
        gaps = [points(row) for _, row in rows.iterrows()]
        assert re.findall(r"\[([^\]]+)\]", told) == gaps + [f"{100 * has:.1f}%" for has in right]
        assert {*rows.answer} == {"higher"} and {*rows.pairs} == {int(seeds)}
    controls = by_can[1:]
    assert controls.answer.str.startswith("not answered").all() and {*controls.pairs} == {0}
    assert "both fewer than the plain student, and so it did not teach" in told
    together = pd.read_csv(ROOT / "reports/tables/study_pairs.csv").set_index("arm").holm
    holm = re.search(r"do not stay \(p (\S+), (\S+) and (\S+)\)", README).groups()
    arms = "taught, by litv2_cifar", "taught, by deit_tiny_patch16_224", "taught, by a teacher pre-trained by CAN"
    assert [*map(float, holm)] == [float(f"{together[arm]:.2g}") for arm in arms] and min(map(float, holm)) > 0.05


def test_the_readme_says_how_good_features_without_labels_are():
    told, seeds = beside("features learned without labels")
    arms = pd.read_csv(ROOT / "reports/tables/can_arms.csv").query("data == 'cifar100'").set_index("arm")
    arms = arms.loc[["CAN", "SimCLR", "MAE"]]
    columns = "linear probe, test", "fine-tuned, test", "fine-tuned, held out"
    means = arms[[*columns]].map(lambda share: float(share.split(" ± ")[0]))
    assert re.findall(r"\d+\.\d%", told) == [f"{100 * share:.1f}%" for name in columns[:2] for share in means[name]]
    assert set(arms.seeds) == {int(seeds)}
    steps = pd.read_csv(ROOT / "reports/tables/can_differences.csv").set_index("pair")
    steps = steps.loc[["CAN over SimCLR", "CAN over MAE"]].astype({"difference": float})
    assert re.findall(r"\[([+-][^\]]+)\]", told) == [points(row) for _, row in steps.iterrows()]
    assert {*steps.resolved} == {"higher"} and {*steps.seeds} == {int(seeds)}
    assert "of held-out images MAE's model has the most right" in told
    assert means["fine-tuned, held out"].idxmax() == "MAE"


def test_the_readme_says_what_noise_adds():
    told, seeds = beside("noise add to contrast and masks")
    steps = pd.read_csv(ROOT / "reports/tables/can_differences.csv").set_index("pair").loc[[
        "noise as augmentation only over no noise", "noise loss, sigma not told over noise as augmentation only",
        "noise loss of unit variance over noise as augmentation only", "CAN over noise loss, sigma not told"]]
    assert re.findall(r"\[(\S+)\]", told) == [f"{100 * float(gap):+.1f}" for gap in steps.difference]
    assert set(steps.seeds) == {int(seeds)} == {1} and "one seed shows" in told


def test_grids_of_the_readme_need_nothing_that_a_clone_has_not():
    named = re.findall(r"^vitdistill grid (\S+)", README, re.M)
    assert named and not any(not_here(grid_cells(ROOT / path)) for path in named)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: re.search(r"out/(\w+)", r)[1])
def test_recipe_of_the_readme_makes_a_config(recipe):
    """Its template is there, every name is one of its parameters or of Config, and the values are in range."""
    template, given = given_of(recipe)
    assert (EXPERIMENTS / f"{template}.ipynb").is_file()
    own = "weights", "adopted", "out_of_fold", "teacher_data_fraction"
    config = configure(PARTS[template], {"preset": "demo"} | {k: v for k, v in given.items() if k not in own})
    assert config.experiment == PARTS[template]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: re.search(r"out/(\w+)", r)[1])
def test_recipe_of_the_readme_runs(recipe, tmp_path):
    """As it stands, but small: the digits, tiny models, one epoch, one process, files made here."""
    template, given = given_of(recipe)
    small = dict(preset="demo", epochs=1, nproc=1, runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"))
    student = dict(student="resnet18") if template[:3] in ("e01", "e02") else dict(student_kwargs=TINY_VIT)
    convnet = given.get("role") == "deit_teacher"
    small |= student if "student" not in given and not convnet else {}
    if given.get("student", "").startswith("deit"):
        small |= dict(student_kwargs=TINY_VIT)
    if template.startswith("e06"):  # with its own preset's small transformer
        small |= dict(preset=given["preset"], student_kwargs=None)
    if template.startswith("e03"):
        small |= dict(allow_untrained=True, teacher_weights=None)
    if template.startswith("e02"):
        folds = given.get("out_of_fold")  # whose two teachers are trained here, in earnest: on all digits
        small |= dict(teacher_kwargs=TINY_VIT, data_fraction=1.0 if folds else 0.5)
        small |= {} if folds else dict(allow_untrained=True, teacher_weights=None)
    if given.get("dataset") == "imagefolder":
        small |= dict(dataset="imagefolder", data_root=str(folders(tmp_path / "images")), batch_size=8)
    if template.startswith("e04"):
        small |= dict(weights=str(tiny_weights(tmp_path)), val_rows="1200:1438")
    if template.startswith("e00"):
        small |= dict(student_pretrained=False)
    execute(template, tmp_path / "run.ipynb", **given | small)
    done = [run.status for run in find_runs(tmp_path / "runs")]
    assert set(done) <= {"done"} and (done or list((tmp_path / "work").glob("*/model/card.json")))


def folders(root):
    """Two classes of a few random pictures, for training and validation."""
    from PIL import Image
    for part, n in dict(train=12, val=4).items():
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.random.default_rng(i).integers(0, 255, (80, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def tiny_weights(folder):
    """A file of a small vision transformer's weights."""
    import timm
    from safetensors.torch import save_file
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY_VIT)
    save_file(model.state_dict(), folder / "a.safetensors")
    return folder / "a.safetensors"


GRIDS = ROOT / "nbs/experiments/grids"


def head_of(grid):
    return " ".join(line.lstrip("# ") for line in grid.read_text().splitlines() if line.startswith("#"))


FORETOLD = [path for path in sorted(GRIDS.glob("*.yaml")) if re.search("before (it|they) ran", head_of(path))]


OWN = {*notebook_names} - {"preset", "role"}  # parameters that only a notebook knows


@pytest.mark.parametrize("grid", FORETOLD, ids=lambda p: p.stem)
def test_foretelling_grid_says_what_it_asks(grid):
    """Its head says what is asked, what is expected and which seeds; each cell is a config."""
    head = head_of(grid)
    assert "?" in head and re.search("[Ee]xpected", head) and re.search(r"[Ss]eeds? \d|[Oo]ne seed", head)
    for cell in grid_cells(grid):
        values = {k: v for k, v in cell.chosen.items() if k not in OWN}
        part = values.pop("role", None) or PARTS[cell.notebook.stem]
        assert configure(part, values).experiment == part


FOUND = frozenset({"data_hash", "weights_hash", "teacher_hash"})  # by the run itself


@pytest.mark.parametrize("grid", FORETOLD, ids=lambda p: p.stem)
def test_grid_stood_before_its_runs(grid, tmp_path):
    """The commit in each record of a grid that foretells holds the cell, and the preset, that made it."""
    def configs(root):
        for cell in grid_cells(root / grid.relative_to(ROOT)):
            if cell.notebook.stem in ("e01_baseline_resnet50", "e02_distilled_resnet50", "e03_deit_from_regnet"):
                values = {k: v for k, v in cell.chosen.items() if k not in OWN}
                values["preset"] = str(root / f"nbs/presets/{values['preset']}.yaml")
                c = configure(PARTS[cell.notebook.stem], values)
                yield c.experiment, c.seed, settings(c, FOUND), bool(cell.chosen.get("out_of_fold"))

    @functools.cache
    def cells_at(commit):
        if subprocess.run(["git", "cat-file", "-e", commit], cwd=ROOT).returncode:
            pytest.skip("a shallow clone: the commit of the record is not here")
        archive = ["git", "archive", commit, "nbs/presets", str(grid.relative_to(ROOT))]
        then = subprocess.run(archive, cwd=ROOT, capture_output=True)
        if then.returncode:
            return None
        with tarfile.open(fileobj=io.BytesIO(then.stdout)) as files:
            files.extractall(tmp_path / commit, filter="data")
        return set(configs(tmp_path / commit))

    made = set(configs(ROOT))
    for run in records():
        c = run.config
        cell = c.experiment, c.seed, settings(c, FOUND), bool(c.fold_weights)
        if cell not in made:
            continue
        then = cells_at(run.environment["commit"])
        assert then is not None, f"{run.name} was run before {grid.name} was committed"
        assert cell in then, run.name


@pytest.mark.parametrize("grid, run", [("small_tuned", 10), ("deit_strengths", 8)])
def test_a_grids_cells_meet_the_records_that_they_are_to_be_paired_with(grid, run):
    """Whatever fields or presets changed since: today's cells of a grid that has run are its records."""
    cells = [configure(PARTS[cell.notebook.stem], cell.chosen) for cell in grid_cells(GRIDS / f"{grid}.yaml")]
    here = {(run.config.experiment, run.config.seed, settings(run.config, FOUND)) for run in records()}
    assert len({(c.experiment, c.seed, settings(c, FOUND)) for c in cells} & here) >= run
