"""Images in people's own folders, tars and shards: what is read, in which order, with which pixels, what is
said."""
import io
import os
import struct
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFile, PngImagePlugin
from torchvision.datasets import ImageFolder

from vitdistill.base import VitdistillError
from vitdistill.config import Config, config_hash
from vitdistill.data.datasets import fingerprint, image_lines, labelled_images, load_data
from vitdistill.data.files import in_folders, read_image, rgb_image, say_once, square_pixels, unreadable
from vitdistill.runs import Run, RunWriter
from vitdistill.train.ranks import Ranks
from vitdistill.train.setup import prepare, refuse_other_list, resolve
from vitdistill.train.loop import batches


def encoded(*color, kind="PNG", **options):
    """Returns a file with a picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (40, 20), color or (9, 9, 9)).save(file, kind, **options)
    return file.getvalue()


PNG = encoded()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write(root, files, splits=("train", "val"), tar=False):
    """Writes {name: bytes} into each split's folder or tar; returns the config that reads them."""
    for split in splits:
        if tar:
            root.mkdir(exist_ok=True)
            write_tar(root / f"{split}.tar", files)
        else:
            for name, content in files.items():
                path = root / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    return Config(dataset="imagefolder", data_root=str(root), image_size=16)


def named(listed):
    """Returns {name below the split: class}."""
    return {name.partition("/")[2]: listed.classes[label] for name, _, label in listed.files}


def by_torchvision(folder):
    found = ImageFolder(folder)
    return {os.path.relpath(path, folder): found.classes[label] for path, label in found.samples}


NAMES = "cat/2020/1.png", "cat/2021/1.png", "cat/2.png", "dog/2020/a/1.png", "dog/2021/1.png"
NESTED = dict.fromkeys(NAMES, PNG)


@pytest.mark.parametrize("tar", [False, True])
def test_a_class_is_the_first_folder_as_in_torchvision(tmp_path, tar):
    write(tmp_path / "folders", NESTED)
    write(tmp_path / "read", NESTED, tar=tar)
    found = named(in_folders(tmp_path / "read", "train"))
    assert found == by_torchvision(tmp_path / "folders/train") and set(found.values()) == {"cat", "dog"}


@pytest.mark.parametrize("tar", [False, True])
def test_a_class_is_the_last_folder_where_asked(tmp_path, tar):
    folders = [f"{year}/{kind}" for year in (2020, 2021) for kind in ("cat", "dog")]
    files = {f"{folder}/{i}.png": PNG for folder in folders for i in range(2)}
    config = replace(write(tmp_path, files, tar=tar), class_folder="last")
    data = load_data(config)
    assert data.classes == ["cat", "dog"] and torch.bincount(data.train_labels).tolist() == [4, 4]
    assert load_data(replace(config, class_folder="first")).classes == ["2020", "2021"]
    assert fingerprint(config) != fingerprint(replace(config, class_folder="first"))
    assert config_hash(config) != config_hash(replace(config, class_folder="first"))


def test_which_folder_is_the_class_is_said_once_a_call_where_both_could_be(tmp_path, capsys):
    config = write(tmp_path, NESTED)
    for _ in range(2):
        load_data(config)
        told = capsys.readouterr().out
        said = told.count("first folder is the class of an image, such as cat, dog, not")
        assert told.count("\n") == said == 1
    files = dict.fromkeys(["cat/images/1.png", "dog/images/1.png"], PNG)
    load_data(write(tmp_path / "plain", files))  # the last folder would make one class of all
    assert capsys.readouterr().out == ""
    with pytest.raises(VitdistillError, match="all images are of one class, 'images'"):
        load_data(replace(write(tmp_path / "plain", files), class_folder="last"))


@pytest.mark.parametrize("tar", [False, True])
def test_names_with_a_dot_first_are_left_out(tmp_path, tar):
    """As JupyterLab and the archives of macOS make them, also beside the classes and within a folder of the
    split."""
    hidden = ["._1.png", ".ipynb_checkpoints/1.png", "cat/._1.png", "cat/.ipynb_checkpoints/1.png", "._cat"]
    seen = ["cat/1.png", "dog/1.png"]
    config = write(tmp_path, dict.fromkeys(hidden + seen, PNG), tar=tar)
    assert load_data(config).classes == ["cat", "dog"] and list(named(in_folders(tmp_path, "train"))) == seen
    packed = {f"./train/{name}": PNG for name in seen} | {"./._train": b"", "./train/._cat": b""}
    write(tmp_path / "packed", packed, splits=["train"], tar=True)
    assert list(named(in_folders(tmp_path / "packed", "train"))) == seen


