"""One process, two processes, another order of the seeds: the same answer.

Two gloo processes are forked from this one and run the command line as a launcher would have it. Tolerances: images,
8-bit moments, neighbours, clones and collapse are made in blocks that know nothing of ranks, so they are equal bit for
bit; float moments differ by the order of sums, 1e-12; Fréchet distances by 1e-6 (a root of small eigenvalues).
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import symbreak as sb
from symbreak.cli.commands import main
from symbreak.metrics.memorization import nearest_in
from symbreak.noise import generator
from symbreak.runtime.files import InputError, read_json, read_tensors, write_json, write_whole
from symbreak.runtime.ranks import (
    agreed,
    alone,
    from_each,
    from_first,
    joined,
    map_over_ranks,
    own_rows,
    rank_of,
    summed,
)
from symbreak.runtime.rows import Shards
from tests.worlds import small_choice

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module", autouse=True)
def warmed():
    """What commands import and load on first use, once here instead of in every process that is forked."""
    import jinja2  # noqa: F401
    import matplotlib.backends.backend_svg  # noqa: F401

    for name in sb.__all__:
        getattr(sb, name)
    sb.load_pipeline("digits")
    sb.extractor("digits-classifier")


@pytest.fixture(scope="module", autouse=True)
def a_small_choice():
    """These tests are of processes: starts are chosen by the same code with fewer states."""
    with small_choice():
        yield


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def on_ranks(function, *arguments, ranks=2, wait=600, meanwhile=None):
    """Exit codes of ``ranks`` forked processes that call function(*arguments) as a launcher's.

    ``meanwhile`` is called with them once they run.
    """
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}

    def child(rank):
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
        torch.set_num_threads(1)
        function(*arguments)

    began = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    try:
        children = [FORK.Process(target=child, args=(rank,)) for rank in range(ranks)]
        for c in children:
            c.start()
        if meanwhile is not None:
            meanwhile(children)
        for c in children:
            c.join(wait)
        for c in children:
            c.kill()
        return [c.exitcode for c in children]
    finally:
        torch.set_num_threads(began)


def command(*arguments, ranks=2):
    """Run a command of the command line on one or two processes."""
    assert on_ranks(main, [str(a) for a in arguments], ranks=ranks) == [0] * ranks


def content(folder):
    """A record without what is allowed to differ."""
    record = read_json(Path(folder) / "record.json")
    return {k: v for k, v in record.items() if k not in ("timings", "versions")}


def close(a, b, tolerance):
    """Plain values equal, floats up to a relative tolerance."""
    if isinstance(a, dict):
        assert set(a) == set(b)
        for k in a:
            if k not in ("grid", "png", "pictures"):  # drawn from images that are compared elsewhere
                close(a[k], b[k], tolerance)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            close(x, y, tolerance)
    elif isinstance(a, float) and isinstance(b, float):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    else:
        assert a == b


# --- the pieces -----------------------------------------------------------------------------------


def _pieces(out):
    with joined() as (rank, ranks):
        found = map_over_ranks(range(5), lambda i: {"of": np.array([i, rank_of()[1]]), "none": np.zeros((0, 3))})
        part, first, shared = own_rows(torch.arange(10), 4)  # blocks 0-3, 4-7, 8-9
        turned = map_over_ranks(range(3), lambda i: {"x": np.asfortranarray(np.arange(6.0).reshape(2, 3))})
        assert all(np.array_equal(t["x"], np.arange(6.0).reshape(2, 3)) for t in turned)
        whole = torch.full((2,), float(rank + 1))
        summed(whole)
        pilot = torch.full((2,), rank + 7.0)
        from_first(pilot)
        each = from_each({"rank": np.array(rank)})
        told = agreed(lambda: {"rank": rank})
        with alone():
            assert rank_of() == (0, 1)
        assert len(own_rows(torch.arange(3), 4)[0]) == 3  # too short to share
        write_whole(out / "one", lambda p: p.write_text(str(rank)))
        write_json(out.parent / f"{out.name}-{rank}.json", {})  # only the first rank's appears
        with alone():
            write_json(
                out / f"{rank}.json",
                {
                    "place": [rank, ranks],
                    "found": [f["of"].tolist() for f in found],
                    "none": [list(f["none"].shape) for f in found],
                    "part": [part.tolist(), first, shared],
                    "sum": whole.tolist(),
                    "pilot": pilot.tolist(),
                    "each": [int(e["rank"]) for e in each],
                    "told": told,
                },
            )
    assert rank_of() == (0, 1)


def test_every_process_learns_what_each_computed(tmp_path):
    out = tmp_path / "out"
    assert on_ranks(_pieces, out) == [0, 0]
    parts = [[0, 1, 2, 3], 0, True], [[4, 5, 6, 7, 8, 9], 4, True]
    for rank in (0, 1):
        assert read_json(out / f"{rank}.json") == {
            "place": [rank, 2],
            "found": [[i, 1] for i in range(5)],  # each block is made alone
            "none": [[0, 3]] * 5,
            "part": list(parts[rank]),
            "sum": [3.0, 3.0],
            "pilot": [7.0, 7.0],
            "each": [0, 1],
            "told": {"rank": 0},
        }
    assert (out / "one").read_text() == "0"
    assert [p.name for p in tmp_path.glob("out-*.json")] == ["out-0.json"]


def _refused(out):
    def make(i):
        if i == 3:
            raise InputError("block 3 is wrong. Repair it.")
        return {"x": np.array(i)}

    def make_nothing():
        raise InputError("the first rank cannot read it.")

    with joined() as (rank, _):
        with pytest.raises(InputError, match="block 3 is wrong"):
            map_over_ranks(range(8), make)
        with pytest.raises(InputError, match="first rank"):
            agreed(make_nothing)
        assert sum(int(d["x"]) for d in map_over_ranks(range(3), make)) == 3  # and they go on together
        with alone():
            write_json(out / f"{rank}.json", {})


def test_what_one_rank_refuses_all_refuse(tmp_path):
    assert on_ranks(_refused, tmp_path) == [0, 0]
    assert len(list(tmp_path.glob("*.json"))) == 2


def _rank_alone(out):
    """A program of somebody's own, where only one rank calls us."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        sb.Moments.fit(sb.images("digits")).save(out)
    dist.barrier()
    dist.destroy_process_group()


