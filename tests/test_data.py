import io
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import symbreak.data.arrays
from symbreak.data.arrays import _mapped
from symbreak.data.readers import images
from symbreak.runtime.files import InputError


def picture(seed=0, size=(6, 5), mode="L"):
    rng = np.random.default_rng(seed)
    shape = size[::-1] if mode == "L" else (*size[::-1], 3)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for c in ("cat", "dog"):
        (tmp_path / c).mkdir()
        for i in range(4):
            picture(seed=i + 10 * (c == "dog")).save(tmp_path / c / f"{i}.png")
    return tmp_path


def test_digits_are_split_once_and_evenly():
    train, held_out, everything = (images(n) for n in ("digits", "digits:held-out", "digits:all"))
    assert (len(train), len(held_out), len(everything)) == (898, 899, 1797)
    counts = train.labels.bincount() - held_out.labels.bincount()
    assert counts.abs().max() <= 1
    both = {x.numpy().tobytes() for x in train.tensor()} & {x.numpy().tobytes() for x in held_out.tensor()}
    assert not both
    assert train.fingerprint() != held_out.fingerprint()
    # The split is part of what was measured: it must never move.
    assert train.fingerprint() == "a8d11a38ce6a113e"


def test_digits_scale():
    x = images("digits").tensor()
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    assert set(np.unique(x * 8)) == set(range(-8, 9))


def test_folder_with_classes(folder):
    found = images(folder)
    assert found.shape == (1, 5, 6)
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0] * 4 + [1] * 4
    x = found.tensor()
    wanted = np.asarray(picture(seed=10)) / 127.5 - 1
    np.testing.assert_allclose(x[4, 0], wanted, atol=1e-6)
    dogs = images(folder, classes=["dog"])
    torch.testing.assert_close(dogs.tensor(), x[4:])
    assert dogs.labels.tolist() == [1] * 4


def test_every_source_gives_the_same_images(folder, tmp_path):
    wanted = images(folder).tensor()
    raw = ((wanted + 1) * 127.5).round().to(torch.uint8).numpy()
    np.save(tmp_path / "a.npy", raw)
    np.savez(tmp_path / "b.npz", images=raw.transpose(0, 2, 3, 1), labels=np.array(["x"] * 4 + ["y"] * 4))
    np.save(tmp_path / "c.npy", (raw / 255.0).astype(np.float64))
    np.save(tmp_path / "d.npy", raw[:, 0].astype(np.float32))
    table = pa.table(
        {"image": [{"bytes": encoded(Image.fromarray(r[0])), "path": None} for r in raw], "label": [0] * 4 + [1] * 4}
    )
    pq.write_table(table, tmp_path / "e.parquet")
    for name, kwargs in (
        ("a.npy", {}),
        ("b.npz", {}),
        ("c.npy", {}),
        ("d.npy", {"value_range": (0, 255)}),
        ("e.parquet", {}),
    ):
        found = images(tmp_path / name, **kwargs)
        torch.testing.assert_close(found.tensor(), wanted, atol=1e-6, rtol=0)
        assert len(found.fingerprint()) == 16
    assert images(tmp_path / "b.npz").classes == ("x", "y")
    assert images(tmp_path / "e.parquet").labels.tolist() == [0] * 4 + [1] * 4