@pytest.mark.parametrize("tar", [False, True])
def test_an_image_without_a_class_is_refused_by_its_name(tmp_path, tar):
    config = write(tmp_path, dict.fromkeys(["cat/1.png", "dog/1.png", "stray.png"], PNG), tar=tar)
    for load in (load_data, fingerprint):
        with pytest.raises(VitdistillError, match=r"train(.tar)?/stray.png is not in the folder of a class"):
            load(config)


def test_one_class_is_refused(tmp_path):
    with pytest.raises(VitdistillError, match="all images are of one class, 'cat'"):
        fingerprint(write(tmp_path, {"cat/1.png": PNG}))
    write_tar(tmp_path / "a-train-0.tar", shard := {"1.png": PNG, "1.cls": b"0"})
    write_tar(tmp_path / "a-val-0.tar", shard)
    with pytest.raises(VitdistillError, match="all images are of one class, '0'"):
        fingerprint(Config(dataset="wds/a", data_root=str(tmp_path), image_size=16))


def test_a_loop_of_links_counts_each_file_once(tmp_path, capsys):
    config = write(tmp_path, dict.fromkeys(["cat/1.png", "dog/1.png"], PNG))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/1.png").write_bytes(PNG)
    links = {"cat/up": "..", "dog/cats": "../cat", "cat/root": "../..", "cow": "../elsewhere"}
    for link, target in links.items():
        (tmp_path / "train" / link).symlink_to(target)
    (tmp_path / "val/cow").symlink_to("../elsewhere")
    data = load_data(config)
    assert data.classes == ["cat", "cow", "dog"] and data.train_labels.tolist() == [0, 1, 2]
    assert "cat/root, train/cat/up, train/dog/cats (a link to a folder" in capsys.readouterr().out


