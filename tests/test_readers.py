"""What users bring as data: read right, or one line that says why not; every decision is in the notes."""

import io
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageCms

import symbreak as sb
from symbreak.cli.commands import main
from symbreak.data.images import describe
from symbreak.runtime.errors import InputError


def picture(seed=0, size=(6, 5), mode="L"):
    rng = np.random.default_rng(seed)
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    return Image.frombytes(mode, size, rng.integers(0, 256, (*size[::-1], *channels), dtype=np.uint8).tobytes())


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def table(path, columns, rows=4, kind=None, mode="RGB"):
    cells = [encoded(picture(i, mode=mode)) for i in range(rows)]
    image = pa.array([{"bytes": c, "path": None} for c in cells]) if kind is None else pa.array(cells).cast(kind)
    pq.write_table(pa.table({"image": image, **columns}), path)
    return path


def pixels(image):
    x = np.asarray(image).astype(np.float32) / 127.5 - 1
    return torch.from_numpy(x[None] if x.ndim == 2 else x.transpose(2, 0, 1))


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def said(data, text):
    assert sum(text in note for note in data.notes) == 1, data.notes
    assert list(data.notes) == describe(data)["notes"]


# Values


@pytest.mark.parametrize("beyond", [0.0, 1e-6, 0.009])
def test_floats_a_rounding_beyond_their_range_are_clipped(beyond):
    x = np.random.default_rng(0).random((20, 4, 4))
    x[3, 0, 0], x[4, 0, 0] = -beyond, 1 + beyond
    data = sb.images(x)
    same(data.tensor()[:, 0], torch.from_numpy(x.clip(0, 1) * 2 - 1).float())
    said(data, "are read as 0 .. 1")
    assert ("clipped" in data.notes[0]) == (beyond > 0)


def test_floats_that_fill_no_known_range_ask_for_one():
    x = np.random.default_rng(0).random((20, 4, 4))
    x[3, 0, 0] = -0.2
    with pytest.raises(InputError, match=r"values -0\.2 \.\. .*--range -1,1 or 0,1"):
        sb.images(x)
    assert sb.images(x, value_range=(-1, 1)).notes == ()
    said(sb.images(2 * np.random.default_rng(0).random((20, 4, 4)) - 1), "are read as -1 .. 1")


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.int32, bool, np.uint16])
def test_masks_of_0_and_1_are_black_and_white(kind):
    x = (np.random.default_rng(0).random((9, 4, 4)) > 0.5).astype(kind)
    data = sb.images(x)
    same(data.tensor()[:, 0], torch.from_numpy(x * 2.0 - 1).float())
    said(data, "whole numbers 0 .. 1")


def test_masks_of_minus_1_and_1_dark_images_and_black_ones():
    spins = np.sign(np.random.default_rng(0).standard_normal((9, 4, 4))).astype(np.int8)
    same(sb.images(spins).tensor()[:, 0], torch.from_numpy(spins).float())
    dark = np.random.default_rng(0).integers(0, 17, (9, 4, 4), np.uint8)
    same(sb.images(dark).tensor()[:, 0], torch.from_numpy(dark / 127.5 - 1).float())
    said(sb.images(dark), "No value is above 16")
    same(sb.images(dark, value_range=(0, 16)).tensor()[:, 0], torch.from_numpy(dark / 8 - 1).float())
    assert (sb.images(np.zeros((4, 4, 4), np.uint8)).tensor() == -1).all()
    with pytest.raises(InputError, match=r"no value above 1, declared as 0 \.\. 255"):
        sb.images((dark > 8).astype(np.uint8), value_range=(0, 255))


def test_pictures_of_0_and_1_are_masks(tmp_path):
    masks = np.random.default_rng(0).integers(0, 2, (5, 4, 4), np.uint8)
    for i, m in enumerate(masks):
        Image.fromarray(m).save(tmp_path / f"{i}.png")
    data = sb.images(tmp_path)
    same(data.tensor()[:, 0], torch.from_numpy(masks * 2.0 - 1).float())
    said(data, "nothing but 0 and 1")
    small = sb.images(tmp_path, size=3)
    assert not small.integer
    assert len(small.tensor().unique()) > 2
    eight = sb.images(tmp_path, value_range=(0, 255))
    same(eight.tensor()[:, 0], torch.from_numpy(masks / 127.5 - 1).float())
    picture(1, (4, 4)).save(tmp_path / "9.png")
    assert sb.images(tmp_path).notes == ()


