"""Pictures that several threads decode: the bits, the order and the errors of one thread, and bounded memory."""

import builtins
import contextlib
import io
import pathlib
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import symbreak as sb
from symbreak.cli.commands import main
from symbreak.runtime.errors import InputError
from symbreak.runtime.threads import ahead_of

MANY = 400  # above the number that one thread decodes


@pytest.fixture
def threads(monkeypatch):
    """Sets the number of threads that decode, at first two; torch's own pool would not survive the forks of tests."""

    def use(number):
        monkeypatch.setattr(torch, "get_num_threads", lambda: number)

    use(2)
    return use


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """JPEGs of 16 x 16, of which every 50th is grey, and one PNG."""
    place, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(MANY):
        pixels = rng.integers(0, 256, (16, 16) if i % 50 == 7 else (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{i:03d}.{'png' if i == 11 else 'jpg'}")
    return place


def left_behind():
    return [t for t in threading.enumerate() if t.name.startswith("symbreak")]


def walk(items, seen):
    for item in items:
        seen.append(item)


def test_threads_give_the_bits_and_the_order_of_one_thread(folder, threads):
    data = sb.images(folder, batch_size=37)
    many = [block.copy() for block in data.blocks()]
    assert not left_behind()
    threads(1)
    one = list(data.blocks())
    assert [len(b) for b in many] == [len(b) for b in one]
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(many, one))
    with Image.open(folder / "123.jpg") as picture:
        assert np.array_equal(np.concatenate(one)[123], np.asarray(picture).transpose(2, 0, 1))


def test_a_pass_brings_along_notes_and_fingerprint(folder, threads, monkeypatch):
    before = sb.images(folder)
    notes, fingerprint = before.notes, before.fingerprint()  # from files that no pass has read
    data, opened = sb.images(folder), Counter()

    def counted(real):
        def read(path, *rest, **more):
            if str(folder) in str(path):
                opened[Path(path).name] += 1
            return real(path, *rest, **more)

        return read

    if hasattr(pathlib, "_NormalAccessor"):  # Python 3.10 has an open of its own
        monkeypatch.setattr(pathlib._NormalAccessor, "open", staticmethod(counted(io.open)))
    for place in (builtins, io):
        monkeypatch.setattr(place, "open", counted(place.open))
    assert not data.noted
    sb.Moments.fit(data)
    assert data.noted
    assert (data.notes, data.fingerprint()) == (notes, fingerprint)
    assert len(opened) == MANY
    assert set(opened.values()) == {1}
    assert len(notes) == 1
    assert notes[0].startswith("8 of 400 pictures are grey among colour ones")
    assert notes[0].endswith("(first: 007.jpg).")


def test_a_broken_picture_is_the_same_error_after_the_same_batches(folder, threads, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 300 if file.name in ("301.jpg", "333.jpg") else None])
    said = []
    for number in (1, 2):
        threads(number)
        batches = []
        with pytest.raises(InputError) as error:
            walk(sb.images(tmp_path, batch_size=50), batches)
        said.append((len(batches), str(error.value), sb.images(tmp_path, skip_bad=True).skipped))
    assert said[0] == said[1]
    assert said[0][0] == 6
    assert said[0][1].startswith("2 of 400 images")
    assert "(first: 301.jpg cannot" in said[0][1]
    assert not left_behind()


def test_items_ahead_of_a_slow_consumer_are_bounded():
    under_way, most = set(), 0

    def make(i):
        under_way.add(i)
        return i

    for i in ahead_of(range(500), make, threads=2, most=12):
        time.sleep(0.0005)
        most = max(most, len(under_way))
        under_way.discard(i)
    assert most <= 12 + 6  # of what was handed over, a task has to be consumed still
    assert i == 499
    assert not left_behind()


def test_an_error_comes_after_what_was_before_it():
    def source():
        yield from range(100)
        raise InputError("no more")

    def odd(i):
        if i == 77:
            raise ValueError(i)
        return i

    for make, last, error in ((lambda i: i, 99, InputError), (odd, 76, ValueError)):
        seen = []
        with pytest.raises(error):
            walk(ahead_of(source(), make, threads=3, most=30), seen)
        assert seen == list(range(last + 1))


def test_no_threads_are_left_after_an_interrupt():
    def interrupted():
        for i in ahead_of(range(10**9), lambda i: i, threads=2, most=64):
            if i == 500:
                raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        interrupted()
    assert not left_behind()


def test_the_warning_filters_of_the_program_stay(folder, threads):
    with warnings.catch_warnings(record=True):
        before = list(warnings.filters)
        for _ in sb.images(folder):
            warnings.warn("of the consumer", stacklevel=1)
        assert warnings.filters == before


def test_the_command_tells_notes_once_the_pictures_were_read(folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--data", str(folder), "--size", "8", "--out", str(tmp_path / "m.safetensors")])
    assert capsys.readouterr().err.count("8 of 400 pictures are grey") == 1
