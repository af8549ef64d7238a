"""Writes a folder of images for a try of `vitdistill distill`: python docs/photos.py SET FOLDER

SET is animals or plants (photographs of ten classes of CIFAR-100), digits (scanned), hundred (all classes of
CIFAR-100, from its test images), or stranger (photographs as somebody else may have them: classes of unlike
size, images without labels, five training images that are test images too). CIFAR-100 is read from the folder
that VITDISTILL_DATA names, or downloaded.
"""
import hashlib
import sys
from pathlib import Path

import torch
from PIL import Image

from vitdistill.config import Config
from vitdistill.data.datasets import load_data

CLASSES = dict(
    animals="bear leopard lion tiger wolf fox porcupine possum raccoon skunk".split(),
    plants="orchid poppy rose sunflower tulip maple_tree oak_tree palm_tree pine_tree willow_tree".split(),
    digits=[*"0123456789"])
STRANGER = dict(bus=130, bicycle=105, motorcycle=85, pickup_truck=65, streetcar=50, tank=40, tractor=30,
                rocket=25)
SIDE = 96  # px of the pictures; those of the data have 32


def digest(image):
    """Returns the hash of an image's pixels."""
    return hashlib.sha256(image.tobytes()).digest()


def images_of(name):
    """Returns the images of each class of a dataset of vitdistill, in an order that their pixels alone
    decide."""
    data, found = load_data(Config(dataset=name)), {}
    images = torch.cat([data.train_images, data.test_images]).numpy()
    labels = torch.cat([data.train_labels, data.test_labels]).numpy()
    for label, title in enumerate(data.classes):
        found[title] = sorted(images[labels == label], key=digest)
    return found


def write(images, folder, name="{:03}.png", side=SIDE):
    """Writes images as numbered files, resized to a side in px."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        picture = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(folder / name.format(number))


def write_even(name, folder):
    """Writes 40 training images and 40 test images of each of ten classes."""
    images = images_of("digits" if name == "digits" else "cifar100")
    for title in CLASSES[name]:
        write(images[title][:40], folder / "train" / title)
        write(images[title][40:80], folder / "val" / title)


def write_hundred(folder):
    """Writes 60 training images and 40 test images of each class, none of which CIFAR-100 trains on."""
    data = load_data(Config(dataset="cifar100"))
    for label, title in enumerate(data.classes):
        images = data.test_images[data.test_labels == label].numpy()
        write(images[:60], folder / "train" / title)
        write(images[60:], folder / "val" / title)


def write_stranger(folder):
    """Writes 530 images of eight classes, a fifth of each for the test, five copies of these, and 500
    unlabelled."""
    images, others = images_of("cifar100"), []
    for title, count in STRANGER.items():
        tested = count // 5
        write(images[title][:tested], folder / "val" / title)
        write(images[title][tested:count], folder / "train" / title)
        others += images[title][count:count + 63]
    write(others[:500], folder / "unlabelled")
    for title in [*STRANGER][:5]:  # the same picture, smaller, and saved as a JPEG
        write(images[title][:1], folder / "train" / title, "copy.jpg", side=80)


def main(name, folder):
    folder = Path(folder)
    if folder.exists():
        sys.exit(f"{folder} is there already: name a new folder.")
    if name == "stranger":
        write_stranger(folder)
    elif name == "hundred":
        write_hundred(folder)
    elif name in CLASSES:
        write_even(name, folder)
    else:
        sys.exit(f"SET is {name!r}: give {', '.join(CLASSES)}, hundred or stranger.")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