# Pictures


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_pictures_are_upright(tmp_path, orientation, kind):
    """A picture that a camera stored turned reads as the one it shows: stored and upright ones are equal."""
    shown = picture(0, (12, 8), "RGB").resize((24, 16))
    undo = [None, None, *(Image.Transpose(i) for i in (0, 3, 1, 5, 2, 6, 4))][orientation]
    stored = shown if undo is None else shown.transpose(undo)
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    for i in range(2):
        stored.save(tmp_path / f"{i}.{kind.lower()}", exif=exif, **options)
    data = sb.images(tmp_path)
    assert data.shape == (3, 16, 24)
    assert (data.tensor()[0] - pixels(shown)).abs().max() < (0.2 if kind == "JPEG" else 1e-6)
    if orientation > 1 and kind != "TIFF":  # Pillow turns those while it loads them
        said(data, "2 of 2 pictures are turned upright")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PNG"])
def test_transparency_is_laid_on_black(tmp_path, mode):
    if mode in ("RGBA", "LA"):
        made = picture(0, mode=mode)
        x, alpha = np.asarray(made)[..., :-1].astype(int), np.asarray(made)[..., -1:]
        wanted = np.round(x * (alpha / 255.0))
        options = {}
    else:
        grey = np.array([[0, 1], [1, 2]], np.uint8)
        made = Image.fromarray(grey * 100)
        if mode == "P":
            made = Image.frombytes("P", (2, 2), grey.tobytes())
            made.putpalette([255, 255, 255, 10, 20, 30, 200, 100, 0])
        options = {"transparency": 0 if mode == "P" else 100}
        wanted = np.array(
            [[[0] * 3, [10, 20, 30]], [[10, 20, 30], [200, 100, 0]]] if mode == "P" else [[[0], [0]], [[0], [200]]]
        )
    for i in range(2):
        made.save(tmp_path / f"{i}.png", **options)
    data = sb.images(tmp_path)
    assert data.shape == (1 if mode in ("LA", "PNG") else 3, *wanted.shape[:2])
    assert (data.tensor()[0] - pixels(wanted.astype(np.uint8).squeeze())).abs().max() < 1.01 / 127.5
    said(data, "laid on black")


def test_grey_among_colour_is_converted(tmp_path):
    for i in range(10):
        picture(i, mode="L" if i in (0, 7) else "RGB").save(tmp_path / f"{i}.png")
    data = sb.images(tmp_path)
    assert data.shape == (3, 5, 6)
    same(data.tensor()[7], pixels(picture(7)).repeat(3, 1, 1))
    said(data, "2 of 10 pictures are grey among colour ones")
    assert "(first: 0.png)" in data.notes[0]
    grey = sb.images(tmp_path, mode="L")
    assert grey.notes == ()
    same(grey.tensor()[7], pixels(picture(7)))
    same(grey.tensor()[1], pixels(picture(1, mode="RGB").convert("L")))
    assert grey.fingerprint() != data.fingerprint()


def test_colour_far_behind_grey_ones_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("symbreak.data.readers.LOOKED_AT", 3)
    for i in range(6):
        picture(i, mode="RGB" if i == 5 else "L").save(tmp_path / f"{i}.png")
    with pytest.raises(InputError, match=r"5\.png has 3 channels, not 1.*--mode RGB"):
        sb.images(tmp_path).tensor()
    assert sb.images(tmp_path, mode="RGB").tensor().shape == (6, 3, 5, 6)


def test_formats_that_pillow_reads(tmp_path):
    kinds = {"pgm": "PPM", "ppm": "PPM", "jfif": "JPEG", "jp2": "JPEG2000", "tga": "TGA", "bmp": "BMP", "tif": "TIFF"}
    kinds |= {"JPG": "JPEG", "gif": "GIF", "webp": "WEBP", "avif": "AVIF", "sgi": "SGI", "pcx": "PCX"}
    Image.init()  # Pillow before 11.3 writes no AVIF
    kinds = {k: v for k, v in kinds.items() if v in Image.SAVE}
    for suffix, kind in kinds.items():
        picture(0, (16, 16), "RGB").save(tmp_path / f"x.{suffix}", kind)
    data = sb.images(tmp_path)
    assert data.names() == sorted(f"x.{suffix}" for suffix in kinds)
    exact = [i for i, n in enumerate(data.names()) if n.split(".")[1] in ("ppm", "tga", "bmp", "tif", "sgi", "pcx")]
    for x in data.tensor()[exact]:
        same(x, pixels(picture(0, (16, 16), "RGB")))


