"""Faults: kills at random moments, full disks, malformed inputs. Nothing is lost, half-written or a traceback."""

import io
import json
import math
import os
import pickle
import platform
import random
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import symbreak
from symbreak.cli.commands import main
from symbreak.cli.options import level
from symbreak.cli.options import limits as range_limits
from symbreak.data.images import describe
from symbreak.data.readers import images
from symbreak.laws import Gaussian, PrincipalMixture
from symbreak.laws.saving import load_law, save_law
from symbreak.metrics import extractor
from symbreak.metrics.feature_rows import load_classifier, save_classifier
from symbreak.metrics.reference import load_statistics, statistics
from symbreak.moments.one_pass import Moments
from symbreak.networks.samplers import scheduler
from symbreak.runtime.files import InputError, output_folder, read_tensors, write_json, write_tensors
from symbreak.start.fit import late_start
from symbreak.start.late_start import LateStart, standard_start
from symbreak.start.recipe import Recipe
from symbreak.start.sample import parse_seeds
from tests.worlds import low_rank_mixture

FIT = "fit --data IN/images --start --model digits --sampler dpm++2m --steps 1 --clusters 3 --out OUT/start.safetensors"
COMMANDS = {
    "fit": FIT,
    "sample": "sample --start IN/law.safetensors --seeds 0-99 --micro-batch 8 --steps 4 --out OUT",
    "evaluate": "evaluate --data digits --samples IN/images --repeats 3 --out OUT --reference OUT/real.safetensors",
    "train": "train --data digits --recipe IN/recipe.json --out OUT",
    "train, file": "train --data IN/large.npy --memory 1MiB --recipe IN/recipe.json --out OUT",
    "study": "study --quick --samplers ddim --calls 3 --out OUT",
    "audit": "audit --data digits --samples IN/images --out OUT",
    "phases": "phases --data IN/small.npy --quick --out OUT",
}
KILLED = ["fit", "sample", "evaluate", "train", "study"]
SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT]
WHILE_IT_RUNS = re.compile(r"(blocks-.*/.*|\.lock|checkpoint\.safetensors|\.stage/.*|.*\.part)")
CHECKPOINT_SECONDS = 0.15


class Forks:
    """Command lines in children of one warmed process."""

    def __init__(self, folder):
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forked.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(symbreak.__file__).parents[1])},
        )
        self._answer()
        np.save(folder / "large.npy", np.random.default_rng(0).integers(0, 256, (6400, 16, 16), np.uint8))
        (folder / "recipe.json").write_text('{"channels": [8, 16], "steps": 15, "batch": 32, "warmup": 5}')
        for line in (
            "fit --data digits --out IN/law.safetensors",
            "sample --start IN/law.safetensors --seeds 0-99 --steps 2 --out IN/images",
        ):
            assert self(line, folder)["code"] == 0
        self.known, self.folders = {}, {}

    def _answer(self):
        line = self.server.stdout.readline()
        assert line, "the forking process ended"
        return json.loads(line)

    def __call__(self, command, out, kill=None, **faults):
        """Run a command line; ``kill`` is (seconds from its start, signal)."""
        argv = [a.replace("OUT", str(out)).replace("IN", str(self.folder)) for a in command.split()]
        task = {"argv": argv, "environment": {"SYMBREAK_CACHE": str(out / "cache")}, **faults}
        task.setdefault("checkpoint_seconds", CHECKPOINT_SECONDS)
        self.server.stdin.write((json.dumps(task) + "\n").encode())
        began = time.monotonic()
        pid = self._answer()["pid"]
        if kill is not None:
            ended, _, _ = select.select([self.server.stdout], [], [], max(0, began + kill[0] - time.monotonic()))
            if not ended:  # so the child still is the process of this number
                os.kill(pid, kill[1])
        return self._answer()

    def undisturbed(self, name, tmp_path_factory):
        """Content and seconds of a command that nothing disturbs, run once."""
        if name not in self.known:
            out = tmp_path_factory.mktemp(f"whole-{name}")
            done = self(COMMANDS[name], out)
            assert done["code"] == 0, done["said"]
            self.known[name], self.folders[name] = (content(out), done["seconds"]), out
        return self.known[name]

    def close(self):
        self.server.stdin.close()
        self.server.wait(timeout=60)


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    found = Forks(tmp_path_factory.mktemp("inputs"))
    yield found
    found.close()


def files(folder):
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}