@pytest.mark.skipif("GNU tar" not in subprocess.getoutput("tar --version"), reason="needs GNU tar")
@pytest.mark.parametrize("version", ["old", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize("kind", ["folders", "nested", "shards"])
def test_a_sparse_tar_is_refused_by_its_member(tmp_path, kind, version):
    """The zeros of a sparse member are not in the tar: the bytes at its place are other images'."""
    image = Image.new("RGB", (128, 128))
    image.save(whole := io.BytesIO(), "BMP")
    image = tmp_path / "files/cat/1.bmp"
    image.parent.mkdir(parents=True)
    with open(image, "wb") as file:
        file.write(whole.getvalue()[:4096])
        file.truncate(whole.tell())
    image.with_suffix(".cls").write_text("0")
    how = ["--format=gnu"] if version == "old" else ["--format=pax", f"--sparse-version={version}"]
    name = "train.tar" if kind == "folders" else "train-0.tar" if kind == "shards" else "all.tar"
    subprocess.run(["tar", "-S", *how, "-cf", tmp_path / name, "cat"], cwd=tmp_path / "files", check=True)
    if kind == "nested":
        write_tar(tmp_path / "train.tar", {"all.tar": (tmp_path / "all.tar").read_bytes()})
    write(tmp_path, dict.fromkeys(["cat/1.png", "dog/1.png"], PNG), splits=["val"])
    dataset = "wds/any" if kind == "shards" else "imagefolder"
    with pytest.raises(VitdistillError, match=r"/cat/1.bmp is a sparse member.* without --sparse"):
        fingerprint(Config(dataset=dataset, data_root=str(tmp_path), image_size=16))


@pytest.mark.parametrize("tar", [False, True])
def test_class_folders_without_an_image_are_named(tmp_path, capsys, tar):
    kinds = {"cat/1.png": PNG, "dog/a/1.png": PNG, "cow/1.heic": b""}
    config = write(tmp_path, kinds, tar=tar)
    if tar:
        with tarfile.open(tmp_path / "val.tar", "a") as more:
            folder = tarfile.TarInfo("eel/young")
            folder.type = tarfile.DIRTYPE
            more.addfile(folder)
    else:
        (tmp_path / "val/eel/young").mkdir(parents=True)
        (tmp_path / "val/fox").symlink_to("nowhere")
        (tmp_path / "val/pup").symlink_to("dog")
    assert load_data(config).classes == ["cat", "dog"]
    end = ".tar" if tar else ""
    empty = f"train{end}/cow, val{end}/cow, val{end}/eel" + ("" if tar else ", val/fox, val/pup")
    assert f"no image in {empty}: these folders are no classes" in capsys.readouterr().out


def test_a_class_written_in_two_ways_is_said_or_refused(tmp_path, capsys):
    composed, decomposed = "K\u00e4fer", "Ka\u0308fer"
    both = write(tmp_path / "both", dict.fromkeys([f"{composed}/1.png", f"{decomposed}/1.png"], PNG))
    if len(load_data(both).classes) != 2:
        pytest.skip("this file system knows one normal form alone")
    assert r"'Ka\u0308fer' and 'K\xe4fer' differ in the way" in capsys.readouterr().out
    forms = composed, decomposed, r"'K\\xe4fer'"
    for one, other, words in forms, ("Cat", "cat", "'Cat' and 'cat' differ in case"):
        root = tmp_path / ascii(one)
        config = write(root, dict.fromkeys([f"{one}/1.png", "dog/1.png"], PNG), splits=["train"])
        write(root, dict.fromkeys([f"{other}/1.png", "dog/1.png"], PNG), splits=["val"])
        with pytest.raises(VitdistillError, match=f"name one class in two ways, .*{words}"):
            fingerprint(config)


def test_every_format_that_pillow_decodes_is_read_and_the_rest_is_said(tmp_path, capsys):
    kinds = dict(png="PNG", jpg="JPEG", webp="WEBP", bmp="BMP", tif="TIFF", gif="GIF", ppm="PPM", TIFF="TIFF",
                 mpo="MPO")
    files = {f"{end}/1.{end}": encoded(200, 100, 50, kind=kind) for end, kind in kinds.items()}
    rest = {"png/1.heic": b"", "gif/2.HEIC": b"", "png/notes": b"", "png/a.tar.gz": b""}
    config = write(tmp_path, files | rest)
    data = load_data(config)
    assert len(data.classes) == len(kinds) == len(data.train_labels)
    difference = data.train_images.int() - torch.tensor([200, 100, 50])
    assert difference.abs().max() <= 4  # JPEG's and GIF's losses
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "train/gif/2.HEIC" in told and "and 5 more (empty)" in told
    assert in_folders(tmp_path, "train").left_out == {f"train/{name}": "empty" for name in rest}


@pytest.mark.parametrize("tar", [False, True])
def test_a_photograph_is_known_by_its_content(tmp_path, tar, capsys):
    """Phones rename: a JPEG may end in .HEIC, in two dots or in nothing; a text stays one, whatever it begins
    with."""
    jpeg, heic = encoded(200, 100, 50, kind="JPEG"), bytes(4) + b"ftypheic" + bytes(40)
    photos = {"cat/1.HEIC": jpeg, "cat/2": PNG, "dog/3.jpg_large": jpeg, "dog/4.png": PNG}
    texts = {"cat/a.txt": b"P6 is a name", "cat/b.h": b"#define A 1", "dog/empty": b""}
    config = write(tmp_path, photos | texts | {"dog/5.heic": heic}, tar=tar)
    data = load_data(config)
    assert len(data.train_labels) == len(photos)
    jpegs = [row for row, pixel in enumerate(data.train_images[:, 8, 8].tolist()) if abs(pixel[0] - 200) < 4]
    assert data.train_labels[jpegs].tolist() == [0, 1]
    told = capsys.readouterr().out
    assert "a.txt" in told and "5.heic (HEIC, which needs pillow-heif: pip install" in told
    for broken, why in (heic, "pillow-heif"), (b"text", "no format"):  # it should be an image, by its ending
        write(tmp_path / "ends", {"cat/1.jpg": broken, "dog/1.png": PNG})
        with pytest.raises(VitdistillError, match=f"cat/1.jpg .*{why}"):
            load_data(replace(config, data_root=str(tmp_path / "ends")))


def test_a_class_of_other_formats_is_not_lost_silently(tmp_path):
    config = write(tmp_path, dict.fromkeys(["cat/1.png", "dog/1.png", "cow/1.png"], PNG), splits=["train"])
    write(tmp_path, {"cat/1.png": PNG, "dog/1.png": PNG, "cow/1.heic": b""}, splits=["val"])
    with pytest.raises(VitdistillError, match=r"test has no image of cow \(left out: val/cow/1.heic \(empty"):
        load_data(config)


def test_order_is_timms_where_names_do_not_collide(tmp_path):
    """Label numbers and rows stay what they were."""
    from timm.data.readers import create_reader
    kinds = "n10", "n9", "Zebra", "apple", "7", "x1y10", "x1y2"
    names = [f"{kind}/{i}.png" for kind in kinds for i in (1, 10, 2)]
    write(tmp_path, dict.fromkeys(names, PNG), splits=["train"])
    listed = in_folders(tmp_path, "train")
    reader = create_reader("", str(tmp_path / "train"))
    assert listed.classes == list(reader.class_to_idx)
    assert [(str(tmp_path / name), label) for name, _, label in listed.files] == reader.samples


def big_text():
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "a" * 2**21, zip=True)
    return encoded(pnginfo=info)


def bomb():
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("tar", [False, True])
@pytest.mark.parametrize("content", [big_text, bomb, PNG[:60], encoded(kind="JPEG")[:-300], b"", b"text",
                                     PNG[:20] + b"\xff" * 50],
                         ids=["text", "bomb", "cut", "cut_jpeg", "empty", "no_image", "broken"])
def test_whatever_pillow_raises_is_one_sentence(tmp_path, tar, content):
    content = content() if callable(content) else content
    config = write(tmp_path, {"cat/1.png": content, "dog/1.png": PNG}, tar=tar)
    with pytest.raises(VitdistillError, match=r"train(.tar)?/cat/1.png can not be read .*\(.+\): replace"):
        load_data(config)


@pytest.mark.parametrize("tar", [False, True])
def test_names_may_be_any_bytes(tmp_path, tar):
    odd, usual = os.fsdecode(b"caf\xe9/\xff.png"), "é/ß.png"
    try:
        config = write(tmp_path, {odd: PNG, usual: PNG}, tar=tar)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    data = load_data(config)
    assert data.classes == ["caf\\xe9", "é"] and len({data.train_hash, fingerprint(config)}) == 2
    place = "train.tar" if tar else "train"
    lines = [f"{place}/é/ß.png {len(PNG)} 1\n".encode(), os.fsencode(f"{place}/{odd} {len(PNG)} 0\n")]
    assert lines == sorted(list(image_lines(config))[1:3], reverse=True)
    write(tmp_path, {odd: b"text", usual: PNG}, tar=tar)
    with pytest.raises(VitdistillError) as refused:
        load_data(config)
    assert "caf\\xe9/\\xff.png can not be read" in str(refused.value).encode().decode()


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("kind, dtype", [("PNG", np.uint16), ("TIFF", np.uint16), ("PPM", np.uint16),
                                         ("TIFF", np.int32)])
def test_grey_of_16_bits_is_scaled(kind, dtype):
    grey = np.linspace(0, 65535, 24 * 24).astype(dtype).reshape(24, 24)
    read = square_pixels(saved(Image.fromarray(grey), kind), 24)
    assert np.array_equal(read, np.repeat(np.round(grey / 257)[..., None], 3, -1))


@pytest.mark.parametrize("values", [np.full((9, 9), 0.5, np.float32), np.full((9, 9), 70_000, np.int32)])
def test_numbers_of_unknown_scale_are_refused(tmp_path, values):
    config = write(tmp_path, {"cat/1.png": PNG, "dog/1.png": PNG})
    Image.fromarray(values).save(tmp_path / "train/cat/2.tif")
    with pytest.raises(VitdistillError, match="cat/2.tif can not be read .*neither 8 nor 16 bits"):
        load_data(config)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_are_as_pillow_converts_them(mode):
    """Compared with the conversion by Pillow of the same file."""
    image = Image.new("RGB", (20, 20), (200, 100, 50))
    ImageDraw.Draw(image).rectangle((5, 5, 12, 12), (0, 255, 0))
    file = saved(image.convert(mode), "TIFF")
    assert np.array_equal(square_pixels(file, 20), np.asarray(file.convert("RGB")))


def see_through(kind):
    """Returns a file whose left half is transparent over black pixels, and a file of the same picture on
    white."""
    alpha = np.full((16, 16), 255, np.uint8)
    alpha[:, :8] = 0
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, 8:] = 200, 100, 50
    on_white = np.where(alpha[..., None] == 0, 255, picture)
    image, options = Image.fromarray(picture), {}
    if kind == "RGBA":
        image.putalpha(Image.fromarray(alpha))
    elif kind == "LA":
        image = image.convert("L")
        on_white = np.where(alpha[..., None] == 0, 255, np.asarray(image)[..., None].repeat(3, -1))
        image.putalpha(Image.fromarray(alpha))
    else:  # the colour black is transparent
        image = image.quantize(2) if kind == "P" else image
        options = dict(transparency=image.getpixel((0, 0)))
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue(), on_white


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white(tmp_path, kind):
    """In training, in prediction and in pictures alike."""
    content, on_white = see_through(kind)
    config = write(tmp_path, {"cat/1.png": content, "dog/1.png": PNG})
    image = load_data(config).train_images[0]
    assert np.array_equal(image, on_white)
    assert np.array_equal(read_image(tmp_path / "val/cat/1.png", 16), on_white)
    assert np.array_equal(rgb_image(Image.open(io.BytesIO(content))), on_white)
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 102))
    assert np.asarray(rgb_image(half)).tolist() == [[[153] * 3] * 8] * 8  # 40% of black on white