def test_what_is_left_out_is_counted_and_named(tmp_path):
    picture(0).save(tmp_path / "a.tif", save_all=True, append_images=[picture(i) for i in range(3)])
    picture(1).save(tmp_path / "b.png")
    for name in ("c.txt", "d.heic", "e.heic", ".DS_Store", "._b.png", "record.json"):
        (tmp_path / name).write_text("x")
    os.symlink(tmp_path / "gone.png", tmp_path / "f.png")
    data = sb.images(tmp_path)
    same(data.tensor()[0], pixels(picture(0)))
    assert len(data) == 2
    said(data, "1 of 2 pictures is in a file with several pages")
    said(data, "4 files that are no pictures are left out (.heic 2, .txt 1, .png 1); the first is c.txt")
    os.rename(tmp_path / "b.png", tmp_path / "b.xyz")
    with pytest.raises(InputError, match="1 image"):
        sb.images(tmp_path)


def test_sixteen_bits_and_other_colour_spaces_are_said(tmp_path):
    for i in range(2):
        Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3) * 10_000).save(tmp_path / f"{i}.png")
    said(sb.images(tmp_path), "2 of 2 pictures are in 16 bits")
    (tmp_path / "c").mkdir()
    for i in range(2):
        picture(i, mode="CMYK").save(tmp_path / "c" / f"{i}.jpg")
    said(sb.images(tmp_path / "c"), "converted to RGB")


