"""What runs of real training leave: the decisions of a checkpoint, by the command; curves where they are
asked for."""
import contextlib
import json
import sqlite3
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from conftest import elsewhere, environment, run_of
from vitdistill.config import save
from vitdistill.train.outcome import head_accuracies, main
from vitdistill.runs import read_arrays
from vitdistill.train.loop import train


def test_decisions_of_a_checkpoint(tiny, tmp_path):
    """Of the last epoch they are the finished run's, bit for bit; of an earlier one, those that its metrics
    counted."""
    config = replace(tiny, epochs=2, keep_checkpoints=[1], distillation="none", teacher="", data_fraction=1.0)
    run = train(elsewhere(config, tmp_path))
    assert main([str(run.folder), "--epochs", "1"]) == 0
    assert main([str(run.folder), "--record", str(tmp_path / "record")]) == 0
    last = read_arrays(tmp_path / "record/predictions-0002.npz")
    done = read_arrays(run.folder / "predictions.npz")
    head = {f"test_class_{kind}" for kind in ("decision", "confidence")}
    assert {"test_image", "test_label"} | head == set(last)
    for name in set(last) & set(done):
        assert np.array_equal(last[name], done[name]), name
    first = head_accuracies(read_arrays(run.folder / "predictions-0001.npz"))["class"]
    told = run.metrics().test_top1
    assert told[0] != told[1]
    assert [first, head_accuracies(last)["class"]] == pytest.approx(list(told), abs=1e-5)


def test_students_that_start_from_the_images_start_alike(tiny, tmp_path):
    """Two arms of one seed begin with the same weights, computed from the same images."""
    student = dict(student="airbench94", student_kwargs=dict(widths=[8, 8, 8]), epochs=1)
    plain = train(elsewhere(replace(tiny, **student, distillation="none", teacher=""), tmp_path / "plain"))
    taught = train(elsewhere(replace(tiny, **student), tmp_path / "taught"))
    assert plain.result["start_hash"] == taught.result["start_hash"]
    assert plain.result["weights_hash"] != taught.result["weights_hash"]
    other = train(elsewhere(replace(plain.config, seed=2), tmp_path / "other"))
    assert other.result["start_hash"] != plain.result["start_hash"]


@pytest.mark.slow
def test_trackers_hold_what_the_record_holds(tiny, tmp_path):
    """Every column of metrics.csv, the config and the result, by TensorBoard's reader and from trackio's
    store."""
    for package in ("tensorboard", "trackio"):
        pytest.importorskip(package)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    config = replace(tiny, epochs=2, ema_decay=0.9, track="tensorboard, trackio")
    command = [sys.executable, "-m", "vitdistill.train", "--config", save(config, tmp_path / "c.yaml")]
    subprocess.run(command, env=environment() | dict(TRACKIO_DIR=str(tmp_path / "store")), check=True)
    run = run_of(config)
    rows = [{name: value for name, value in row.items() if value == value}
            for row in run.metrics().drop(columns="epoch").to_dict("records")]
    assert len(rows) == 2 and "ema_test_top1" in rows[0]
    events = EventAccumulator(str(run.work / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(rows[0]) | set(rows[1])
    for name in events.Tags()["scalars"]:
        told = {event.step: event.value for event in events.Scalars(name)}
        expected = {epoch: row[name] for epoch, row in enumerate(rows) if name in row}
        assert told == pytest.approx(expected, rel=1e-5)
    text = events.Tensors("result/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f'"test_top1": {run.result["test_top1"]}' in text
    with contextlib.closing(sqlite3.connect(tmp_path / "store/vitdistill.db")) as store:
        written = store.execute("select step, metrics from metrics")
        kept = [(step, json.loads(values)) for step, values in written]
        about, = store.execute("select config from configs where run_name = ?", [run.name])
    for (step, told), (epoch, row) in zip(kept, enumerate(rows)):
        assert step == epoch and told == {name: pytest.approx(value, rel=1e-5) for name, value in row.items()}
    assert kept[-1][1]["result/test_top1"] == run.result["test_top1"]
    assert json.loads(about[0])["ema_decay"] == 0.9
