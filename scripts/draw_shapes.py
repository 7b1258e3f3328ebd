"""A folder of small pictures for trying things out: coloured circles, squares, triangles and rings, 32 x 32 pixels.

    python scripts/draw_shapes.py build/shapes 2000                draws them
    python scripts/draw_shapes.py build/shapes build/net FILE.png  draws samples of a network that was trained on them

Sub-folders are the four shapes. Picture i is drawn from the generator of seed i.
"""

import sys
from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("circle", "square", "triangle", "ring")
SIZE, FINE = 32, 4  # pixels, and how much finer they are drawn


def draw(seed: int) -> tuple[str, Image.Image]:
    """One picture and its kind."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    hue = rng.uniform()
    dark, light = (tuple(int(255 * c) for c in hsv_to_rgb(hue + 0.5, 0.35, v)) for v in rng.uniform(0.15, 0.45, 2))
    ramp = np.linspace(dark, light, SIZE * FINE)[:, None].repeat(SIZE * FINE, 1)
    image = Image.fromarray(ramp.astype(np.uint8))
    radius = rng.uniform(7, 12) * FINE
    x, y = rng.uniform(radius, SIZE * FINE - radius, 2)
    color = tuple(int(255 * c) for c in hsv_to_rgb(hue + rng.uniform(-0.08, 0.08), rng.uniform(0.6, 0.95), 0.95))
    pen = ImageDraw.Draw(image)
    turn = np.deg2rad(rng.uniform(0, 360))
    if kind in ("circle", "ring"):
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)
        if kind == "ring":
            hole = 0.55 * radius
            pen.ellipse([x - hole, y - hole, x + hole, y + hole], fill=tuple(ramp[int(y), int(x)].astype(int)))
    else:
        corners = 4 if kind == "square" else 3
        angles = turn + 2 * np.pi * np.arange(corners) / corners
        pen.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], fill=color)
    return kind, image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def compare(pictures: str, net: str, path: str) -> None:
    """Sixteen pictures of the folder above, below samples of a network with 3 and 5 evaluations from its own start."""
    import symbreak as sb
    from symbreak.start.training_looks import grid

    data, pipe = sb.images(pictures), sb.load_pipeline(net)
    rows = [data.subset(16).tensor()]
    for steps in (3, 5):
        sampler = sb.scheduler("dpm++2m-karras", like=pipe.scheduler)
        start = sb.late_start(sampler, pipe.start.law, steps, at=pipe.start.level, check=False)
        rows.append(sb.generate(pipe.unet, start, range(16)))
    sheets = [grid(x, columns=16) for x in rows]
    page = Image.new("RGB", (sheets[0].width, sum(sheet.height + 8 for sheet in sheets) - 8), "white")
    for i, sheet in enumerate(sheets):
        page.paste(sheet, (0, i * (sheet.height + 8)))
    page.save(path)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        compare(*sys.argv[1:])
        raise SystemExit
    if len(sys.argv) != 3 or not sys.argv[2].isdecimal():
        raise SystemExit(__doc__)
    for seed in range(int(sys.argv[2])):
        kind, image = draw(seed)
        folder = Path(sys.argv[1]) / kind
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{seed:05d}.png")
    print(f"{sys.argv[2]} pictures in {sys.argv[1]}")
