"""Draws 600 pictures of ten shapes, for a first try without images of your own:
python docs/shapes.py data/own"""
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDES = dict(triangle=3, square=4, hexagon=6)  # regular polygons
POINTS = dict(star4=4, star5=5, star8=8)  # stars
ROUND = "disc", "ring"
LINES = dict(bar=1, cross=2)


def corners(n, radius, turn, inner=1.0):
    """Returns the corners of a polygon with n sides, or of a star with n points if `inner` is below 1."""
    steps = n if inner == 1 else 2 * n
    angles = [turn + 2 * math.pi * i / steps for i in range(steps)]
    radii = [radius * (inner if i % 2 else 1) for i in range(steps)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles)]


def picture(name, seed):
    """Returns a picture of 120 x 96 px: one shape of any colour, size and angle on a faintly noisy
    background."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(110, 146, (12, 15, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((120, 96), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    x, y = rng.uniform(40, 80), rng.uniform(35, 61)
    radius, turn = rng.uniform(24, 36), rng.uniform(0, 2 * math.pi)
    colour = tuple(rng.integers(0, 256, 3).tolist())
    if name in ROUND:
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=colour if name == "disc" else None, outline=colour, width=8)
    elif name in LINES:
        for i in range(LINES[name]):
            (a, b), (c, d) = corners(2, radius, turn + i * math.pi / 2)
            draw.line((x + a, y + b, x + c, y + d), fill=colour, width=9)
    else:
        n, inner = (SIDES[name], 1.0) if name in SIDES else (POINTS[name], 0.5)
        draw.polygon([(x + a, y + b) for a, b in corners(n, radius, turn, inner)], fill=colour)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.5)))


def main(folder):
    if Path(folder).exists():
        sys.exit(f"{folder} is there already: name a new folder.")
    for label, name in enumerate([*SIDES, *POINTS, *ROUND, *LINES]):
        place = Path(folder, name)
        place.mkdir(parents=True, exist_ok=True)
        for i in range(60):
            picture(name, [label, i]).save(place / f"{i:02}.png")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(sys.argv[1])