def test_only_announced_formats_are_opened(tmp_path, monkeypatch):
    """A .png that holds PostScript would start Ghostscript."""
    from PIL import EpsImagePlugin

    def never(*_):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", never)
    eps = encoded(picture(0, mode="RGB"), "EPS")
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(eps)
    with pytest.raises(InputError, match="no readable image"):
        sb.images(tmp_path)
    pq.write_table(pa.table({"image": [eps, eps]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="no readable image"):
        sb.images(tmp_path / "x.parquet")


# Folders


def test_linked_folders_are_read_and_hidden_ones_not(tmp_path):
    for place in ("root/cat", "elsewhere", "root/.ipynb_checkpoints", "root/__MACOSX", "root/cat/.cache"):
        (tmp_path / place).mkdir(parents=True)
        for i in range(2):
            picture(i).save(tmp_path / place / f"{i}.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "dog")
    os.symlink(tmp_path / "root", tmp_path / "root" / "cat" / "again")  # a circle
    data = sb.images(tmp_path / "root")
    assert (len(data), data.classes) == (4, ("cat", "dog"))
    said(data, "3 hidden folders are left out; the first is .ipynb_checkpoints")


def test_generated_images_are_no_class(tmp_path):
    for place in ("cat", "made"):
        (tmp_path / place).mkdir()
        for i in range(2):
            picture(i).save(tmp_path / place / f"{i}.png")
    (tmp_path / "made" / "sample.json").write_text("{}")
    data = sb.images(tmp_path)
    assert (len(data), data.classes) == (2, ("cat",))
    said(data, "1 folders of generated images")
    assert len(sb.images(tmp_path / "made")) == 2


def test_splits_of_folders(tmp_path):
    for split, n in (("train", 3), ("test", 2), ("val", 4)):
        for c in "ab":
            (tmp_path / split / c).mkdir(parents=True)
            for i in range(n):
                picture(i).save(tmp_path / split / c / f"{i}.png")
    data = sb.images(tmp_path)
    assert (len(data), data.classes) == (6, ("a", "b"))
    said(data, "splits test (4 files), train (6 files), val (8 files); train is read")
    assert data.fingerprint() == sb.images(tmp_path / "train").fingerprint()
    assert len(sb.images(tmp_path, split="test")) == 4
    assert len(sb.images(tmp_path, split="validation")) == 8
    with pytest.raises(InputError, match=r"no split 'other'.*test, train, val"):
        sb.images(tmp_path, split="other")
    with pytest.raises(InputError, match="no splits"):
        sb.images(tmp_path / "train", split="test")
    os.rename(tmp_path / "val", tmp_path / "bird")
    assert sb.images(tmp_path).classes == ("bird", "test", "train")


def test_a_folder_named_digits(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    for i in range(2):
        picture(i).save(tmp_path / "digits" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    for source in ("./digits", (tmp_path / "digits").relative_to(tmp_path)):
        assert len(sb.images(source)) == 2
    assert len(sb.images("digits")) == 898
    said(sb.images("digits"), "pass ./digits")


# Labels


@pytest.mark.parametrize(
    ("labels", "codes", "classes"),
    [
        (np.array([3, 7, 3, 7]), [3, 7, 3, 7], tuple("01234567")),
        (np.array([3.0, 7.0, 3.0, 7.0]), [3, 7, 3, 7], tuple("01234567")),
        (np.array([3, 7, -1, 7]), [3, 7, 7], tuple("01234567")),
        (np.array([3, 7, np.nan, 7]), [3, 7, 7], tuple("01234567")),
        (np.array([-1, 1, -1, 1]), [0, 1, 0, 1], ("-1", "1")),
        (np.array([-2, 1, -1, 1]), [0, 2, 1, 2], ("-2", "-1", "1")),
        (np.array([True, False, True, True]), [1, 0, 1, 1], ("False", "True")),
        (np.array(["b", "a", "b", "b"]), [1, 0, 1, 1], ("a", "b")),
        (np.array([0.5, 1.5, 0.5, 0.5]), [0, 1, 0, 0], ("0.5", "1.5")),
        (np.array([-1, -1, -1, -1]), None, ()),
    ],
)
def test_labels_of_arrays(tmp_path, labels, codes, classes):
    x = np.random.default_rng(0).integers(0, 256, (4, 4, 4), np.uint8)
    np.savez(tmp_path / "x.npz", images=x, labels=labels)
    for data in (sb.images(tmp_path / "x.npz"), sb.images(x, labels=labels)):
        assert (None if data.labels is None else data.labels.tolist()) == codes
        assert data.classes == classes
        if codes is not None and len(codes) < 4:
            said(data, "1 of 4 images have no label and are left out; the first is image 2")
            same(data.tensor()[:, 0], torch.from_numpy(x[[0, 1, 3]] / 127.5 - 1).float())


PARQUET_LABELS = {
    "text": (pa.array(["b", "a", "b", "a"]), [1, 0, 1, 0], ("a", "b")),
    "large text": (pa.array(["b", "a", "b", "a"], pa.large_string()), [1, 0, 1, 0], ("a", "b")),
    "bool": (pa.array([True, False, True, False]), [1, 0, 1, 0], ("False", "True")),
    "dictionary": (pa.array(["b", "a", "b", "a"]).dictionary_encode(), [1, 0, 1, 0], ("a", "b")),
    "numbers": (pa.array([3, 1, 3, 1], pa.int16()), [3, 1, 3, 1], ("0", "1", "2", "3")),
    "minus one": (pa.array([3, -1, 3, 1]), [3, 3, 1], ("0", "1", "2", "3")),
    "null": (pa.array([3, None, 3, 1]), [3, 3, 1], ("0", "1", "2", "3")),
    "null text": (pa.array(["b", None, "b", "a"]), [1, 1, 0], ("a", "b")),
    "null bool": (pa.array([True, None, True, False]), [1, 1, 0], ("False", "True")),
    "floats": (pa.array([3.0, 1.0, 3.0, 1.0]), [3, 1, 3, 1], ("0", "1", "2", "3")),
}


@pytest.mark.parametrize("kind", PARQUET_LABELS)
def test_labels_of_parquet_files(tmp_path, kind):
    column, codes, classes = PARQUET_LABELS[kind]
    data = sb.images(table(tmp_path / "x.parquet", {"label": column}))
    assert (data.labels.tolist(), data.classes) == (codes, classes)
    if len(codes) < 4:
        said(data, "1 of 4 images have no label and are left out; the first is row 1")


def test_label_columns_of_the_users_choice(tmp_path):
    path = table(
        tmp_path / "x.parquet",
        {
            "Smiling": [True, False, True, False],
            "Male": [True, True, False, False],
            "id": ["p", "q", "r", "s"],
            "v": [[1]] * 4,
        },
    )
    plain = sb.images(path)
    assert plain.labels is None
    said(plain, "No column is read as labels; labels= takes one. It has: Smiling, Male, id.")
    smiling = sb.images(path, labels="Smiling")
    assert (smiling.labels.tolist(), smiling.classes) == ([1, 0, 1, 0], ("not Smiling", "Smiling"))
    assert len(sb.images(path, labels="Smiling", classes=["Smiling"])) == 2
    both = sb.images(path, labels=["Smiling", "Male"])
    assert both.classes == (
        "not Smiling and not Male",
        "not Smiling and Male",
        "Smiling and not Male",
        "Smiling and Male",
    )
    assert both.labels.tolist() == [3, 1, 2, 0]
    assert sb.images(path, labels=[5, 0, 5, 0]).labels.tolist() == [5, 0, 5, 0]
    with pytest.raises(InputError, match=r"no label column 'smile'.*It has: Smiling, Male, id\."):
        sb.images(path, labels="smile")
    with pytest.raises(InputError, match=r"'v' .*holds no classes"):
        sb.images(path, labels="v")
    with pytest.raises(InputError, match=r"labels of shape \(3,\) for 4 images"):
        sb.images(path, labels=[1, 2, 3])
    with pytest.raises(InputError, match="has no columns"):
        sb.images("digits", labels="Smiling")
    assert sb.images("digits", labels="none").labels is None


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view"])
def test_columns_of_bytes(tmp_path, kind):
    if not hasattr(pa, kind):
        pytest.skip("this Arrow has no such column")
    try:
        path = table(tmp_path / "x.parquet", {}, kind=getattr(pa, kind)())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        pytest.skip("this Arrow writes no such column")
    same(sb.images(path).tensor()[2], pixels(picture(2, mode="RGB")))


def test_a_folder_of_shards_is_one_data_set(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(3):
        table(tmp_path / "data" / f"train-0000{i}-of-00003.parquet", {"label": [i] * (4 + i)}, rows=4 + i)
    table(tmp_path / "data" / "test-00000-of-00001.parquet", {"label": [0] * 4})
    (tmp_path / "README.md").write_text("x")
    data = sb.images(tmp_path, batch_size=3)
    assert len(data) == 15
    assert data.labels.tolist() == [0] * 4 + [1] * 5 + [2] * 6
    x = data.tensor()
    for row, i in ((0, 0), (5, 1), (14, 5)):
        same(x[row], pixels(picture(i, mode="RGB")))
    for first, last in ((3, 5), (4, 9), (8, 15), (14, 15)):
        same(data.rows(first, last).tensor(), x[first:last])
    said(data, "train is read")
    said(data, "(.md 1)")
    assert len(sb.images(tmp_path, split="test")) == 4


# Layouts and sources in memory


def test_layouts_that_may_mean_two_things_ask():
    x = np.random.default_rng(0).integers(0, 256, (5, 3, 3, 3), np.uint8)
    for source in (x, torch.from_numpy(x)):
        with pytest.raises(InputError, match="may be NCHW or NHWC"):
            sb.images(source)
        same(sb.images(source, layout="NCHW").tensor(), torch.from_numpy(x / 127.5 - 1).float())
        same(sb.images(source, layout="nhwc").tensor(), torch.from_numpy(x.transpose(0, 3, 1, 2) / 127.5 - 1).float())
    one = np.random.default_rng(0).integers(0, 256, (16, 12, 3), np.uint8)
    with pytest.raises(InputError, match="one picture of 3 channels, or 16 images 3 pixels wide"):
        sb.images(one)
    assert sb.images(one, layout="NHW").shape == (1, 12, 3)
    said(sb.images(np.repeat(one[None], 2, 0)), "is read as NHWC")
    for layout in ("NWH", "NHW", "NHWC"):
        with pytest.raises(InputError, match="layout"):
            sb.images(np.zeros((5, 3, 8, 8), np.uint8), layout=layout)


def test_sources_in_memory():
    """bfloat16 tensors; lists of pictures, arrays and tensors; a data set of `datasets`; an empirical law of images."""
    import datasets

    pictures = [picture(i, mode="RGB") for i in range(4)]
    wanted = torch.stack([pixels(p) for p in pictures])
    same(sb.images(pictures).tensor(), wanted)
    same(sb.images(tuple(np.asarray(p) for p in pictures)).tensor(), wanted)
    same(sb.images([torch.from_numpy(np.asarray(p).transpose(2, 0, 1).copy()) for p in pictures]).tensor(), wanted)
    assert (sb.images(wanted.bfloat16(), value_range=(-1, 1)).tensor() - wanted).abs().max() < 2**-8
    features = datasets.Features({"pic": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    made = datasets.Dataset.from_dict({"pic": pictures, "label": [1, 0, 1, -1]}, features=features)
    data = sb.images(made)
    assert (data.labels.tolist(), data.classes) == ([1, 0, 1], ("a", "b"))
    same(data.tensor(), wanted[:3])
    both = datasets.DatasetDict({"train": made, "test": made.select([0, 1])})
    assert len(sb.images(both)) == 3
    assert len(sb.images(both, split="test")) == 2
    with pytest.raises(InputError, match=r"no split 'dev'.*train, test"):
        sb.images(both, split="dev")
    with pytest.raises(InputError, match="data of the type dict"):
        sb.images({"a": 1})
    with pytest.raises(InputError, match="a list of int"):
        sb.images([1, 2])
    with pytest.raises(InputError, match=r"array 1 of the list is uint8 .4, 4."):
        sb.images([np.zeros((3, 3), np.uint8), np.zeros((4, 4), np.uint8)])
    with pytest.raises(InputError, match="holds 0 images"):
        sb.images([])
    law = sb.Empirical(data)
    same(law.denoise(wanted[:1], sigma=1e-3), wanted[:1])


def test_files_of_a_data_set_are_read_once(tmp_path, monkeypatch):
    """A cell of `datasets` may hold a path alone: its pixels come from the bytes that were read, not from it again."""
    import datasets

    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 200)).save(tmp_path / f"{i}.jpg")
    paths = [str(tmp_path / f"{i}.jpg") for i in range(4)]
    data = sb.images(datasets.Dataset.from_dict({"pic": paths}).cast_column("pic", datasets.Image()))
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda source, **options: opened.append(type(source)) or real(source, **options))
    assert data.tensor().shape == (4, 3, 8, 8)
    assert opened == [io.BytesIO] * 4


# Sizes


def test_size_and_crop(tmp_path):
    for i in range(3):
        picture(i, (20 + i, 30), "RGB").save(tmp_path / f"{i}.png")
    with pytest.raises(InputError, match=r"is 30 x 21, not 30 x 20.*--size N"):
        sb.images(tmp_path).tensor()
    for crop, box in (("center", (0, 5, 20, 25)), (10, (5, 10, 15, 20)), ("10", (5, 10, 15, 20))):
        data = sb.images(tmp_path, size=8, crop=crop)
        assert data.shape == (3, 8, 8)
        wanted = picture(0, (20, 30), "RGB").crop(box).resize((8, 8), Image.Resampling.BICUBIC)
        same(data.tensor()[0], pixels(wanted))
    assert len({sb.images(tmp_path, size=8, crop=c).fingerprint() for c in (None, "center", 10)}) == 3
    squeezed = sb.images(tmp_path, size=8)
    same(squeezed.tensor()[2], pixels(picture(2, (22, 30), "RGB").resize((8, 8), Image.Resampling.BICUBIC)))
    said(squeezed, "30 x 20 pixels is squeezed into a square")
    assert sb.images(tmp_path, crop=10, pad=12).tensor().shape == (3, 3, 12, 12)
    picture(0, (9, 30), "RGB").save(tmp_path / "9.png")
    with pytest.raises(InputError, match=r"9\.png is 30 x 9, smaller than the crop of 10"):
        sb.images(tmp_path, crop=10).tensor()
    assert len(sb.images(tmp_path, crop=10, skip_bad=True)) == 3
    for options, match in (
        ({"crop": 21}, "a crop of 21 pixels, but the first image .* is 30 x 20"),
        ({"crop": "middle"}, "expected center or a number"),
        ({"crop": 0}, "expected center or a number"),
        ({"crop": 6.5}, "expected center or a number"),
        ({"crop": (6, 6)}, "expected center or a number"),
        ({"size": 0}, "size of 0 pixels"),
        ({"size": "64"}, "size of '64' pixels; expected one whole number"),
        ({"size": (6, 6)}, "expected one whole number"),
        ({"pad": 6.5}, "padding to 6.5 pixels"),
        ({"value_range": "0,1"}, "expected two numbers"),
        ({"mode": "CMYK"}, "expected RGB or L"),
        ({"sise": 8}, "no option 'sise'. Expected size"),
    ):
        with pytest.raises(InputError, match=match):
            sb.images(tmp_path, **options)


def test_arrays_are_resized_like_pictures():
    x = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    eight = sb.images(x, size=8, mode="L")
    floats = sb.images(x / 255.0, size=8, mode="L", value_range=(0, 1))
    assert eight.shape == floats.shape == (1, 8, 8)
    assert (eight.tensor() - floats.tensor()).abs().max() < 2 / 127.5  # of rounding, twice
    assert sb.images(x[..., 0], mode="RGB").tensor().shape == (3, 3, 20, 20)
    steps = np.zeros((2, 9, 9))
    steps[:, 4:] = 1
    x = sb.images(steps, size=31).tensor()
    assert (x.min(), x.max()) == (-1, 1)  # no overshoot beyond the image's own range


def test_parquet_files_without_pictures_or_rows(tmp_path):
    """Rows without a picture are counted, files with nothing but paths are one line."""
    cells = [{"bytes": encoded(picture(i)), "path": None} for i in range(3)]
    pq.write_table(pa.table({"image": [cells[0], None, *cells[1:]], "label": [0, 1, 0, 1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"1 of 4 images .* row 1 cannot be read .*no bytes"):
        sb.images(tmp_path / "x.parquet").tensor()
    assert sb.images(tmp_path / "x.parquet", skip_bad=True).labels.tolist() == [0, 0, 1]
    for columns, match in (
        ({"image": [{"bytes": None, "path": "x.png"}] * 4}, "paths of pictures"),
        ({"image": pa.array([], pa.binary())}, "holds 0 images"),
        ({"left": cells, "right": cells}, "expected 'image' with encoded bytes"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "y.parquet")
        with pytest.raises(InputError, match=match):
            sb.images(tmp_path / "y.parquet")


# Limits


def test_files_that_unpack_to_far_more_are_not_read(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((3000, 32, 32), np.uint8))
    assert len(sb.images(tmp_path / "x.npz")) == 3000
    table_of = [{"bytes": encoded(picture(0)) + bytes(100_000), "path": None}] * 40
    pq.write_table(pa.table({"image": table_of}), tmp_path / "x.parquet", compression="zstd", use_dictionary=False)
    assert len(sb.images(tmp_path / "x.parquet")) == 40
    monkeypatch.setattr("symbreak.data.arrays.UNPACKED", 2**20)
    monkeypatch.setattr("symbreak.data.parquet.UNPACKED", 2**20)
    for name in ("x.npz", "x.parquet"):
        with pytest.raises(
            InputError, match=r"unpacks from [\d,]+ to [\d,]+ bytes; the limit is 100 times, or 1,048,576"
        ):
            sb.images(tmp_path / name)


def test_a_dictionary_of_large_values_is_not_unrolled(tmp_path, monkeypatch):
    """One value of 1 MB in 2,000 rows is a small file and 2 GB of rows."""
    large = encoded(picture(0)) + os.urandom(2**20)
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2000, np.int32)), pa.array([large], pa.binary()))
    pq.write_table(
        pa.table({"image": column}), tmp_path / "x.parquet", store_schema=False, dictionary_pagesize_limit=2**26
    )
    assert (tmp_path / "x.parquet").stat().st_size < 2**22
    monkeypatch.setattr("symbreak.data.parquet.BATCH_BYTES", 2**23)
    before = pa.total_allocated_bytes()
    most = 0
    for x in itertools.islice(sb.images(tmp_path / "x.parquet", batch_size=8), 20):
        most = max(most, pa.total_allocated_bytes() - before)
        assert x.shape == (8, 1, 5, 6)
    assert most < 2**26


# In commands


def test_a_command_tells_each_note_once_and_records_it(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        picture(i, (20, 30), "L" if i == 2 else "RGB").save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("x")
    arguments = ["--crop", "center", "--size", "4", "--json", "--out", str(tmp_path / "m.safetensors")]
    with pytest.raises(SystemExit) as left:
        main(["fit", "--data", str(folder), *arguments])
    out, err = capsys.readouterr()
    assert left.value.code == 0
    assert json.loads(out)["shape"] == [3, 4, 4]
    assert json.loads(out)["notes"] == list(sb.images(folder, size=4, crop="center").notes)
    for text in ("1 of 6 pictures is grey among colour ones", "1 file that is no picture is left out (.txt 1)"):
        assert err.count(text) == 1
    for wrong, match in (
        (["--crop", "21"], "a crop of 21 pixels"),
        (["--labels", "Smiling"], "has no columns"),
        (["--split", "test"], "has no splits"),
        (["--mode", "CMYK"], "expected RGB or L"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["fit", "--data", str(folder), *wrong, "--out", str(tmp_path / "n.safetensors")])
        out, err = capsys.readouterr()
        assert (left.value.code, out, err.count("\n")) == (2, "", 1)
        assert match in err


@pytest.mark.slow
@pytest.mark.skipif("SYMBREAK_DATA" not in os.environ, reason="needs faces")
def test_the_spectrum_of_faces(tmp_path, capsys):
    """CelebA as the first paper crops it: 140 of 178 pixels, here 70 of 89 or so, at 64 x 64.

    The top eigenvalue of the first channel in [0, 1] is near 80.
    """
    faces = Path(os.environ["SYMBREAK_DATA"]) / "celeba10k-train.parquet"
    data = sb.images(faces, size=64, crop=70, labels="Smiling")
    assert (data.shape, data.classes) == ((3, 64, 64), ("not Smiling", "Smiling"))
    red = np.concatenate([x[:, 0].numpy() for x in data]).reshape(len(data), -1) / 2
    red -= red.mean(0)
    top = np.linalg.eigvalsh(red.T @ red / len(red))[-1]
    assert 76 < top < 84
    with pytest.raises(SystemExit):
        main(
            [
                "fit",
                "--data",
                str(faces),
                "--size",
                "64",
                "--crop",
                "70",
                "--json",
                "--rank",
                "3",
                "--out",
                str(tmp_path / "m.safetensors"),
            ]
        )
    assert json.loads(capsys.readouterr().out)["shape"] == [3, 64, 64]


@pytest.mark.parametrize("offline", [False, True])
def test_nobody_asks_the_hub_for_data_without_a_word(tmp_path, monkeypatch, capsys, offline):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    said = []

    def asked(*_, **__):
        said.append(capsys.readouterr().err)
        raise ConnectionError("nobody is there")

    monkeypatch.setattr("datasets.load_dataset", asked)
    with pytest.raises(InputError, match="is no file here, and the hub gave no such data set"):
        sb.images("owner/no-such-data")
    assert said == [
        "" if offline else "symbreak: note: owner/no-such-data is no file here; asking the Hugging Face hub for it\n"
    ]


def test_dark_pictures_are_said(tmp_path):
    """16-bit pictures of which the lower bits are used, as cameras write them, and masks of numbered classes."""
    for name, top, kind, said in (("deep", 200, np.uint16, 0), ("deeper", 4095, np.uint16, 15), ("mask", 20, "u1", 20)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(np.full((8, 8), top - i, kind)).save(tmp_path / name / f"{i}.png")
        notes = " ".join(sb.images(tmp_path / name).notes)
        assert f"No picture looked at has a value above {said}, read as 0 .. 255" in notes


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("", {}, "an empty path"),
        ("digits", {"size": True}, "size of True pixels"),
        ("digits", {"crop": True}, "crop True"),
        ("digits", {"limit": 2.5}, "subset of 2.5 images"),
        ("digits", {"limit": "9"}, "subset of 9 images"),
        ("digits", {"classes": []}, "0 images of these classes"),
        (np.ma.masked_greater(np.random.default_rng(0).random((4, 8, 8)), 0.5), {}, "values of the array are masked"),
    ],
)
def test_options_of_other_kinds_are_one_line(source, options, said):
    with pytest.raises(InputError, match=said):
        sb.images(source, **options)


def swapped_profile():
    """sRGB with the red and the green primary exchanged: what is red in it is green."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for a, b in ((b"sRGB", b"swap"), ("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))):
        profile = profile.replace(a, b)
    count = int.from_bytes(profile[128:132], "big")
    entry = {profile[132 + 12 * i : 136 + 12 * i]: 132 + 12 * i for i in range(count)}
    out, places = bytearray(profile), [entry[b"rXYZ"], entry[b"gXYZ"]]
    for here, there in (places, places[::-1]):
        out[here + 4 : here + 12] = profile[there + 4 : there + 12]
    return bytes(out)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_with_a_colour_profile_are_shown_in_srgb(tmp_path, kind):
    flat = [Image.new("RGB", (8, 8), c) for c in ((200, 40, 90), (30, 220, 60))]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    for i, x in enumerate(flat):
        x.save(tmp_path / f"{i}.{kind.lower()}", icc_profile=swapped_profile(), **options)
        x.save(tmp_path / f"plain{i}.{kind.lower()}", icc_profile=(srgb, b"broken")[i], **options)
    data = sb.images(tmp_path)
    x = data.unscaled(data.tensor()).numpy()[:, :, 4, 4]
    np.testing.assert_allclose(x, [[40, 200, 90], [220, 30, 60], [200, 40, 90], [30, 220, 60]], atol=3)
    said(
        data,
        "2 of 4 pictures are with a colour profile other than sRGB, from which they are converted to it (first: 0.",
    )