def test_one_rank_of_somebody_elses_program_waits_for_nobody(tmp_path):
    assert on_ranks(_rank_alone, tmp_path / "m.safetensors", wait=240) == [0, 0]
    assert sb.Moments.load(tmp_path / "m.safetensors").count == 898


# --- moments --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """Float images with a mean far from zero, in a file that three processes cannot share evenly."""
    path = tmp_path_factory.mktemp("floats") / "x.npy"
    x = torch.rand(1001, 1, 6, 6, generator=generator(3)) * torch.linspace(0.1, 1, 36).reshape(1, 1, 6, 6)
    np.save(path, x.numpy())
    return path


def test_moments_of_bytes_have_the_same_bits(tmp_path):
    command("fit", "--data", "digits", "--out", tmp_path / "two.safetensors")
    command("fit", "--data", "digits", "--out", tmp_path / "one.safetensors", ranks=1)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize(("rank", "tolerance"), [(None, 1e-12), (5, 1e-5)])  # a sketch is float32 inside
def test_moments_of_floats(floats, tmp_path, rank, tolerance):
    extra = () if rank is None else ("--rank", rank)
    for ranks in (1, 3):
        command("fit", "--data", floats, "--out", tmp_path / f"{ranks}.safetensors", *extra, ranks=ranks)
    one, three = (sb.Moments.load(tmp_path / f"{ranks}.safetensors") for ranks in (1, 3))
    assert one.count == three.count == 1001
    scale = float(one.spectrum(1).values[0])
    np.testing.assert_allclose(three.mean, one.mean, rtol=1e-12)
    np.testing.assert_allclose(three.spectrum(5).values, one.spectrum(5).values, rtol=tolerance)
    if rank is None:
        np.testing.assert_allclose(three.cov, one.cov, rtol=tolerance, atol=tolerance * scale)
        np.testing.assert_allclose(three.spectrum(3).low, one.spectrum(3).low, rtol=1e-9)
    else:
        np.testing.assert_allclose(three.variances, one.variances, rtol=1e-12)