def test_few_bits_in_many_are_read_or_said(capsys):
    """Whole numbers of 32 bits up to 255 have 8 bits; an image of 16 bits stays comparable with others, and
    dark."""
    read = square_pixels(saved(Image.fromarray(np.full((8, 8), 200, np.int32)), "TIFF"), 8)
    assert (read == 200).all() and "read as one of 8 bits" in capsys.readouterr().err
    for value, dtype, kind, most in ((2048, np.uint16, "PNG", "4,095"), (200, np.uint16, "TIFF", "255"),
                                     (9000, np.int32, "TIFF", "16,383")):
        say_once.cache_clear()
        for _ in range(2):
            read = square_pixels(saved(Image.fromarray(np.full((8, 8), value, dtype)), kind), 8)
        told = capsys.readouterr()
        assert (read == round(value / 257)).all() and told.out == "" and told.err.count("\n") == 1
        assert f"no value above {most} of 65,535" in told.err
    square_pixels(saved(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "PNG"), 8)
    sixteen_bits = b"P5 8 8 4095\n" + b"\x00\x0a" * 64  # Pillow scales it to 16 bits
    square_pixels(Image.open(io.BytesIO(sixteen_bits)), 8)
    square_pixels(saved(Image.new("RGB", (8, 8)), "PNG"), 8)
    assert capsys.readouterr().err == ""
    colours = b"II*\x00" + b"\x08\x00\x00\x00"  # a TIFF of one pixel, three numbers of 16 bits: 2048
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2),
            (273, 4, 1, 220), (277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 6)]
    colours += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    colours = colours.ljust(200, b"\0") + struct.pack("<3H", 16, 16, 16)
    colours = colours.ljust(220, b"\0") + struct.pack("<3H", 2048, 2048, 2048)
    assert (square_pixels(Image.open(io.BytesIO(colours)), 4) == 8).all()
    assert "no value above 4,095" in capsys.readouterr().err