def timeless(value):
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("timings", "seconds")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def checked(path, folder):
    """What a file says apart from seconds and its folder's name; fails where it is half-written."""
    if path.suffix == ".png":
        with Image.open(path) as picture:
            picture.load()
    elif path.suffix == ".json":
        return timeless(json.loads(path.read_text().replace(str(folder), "OUT")))
    elif path.suffix == ".safetensors":
        read_tensors(path)
    elif path.suffix == ".html":
        text = path.read_text()
        assert text.endswith("</html>"), path
        return text.split("<h2>Seconds per stage</h2>")[0].replace(str(folder), "OUT")
    elif path.name == ".lock":
        return None  # a killed process leaves it; it locks nothing
    else:
        raise AssertionError(f"{path} is of no known kind")
    return path.read_bytes()


def content(folder):
    """Every file with its checked content, apart from what is there only while a command runs."""
    return {name: checked(path, folder) for name, path in files(folder).items() if not WHILE_IT_RUNS.fullmatch(name)}


def left_over(folder):
    return [name for name in files(folder) if WHILE_IT_RUNS.fullmatch(name)]


def sound_after_a_kill(out, whole, clean):
    """Nothing is half-written, and what is finished has its final content already."""
    for name, path in files(out).items():
        if name.startswith(".stage/") or name.endswith(".part"):
            assert not clean, f"{name} is left"
            continue
        said = checked(path, out)
        if name in whole and not name.endswith("sample.json"):
            assert said == whole[name], f"{name} differs"


KILLS = [pytest.param(name, k, marks=[pytest.mark.slow] * (k > 0)) for name in KILLED for k in range(10)]


@pytest.mark.parametrize(("name", "number"), KILLS)
def test_killed_at_a_random_moment(forks, tmp_path, tmp_path_factory, name, number):
    whole, seconds = forks.undisturbed(name, tmp_path_factory)
    chance = random.Random(f"{name} {number}")
    sent = SIGNALS[(number + KILLED.index(name)) % len(SIGNALS)]
    # ten kills of a command fall into ten different tenths of its run
    tenth = (3 * number + 2 * KILLED.index(name) + 4) % 10
    for attempt in range(10):
        out = tmp_path / str(attempt)
        moment = seconds * (tenth + chance.random()) / 10 * 0.8**attempt
        killed = forks(COMMANDS[name], out, kill=(moment, sent))
        if killed["code"] != 0:
            break  # else it was quicker this time than the undisturbed run
    assert "Traceback" not in killed["said"]
    # before symbreak listens, a signal ends a process by itself
    assert killed["code"] in {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}[sent]
    sound_after_a_kill(out, whole, clean=sent != signal.SIGKILL)
    again = forks(COMMANDS[name], out)
    assert again["code"] == 0, again["said"]
    assert content(out) == whole
    assert left_over(out) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed_at_every_change_of_a_file(forks, tmp_path, tmp_path_factory, name):
    """The moments that matter most are rare in time: between two changes of files."""
    whole, _ = forks.undisturbed(name, tmp_path_factory)
    fallen, chance = 0, random.Random(name)
    for count in [1, 2, 3, 4, 5, *sorted(chance.sample(range(6, 60), 6))]:
        out = tmp_path / str(count)
        killed = forks(COMMANDS[name], out, fall_at=[count, str(out)])
        if killed["code"] == 0:
            break
        fallen += 1
        assert killed["code"] == -signal.SIGKILL, killed["said"]
        sound_after_a_kill(out, whole, clean=False)
        assert forks(COMMANDS[name], out)["code"] == 0
        assert content(out) == whole
        assert left_over(out) == []
    assert fallen >= 2