def test_an_array_in_an_archive_is_mapped_and_not_read(tmp_path, monkeypatch):
    np.savez(tmp_path / "small.npz", images=np.zeros((3, 4, 4), np.uint8))

    def mapped(name):
        with zipfile.ZipFile(tmp_path / f"{name}.npz") as archive:
            return _mapped(tmp_path / f"{name}.npz", archive.getinfo("images.npy"))

    assert mapped("small") is None  # numpy checks it
    monkeypatch.setattr(symbreak.data.arrays, "PART_BYTES", 10)
    raw = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)
    for name, array in (("c", raw), ("f", np.asfortranarray(raw)), ("wide", raw / 255.0)):
        np.savez(tmp_path / f"{name}.npz", labels=np.arange(6), images=array)
        found = mapped(name)
        assert isinstance(found, np.memmap)
        np.testing.assert_array_equal(found, array)
        torch.testing.assert_close(
            images(tmp_path / f"{name}.npz").tensor()[:, 0], torch.tensor(raw / 127.5 - 1).float()
        )
    np.savez_compressed(tmp_path / "packed.npz", images=raw)
    assert mapped("packed") is None
    assert images(tmp_path / "packed.npz").labels is None
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        stream = io.BytesIO()
        np.save(stream, raw)
        archive.writestr("images.npy", stream.getvalue()[:-1])
        archive.writestr("secret.npy", b"not part of it")
    with pytest.raises(InputError, match="cannot be read"):
        images(tmp_path / "short.npz")


def test_a_local_data_set_through_the_hub_loader(tmp_path, monkeypatch):
    """The real `datasets` path, on a small data set of our own."""
    import datasets

    local = datasets.Dataset.from_dict(
        {"img": [encoded(picture(seed=i)) for i in range(4)], "label": [0, 1, 0, 1]},
        features=datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}),
    )
    local.to_parquet(tmp_path / "x.parquet")
    load = datasets.load_dataset

    def offline(name, split):
        assert name == "owner/small"
        return load("parquet", data_files=str(tmp_path / "x.parquet"), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", offline)
    found = images("owner/small")
    assert (len(found), found.shape, found.classes) == (4, (1, 5, 6), ("a", "b"))
    torch.testing.assert_close(found.tensor()[2, 0], torch.from_numpy(np.asarray(picture(seed=2)) / 127.5 - 1).float())


def test_padding_is_black(folder):
    x = images(folder, pad=8).tensor()
    assert x.shape == (8, 1, 8, 8)
    torch.testing.assert_close(x[:, :, 1:6, 1:7], images(folder).tensor())
    assert (x[:, :, 0] == -1).all()


def test_batches_never_change_the_images(folder):
    whole = images(folder).tensor()
    for size in (1, 3, 8):
        torch.testing.assert_close(images(folder, batch_size=size).tensor(), whole, rtol=0, atol=0)


def test_skip_bad_counts_and_goes_on(folder):
    (folder / "cat" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnope")
    picture(size=(7, 7)).save(folder / "cat" / "large.png")
    with pytest.raises(InputError, match=r"2 of 10 images .* are unusable \(first: cat/broken.png cannot be read"):
        images(folder).tensor()
    found = images(folder, skip_bad=True)
    assert len(found.tensor()) == len(found) == len(found.labels) == 8
    assert [s.split(":")[0] for s in found.skipped] == ["cat/broken.png", "cat/large.png"]
    # labels stay with their images, also through a split
    assert found.labels.tolist() == [0] * 4 + [1] * 4
    a, b = found.split(0.5)
    both = torch.cat([a.tensor(), b.tensor()])
    assert len(both) == 8
    assert {x.numpy().tobytes() for x in both} == {x.numpy().tobytes() for x in found.tensor()}


def test_sixteen_bit_images_are_scaled_not_clipped(tmp_path):
    for i in range(2):
        values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 10_000 + i
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    x = images(tmp_path).tensor()
    assert len(np.unique(x[0])) == 6
    np.testing.assert_allclose(x[0, 0], (values >> 8) / 127.5 - 1, atol=1e-6)
    Image.fromarray(np.ones((2, 3), np.float32)).save(tmp_path / "2.tiff")
    with pytest.raises(InputError, match="32-bit pixels"):
        images(tmp_path).tensor()


def test_the_fingerprint_knows_the_range_and_options_apply_to_opened_data():
    x = np.random.default_rng(0).random((5, 4, 4))
    assert images(x).fingerprint() != images(x, value_range=(0, 5)).fingerprint()
    assert images(images(x), pad=6).tensor().shape == (5, 1, 6, 6)


def test_truncated_images_are_named(folder):
    data = encoded(picture(size=(40, 40)))
    (folder / "cat" / "9.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"cat/9\.png"):
        images(folder).tensor()


def test_a_picture_of_too_many_pixels_is_no_way_in(folder, monkeypatch):
    monkeypatch.setattr("symbreak.data.pictures.MAX_PIXELS", 20)
    with pytest.raises(InputError, match="no readable image"):
        images(folder)


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: p / "nope", "does not exist"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "holds no images"),
        (lambda p: (p / "x.txt").write_text("hi") and p / "x.txt", "is a table, which holds no pictures"),
        (lambda p: (p / "x.parquet").write_text("hi") and p / "x.parquet", "no readable parquet"),
        (lambda p: (p / "x.npy").write_text("hi") and p / "x.npy", "cannot be read|pickled"),
        (lambda p: np.save(p / "o.npy", np.array([{}, {}])) or p / "o.npy", "pickled objects"),
        (lambda p: np.save(p / "s.npy", np.zeros((4, 4))) or p / "s.npy", r"shape \(4, 4\)"),
        (lambda p: np.save(p / "1.npy", np.zeros((1, 4, 4))) or p / "1.npy", "holds 1 image;"),
        (lambda p: np.save(p / "t.npy", np.array([["a"]])[None].repeat(3, 0)) or p / "t.npy", "expected 8-bit"),
        (lambda p: write_npz(p / "k.npz", other=np.zeros((3, 4, 4))), "named 'images'"),
        (lambda p: write_npz(p / "l.npz", images=np.zeros((3, 4, 4)), labels=np.zeros(2)), r"labels of shape \(2,\)"),
    ],
)
def test_bad_sources(tmp_path, make, match):
    with pytest.raises(InputError, match=match):
        images(make(tmp_path)).tensor()


