"""Draws README's first picture, docs/_static/first.svg: python docs/first.py [JOB]

Left are answers of a job on the pictures of docs/shapes.py, from docs/_static/first.csv. JOB, such as
out/mine, writes that file anew. Right is one contrast of the study, from reports/tables/study_rounds.csv. The
pictures are drawn by us, so they have the licence of the repository.
"""
import hashlib
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from scipy.stats import binomtest

import shapes

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs/_static/first.svg"
ANSWERS = ROOT / "docs/_static/first.csv"
STUDY = ROOT / "reports/tables/study_rounds.csv"
CLASSES = [*shapes.SIDES, *shapes.POINTS, *shapes.ROUND, *shapes.LINES]
MODELS = dict(teacher="teacher", plain="student without teacher", taught="student with teacher")
COLOURS = dict(teacher="#118060", plain="#4878b8", taught="#c8641e")
MISTAKES = 4


def made_of():
    """Returns the hash of what the picture shows."""
    return hashlib.sha256(ANSWERS.read_bytes() + STUDY.read_bytes()).hexdigest()


def record(job):
    """Saves what the models of a job see in its test images."""
    from vitdistill.api import predict

    from vitdistill.config import read_yaml
    from vitdistill.data.labels import Part, table_rows

    root = Path(read_yaml(job / f"{job.name}.yaml")["common"]["data_root"])
    files = sorted(root / row.file for row in table_rows(job / "images.csv") if row.part == Part.test)
    answers = []
    for model in MODELS:
        seen = predict(job / "models" / model, files)
        answers.append(pd.DataFrame(dict(
            model=model, file=[f"{file.parent.name}/{file.name}" for file in files],
            seen_as=seen["class"], probability=seen["probability"].round(4))))
    pd.concat(answers).to_csv(ANSWERS, index=False)


def draw_accuracies(axis, answers):
    """Draws how many test images each model has right, with 95% intervals."""
    for row, (model, title) in enumerate(MODELS.items()):
        own = answers[answers["model"] == model]
        right = int((own["seen_as"] == own["class"]).sum())
        low, high = binomtest(right, len(own)).proportion_ci(method="wilson")
        middle, colour = right / len(own), COLOURS[model]
        axis.plot([100 * low, 100 * high], [row, row], color=colour, lw=3, solid_capstyle="round")
        axis.plot([100 * middle], [row], "o", color=colour, ms=9)
        beside = dict(transform=axis.get_yaxis_transform(), va="center", color=colour)
        axis.text(-0.02, row, title, ha="right", **beside)
        axis.text(1.03, row, f"{100 * middle:.0f}%", **beside)
    axis.set(ylim=(2.6, -0.6), xlim=(0, 100), yticks=[], xticks=[0, 50, 100],
             xlabel=f"right, of {len(own)} test images, in %")


def draw_mistakes(axes, answers):
    """Shows the test images of which the plain student is surest, and wrong."""
    wrong = answers[(answers["model"] == "plain") & (answers["seen_as"] != answers["class"])]
    wrong = wrong.sort_values("probability", ascending=False).head(len(axes))
    for axis, (_, it) in zip(axes, wrong.iterrows()):
        number = int(Path(it["file"]).stem)
        axis.imshow(shapes.picture(it["class"], [CLASSES.index(it["class"]), number]).resize((90, 72)))
        caption = f"seen as {it['seen_as']}\n({it['probability']:.0%} sure),\nis {it['class']}"
        axis.set_title(caption, fontsize=11, loc="left")


def draw_study(axis):
    """Draws what two kinds of answers add to labels alone."""
    rounds = pd.read_csv(STUDY).set_index("answer")
    rows = dict(zip(("teacher's top class\n(hard labels)", "its probabilities\n(soft answers)"),
                    ("hard labels, planned rounds", "soft answers, planned rounds")))
    axis.axvline(0, color="#888", lw=1)
    axis.plot([0], [0], "o", color="#555", ms=9)
    titles = ["labels alone", *rows]
    for row, name in enumerate(rows.values(), 1):
        middle, low, high = (100 * rounds.loc[name, column] for column in ("difference", "low", "high"))
        axis.plot([low, high], [row, row], color=COLOURS["taught"], lw=3, solid_capstyle="round")
        axis.plot([middle], [row], "o", color=COLOURS["taught"], ms=9)
        axis.text(high + 0.15, row, f"{middle:+.1f}", va="center")
    axis.set(ylim=(2.6, -0.6), xlim=(-0.4, 5), yticks=range(3), yticklabels=titles,
             xlabel="points more than labels alone")
    axis.tick_params(axis="y", length=0)
    return int(rounds.loc["soft answers, planned rounds", "seeds"])


def main(job=None):
    if job:
        record(Path(job))
    answers = pd.read_csv(ANSWERS)
    answers["class"] = answers["file"].str.partition("/")[0]
    matplotlib.rcParams |= {"svg.hashsalt": "first", "font.size": 12, "axes.spines.top": False,
                            "axes.spines.right": False, "axes.spines.left": False}
    figure = plt.figure(figsize=(10, 5))
    heading = dict(fontsize=15, fontweight="bold", va="top")
    figure.text(0.015, 0.97, "Your images: one command, one page", **heading)
    draw_accuracies(figure.add_axes((0.245, 0.65, 0.25, 0.25)), answers)
    figure.text(0.015, 0.47, "Where it errs most surely", va="top", fontsize=13, fontweight="bold")
    places = [figure.add_axes((0.015 + 0.14 * i, 0.0, 0.13, 0.24)) for i in range(MISTAKES)]
    for place in places:
        place.set_axis_off()
    draw_mistakes(places, answers)
    figure.text(0.61, 0.97, "Our study: what a teacher adds", **heading)
    seeds = draw_study(figure.add_axes((0.78, 0.4, 0.19, 0.48)))
    note = f"""10,000 images of CIFAR-100, {seeds} seeds:
a ResNet-18 from random weights.
Bars, left and right: 95% intervals."""
    figure.text(0.61, 0.21, note, va="top", fontsize=12, color="#333")
    figure.savefig(PICTURE, metadata={"Date": None, "Description": made_of()})
    figure.savefig(ROOT / "out/first.png", dpi=110)
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
