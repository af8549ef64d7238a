"""Images of one group, such as those of a patient, stay in one part: of a job, of a run, of folds."""
import numpy as np
import pytest
from PIL import Image

from vitdistill import api
from vitdistill.base import VitdistillError
from vitdistill.config import Config
from vitdistill.data.datasets import load_data
from vitdistill.data.labels import Part, table_rows, write_table
from vitdistill.job.folder import scan


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve patients, each with four images of both classes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for kind in ("sick", "well"):
        (folder / kind).mkdir()
        for patient in range(12):
            for number in range(4):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / kind / f"p{patient:02}_{number}.png")
    return folder


def config_of(photos, **more):
    return Config(**dict(dataset="imagefolder", data_root=str(photos), image_size=32, group_by="p\\d+",
                         val_fraction=0.2) | more)


def groups_by_part(rows):
    parts = {}
    for row in rows:
        parts.setdefault(row.part, set()).add(row.group)
    return parts


def disjoint(sets):
    return sum(map(len, sets)) == len(set.union(*sets))


def test_a_job_divides_groups_and_no_group(photos, tmp_path):
    images = scan(config_of(photos))
    parts = groups_by_part(images.rows)
    assert parts.keys() == {Part.train, Part.held_out, Part.test} and disjoint(parts.values())
    assert len(set.union(*parts.values())) == 12 and all(parts.values())
    assert "groups, such as p0" in str(images)
    # the table keeps them, and a job of this table does too
    table = write_table(images.rows, tmp_path / "images.csv")
    again = scan(config_of(photos, group_by="", labels=str(table)))
    assert {row.file: (row.part, row.group) for row in again.rows if row.group} == {
        row.file: (row.part, row.group) for row in table_rows(table) if row.group}


def test_images_that_are_added_leave_groups_where_they_were(photos, tmp_path):
    before = {row.file: row.part for row in scan(config_of(photos)).rows}
    more = tmp_path / "more"
    for file in photos.rglob("*.png"):
        to = more / file.relative_to(photos)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(file.read_bytes())
    Image.new("RGB", (32, 32), "red").save(more / "well/p03_9.png")
    after = {row.file: row.part for row in scan(config_of(more)).rows}
    assert before.items() <= after.items() and after["well/p03_9.png"] == after["well/p03_1.png"]


def test_a_run_holds_out_groups_and_folds_are_of_groups(photos):
    config = config_of(photos)
    data = load_data(config)
    groups = np.array(data.groups)
    train, val = data.split(config)
    assert len(val) and set(groups[train]).isdisjoint(groups[val])
    tested = []
    for fold in ("1/3", "2/3", "3/3"):
        train, val = data.split(config_of(photos, val_fraction=0.0, fold=fold))
        assert set(groups[train]).isdisjoint(groups[val])
        tested += val.tolist()
    assert sorted(tested) == list(range(len(groups)))  # each image is in one of the folds


def test_groups_change_the_fingerprint_and_no_groups_do_not(photos):
    with_groups, without = (load_data(config_of(photos, group_by=text)) for text in ("p\\d+", ""))
    assert with_groups.groups and not without.groups
    assert with_groups.train_hash != without.train_hash


@pytest.mark.parametrize("group_by, words", [
    ("patient\\d+", "group_by = .* is found in no name of a file, such as "),
    ("(", "is no regular expression"),
    ("^[a-z]+", "sick, well: too few groups"),  # a group for each class
])
def test_bad_groups_are_one_sentence(photos, group_by, words, tmp_path):
    with pytest.raises(VitdistillError, match=words):
        api.distill(photos, out=tmp_path / "out", group_by=group_by, dry_run=True)


def test_a_split_that_breaks_a_group_is_refused(photos, tmp_path):
    lines = ["file,class,part,group"]
    for file in sorted(photos.rglob("*.png")):
        kind, number = file.parent.name, int(file.stem[-1])
        lines.append(f"{kind}/{file.name},{kind},{'test' if number == 3 else 'train'},{file.stem[:3]}")
    (table := tmp_path / "mine.csv").write_text("\n".join(lines))
    with pytest.raises(VitdistillError, match="have groups in common .p00, p01, p02 and 9 more"):
        load_data(config_of(photos, labels=str(table)))
    with pytest.raises(VitdistillError, match="training and held-out images have groups in common"):
        config = config_of(photos, val_fraction=0.0, val_rows="0:3")
        load_data(config).split(config)