def _few(out):
    with joined() as (rank, ranks):
        data = sb.images(torch.arange(3 * 16.0).reshape(3, 4, 4) / 48)  # fewer images than ranks
        moments = sb.Moments.fit(data)
        near = nearest_in(data.tensor()[:2] + 0.01, data)
        with alone():
            assert torch.equal(moments.cov, sb.Moments.fit(data).cov)
            assert torch.equal(near, nearest_in(data.tensor()[:2] + 0.01, data))
            write_json(out / f"{rank}.json", {"ranks": ranks})


def test_more_ranks_than_images(tmp_path):
    assert on_ranks(_few, tmp_path, ranks=4) == [0] * 4
    assert len(list(tmp_path.glob("*.json"))) == 4


def test_unusable_images_are_left_out_by_all(tmp_path):
    from PIL import Image

    for i in range(9):
        Image.fromarray(np.full((4, 4), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "7.png").write_bytes(b"")
    run = ("fit", "--data", tmp_path, "--skip-bad", "--out")
    for ranks in (1, 2):
        command(*run, tmp_path.parent / f"{ranks}.safetensors", ranks=ranks)
    one, two = ((tmp_path.parent / f"{ranks}.safetensors").read_bytes() for ranks in (1, 2))
    assert one == two
    assert sb.Moments.load(tmp_path.parent / "2.safetensors").count == 7


def _kept_by(out, ranks_said):
    with joined():
        made = []
        run = sb.Run(out).identified({"of": "us"})
        found = run.parts("b", range(5), lambda i: made.append(i) or {"x": np.array(i)})
        assert [int(f["x"]) for f in found] == list(range(5))
        assert bool(made) == (ranks_said == "first")


def test_blocks_serve_another_number_of_ranks(tmp_path):
    assert on_ranks(_kept_by, tmp_path, "first", ranks=3) == [0] * 3
    assert on_ranks(_kept_by, tmp_path, "again", ranks=2) == [0] * 2
    assert on_ranks(_kept_by, tmp_path, "again", ranks=1) == [0]


def _of_their_own(out):
    """Ranks that differ, as those of different machines do in the last bits."""
    with joined() as (rank, _):
        for folder in (out / "kept", None):
            run = sb.Run(folder).identified({"of": f"rank {rank}"})
            assert int(run.part("b", lambda: {"x": np.array(rank)})["x"]) == 0
            assert run.value("v", lambda: rank + 0.25) == 0.25


def test_ranks_take_what_the_first_one_made(tmp_path):
    assert on_ranks(_of_their_own, tmp_path) == [0, 0]


def test_a_fault_in_one_part_of_the_data_is_everybodys(tmp_path):
    x = np.full((40, 1, 4, 4), 0.5, np.float32)
    x += np.arange(40, dtype=np.float32).reshape(-1, 1, 1, 1) / 100
    x[33, 0, 1, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    codes = on_ranks(main, ["fit", "--data", str(tmp_path / "x.npy"), "--out", str(tmp_path / "m.safetensors")])
    assert codes[1] == 2  # it read the row; the other one lost its partner
    assert codes[0] in (1, 2)
    assert not (tmp_path / "m.safetensors").exists()


def test_parts_of_every_source_are_the_rows_of_the_whole(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    (tmp_path / "folder").mkdir()
    rows = []
    for i in range(23):
        picture = Image.fromarray(np.full((4, 4), 10 * i, np.uint8))
        picture.save(tmp_path / "folder" / f"{i:02d}.png")
        rows.append({"bytes": (tmp_path / "folder" / f"{i:02d}.png").read_bytes(), "path": None})
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet", row_group_size=7)
    np.save(tmp_path / "x.npy", np.arange(23 * 16, dtype=np.uint8).reshape(23, 4, 4))
    for source in (tmp_path / "folder", tmp_path / "x.parquet", tmp_path / "x.npy"):
        data = sb.images(source)
        for first, last in ((0, 5), (5, 9), (6, 7), (7, 14), (13, 23), (21, 23)):
            part = data.rows(first, last)
            assert torch.equal(part.tensor(), data.tensor()[first:last]), (source, first, last)
            assert part.names() == data.names()[first:last]
            some = data.take(np.array([1, 8, 20]), "some").rows(1, 3)
            assert some.names() == [data.names()[8], data.names()[20]]


# --- images ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    out = tmp_path_factory.mktemp("hundred")
    command("sample", "--steps", 2, "--seeds", "0-99", "--out", out, "--micro-batch", 16, ranks=1)
    return {p.name: p.read_bytes() for p in out.glob("*.png")}


def test_an_image_is_its_seed(hundred, tmp_path):
    assert len(hundred) == 100
    command("sample", "--steps", 2, "--seeds", "0-99", "--out", tmp_path, "--micro-batch", 16)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.png")} == hundred


@pytest.mark.parametrize("at_a_time", [7, 33])
def test_an_image_knows_nothing_of_its_neighbours(hundred, tmp_path, at_a_time):
    for first in range(0, 99, at_a_time):
        seeds = ",".join(str(s) for s in reversed(range(first, min(first + at_a_time, 100))))
        with pytest.raises(SystemExit, match="0"):
            main(["sample", "--steps", "2", "--seeds", seeds, "--out", str(tmp_path), "--micro-batch", "16"])
    found = {p.name: p.read_bytes() for p in tmp_path.glob("*.png")}
    assert found == {k: hundred[k] for k in found}
    assert len(found) >= 99


# --- measurements ---------------------------------------------------------------------------------


def test_an_evaluation_on_two_processes(tmp_path):
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        extra = ("--model", "digits", "--seeds", "0-599", "--steps", 2, "--no-cache", "--out", out)
        command("evaluate", "--data", "digits", "--repeats", 3, *extra, ranks=ranks)
    close(content(tmp_path / "1"), content(tmp_path / "2"), 1e-6)
    assert "Fréchet" in (tmp_path / "2" / "report.html").read_text()


def test_reference_statistics_are_written_once_and_read_by_all(tmp_path):
    np.save(tmp_path / "x.npy", sb.images("digits").tensor()[:300].numpy())
    run = ("evaluate", "--samples", tmp_path / "x.npy", "--data", "digits", "--reference", tmp_path / "r.safetensors")
    command(*run, "--no-cache", "--out", tmp_path / "fresh")
    written = (tmp_path / "r.safetensors").read_bytes()
    command(*run, "--no-cache", "--out", tmp_path / "read")
    assert (tmp_path / "r.safetensors").read_bytes() == written
    assert content(tmp_path / "fresh")["content"]["distance"] == content(tmp_path / "read")["content"]["distance"]


def test_an_audit_on_two_processes(tmp_path):
    run = ("audit", "--data", "digits", "--model", "digits", "--count", 200, "--steps", 2)
    for ranks in (1, 2):
        command(*run, "--out", tmp_path / str(ranks), ranks=ranks)
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_a_study_on_two_processes(tmp_path):
    run = ("study", "--quick", "--samples", 40, "--repeats", 2, "--samplers", "ddim", "--calls", 3)
    for ranks in (1, 2):
        command(*run, "--out", tmp_path / str(ranks), ranks=ranks)
    close(content(tmp_path / "1"), content(tmp_path / "2"), 1e-6)  # moments of features, as in an evaluation


def test_phases_of_data_on_two_processes(tmp_path):
    for ranks in (1, 2):
        few = ("--classes", "0,1", "--limit", 80)
        command("phases", "--data", "digits", *few, "--out", tmp_path / str(ranks), ranks=ranks)
    # Sums of float32 exponentials over a part of the points, put together: 1e-6 of a curve's values.
    close(content(tmp_path / "1"), content(tmp_path / "2"), 1e-5)


def _overlaps(out):
    from symbreak.laws.pairwise_weights import SharedPoints, overlaps

    sigma = np.geomspace(0.02, 20, 9)  # from where only the tails are left to where all weigh the same
    with joined() as (rank, ranks):
        data = sb.images("digits")
        law = SharedPoints(data.shards())
        found = overlaps(law, sigma, 300, seed=4)
        assert law.points.shared == (ranks > 1)
        time = sb.collapse_time(law, queries=300)
        with alone():
            whole = sb.Empirical(data.tensor())
            exact = overlaps(whole, sigma, 300, seed=4)
            np.testing.assert_allclose(found.parts, exact.parts, rtol=1e-6, atol=1e-5)
            other = sb.collapse_time(whole, queries=300)
            assert time.sigma == pytest.approx(other.sigma, rel=1e-6)
            assert law.widest == pytest.approx(float(whole._half.max()), rel=1e-12)
            write_json(out / f"{rank}.json", [time.sigma, time.low.sigma, np.asarray(found.parts).tolist()])


def test_a_collapse_of_points_that_ranks_share(tmp_path):
    assert on_ranks(_overlaps, tmp_path / "one", ranks=1) == [0]
    assert on_ranks(_overlaps, tmp_path / "three", ranks=3) == [0] * 3
    each = [read_json(tmp_path / "three" / f"{rank}.json") for rank in range(3)]
    assert each[0] == each[1] == each[2]
    close(each[0], read_json(tmp_path / "one" / "0.json"), 1e-5)


def _network_phases(out):
    from symbreak.phases.branches import Paths
    from symbreak.phases.cloning import clones
    from symbreak.phases.losses import loss_curve
    from symbreak.phases.turns import u_turns

    with joined() as (rank, _):
        pipe = sb.load_pipeline("digits")
        network, x = sb.denoiser(pipe.unet, pipe.scheduler), sb.images("digits:held-out").tensor()[:40]
        judge = sb.extractor("digits-classifier")
        pairs = clones(network, [0.5, 2.0], judge.logits, pairs=130, steps=4)
        turns = u_turns(network, x, [0.5, 2.0], judge.logits, steps=4, paths=Paths(turns=3))
        loss = loss_curve(network, x, [0.3, 1.0, 3.0]).mmse
        with alone():
            write_json(
                out / f"{rank}.json",
                {
                    "clones": pairs.curve.value.tolist(),
                    "ends": np.asarray(pairs.ends, np.float64).sum((1, 2, 3)).tolist(),
                    "turns": turns.features.value.tolist(),
                    "loss": [loss.value.tolist(), loss.low.tolist()],
                },
            )


@pytest.mark.slow
def test_phases_of_a_network_on_two_processes(tmp_path):
    few = ("--quick", "--pairs", 20, "--steps", 6, "--branches", 3, "--classes", "0,1", "--limit", 150)
    for ranks in (1, 2):
        out = ("--model", "digits", "--out", tmp_path / str(ranks))
        codes = on_ranks(main, [str(a) for a in ("phases", "--data", "digits", *few, *out)], ranks=ranks, wait=1500)
        assert codes == [0] * ranks
    close(content(tmp_path / "1"), content(tmp_path / "2"), 1e-5)


@pytest.mark.slow
def test_a_start_fitted_on_two_processes(tmp_path):
    for ranks in (1, 2):
        out = (
            "--start",
            "--model",
            "digits",
            "--sampler",
            "ddim",
            "--steps",
            3,
            "--out",
            tmp_path / f"{ranks}.safetensors",
        )
        command("fit", "--data", "digits", *out, ranks=ranks)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_experiments_on_a_network_on_two_processes(tmp_path):
    assert on_ranks(_network_phases, tmp_path / "two") == [0, 0]
    assert on_ranks(_network_phases, tmp_path / "one", ranks=1) == [0]
    alone_ = read_json(tmp_path / "one" / "0.json")
    assert alone_ == read_json(tmp_path / "two" / "0.json") == read_json(tmp_path / "two" / "1.json")
    assert 0 < alone_["clones"][0] <= 1


# --- training -------------------------------------------------------------------------------------


def _recipe(path, **settings):
    given = {"channels": [8, 16], "steps": 12, "batch": 20, "dropout": 0.0, "warmup": 2}
    return write_json(path, {**given, **settings})


def _weights(folder):
    return read_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors")[0]


def test_two_processes_train_the_network_of_one(tmp_path):
    recipe = _recipe(tmp_path / "recipe.json")
    for ranks in (1, 2):
        command("train", "--data", "digits", "--recipe", recipe, "--out", tmp_path / str(ranks), ranks=ranks)
    one, two = (_weights(tmp_path / str(ranks)) for ranks in (1, 2))
    # Adam divides by the size of gradients: where one is nearly zero, rounding moves a weight by up to a step (1e-3).
    gaps = torch.cat([(one[k] - two[k]).abs().reshape(-1) for k in one])
    assert float(gaps.median()) < 1e-6
    assert float(gaps.max()) < 12 * 1e-3
    losses = [read_json(tmp_path / str(ranks) / "training.json")["loss"] for ranks in (1, 2)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def _train_until(out, recipe, steps):
    class Enough(Exception):
        pass

    def tell(stage, step, _):
        if stage == "steps" and steps is not None and step >= steps:
            raise Enough

    run = sb.Run(progress=tell)
    with joined(), contextlib.suppress(Enough):
        sb.train_network(sb.images("digits"), out, sb.Recipe.load(recipe), checkpoint_seconds=0.0, run=run)


def test_interrupted_training_on_two_processes_ends_with_the_same_bits(tmp_path):
    recipe = _recipe(tmp_path / "recipe.json", dropout=0.1, steps=25)
    assert on_ranks(_train_until, tmp_path / "whole", recipe, None) == [0, 0]
    assert on_ranks(_train_until, tmp_path / "cut", recipe, 10) == [0, 0]
    assert (tmp_path / "cut" / "checkpoint.safetensors").exists()
    assert on_ranks(_train_until, tmp_path / "cut", recipe, None) == [0, 0]
    one, two = _weights(tmp_path / "whole"), _weights(tmp_path / "cut")
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_batch_smaller_than_the_number_of_processes(tmp_path):
    recipe = _recipe(tmp_path / "recipe.json", batch=1)
    assert on_ranks(main, ["train", "--data", "digits", "--recipe", str(recipe), "--out", str(tmp_path / "o")]) == [
        2,
        2,
    ]


# --- who reads and holds what ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """1,536 digits as encoded images in a parquet file, six blocks of 256, and 200 others."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    data = sb.images("digits:all")
    rows, labels = np.concatenate(list(data.blocks()))[:, 0] * 15, data.labels.tolist()

    def encoded(image):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    for name, part in (("train", slice(0, 1536)), ("held", slice(1536, 1736))):
        table = pa.table({"image": [encoded(r) for r in rows[part]], "label": labels[part]})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=128)
    return folder


def _counted(out, train, arguments):
    """Run a command, and write down how many of the training images this process decoded."""
    import pyarrow.parquet as pq

    import symbreak.data.readers

    read, real = set(), symbreak.data.readers.attempt
    symbreak.data.readers.attempt = lambda data, *more: read.add(data) or real(data, *more)
    try:
        main(arguments)
    finally:
        known = {cell["bytes"] for cell in pq.read_table(train)["image"].to_pylist()}
        (out / f"{os.environ['RANK']}.json").write_text(json.dumps(len(read & known)))


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit",),
        ("fit", "--rank", 5),
        pytest.param(("phases", "--holdout", "HELD"), marks=pytest.mark.slow),
        ("evaluate", "--samples", "HELD", "--holdout", "HELD", "--features", "pixels", "--no-cache", "--repeats", 2),
        pytest.param(
            ("evaluate", "--samples", "HELD", "--holdout", "HELD", "--features", "classifier", "--no-cache"),
            marks=pytest.mark.slow,
        ),
        ("audit", "--samples", "HELD", "--holdout", "HELD"),
        pytest.param(("audit", "--samples", "HELD", "--features", "classifier"), marks=pytest.mark.slow),
        ("study", "--quick", "--samplers", "ddim", "--calls", 3, "--holdout", "HELD", "--features", "pixels"),
        ("train", "--recipe", "RECIPE"),
        pytest.param(("phases", "--model", "digits", "--quick", "--holdout", "HELD"), marks=pytest.mark.slow),
        pytest.param(("fit", "--start", "--model", "digits", "--steps", 3), marks=pytest.mark.slow),
    ],
    ids=lambda a: "-".join(str(w) for w in a if w not in ("HELD", "RECIPE")),
)
def test_no_rank_reads_everything(pictures, tmp_path, arguments):
    given = {"HELD": pictures / "held.parquet", "RECIPE": _recipe(tmp_path / "recipe.json")}
    out = tmp_path / ("out.safetensors" if arguments[0] == "fit" else "out")
    train = pictures / "train.parquet"
    whole = [arguments[0], "--data", train, *(given.get(a, a) for a in arguments[1:]), "--out", out]
    assert on_ranks(_counted, tmp_path, train, [str(a) for a in whole], ranks=3, wait=1200) == [0] * 3
    read = [read_json(tmp_path / f"{rank}.json") for rank in range(3)]
    # A third each, of whole blocks of 256, and of the parts that are kept back; and pictures of the report.
    assert max(read) <= 1024
    assert sum(read) > 1000


def test_a_hub_data_set_is_read_in_parts(pictures, tmp_path, monkeypatch):
    import datasets

    train, load = pictures / "train.parquet", datasets.load_dataset
    given = {"data_files": str(train), "cache_dir": str(tmp_path / "cache")}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    monkeypatch.setattr(
        datasets, "load_dataset", lambda _, split: load("parquet", split=split, features=features, **given)
    )
    run = ["fit", "--data", "owner/digits", "--out", str(tmp_path / "m.safetensors")]
    assert on_ranks(_counted, tmp_path, train, run, ranks=3) == [0] * 3
    assert max(read_json(tmp_path / f"{rank}.json") for rank in range(3)) <= 514
    assert torch.equal(sb.Moments.load(tmp_path / "m.safetensors").cov, sb.Moments.fit(sb.images(train)).cov)


def test_images_of_a_part_and_those_asked_for(pictures, tmp_path):
    data = sb.images(pictures / "train.parquet")
    x = data.tensor()
    index = torch.tensor([1535, 0, 1, 2, 600, 7, 7, 550])
    for memory in (2**30, 1000):  # in memory, in a file
        rows = data.shards(sb.Run(tmp_path / "new").share(memory / 2**30))
        assert (rows._file is None) == (memory == 2**30)
        assert rows.shape == (1536, 1, 8, 8)
        assert torch.equal(rows.at(index), x[index])
        some = rows.take(np.array([3, 4, 5, 1535])).take(np.array([1, 2, 3]))
        assert len(some) == 3
        assert torch.equal(some.at(torch.tensor([2, 0])), x[[1535, 4]])
        assert torch.equal(torch.cat([turn[1] for turn in some.pieces(2)]), x[[4, 5, 1535]])
    assert list((tmp_path / "new").iterdir()) == []  # the file has no name
    assert on_ranks(_asked_for, pictures, x, index, ranks=3) == [0] * 3


def _asked_for(pictures, x, index):
    with joined() as (rank, _):
        data = sb.images(pictures / "train.parquet")
        assert torch.equal(data.tensor(), x)
        for rows in (data.shards(), data.shards(sb.Run().share(1000 / 2**30)), Shards.of(x)):
            assert (rows.first, rows.last) == (512 * rank, 512 * rank + 512)
            assert torch.equal(rows.at(index), x[index])
            odd = rows.take(np.arange(1, 700, 2))  # the last rank has none of them
            assert torch.equal(odd.at(torch.tensor([349, 3])), x[[699, 7]])
            turns = list(odd.pieces(200))
            assert [first for first, _ in turns] == [[0, 200], [256], []][rank]
            mine = [x[1:512:2], x[513:700:2], x[:0]][rank]
            assert torch.equal(torch.cat([mine[:0], *(rows for _, rows in turns)]), mine)
        with alone(), pytest.raises(RuntimeError, match="one rank alone"):
            rows.at(index)


# --- faults ---------------------------------------------------------------------------------------


def _dies(out):
    with joined() as (rank, _):

        def make(i):
            if rank == 1 and i == 3:
                os._exit(9)
            return {"x": np.array(i)}

        sb.Run(out).identified({"of": "us"}).parts("b", range(6), make)


def _survives(out):
    try:
        _dies(out)
    except Exception as error:
        from symbreak.runtime.ranks import lost

        raise SystemExit(1 if lost(error) else 7) from None


def test_a_dead_rank_ends_the_others_and_costs_its_own_block_only(tmp_path):
    codes = on_ranks(_survives, tmp_path / "out", wait=240)
    assert codes == [1, 9]
    kept = sorted(p.name for p in (tmp_path / "out").glob("blocks-*/*.safetensors"))
    assert kept == [f"b-{i}.safetensors" for i in (0, 1, 2, 4)]


def test_sampling_goes_on_after_a_rank_was_killed(hundred, tmp_path):
    run = ["sample", "--steps", "2", "--seeds", "0-99", "--out", str(tmp_path), "--micro-batch", "16"]

    def kill_second(children):
        while not list(tmp_path.glob("*.png")) and children[1].is_alive():
            time.sleep(0.002)
        os.kill(children[1].pid, signal.SIGKILL)

    codes = on_ranks(main, run, meanwhile=kill_second)
    made = {p.name: p.read_bytes() for p in tmp_path.glob("*.png")}
    assert codes == [1, -signal.SIGKILL]  # the first rank says that the other one is gone
    assert 0 < len(made) < 100
    assert made == {k: hundred[k] for k in made}
    command(*run)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.png")} == hundred


# --- launchers ------------------------------------------------------------------------------------


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "PORT"],
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "PORT"],
}


def launched(launcher, *arguments):
    """What a command line prints as JSON on two processes of a launcher: one of them speaks for all."""
    words = [str(free_port()) if w == "PORT" else w for w in LAUNCHERS[launcher]]
    done = subprocess.run(
        [sys.executable, "-m", *words, "-m", "symbreak", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_launcher_starts_the_ranks_that_forks_stand_for(tmp_path):
    """With `fit`, which needs no diffusers: three interpreters start in half of the time."""
    assert launched("torchrun", "fit", "--data", "digits", "--out", tmp_path / "two.safetensors")["count"] == 898
    command("fit", "--data", "digits", "--out", tmp_path / "one.safetensors", ranks=1)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(hundred, tmp_path, launcher):
    run = ("sample", "--steps", 2, "--seeds", "0-40", "--out", tmp_path, "--micro-batch", 16)
    assert launched(launcher, *run)["made"] == 41
    found = {p.name: p.read_bytes() for p in tmp_path.glob("*.png")}
    assert len(found) == 41
    assert found == {k: hundred[k] for k in found}