def test_what_dead_processes_left_goes(tmp_path):
    """And nothing else does: not what a living process writes, not what another machine may be writing."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, there = f"{zlib.crc32(platform.node().encode()):08x}", "00000000"
    for name in (
        f".a.{dead.pid}-{here}.part",
        f".b.{os.getpid()}-{here}.part",
        f".c.{dead.pid}-{there}.part",
        ".x.part",
    ):
        (tmp_path / name).touch()
    old = tmp_path / f".d.7-{there}.part"
    old.touch()
    os.utime(old, (time.time() - 2 * 86_400,) * 2)
    write_json(output_folder(tmp_path) / "e", 1)
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert kept == sorted([f".b.{os.getpid()}-{here}.part", f".c.{dead.pid}-{there}.part", ".x.part", "e"])


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    """What was fitted again after a kill is the same file, by whose hash images are continued."""
    about = {k: f'{k} é "\x01\\' for k in "abcdef"}
    files = [write_tensors(tmp_path / str(i), {"x": torch.arange(3), "y": torch.ones(2)}, about) for i in range(10)]
    assert len({path.read_bytes() for path in files}) == 1
    assert read_tensors(files[0])[1] == about


FULL = [
    ("fit", {"largest_file": 2000}),
    ("fit", {"full_at": 1}),
    ("sample", {"largest_file": 600}),
    ("sample", {"full_at": 9}),
    ("evaluate", {"largest_file": 3000}),
    ("evaluate", {"full_at": 3}),
    ("train", {"largest_file": 20_000}),
    ("train", {"largest_file": 300_000}),
    ("train", {"full_at": 2}),
    ("train, file", {"largest_file": 1_500_000}),  # of 1.6 MB of images
    ("study", {"largest_file": 2000}),
    ("study", {"full_at": 2}),
    ("audit", {"largest_file": 2000}),
    ("audit", {"full_at": 1}),
]
QUICK_TO_FILL = [("sample", 9), ("train", 300_000), ("train, file", 1_500_000)]


@pytest.mark.parametrize(
    ("name", "fault"),
    [pytest.param(n, f, marks=[pytest.mark.slow] * ((n, *f.values()) not in QUICK_TO_FILL)) for n, f in FULL],
)
def test_a_full_disk(forks, tmp_path, tmp_path_factory, name, fault):
    """EFBIG from a limit on file sizes, or ENOSPC when a file is to reach the disk."""
    whole, _ = forks.undisturbed(name, tmp_path_factory)
    before = {}
    if name == "fit":
        before = {"start.safetensors": (forks.folder / "law.safetensors").read_bytes()}
    elif name == "sample":
        assert forks(COMMANDS[name].replace("0-99", "3"), tmp_path)["code"] == 0
        before = {"00000003.png": (tmp_path / "00000003.png").read_bytes()}
    elif not name.startswith("train"):
        before = {"record.json": b'{"mine": 1}', "report.html": b"<html>mine</html>"}
    for file, data in before.items():
        (tmp_path / file).write_bytes(data)
    failed = forks(COMMANDS[name], tmp_path, **fault)
    assert failed["code"] == 1, failed["said"]
    assert "Traceback" not in failed["said"]
    said = failed["said"].strip().splitlines()[-1]
    assert said.startswith("symbreak: the machine failed: ")
    assert "No space left" in said or "File too large" in said
    for file, data in before.items():
        assert (tmp_path / file).read_bytes() == data
    sound_after_a_kill(tmp_path, {k: v for k, v in whole.items() if k not in before}, clean=True)
    # with space again the same command ends well
    assert forks(COMMANDS[name], tmp_path)["code"] == 0
    assert content(tmp_path) == whole
    assert left_over(tmp_path) == []


# Malformed inputs. Whatever comes, a reader works or raises InputError, which the command line says in one line.


def examples(count):
    """The same examples on every run, over as many folders as there are examples."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)


def reads(read):
    """What a reader gives, or its refusal, which is one line."""
    try:
        return read()
    except InputError as error:
        said = error
    assert "\n" not in str(said)
    assert len(str(said)) <= 1000
    return said