def test_bad_values(tmp_path):
    x = np.random.default_rng(0).random((4, 3, 3))
    x[2, 0, 0] = np.nan
    with pytest.raises(InputError, match="image 2 holds NaN or infinity"):
        images(x).tensor()
    x[2, 0, 0] = 7
    with pytest.raises(InputError, match=r"outside the range 0 \.\. 1.*--range"):
        images(x).tensor()
    with pytest.raises(InputError, match="is empty"):
        images(x, value_range=(1, 0))
    with pytest.raises(InputError, match="no class 'bird'"):
        images("digits", classes=["bird"])
    with pytest.raises(InputError, match="no labels"):
        images(np.zeros((3, 4, 4)), classes=["a"])
    with pytest.raises(InputError, match="leaves one part empty"):
        images("digits").split(1.0)


def test_a_subset_is_even_and_fixed():
    digits = images("digits")
    few = images("digits", limit=200)
    counts = torch.bincount(few.labels, minlength=10)
    shares = torch.bincount(digits.labels, minlength=10) * 200 / len(digits)
    assert len(few) == 200
    assert float((counts - shares).abs().max()) < 1  # every class its share, up to rounding
    assert torch.equal(few.tensor(), images("digits").subset(200).tensor())
    assert few.fingerprint() != digits.fingerprint()
    with pytest.raises(InputError, match="a subset of 899 images of 898 in digits; expected 2 to 898"):
        images("digits", limit=899)


def test_the_fingerprint_knows_the_labels_by_which_images_were_picked():
    x = np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8)
    first, other = np.arange(40) % 2, np.arange(40) // 20
    for pick in ({"classes": ["1"]}, {"limit": 10}, {}):
        a, b = (images(x, labels=labels, **pick) for labels in (first, other))
        assert a.fingerprint() != b.fingerprint()
        assert a.fingerprint() == images(x, labels=first.tolist(), **pick).fingerprint()
    # Labels that a file holds are part of its content: nothing is added.
    assert images("digits").history == ("split 0.5 first 20231",)
