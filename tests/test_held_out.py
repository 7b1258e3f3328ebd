import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from symbreak.data.held_out import held_out
from symbreak.data.readers import images
from symbreak.runtime.errors import InputError


def numbered(tmp_path, labels):
    """Images whose pixels say which they are."""
    raw = np.arange(len(labels) * 4).reshape(-1, 2, 2) / (4 * len(labels))
    np.savez(tmp_path / "data.npz", images=raw, labels=labels)
    return images(tmp_path / "data.npz")


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(4, 40), min_size=1, max_size=5),
    share=st.sampled_from([0.1, 0.2, 0.25, 0.5]),
    seed=st.integers(0, 3),
    order=st.randoms(use_true_random=False),
)
def test_a_share_is_kept_back_of_every_class(tmp_path_factory, sizes, share, seed, order):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    order.shuffle(labels)
    data = numbered(tmp_path_factory.mktemp("data"), labels)
    if len(data) * share < 2:
        with pytest.raises(InputError, match="Pass more, or held-out images"):
            held_out(data, share=share, seed=seed)
        return
    parts, again = (held_out(data, share=share, seed=seed) for _ in range(2))
    names = [set(part.names()) for part in (parts.train, parts.test)]
    assert not names[0] & names[1]
    assert names[0] | names[1] == set(data.names())
    # The running share is cut class after class: each class has its share, up to one image at either end.
    for c, size in enumerate(sizes):
        assert abs(int((parts.test.labels == c).sum()) - share * size) <= 1
    assert [part.fingerprint() for part in (parts.train, parts.test)] == [
        part.fingerprint() for part in (again.train, again.test)
    ]
    record = parts.to_dict()
    assert (record["how"], record["share"], record["seed"]) == ("kept back", share, seed)
    assert record["count"] == len(parts.test)
    assert f"{len(parts.test)} images ({share:.0%} of" in parts.note


def test_another_seed_keeps_others_back_and_writing_order_does_not_matter(tmp_path):
    files = [(c, i) for c in ("cat", "dog") for i in range(10)]
    for name, order in (("a", files), ("b", files[::-1])):
        for c, i in order:
            (tmp_path / name / c).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((2, 2), 20 * i + (c == "dog"), np.uint8)).save(tmp_path / name / c / f"{i}.png")
    first, second = (held_out(images(tmp_path / name)) for name in ("a", "b"))
    assert first.test.names() == second.test.names()
    assert first.test.fingerprint() == second.test.fingerprint()
    assert first.test.labels.bincount().tolist() == [2, 2]
    assert held_out(images(tmp_path / "a"), seed=1).test.names() != first.test.names()


def test_images_that_are_passed_are_taken_in_the_numbering_of_the_data(tmp_path):
    data = numbered(tmp_path, np.array(["a", "b", "c"] * 4))
    raw = np.ones((2, 2, 2), np.float32)
    np.savez(tmp_path / "other.npz", images=raw, labels=np.array(["c", "b"]))
    parts = held_out(data, images(tmp_path / "other.npz"), share=0.5)
    assert parts.train is data
    assert parts.test.labels.tolist() == [2, 1]
    assert (parts.how, parts.share, parts.seed) == ("passed", None, None)
    assert parts.note == f"The held-out images are 2 images of {tmp_path / 'other.npz'}."
    np.savez(tmp_path / "more.npz", images=raw, labels=np.array(["c", "d"]))
    with pytest.raises(InputError, match="have a class 'd' that the data do not have"):
        held_out(data, images(tmp_path / "more.npz"))
    with pytest.raises(InputError, match=r"the data are \(1, 2, 2\), the held-out images \(1, 8, 8\)"):
        held_out(data, images("digits"))


def test_digits_have_a_half_of_their_own():
    data, half = images("digits"), images("digits:held-out")
    parts = held_out(data)
    assert parts.train is data
    assert parts.test.fingerprint() == half.fingerprint()
    assert parts.to_dict()["fingerprint"] == half.fingerprint()
    assert parts.note == "The held-out images are 899 digits of the half that is never fitted to."
    few = held_out(images("digits", classes=["3", "1"], limit=50, pad=10)).test
    assert few.shape == (1, 10, 10)
    assert few.labels.unique().tolist() == [1, 3]
    assert torch.equal(few.tensor(), images("digits:held-out", classes=["1", "3"], pad=10).tensor())
    # Where that half is to stay unseen, a share is kept back as of other data.
    mine = held_out(data, bundled=False)
    assert (len(mine.train), len(mine.test), mine.how) == (718, 180, "kept back")
    # Digits that came another way are other data.
    other = held_out(images(data.tensor(), value_range=(-1, 1)), share=0)
    assert (len(other.train), len(other.test), other.how, other.note) == (898, 0, "none", "No held-out images.")