def command(*argv):
    """(exit code, stdout, stderr) of a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as left:
        main([str(a) for a in argv])
    return left.value.code, out.getvalue(), err.getvalue()


def refused(*argv):
    """A command line that ends in one line and exit code 2."""
    code, out, err = command(*argv)
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1
    assert err.startswith("symbreak: ")
    return err


@st.composite
def damage(draw, data):
    """Bytes as a broken disk, a broken transfer or an attacker would leave them."""
    how = draw(st.sampled_from(["cut", "flip", "insert", "zeros", "garbage", "whole"]))
    at = draw(st.integers(0, len(data) - 1))
    if how == "cut":
        return data[:at]
    if how == "flip":
        raw = bytearray(data)
        # most of what can be broken lies near the ends: headers and footers
        for place in draw(st.lists(st.integers(0, min(200, len(data) - 1)), min_size=1, max_size=6)):
            raw[place if draw(st.booleans()) else -place - 1] = draw(st.integers(0, 255))
        return bytes(raw)
    if how == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=40)) + data[at:]
    if how == "zeros":
        return data[:at] + bytes(len(data) - at)
    return draw(st.binary(max_size=200)) if how == "garbage" else data


def picture(size=(8, 8), kind="PNG", mode="L", **options):
    found = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(found, kind, **options)
    return found.getvalue()


def walked(source, **options):
    """All images of a source, or the refusal."""

    def read():
        data = images(source, **options)
        x = data.tensor()
        assert len(x) == len(data)
        assert bool((x.abs() <= 1.001).all())
        describe(data)
        return data

    return reads(read)


PICTURES = [
    picture(),
    picture(kind="JPEG"),
    picture(kind="GIF"),
    picture(kind="TIFF"),
    picture(kind="WEBP", mode="RGB"),
]


@examples(60)
@given(st.data(), st.sampled_from(range(len(PICTURES))), st.sampled_from([".png", ".jpg", ".tif", ".webp", ".GIF"]))
def test_damaged_pictures(draw, which, suffix):
    data = draw.draw(damage(PICTURES[which]))
    with TemporaryDirectory() as folder:
        for i in range(2):
            Path(folder, f"{i}.png").write_bytes(picture())
        Path(folder, f"<b>{suffix}").write_bytes(data)
        walked(folder)
        left_out = walked(folder, skip_bad=True)
        assert len(left_out) + len(left_out.skipped) == 3


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def zeros(mebibytes):
    """So many zeros compressed, which are never held."""
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(mebibytes)) + packer.flush()


BOMBS = {  # made when they are asked for, not in every process that collects the tests
    "declared": lambda: chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)) + chunk(b"IDAT", b""),
    "true": lambda: (
        chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)) + chunk(b"IDAT", zeros(108))
    ),  # a little more than 30,000 rows of 3,751 bytes
    "text": lambda: (
        chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
        + chunk(b"zTXt", b"k\0\0" + zeros(400))
        + chunk(b"IDAT", zlib.compress(bytes(72)))
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_picture_bombs_take_no_memory(tmp_path, name):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + BOMBS[name]() + chunk(b"IEND", b""))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    walked(tmp_path)
    # Pillow decompresses at most 64 MiB of text; the pixels alone would be 900 MB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    if name != "text":
        assert "1 of 2 images" in refused("fit", "--data", tmp_path, "--out", tmp_path / "m.safetensors")


class Payload:
    """Unpickled, it would leave a mark."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_never_loaded(tmp_path):
    mark = tmp_path / "mark"
    bad = np.array([Payload(mark)] * 3, dtype=object)
    np.save(tmp_path / "a.npy", bad, allow_pickle=True)
    np.savez(tmp_path / "b.npz", images=bad)
    np.savez(tmp_path / "c.npz", images=np.zeros((3, 4, 4), np.uint8), labels=bad)
    structured = np.zeros(3, dtype=[("x", object)])
    structured["x"] = Payload(mark)
    np.save(tmp_path / "d.npy", structured, allow_pickle=True)
    plain = pickle.dumps(Payload(mark))
    for name in ("e.npy", "f.npz", "g.parquet", "h.safetensors", "i.json"):
        (tmp_path / name).write_bytes(plain)
    for name in ("a.npy", "b.npz", "c.npz", "d.npy", "e.npy", "f.npz", "g.parquet"):
        refused("fit", "--data", tmp_path / name, "--out", tmp_path / "m.safetensors")
    refused("sample", "--start", tmp_path / "h.safetensors", "--out", tmp_path / "x")
    refused("report", tmp_path / "i.json")
    refused("train", "--data", "digits", "--recipe", tmp_path / "i.json", "--out", tmp_path / "t")
    assert not mark.exists()
    pickle.loads(plain)  # noqa: S301 - the payload is a live one
    assert mark.exists()


DTYPES = ["u1", "<u2", ">i4", "i8", "f2", ">f4", "f8", "g", "?", "c8", "M8[s]", "m8[D]", "S3", "U2", "V4", "u1,f4"]
SHAPES = [(3, 4, 4), (3, 4, 4, 1), (3, 3, 4, 4), (0, 4, 4), (3, 0, 4), (1, 4, 4), (3,), (), (2, 2, 2, 2, 2), (4, 1, 1)]
FORGED = [(2**40, 8, 8), (10**18, 3, 10**6), (-3, 8, 8), (3, 4), "x", (3.5, 2, 2), (True, 8, 8), [3, 8, 8], (2**70,)]


def npy(array):
    found = io.BytesIO()
    np.save(found, array, allow_pickle=False)
    return found.getvalue()