UPRIGHT = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
           6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90}


@pytest.mark.parametrize("number", UPRIGHT)
def test_images_are_turned_as_exif_says(tmp_path, number):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = number
    config = write(tmp_path, {"cat/1.png": PNG, "dog/1.png": PNG})
    for split in ("train", "val"):
        Image.fromarray(pixels).save(tmp_path / split / "cat/1.png", exif=exif)
    turned = load_data(config)
    as_stored = load_data(replace(config, exif_orientation=False))
    assert np.array_equal(turned.train_images[0], UPRIGHT[number](pixels))
    assert np.array_equal(as_stored.train_images[0], pixels)
    larger = load_data(replace(config, image_size=2 * config.image_size))
    assert len({data.train_hash for data in (turned, as_stored, larger)}) == 3  # the key of a teacher's memo
    assert turned.images_hash == as_stored.images_hash == larger.images_hash  # on its card
    assert fingerprint(config) != fingerprint(replace(config, exif_orientation=False))


CROPS = dict(simple=dict(padding=0), resized=dict(padding=0, resized_crop=0.08))


@pytest.mark.parametrize("given", CROPS.values(), ids=[*CROPS])
def test_crops_see_the_borders_of_wide_images(tmp_path, given):
    """`whole_image` cuts anywhere; a run's crops don't depend on processes, and without it none leaves the
    centre."""
    picture = Image.new("RGB", (96, 32))
    for left, colour in ((0, (255, 0, 0)), (32, (0, 255, 0)), (64, (0, 0, 255))):
        picture.paste(colour, (left, 0, left + 32, 32))
    file = saved(picture, "PNG").fp.getvalue()
    config = write(tmp_path, {f"{name}/{i}.png": file for name in ("cat", "dog") for i in range(4)})
    config = replace(config, student="resnet18", val_fraction=0.0, batch_size=4, device="cpu", **given)

    def reds_and_blues(**more):  # pixels, and shares of the crops that see the left and the right third
        setup = prepare(resolve(replace(config, student_normalization="own", **more)), Ranks())
        seen = torch.cat([batch.pixels for epoch in range(6) for batch in batches(setup, epoch)])
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in setup.constants)
        return seen, *((seen * std + mean)[:, [0, 2]].amax((2, 3)) > 0.75).float().mean(0).tolist()

    centre, *ends = reds_and_blues()
    assert ends == [0, 0]
    whole, *ends = reds_and_blues(whole_image=True, workers=0)
    assert min(ends) > 0.3 and not torch.equal(whole, centre)
    assert torch.equal(whole, reds_and_blues(whole_image=True, workers=2)[0])


