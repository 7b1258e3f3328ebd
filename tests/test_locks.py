"""Commands in one folder: one at a time, whoever they are; nothing mixed, nothing lost, stale locks lock nothing."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import symbreak as sb
from symbreak.cli.commands import main
from symbreak.metrics.reference import statistics
from symbreak.report.record import Record
from symbreak.runtime.files import InputError, try_writing, write_json
from symbreak.runtime.lock import Hold, locked
from symbreak.runtime.run import Run

FORK = multiprocessing.get_context("fork")
SAMPLE = "sample --seeds 0-7 --micro-batch 4 --steps {} --out {}"


def in_child(function, *arguments):
    """A forked process that calls a function; its exit code is that of the function."""
    child = FORK.Process(target=function, args=arguments)
    child.start()
    return child


def command(line, said):
    """A command line in a forked child, its stderr in a file."""
    torch.set_num_threads(1)
    with Path(said).open("w") as stream, contextlib.redirect_stderr(stream):
        main(line.split())


def holding(folder, ready, seconds):
    with locked(folder):
        ready.set()
        time.sleep(seconds)


@pytest.fixture
def held(tmp_path):
    """A folder that a child holds."""
    ready = FORK.Event()
    child = in_child(holding, tmp_path / "held", ready, 60)
    assert ready.wait(20)
    yield tmp_path / "held", child
    child.kill()
    child.join()


def test_the_second_one_is_told_who_has_the_folder(held):
    folder, child = held
    line = rf"{folder} is in use by process {child.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d: .+ Wait for it"
    for call in (
        lambda: Hold(folder),
        lambda: Run(folder).identified({"a": 1}),
        lambda: sb.train_network(sb.images("digits"), folder, sb.Recipe(steps=1)),
        lambda: sb.audit(sb.images("digits", limit=40), run=Run(folder)),
    ):
        with pytest.raises(InputError, match=line) as error:
            call()
        assert "\n" not in str(error.value)
    assert [p.name for p in folder.iterdir()] == [".lock"]


def test_a_command_is_refused_with_exit_code_2(held, capsys):
    folder, child = held
    for line in (SAMPLE.format(2, folder), f"audit --data digits --out {folder}", f"study --quick --out {folder}"):
        with pytest.raises(SystemExit) as left:
            main(line.split())
        said = capsys.readouterr().err
        assert left.value.code == 2
        assert said.count("\n") == 1
        assert f"in use by process {child.pid}" in said


def test_the_lock_of_a_dead_process_locks_nothing(held):
    folder, child = held
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert (folder / ".lock").exists()
    with locked(folder):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    assert not list(folder.iterdir())


def test_one_process_shares_its_lock_and_a_fork_of_it_does_not_keep_it(tmp_path):
    folder = tmp_path / "a" / "b"
    ready = FORK.Event()
    with locked(folder), locked(tmp_path / "a" / ".." / "a" / "b"):
        child = in_child(ready.wait, 30)
    assert not (tmp_path / "a").exists()
    other = in_child(holding, folder, FORK.Event(), 0)  # the child that was forked in between lives on
    other.join(20)
    assert other.exitcode == 0
    ready.set()
    child.join(20)
    run = Run(folder).identified({"a": 1})
    run.value("x", lambda: 1)
    del run  # forgotten, not closed: what is finished stays, the lock goes
    assert not (folder / ".lock").exists()
    assert list(folder.glob("blocks-*/cells.json"))


def test_a_folder_that_cannot_be_written_is_noticed_first(tmp_path, monkeypatch, capsys):
    real = os.open

    def read_only(path, flags, *rest, **more):
        if str(path).startswith(str(tmp_path)) and flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(30, "Read-only file system")
        return real(path, flags, *rest, **more)

    loaded = []
    monkeypatch.setattr("symbreak.start.loading.load_pipeline", lambda *_, **__: loaded.append(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        patch.setattr("tempfile._os.open", read_only)
        for line in (
            SAMPLE.format(2, tmp_path / "o"),
            f"evaluate --data digits --model digits --out {tmp_path / 'o'}",
            f"study --quick --out {tmp_path / 'o'}",
            f"fit --data digits --out {tmp_path / 'o' / 'law.safetensors'}",
        ):
            with pytest.raises(SystemExit) as left:
                main(line.split())
            said = capsys.readouterr().err
            assert left.value.code == 2, said
            assert "cannot be written (Read-only file system)" in said
            assert said.count("\n") == 1
        assert not loaded
        # A cache that cannot be written costs speed.
        data = sb.images("digits", limit=50)
        first = statistics(lambda x: x.flatten(1)[:, :3], data, rows=4, cache=tmp_path / "cache")
        assert "nothing is cached" in capsys.readouterr().err
    again = statistics(lambda x: x.flatten(1)[:, :3], data, rows=4)
    assert torch.equal(first.rows, again.rows)
    (tmp_path / "file").write_text("")
    statistics(lambda x: x.flatten(1)[:, :3], data, rows=4, cache=tmp_path / "file")
    assert "nothing is cached" in capsys.readouterr().err


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("symbreak.runtime.lock._lock", none)
    with locked(tmp_path / "a"):
        assert "knows no locks" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_names_of_230_bytes_and_names_that_steer_a_terminal(tmp_path, capsys):
    path = tmp_path / ("ä" * 110 + ".json" + "x" * 5)
    assert len(os.fsencode(path.name)) == 230
    write_json(path, {"a": 1})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(SystemExit):
        main(["fit", "--data", str(tmp_path / "a\x1b[31m\u202eb.npy"), "--out", str(tmp_path / "x.safetensors")])
    said = capsys.readouterr().err
    assert "\\x1b[31m\\u202eb.npy" in said
    assert "\x1b" not in said
    main_out = tmp_path / "n\x1b[2J"
    with pytest.raises(SystemExit) as left:
        main(["sample", "--seeds", "0-1", "--steps", "1", "--out", str(main_out)])
    assert left.value.code == 0
    out, err = capsys.readouterr()
    assert "\x1b[2J" not in out + err
    assert "n\\x1b[2J" in out
    try_writing(main_out)


@pytest.mark.parametrize("line", [["--out", ""], ["--out="], ["--seeds", ""]])
def test_an_empty_value_is_an_error(tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["sample", *line])
    assert left.value.code == 2
    assert line[0].strip("=") in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_symbreak_wrote_is_not_data(tmp_path, capsys):
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    for i, image in enumerate(noise):
        (tmp_path / "d" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "d" / "ab"[i % 2] / f"{i}.png")
    before = sb.images(tmp_path / "d")
    with pytest.raises(SystemExit):
        main(SAMPLE.format(2, tmp_path / "d" / "made").split())
    capsys.readouterr()
    after = sb.images(tmp_path / "d")
    assert after.classes == before.classes == ("a", "b")
    assert after.fingerprint() == before.fingerprint()
    assert len(sb.images(tmp_path / "d" / "made")) == 8  # asked for by name they are


# --- pairs of commands at once ------------------------------------------------------------------------------------

PAIRS = {
    "sample": SAMPLE,
    "train": "train --data digits --limit 64 --steps {} --recipe IN/recipe.json --out {}",
    "audit": "audit --data digits --limit 10{} --out {}",
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a command writes when it is alone."""
    folder, done = tmp_path_factory.mktemp("alone"), {}
    (folder / "recipe.json").write_text('{"channels": [8], "batch": 16, "warmup": 2}')

    def content(line, number):
        if (line, number) not in done:
            out = folder / f"{len(done)}"
            child = in_child(command, said_in(line, number, out, folder), folder / "said")
            child.join(120)
            assert child.exitcode == 0, (folder / "said").read_text()
            done[line, number] = written(out)
        return done[line, number]

    content.folder = folder
    return content