def forged(shape, dtype):
    """A header that declares another shape and type than there are bytes for."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    text = text.ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64)


@st.composite
def arrays(draw):
    """Bytes of a .npy file: strange, forged or damaged."""
    kind = draw(st.sampled_from(["strange", "forged", "damaged"]))
    if kind == "forged":
        return forged(draw(st.sampled_from(FORGED)), draw(st.sampled_from(["|u1", "<f8", "|O", "nope", "<f99"])))
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
    raw = draw(st.binary(min_size=64, max_size=64)) * 16
    one = np.dtype(dtype)
    size = int(np.prod(shape, dtype=int))
    array = np.frombuffer((raw * (1 + size * one.itemsize // len(raw)))[: size * one.itemsize], one).reshape(shape)
    return npy(array) if kind == "strange" else draw(damage(npy(array)))


RANGES = st.sampled_from([None, (0.0, 255.0), (0.0, 1.0), (-1.0, 1.0), (-1e308, 1e308), (0.0, 5e-324), (0.0, math.inf)])


@examples(150)
@given(arrays(), st.none() | arrays(), st.sampled_from(["npy", "npz", "swapped"]), RANGES, st.booleans())
def test_damaged_arrays(data, labels, kind, value_range, skip_bad):
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.npy" if kind == "npy" else "x.npz")
        path.write_bytes(data)
        if kind != "npy":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("images.npy", data)
                if labels is not None:
                    archive.writestr("labels.npy", labels)
                archive.writestr("../../outside.npy", data)
        if kind == "swapped":  # an archive under the name of an array
            path = path.rename(Path(folder, "y.npy"))
        walked(path, value_range=value_range, skip_bad=skip_bad)
        assert [p.name for p in Path(folder).iterdir()] == [path.name]
        assert not Path(folder, "..", "..", "outside.npy").exists()


@examples(60)
@given(arrays(), st.binary(max_size=400))
def test_damaged_archives(data, noise):
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w") as archive:
        archive.writestr("images.npy", npy(np.arange(48, dtype=np.uint8).reshape(3, 4, 4)))
        archive.writestr("y.npy", data)
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.npz")
        at = len(noise) % len(found.getvalue())
        path.write_bytes(found.getvalue()[:at] + noise + found.getvalue()[at + len(noise) // 2 :])
        walked(path)


CELL = st.one_of(
    st.none(),
    st.just(picture()),
    st.just(picture((9, 8))),
    st.binary(max_size=60),
    st.sampled_from([picture()[:40], picture(kind="JPEG")]),
)
LABEL = st.none() | st.integers(0, 12) | st.sampled_from([-1, 2**31, 2**62])


@st.composite
def tables(draw):
    cells = draw(st.lists(CELL, max_size=5))
    n = len(cells)
    path = "../../secret.png"
    column = draw(st.sampled_from(["struct", "binary", "bytes missing", "text in bytes", "text", "list", "numbers"]))
    made = {
        "struct": lambda: pa.array([{"bytes": c, "path": path} for c in cells], STRUCT),
        "binary": lambda: pa.array(cells, pa.binary()),
        "bytes missing": lambda: pa.array([{"path": path}] * n, pa.struct([("path", pa.string())])),
        "text in bytes": lambda: pa.array([{"bytes": path}] * n, pa.struct([("bytes", pa.string())])),
        "text": lambda: pa.array([path] * n, pa.string()),
        "list": lambda: pa.array([[1, 2]] * n, pa.list_(pa.int64())),
        "numbers": lambda: pa.array([1.5] * n, pa.float64()),
    }[column]()
    columns = {draw(st.sampled_from(["image", "image", "img", "picture"])): made}
    if draw(st.booleans()):
        tags = draw(st.lists(LABEL, min_size=n, max_size=n))
        columns["label"] = pa.array(tags, pa.int64())
    table = pa.table(columns)
    names = draw(st.sampled_from([None, '{"info": {"features": {"label": {"names": ["a", "b"]}}}}', "{", "[]", '"x"']))
    if names is not None:
        table = table.replace_schema_metadata({"huggingface": names})
    found = io.BytesIO()
    pq.write_table(table, found)
    return draw(damage(found.getvalue()))


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@examples(100)
@given(tables(), st.booleans())
def test_damaged_parquet(data, skip_bad):
    with TemporaryDirectory() as folder:
        Path(folder, "secret.png").write_bytes(picture())
        path = Path(folder, "a", "b", "x.parquet")
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        walked(path, skip_bad=skip_bad)


def test_a_path_in_a_parquet_file_is_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture())
    cells = [{"bytes": picture(), "path": None}] * 2 + [{"bytes": None, "path": str(tmp_path / "secret.png")}]
    pq.write_table(pa.table({"image": pa.array(cells, STRUCT)}), tmp_path / "x.parquet")
    assert "row 2 cannot be read (ValueError: no bytes)" in str(walked(tmp_path / "x.parquet"))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats()
    | st.sampled_from(
        [10**400, -1, 2**63, 2**70, 1e300, math.nan, math.inf, "", "inf", "<script>", "$\\frac$", "\ud800"]
    )
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


def places(value, at=()):
    """Every place of a JSON value, as keys and indices."""
    found = [at] if at else []
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(min(len(value), 3)):
            found += places(value[key], (*at, key))
    return found


@st.composite
def altered(draw, value):
    """A JSON value with a part replaced by another or taken away."""
    value = json.loads(json.dumps(value))
    # long lists of numbers hold most places: those nearer to the root are drawn as often as the deep ones
    known = places(value)
    depth = draw(st.integers(1, max(map(len, known))))
    at = draw(st.sampled_from([p for p in known if len(p) == depth]))
    parent = value
    for key in at[:-1]:
        parent = parent[key]
    if draw(st.booleans()):
        del parent[at[-1]]
    else:
        parent[at[-1]] = draw(JSON)
    return value


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of every kind that is read again, and its reader: it uses what it reads."""
    folder = tmp_path_factory.mktemp("saved")
    data = images("digits")
    law = Gaussian(Moments.fit(data))
    x = data.tensor()

    def use_law(found):
        z = torch.randn(2, *found.shape, generator=torch.Generator().manual_seed(0))
        found.transport(z, 0.7), found.denoise(z, 0.7)

    def use_moments(path):
        found = Moments.load(path)
        found.spectrum(min(3, found.dim))
        use_law(Gaussian(found))

    def use_start(path):
        found = LateStart.load(path)
        found(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
        found.explain()

    def use_statistics(path):
        found = load_statistics(path)
        assert found.whole.cov.shape == (64, 64)
        assert found.count > 1

    plain = extractor("pixels")
    late = late_start(scheduler("dpm++2m"), law, 3, check=False)
    return {
        "moments": (Moments.fit(data).save(folder / "a.safetensors"), use_moments),
        "one part": (Moments(9, np.zeros((1, 2, 2)), np.eye(4)).save(folder / "b.safetensors"), use_moments),
        "low rank": (Moments.fit(data, rank=5).save(folder / "c.safetensors"), use_moments),
        "gaussian": (save_law(law, folder / "d.safetensors"), lambda p: use_law(load_law(p))),
        "mixture": (save_law(low_rank_mixture(), folder / "e.safetensors"), lambda p: use_law(load_law(p))),
        "principal": (
            save_law(PrincipalMixture.fit(data, components=4), folder / "f.safetensors"),
            lambda p: use_law(load_law(p)),
        ),
        "start": (late.save(folder / "g.safetensors"), use_start),
        "standard start": (standard_start(scheduler("ddim"), 3).save(folder / "h.safetensors"), use_start),
        "statistics": (statistics(plain, data, groups=3, rows=50).save(folder / "i.safetensors"), use_statistics),
        "classifier": (
            save_classifier(extractor("digits-classifier"), folder / "j.safetensors", "x"),
            lambda p: load_classifier(p)(x[:2]),
        ),
    }


def spoiled(tensor, how):
    """A tensor that does not fit, or holds what it may not hold."""
    if how == "shorter":
        return tensor.reshape(-1)[:-1].clone()
    if how == "scalar":
        return torch.zeros((), dtype=tensor.dtype)
    if how == "empty":
        return tensor.new_zeros((0, *tensor.shape[1:]))
    if how == "more":
        return torch.stack([tensor, tensor])
    if how in ("half", "bool", "complex", "int"):
        kinds = {"half": torch.bfloat16, "bool": torch.bool, "complex": torch.complex64, "int": torch.int8}
        return tensor.to(kinds[how])
    fill = {"nan": math.nan, "inf": math.inf, "negative": -3.0, "large": 1e300, "zero": 0.0}[how]
    whole = tensor.clone() if tensor.is_floating_point() else tensor.double()
    whole.reshape(-1)[:1] = fill
    return whole


SPOILED = [
    "shorter",
    "scalar",
    "empty",
    "more",
    "half",
    "bool",
    "complex",
    "int",
    "nan",
    "inf",
    "negative",
    "large",
    "zero",
]
WORLDS = [
    "moments",
    "one part",
    "low rank",
    "gaussian",
    "mixture",
    "principal",
    "start",
    "standard start",
    "statistics",
    "classifier",
]


@examples(150)
@given(st.data(), st.sampled_from(WORLDS), st.sampled_from(["bytes", "length", "tensor", "without", "metadata"]))
@pytest.mark.filterwarnings(
    "ignore:overflow", "ignore:invalid value", "ignore:Casting complex", "ignore:divide by zero"
)
def test_damaged_tensors(saved, draw, which, how):
    path, use = saved[which]
    raw = path.read_bytes()
    tensors, metadata = read_tensors(path)
    if how == "bytes":
        raw = draw.draw(damage(raw))
    elif how == "length":
        length = draw.draw(st.sampled_from([0, 1, 7, 2**20, 2**31, 2**60, 2**63, 2**64 - 1]))
        raw = struct.pack("<Q", length) + raw[8:]
    else:
        name = draw.draw(st.sampled_from(sorted(metadata if how == "metadata" else tensors)))
        if how == "tensor":
            tensors[name] = spoiled(tensors[name], draw.draw(st.sampled_from(SPOILED)))
        elif how == "without":
            del tensors[name]
        else:
            try:
                inner = json.loads(metadata[name])
            except ValueError:
                inner = None
            whole = draw.draw(altered(inner) if isinstance(inner, dict) else JSON)
            metadata[name] = json.dumps(whole) if draw.draw(st.integers(0, 4)) else "[" * 5000
    with TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        if how in ("bytes", "length"):
            copy.write_bytes(raw)
        else:
            write_tensors(copy, tensors, metadata)
        reads(lambda: use(copy))


@pytest.fixture(scope="module")
def records(forks, tmp_path_factory):
    """A record of a kind, made when it is asked for."""
    small = np.random.default_rng(0).integers(0, 255, (40, 4, 4), dtype=np.uint8)
    small[:20, :2], small[20:, :2] = 250, 3
    np.save(forks.folder / "small.npy", small)

    def record(name):
        forks.undisturbed(name, tmp_path_factory)
        return json.loads((forks.folders[name] / "record.json").read_text())

    return record


class Page(HTMLParser):
    """The tags of a page, and the attributes that run scripts or load what is elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.active = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for key, value in attributes:
            elsewhere = key in ("src", "href", "xlink:href") and not (value or "").startswith(("data:image/png", "#"))
            if key.startswith("on") or elsewhere:
                self.active.append((tag, key, value))


def harmless(path):
    text = path.read_text()
    page = Page(text)
    assert not page.tags & {"script", "iframe", "object", "form", "base"}
    assert page.active == []
    assert text.rstrip().endswith("</html>")


def report_of_damaged(records, draw, which):
    record = draw.draw(altered(records(which)))
    text = json.dumps(record)
    if draw.draw(st.integers(0, 9)) == 0:
        text = draw.draw(damage(text.encode())).decode(errors="replace")
    with TemporaryDirectory() as folder:
        path = Path(folder, "record.json")
        path.write_text(text, errors="surrogatepass")
        code, out, err = command("report", path)
        if code == 0:
            harmless(Path(folder, "report.html"))
        else:
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert sorted(p.name for p in Path(folder).iterdir()) == ["record.json"]


RECORDS = ["study", "audit", "evaluate", "phases"]


@examples(4)
@given(st.data(), st.sampled_from(RECORDS[:3]))
@pytest.mark.filterwarnings("ignore")
def test_damaged_records(records, draw, which):
    report_of_damaged(records, draw, which)


@pytest.mark.slow
@examples(150)
@given(st.data(), st.sampled_from(RECORDS))
@pytest.mark.filterwarnings("ignore")
def test_many_damaged_records(records, draw, which):
    report_of_damaged(records, draw, which)


@pytest.mark.parametrize("which", RECORDS[:3])
def test_records_without_a_part(records, tmp_path, which):
    path, whole = tmp_path / "record.json", records(which)
    for part in ("kind", "settings", "content", "versions", "timings"):
        for value in ("missing", [], "x", None, 3) + (({}, {"data": {}}) if part == "content" else ()):
            record = dict(whole)
            if value == "missing":
                del record[part]
            else:
                record[part] = value
            path.write_text(json.dumps(record))
            refused("report", path)


def test_records_that_are_none(tmp_path):
    path = tmp_path / "record.json"
    for text in ("[" * 100_000, '{"a":' * 100_000, "", "null", "1e999", '"x"', "{", "[1,2", "\ud800", "NaN"):
        path.write_text(text, errors="surrogatepass")
        refused("report", path)
    refused("report", tmp_path / "nowhere")
    deep = {"format": "symbreak.record", "version": 1, "kind": "study", "settings": {}, "versions": {}, "timings": {}}
    path.write_text(json.dumps(deep)[:-1] + ', "content": ' + '{"data":' * 600 + "1" + "}" * 601)
    refused("report", path)
    # nothing in a record names a file to write
    path.write_text(json.dumps({**deep, "content": {}, "settings": {"out": "../../x"}, "kind": "../../x"}))
    assert "no report for records of kind" in refused("report", path)


EVIL = '<script>alert("1")</script><img src=x onerror=alert(1)>$\\frac$[/red]'
NAMED = {
    "name",
    "title",
    "caption",
    "notes",
    "sentence",
    "source",
    "reason",
    "sample",
    "nearest",
    "second",
    "extractor",
}
NAMED |= {"classifier", "class", "note", "resize", "kernel", "classes", "label", "names", "features", "attribute"}


def evil(value, name=""):
    """A record whose names and sentences are scripts."""
    if isinstance(value, dict):
        return {k: evil(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [evil(v, name) for v in value]
    return EVIL if isinstance(value, str) and name in NAMED else value


@pytest.mark.parametrize("which", [pytest.param(n, marks=[pytest.mark.slow] * (n in RECORDS[::3])) for n in RECORDS])
def test_scripts_in_a_record_are_text(records, tmp_path, which):
    record = records(which)
    for part in ("settings", "versions", "timings"):
        record = {**record, part: {**record[part], EVIL: 1.0 if part == "timings" else EVIL}}
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**record, "content": evil(record["content"])}))
    code, _, err = command("report", path)
    assert code == 0, err
    harmless(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count("&lt;script&gt;") > 5
    assert "<script" not in text


def test_scripts_in_names_of_files_and_classes_are_text(forks, tmp_path):
    """From the folder to the page; a name of a file holds no slash."""
    name, data = EVIL.replace("/", ""), forks.folder / "images"
    for i, file in enumerate(sorted(data.glob("*.png"))):
        target = tmp_path / "in" / f"{i % 2}{name}" / f"{i}{name}{'' if i % 5 else os.fsdecode(bytes([255]))}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    (tmp_path / "in" / f"0{name}" / f"twin{name}.png").write_bytes(file.read_bytes())
    judge = extractor("digits-classifier")
    judge.classes = tuple(f"{i}{EVIL}" for i in range(10))
    save_classifier(judge, tmp_path / "judge.safetensors", EVIL)
    for i, line in enumerate(
        (
            f"audit --data {tmp_path / 'in'} --samples IN/images --out OUT",
            f"evaluate --data {tmp_path / 'in'} --samples IN/images --features {tmp_path}/judge.safetensors --out OUT",
        )
    ):
        done = forks(line, tmp_path / str(i))
        assert done["code"] == 0, done["said"]
        harmless(tmp_path / str(i) / "report.html")
        assert "&lt;script&gt;" in (tmp_path / str(i) / "report.html").read_text()


RECIPE = {"channels": [8, 16], "layers": 1, "dropout": 0.1, "steps": 2, "batch": 4, "lr": 0.001, "warmup": 1}
RECIPE |= {"ema": 0.9, "weight_decay": 0.01, "seed": 0}


@examples(150)
@given(st.data())
def test_damaged_recipes(draw):
    with TemporaryDirectory() as folder:
        path = Path(folder, "r.json")
        text = json.dumps(draw.draw(altered(RECIPE)))
        path.write_bytes(draw.draw(damage(text.encode())) if draw.draw(st.integers(0, 3)) == 0 else text.encode())
        found = reads(lambda: Recipe.load(path))
        if isinstance(found, Recipe):  # what is not refused can be trained, and counts are of a possible size
            assert all(math.isfinite(getattr(found, k)) for k in ("lr", "ema", "dropout", "weight_decay"))
            assert max(*found.channels, found.layers) <= 8192
            assert found.seed < 2**63


NUMBER = st.one_of(
    st.integers(-5, 2000).map(str),
    st.floats().map(str),
    st.sampled_from(["", "1e400", "9" * 5000, "0x10", "1_0", "١", " 7 ", "nan", "-inf", "0-9999999", "5-", "-", "\0"]),
)


@examples(200)
@given(st.lists(NUMBER, max_size=4).map(",".join) | st.lists(NUMBER, max_size=3).map("-".join) | st.text(max_size=8))
def test_seeds(text):
    found = reads(lambda: parse_seeds(text))
    assert isinstance(found, InputError) or 0 < len(found) <= 10_000_000


def test_seeds_that_come_twice_are_one():
    assert parse_seeds("0-3,2,5,5") == [0, 1, 2, 3, 5]


def test_seeds_without_end():
    assert isinstance(reads(lambda: parse_seeds(",".join(["0-9999999"] * 100_000))), InputError)


@examples(100)
@given(st.lists(NUMBER, max_size=3).map(",".join) | st.text(max_size=8))
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_ranges(text):
    def read():
        limits = range_limits(text)
        assert limits is None or len(limits) == 2
        images(np.linspace(0, 1, 48, dtype=np.float32).reshape(3, 4, 4), value_range=limits).tensor()

    reads(read)


LEVELS = st.sampled_from(["", "sigma=", "step=", "tau=", "log_snr=", "speciation", "x=", "=", "sigma=sigma="])


@examples(100)
@given(LEVELS, NUMBER)
@pytest.mark.filterwarnings("ignore")
def test_levels(saved, name, number):
    law = load_law(saved["gaussian"][0])
    reads(lambda: late_start(scheduler("dpm++2m"), law, 2, at=level(name + number)))