def test_whole_images_are_of_files():
    with pytest.raises(VitdistillError, match="digits are squares: set it to false"):
        load_data(Config(dataset="digits", whole_image=True))


def test_damaged_exif_turns_nothing():
    image = saved(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", exif=b"Exif\x00\x00no such thing")
    assert square_pixels(image, 8).tolist() == [[[1, 2, 3]] * 8] * 8


def test_a_long_narrow_image_takes_little_memory(tmp_path):
    """An image of 12,000 x 3 px took 1.7 GB."""
    for name, size in dict(wide=(12_000, 3), high=(3, 12_000)).items():
        Image.new("RGB", size, (7, 8, 9)).save(tmp_path / f"{name}.png")
    command = """if True:
        import resource, sys
        from PIL import Image
        from vitdistill.data.files import square_pixels
        most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        square_pixels(Image.new('RGB', (300, 200)), 224)
        before = most()
        for path in sys.argv[1:]: assert (square_pixels(Image.open(path), 224) == (7, 8, 9)).all()
        print(most() - before)"""
    told = subprocess.run([sys.executable, "-c", command, tmp_path / "wide.png", tmp_path / "high.png"],
                          capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    assert int(told.stdout) * unit < 50e6


BROKEN = {"cat/3.png": PNG[:60], "dog/1.png": b"text"}


@pytest.mark.parametrize("kind", ["folders", "tar", "shards"])
def test_unreadable_images_are_left_out_where_asked(tmp_path, capsys, kind):
    """The result is that of a dataset without them, in memory and on the disk."""
    names = [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(4)]
    whole = {name: encoded(i, i, i) for i, name in enumerate(names)}
    rest = {name: content for name, content in whole.items() if name not in BROKEN}

    def config(folder, files):
        if kind != "shards":
            return write(tmp_path / folder, files, tar=kind == "tar")
        (tmp_path / folder).mkdir()
        labels = {f"{name[:-4]}.cls": str(int(name < "d")).encode() for name in files}
        return shards(tmp_path / folder, train_0=files | labels, val_0=files | labels)

    config, clean = config("broken", whole | BROKEN), config("clean", rest)
    with pytest.raises(VitdistillError, match=r"2 images can not be read: .*skip_broken"):
        load_data(config)
    skips = replace(config, skip_broken=True)
    data = load_data(skips)
    on_disk = load_data(replace(skips, data_on="disk"))
    wanted = load_data(clean)
    assert data.train_images.equal(wanted.train_images) and data.test_labels.equal(wanted.test_labels)
    assert on_disk.train_images[torch.arange(6)].equal(wanted.train_images)
    assert data.train_hash == on_disk.train_hash == wanted.train_hash
    assert data.images_hash == wanted.images_hash
    assert fingerprint(skips) == fingerprint(clean) != fingerprint(config)
    assert config_hash(skips) != config_hash(config) == config_hash(replace(skips, skip_broken=False))
    told = capsys.readouterr().out
    assert "4 left out, since skip_broken is set" in told and all(name in told for name in BROKEN)


def test_files_that_become_whole_are_read(tmp_path):
    """Such as those of a copy that still ran: they have their size already, and zeros in place of bytes."""
    files = {f"{kind}/{i}.png": encoded(i, 9, 9) for kind in ("cat", "dog") for i in range(4)}
    copying = {name: bytes(len(content)) if "1" in name else content for name, content in files.items()}
    config = replace(write(tmp_path, copying), skip_broken=True)
    assert len(load_data(config).train_labels) == 6
    whole = load_data(write(tmp_path, files))
    assert load_data(config).train_images.equal(whole.train_images) and len(whole.train_labels) == 8


@pytest.mark.parametrize("tar", [False, True])
def test_other_images_of_the_same_names_and_sizes_are_other_images(tmp_path, tar):
    """As of a camera, or exported anew: a run, its memo and its teacher's card would be of the first ones."""
    red, blue = (encoded(*color, kind="BMP") for color in ((200, 0, 0), (0, 0, 200)))
    config = replace(write(tmp_path, {"cat/1.bmp": red, "dog/1.bmp": blue}, tar=tar), student="resnet10t",
                     runs_dir=str(tmp_path / "runs"), work_dir=str(tmp_path / "work"))
    before, run = load_data(config), resolve(config)
    write(tmp_path, {"cat/1.bmp": blue, "dog/1.bmp": red}, tar=tar)
    after, again = load_data(config), resolve(config)
    assert before.train_hash != after.train_hash and before.hashes & after.hashes  # these are of names
    assert run.data_hash != again.data_hash and Run.of(run).name != Run.of(again).name
    with pytest.raises(VitdistillError, match="finds other images .* than the call that started it"):
        refuse_other_list(run)
    refuse_other_list(again)


def test_a_run_that_began_with_names_and_sizes_goes_on(tmp_path):
    """Of version 0.3, on images that are as they were; a new run of the same settings is by content."""
    files = {"cat/1.png": PNG, "dog/1.png": PNG}
    config = replace(write(tmp_path, files), student="resnet10t", runs_dir=str(tmp_path / "runs"))
    new = resolve(config)
    old = replace(new, data_hash=fingerprint(config, like=""))
    record = RunWriter.of(old)
    record.begin(old, "")
    assert resolve(config).data_hash == old.data_hash != new.data_hash
    write(tmp_path, {"cat/1.png": encoded(1, 2, 3) + bytes(9)}, splits=["val"])
    assert resolve(config).data_hash not in (old.data_hash, new.data_hash)


class _Own(ImageFile.ImageFile):
    format = "OWN"

    def _open(self):
        if self.fp.read(3) != b"OWN":
            raise SyntaxError("another format")
        self._mode, self._size, self.tile = "RGB", (8, 8), [("raw", (0, 0, 8, 8), 3, ("RGB", 0, 1))]


def test_what_this_process_alone_can_read_is_refused_before_a_run_starts(tmp_path, monkeypatch):
    """A run is a process of its own: it has no plug-in of a notebook, and does not read cut files."""
    config = write(tmp_path, {"cat/1.own": b"OWN" + bytes(192), "cat/1.png": PNG, "dog/1.png": PNG})
    left_out = fingerprint(config)
    monkeypatch.setitem(Image.OPEN, "OWN", (_Own, None))
    monkeypatch.setitem(Image.EXTENSION, ".own", "OWN")
    monkeypatch.setattr(Image, "ID", [*Image.ID, "OWN"])
    assert read_image(tmp_path / "train/cat/1.own", 8).shape == (8, 8, 3)  # as `predict` reads it here
    for read in (fingerprint, load_data):
        with pytest.raises(VitdistillError, match="1.own is read by a plug-in .* can not read .own: save"):
            read(config)
    monkeypatch.undo()
    assert fingerprint(config) == left_out
    write(tmp_path, {"cat/1.png": encoded(5, 5, 5, kind="JPEG")[:-20]}, splits=["train"])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert [*unreadable(in_folders(tmp_path, "train"), range(2))] == [0] and ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_class_of_unreadable_images_alone_is_refused(tmp_path):
    config = write(tmp_path, {"cat/1.png": b"text", "dog/1.png": PNG, "eel/1.png": PNG}, splits=["train"])
    write(tmp_path, dict.fromkeys(["cat/1.png", "dog/1.png", "eel/1.png"], PNG), splits=["val"])
    with pytest.raises(VitdistillError, match=r"train has no image of cat \(left out: train/cat/1.png"):
        load_data(replace(config, skip_broken=True))


def test_measured_images_are_read_like_the_dataset(tmp_path, capsys):
    """A folder of further images, for a teacher that was trained on all others."""
    image = encoded(5, 5, 5, kind="WEBP", lossless=True)
    write(tmp_path, {"cat/a/1.webp": image, "dog/.x.png": b"", "dog/1.heic": b""}, splits=["more"])
    eight = Config(dataset="imagefolder", image_size=8)
    pixels, labels = labelled_images(tmp_path / "more", ["dog", "cat"], eight)
    assert pixels.tolist() == [[[[5, 5, 5]] * 8] * 8] and labels.tolist() == [1]
    assert "more: left out of the dataset: more/dog/1.heic (empty)." in capsys.readouterr().out
    with pytest.raises(VitdistillError, match="folder 'a', which is no class"):
        labelled_images(tmp_path / "more", ["dog", "cat"],
                        Config(dataset="imagefolder", image_size=8, class_folder="last"))


def shards(root, **files):
    """Writes shards, {name: {member: bytes}}; returns the config that reads them."""
    for name, members in files.items():
        write_tar(root / f"{name.replace('_', '-')}.tar", members)
    return Config(dataset="wds/any", data_root=str(root), image_size=16)


def sample(key, label, *color, end="png", kind="PNG"):
    return {f"{key}.{end}": encoded(*color, kind=kind, **({"quality": 95} if kind == "JPEG" else {})),
            f"{key}.cls": str(label).encode()}


def test_samples_of_shards_are_read_or_counted(tmp_path, capsys):
    """Dots in keys, .jpeg, samples that lack a part, and other files; on the disk too, and the same each
    time."""
    first = sample("a.b.1", 1, 30, 30, 30, end="jpeg", kind="JPEG") | {"a.b.1.json": b"{}", "x.png": PNG}
    second = sample("photos/2019.05/1", 0, 40, 40, 40, end="JPG", kind="JPEG")
    second |= {"y.cls": b"1", "._z.png": b""}
    config = shards(tmp_path, train_0=first, train_1=second, val_0=sample(1, 0))
    data = load_data(config)
    on_disk = load_data(replace(config, data_on="disk"))
    assert data.train_labels.tolist() == [1, 0] and data.train_hash == on_disk.train_hash
    assert (data.train_images[:, 8, 8, 0].int() - torch.tensor([30, 40])).abs().max() <= 1
    assert on_disk.train_images[torch.tensor([1, 0])].equal(data.train_images.flip(0))
    told = capsys.readouterr().out
    for name in ("a.b.1.json (no image", "x.png (an image without .cls)", "y.cls (.cls without an image)"):
        assert name in told


def test_damaged_shards_are_refused(tmp_path):
    config = shards(tmp_path, train_0=sample(1, 0) | sample(2, 1), val_0=sample(1, 0))
    path = tmp_path / "train-0.tar"
    path.write_bytes(path.read_bytes()[:1300])
    for load in (load_data, fingerprint):
        with pytest.raises(VitdistillError, match="train-0.tar is damaged, cut or compressed"):
            load(config)
    write_tar(path, sample(1, 0) | {"2.png": PNG[:50], "2.cls": b"1"})
    with pytest.raises(VitdistillError, match="train-0.tar/2.png can not be read as an image"):
        load_data(config)


def test_class_weights_are_of_the_images_that_are_trained_on(tmp_path):
    """Eight of ten cats are held out: two cats and ten dogs count as 12/(2 x 2) and 12/(2 x 10)."""
    files = {f"{kind}/{i}.png": encoded(20 * i, 0, 0) for kind in ("cat", "dog") for i in range(10)}
    config = replace(write(tmp_path, files), class_weights="balanced", val_rows="0:8", student="resnet10t",
                     device="cpu", batch_size=4, epochs=1)
    weights = prepare(resolve(config), Ranks()).criterion.class_weights
    torch.testing.assert_close(weights, torch.tensor([3, 0.6]))


def test_a_seed_is_a_number_that_torch_takes():
    torch.manual_seed(Config(seed=2**64 - 1).seed)
    with pytest.raises(VitdistillError, match="seed = 18446744073709551616 is out of range"):
        Config(seed=2**64)


@pytest.fixture(autouse=True)
def _said_nothing_yet():
    say_once.cache_clear()