def said_in(line, number, out, folder):
    return PAIRS[line].format(number, out).replace("IN", str(folder))


def written(out):
    """Contents of files that are the same in every run."""
    found = {}
    for path in sorted(p for p in Path(out).rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if name == "record.json":
            record = Record.load(out)
            found[name] = json.dumps([record.settings, record.content], sort_keys=True)
        elif name == "training.json":
            found[name] = json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"})
        elif path.suffix != ".html":
            found[name] = path.read_bytes()
    return found


def pair(line, same, alone, tmp_path, chance):
    """Two commands at once in a folder: each ends as it would alone, or is refused with a line."""
    numbers = (3, 3) if same else (3, 4)
    out = tmp_path / "out"
    children = []
    for i, number in enumerate(numbers):
        children.append(in_child(command, said_in(line, number, out, alone.folder), tmp_path / f"said-{i}"))
        time.sleep(chance.random() * 0.3)
    for child in children:
        child.join(180)
    codes = [c.exitcode for c in children]
    said = [(tmp_path / f"said-{i}").read_text() for i in (0, 1)]
    assert 0 in codes, said
    assert set(codes) <= {0, 2}, said
    for code, text in zip(codes, said):
        assert "Traceback" not in text
        if code == 2:
            assert "in use by process" in text or "other settings" in text
    found = written(out)
    whole = [alone(line, number) for number, code in zip(numbers, codes) if code == 0]
    assert found == whole[-1] or found == whole[0], (codes, said)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("line", ["sample", "audit"])
def test_two_commands_at_once(alone, tmp_path, line, same):
    pair(line, same, alone, tmp_path, random.Random(f"{line} {same}"))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(100))
def test_a_hundred_pairs_of_commands(alone, tmp_path, number):
    pair(sorted(PAIRS)[number % 3], number % 2 == 0, alone, tmp_path, random.Random(number))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(50))
def test_kills_while_another_process_reads(alone, tmp_path, number):
    """What a reader sees meanwhile is whole; afterwards the command goes on and ends as it would alone."""
    chance, out = random.Random(number), tmp_path / "out"
    line = sorted(PAIRS)[number % 3]
    child = in_child(command, said_in(line, 3, out, alone.folder), tmp_path / "said")
    end = time.monotonic() + 0.2 + chance.random() * 1.5
    seen = 0
    while time.monotonic() < end:
        for path in Path(out).glob("*.*"):
            with contextlib.suppress(FileNotFoundError):
                if path.suffix == ".json":
                    json.loads(path.read_text())
                elif path.suffix == ".png" and not path.name.startswith("."):
                    from PIL import Image

                    Image.open(path).load()
                seen += 1
    child.kill()
    child.join()
    again = in_child(command, said_in(line, 3, out, alone.folder), tmp_path / "said")
    again.join(180)
    assert again.exitcode == 0, (tmp_path / "said").read_text()
    assert written(out) == alone(line, 3)


def test_two_interpreters_know_of_each_other(tmp_path):
    """Not only forks: another interpreter sees the lock, and the holder's command line."""
    code = f"from symbreak.runtime.lock import Hold; from pathlib import Path; Hold(Path({str(tmp_path)!r}))"
    with locked(tmp_path):
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    assert f"in use by process {os.getpid()}" in found.stderr
