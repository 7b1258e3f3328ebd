import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from symbreak.cli import console
from symbreak.cli.commands import main
from symbreak.data.readers import images
from symbreak.laws import Gaussian
from symbreak.moments.one_pass import Moments
from symbreak.networks.samplers import scheduler
from symbreak.runtime.files import read_tensors, write_tensors
from symbreak.start.fit import late_start
from symbreak.start.late_start import Grid, LateStart, on_grid, with_steps
from symbreak.start.learned_steps import Learned
from tests.worlds import small_choice


@pytest.fixture(scope="module", autouse=True)
def a_small_choice():
    """These tests are of the commands: a start is chosen by the same code with fewer levels and states."""
    with small_choice():
        yield


FIT = ("fit", "--start", "--data", "digits", "--model", "digits")


def symbreak(capsys, *argv):
    """(exit code, stdout, stderr) of a command in this process."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def digits_folder(path):
    data = images("digits")
    for i, (x, y) in enumerate(zip(data.tensor()[:60], data.labels[:60])):
        (path / str(int(y))).mkdir(parents=True, exist_ok=True)
        Image.fromarray(((x[0].numpy() + 1) * 127.5).round().astype(np.uint8)).save(path / str(int(y)) / f"{i}.png")
    return path


def test_fit_sample_evaluate_as_a_user_would(capsys, tmp_path):
    code, out, _ = symbreak(capsys, "fit", "--data", "digits", "--out", tmp_path / "m.safetensors", "--json")
    assert code == 0
    fitted = json.loads(out)
    assert fitted["count"] == 898
    assert fitted["speciation"]["level"]["sigma"] == pytest.approx(1.3359, abs=1e-3)

    common = ("sample", "--start", tmp_path / "m.safetensors", "--sampler", "dpm++2m-karras", "--steps", 4, "--json")
    code, out, _ = symbreak(capsys, *common, "--seeds", "0-29", "--out", tmp_path / "x")
    assert code == 0
    assert json.loads(out)["made"] == 30
    files = sorted(p.name for p in (tmp_path / "x").glob("*.png"))
    assert files[0] == "00000000.png"
    assert len(files) == 30
    first = (tmp_path / "x" / "00000007.png").read_bytes()

    # the same command goes on: what exists is kept, what is missing is made, with the same bits
    (tmp_path / "x" / "00000007.png").unlink()
    code, out, _ = symbreak(capsys, *common, "--seeds", "0-39", "--out", tmp_path / "x")
    assert json.loads(out)["made"] == 11
    assert (tmp_path / "x" / "00000007.png").read_bytes() == first
    code, _, err = symbreak(capsys, *common, "--steps", 5, "--out", tmp_path / "x")
    assert code == 2
    assert "other settings" in err

    code, out, _ = symbreak(
        capsys, "evaluate", "--samples", tmp_path / "x", "--data", "digits", "--repeats", 2, "--json"
    )
    assert code == 0
    result = json.loads(out)
    assert result["distance"]["samples"] == 20
    assert result["distance"]["extractor"] == "digits-classifier"
    assert result["distance"]["mean"] > result["floor"]["pooled"]
    code, out, _ = symbreak(
        capsys, "evaluate", "--model", "digits", "--data", "digits", "--seeds", "0-19", "--steps", 2, "--repeats", 2
    )
    assert code == 0
    assert "held-out images" in out


def test_phases_on_every_kind_of_file(capsys, tmp_path, monkeypatch):
    # of reading files: what a mixture of ten classes of six images says is asked elsewhere, and takes most of the time
    monkeypatch.setattr("symbreak.studies.diagnose.class_laws", lambda d, laws: None)
    folder = digits_folder(tmp_path / "folder")
    code, out, _ = symbreak(capsys, "phases", "--data", folder, "--json", "--out", tmp_path / "p")
    assert code == 0
    wanted = json.loads(out)["content"]
    assert wanted["data"]["count"] == 60
    assert (tmp_path / "p" / "report.html").exists()
    level = wanted["speciation"]["[-1, 1]"]["level"]
    assert set(level) >= {"sigma", "ou_time", "log_snr", "step"}
    x = images(folder).tensor()
    np.savez(tmp_path / "a.npz", images=x.numpy())
    np.save(tmp_path / "a.npy", x.numpy())
    for name in ("a.npz", "a.npy"):
        code, out, _ = symbreak(capsys, "fit", "--data", tmp_path / name, "--json", "--out", tmp_path / "m.safetensors")
        assert json.loads(out)["speciation"]["level"]["sigma"] == pytest.approx(level["sigma"], rel=1e-5)


FEW = ("--quick", "--pairs", 20, "--steps", 8, "--branches", 4)


@pytest.mark.slow
def test_phases_of_a_network(capsys, tmp_path):
    code, out, _ = symbreak(
        capsys, "phases", "--data", "digits", "--model", "digits", *FEW, "--out", tmp_path, "--json"
    )
    assert code == 0
    content = json.loads(out)["content"]
    assert content["schedule"] == "DDPMScheduler"
    levels = {(c["name"], c["of"]): c["level"] for c in content["criteria"]}
    # Twenty pairs place the decision within a factor of two of what the labels say of the data.
    ratio = levels["cloning", "network"]["sigma"] / levels["cloning", "data"]["sigma"]
    assert 0.5 < ratio < 2
    assert {c["name"] for c in content["checks"]} >= {"early fluctuations revert"}
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == 5  # criteria, curves, an arc, and two of the spectrum
    assert symbreak(capsys, "report", "--help")[0] == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--classify", "nothing:at_all"), "cannot be imported"),
        (("--classify", "magic"), "unknown extractor"),
        (("--holdout", "nowhere"), "nowhere"),
        (("--model", "nowhere"), "nowhere"),
        (("--model", "digits", "--pairs", 2), "pairs is 2"),
        (("--clusters", 1), "cluster"),
    ],
)
def test_bad_phases(capsys, argv, said):
    code, out, error = symbreak(capsys, "phases", "--data", "digits", *argv)
    assert code == 2
    assert out == ""
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_study_and_report(capsys, tmp_path):
    argv = ("study", "--samplers", "ddim", "--calls", "3", "--quick", "--out", tmp_path / "s")
    code, out, _ = symbreak(capsys, *argv)
    assert code == 0
    assert out.startswith("Smoke run: too few samples to be evidence.\nWith 3 network evaluations")
    assert "smoke, not evidence" in " ".join(out.split())
    assert f"report: {tmp_path / 's' / 'report.html'}" in out
    html = (tmp_path / "s" / "report.html").read_text()
    assert "Smoke run" in html
    code, out, _ = symbreak(capsys, "report", tmp_path / "s", "--out", tmp_path / "again.html", "--json")
    assert json.loads(out) == {"report": str(tmp_path / "again.html")}
    assert (tmp_path / "again.html").read_text() == html


def test_one_repeat_has_no_interval_and_still_ends(capsys, tmp_path):
    argv = ("study", "--samplers", "dpm++2s", "--calls", "3", "--samples", "20", "--repeats", "1", "--quick")
    code, _, _ = symbreak(capsys, *argv, "--out", tmp_path / "s")
    assert code == 0


def test_a_law_of_another_shape_writes_nothing(capsys, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 255, (20, 16, 16), dtype=np.uint8))
    symbreak(capsys, "fit", "--data", tmp_path / "x.npy", "--out", tmp_path / "m.safetensors")
    code, _, err = symbreak(
        capsys, "sample", "--start", tmp_path / "m.safetensors", "--at", "400", "--out", tmp_path / "o"
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "Fit it on such data" in err
    assert not (tmp_path / "o").exists()


def test_without_arguments_there_is_help(capsys):
    code, out, err = symbreak(capsys)
    assert (code, err) == (0, "")
    assert "phases" in out


FLAGS = {
    "audit": "--classes --compile --crop --data --device --features --holdout --json --labels --layout --limit "
    "--memory --mode --model --near --out --pad --precision --range --sampler --samples --samples-range "
    "--seed --seeds --size --skip-bad --split --steps --threshold --weights --weights-sha256",
    "evaluate": "--at --cache --classes --classify --compile --crop --data --device --features --holdout --json "
    "--labels --layout --memory --mode --model --no-cache --out --pad --precision --range --reference "
    "--repeats --rows --sampler --samples --samples-range --seed --seeds --size --skip-bad --split "
    "--start --steps --weights --weights-sha256",
    "fit": "--classes --clusters --compile --crop --data --device --holdout --json --labels --layout --memory "
    "--mode --model --out --pad --precision --range --rank --sampler --size --skip-bad --split --start "
    "--steps",
    "phases": "--branches --classes --classify --clusters --compile --crop --data --device --holdout --json "
    "--labels --layout --limit --memory --mode --model --out --pad --pairs --precision --quick --range "
    "--seed --size --skip-bad --split --steps",
    "report": "--json --out",
    "sample": "--at --classes --clusters --compile --crop --data --device --holdout --json --labels --layout "
    "--micro-batch --mode --model --out --pad --precision --range --sampler --seeds --size --skip-bad "
    "--split --start --steps",
    "study": "--calls --classes --compile --crop --data --device --features --holdout --json --labels --layout "
    "--memory --mode --model --out --pad --precision --quick --range --repeats --samplers --samples "
    "--size --skip-bad --split",
    "train": "--classes --compile --conditional --crop --data --device --init --json --labels --layout --limit "
    "--memory --minutes --mode --out --pad --precision --range --recipe --residual --size --skip-bad --split --steps",
    "world": "--dim --json --means --out --seed --train --variance --weights",
}


@pytest.mark.parametrize("command", FLAGS)
def test_scripts_of_users_go_on_working(capsys, command):
    code, out, err = symbreak(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert "Example" in out
    assert set(FLAGS[command].split()) <= set(re.findall(r"--[a-z0-9-]+", out))


def test_help_is_there_at_once():
    code = "import sys; sys.argv = ['symbreak', '--help']; from symbreak.cli.commands import main\ntry: main()\n"
    code += "except SystemExit: print(sorted({'torch', 'scipy', 'diffusers', 'PIL', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_values_may_begin_with_a_minus_sign(capsys, tmp_path):
    x = np.random.default_rng(0).random((30, 4, 4)) * 4 - 2
    np.save(tmp_path / "x.npy", x)
    for said in (("--range", "-2,2"), ("--range=-2,2",)):
        code, out, _ = symbreak(
            capsys, "fit", "--data", tmp_path / "x.npy", *said, "--out", tmp_path / "m.safetensors", "--json"
        )
        assert (code, json.loads(out)["count"]) == (0, 30)


def test_train(capsys, tmp_path):
    (tmp_path / "r.json").write_text('{"channels": [8, 8], "steps": 5, "batch": 8}')
    argv = ("train", "--data", "digits", "--recipe", tmp_path / "r.json", "--out", tmp_path / "net")
    code, out, _ = symbreak(capsys, *argv, "--steps", 3, "--json")
    assert code == 0
    assert json.loads(out)["recipe"]["steps"] == 3
    _, out, _ = symbreak(capsys, *argv, "--steps", 3)  # finished: it says the same again
    following = out.splitlines()[-1]
    assert following.startswith("next: symbreak sample ")
    code, _, _ = symbreak(capsys, *shlex.split(following)[2:], "--steps", 1)
    assert code == 0
    assert len(list((tmp_path / "net-samples").glob("*.png"))) == 16
    plain = (tmp_path / "r.json").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "net").rglob("*") if path.is_file()} == {plain}


def test_a_log_file_tells_how_far_a_long_stage_is(capsys, monkeypatch):
    for stage, every, lines in (("clones", 0.0, 3), ("", 0.0, 3), ("clones", 3600.0, 0)):
        monkeypatch.setattr(console, "EVERY", every)
        with console.running(None) as run:
            for done in range(3):
                (run.named(stage) if stage else run).tell(done, 1500)
        said = f"{stage or 'progress'}: "
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith(said)]
        assert len(told) == lines, told


@pytest.mark.parametrize("steps", [("--steps", "2.5"), ("--steps=2.5",)], ids=["apart", "together"])
def test_a_fraction_of_a_step_is_no_number_of_steps(capsys, tmp_path, steps):
    code, out, err = symbreak(capsys, "sample", *steps, "--out", tmp_path / "x")
    assert (code, out, err) == (2, "", "symbreak: --steps 2.5; expected a whole number.\n")
    assert not (tmp_path / "x").exists()


def test_shapes_that_differ_name_the_flag(capsys, tmp_path):
    digits_folder(tmp_path / "grey")
    for name, size in (("colour", 8), ("large", 9)):
        (tmp_path / name).mkdir()
        for i in range(12):
            Image.new("RGB" if size == 8 else "L", (size, size), i).save(tmp_path / name / f"{i}.png")
    for name, way in (("colour", "Read them in grey (--mode L)."), ("large", "Resize them (--size 8).")):
        _, _, err = symbreak(capsys, "phases", "--data", tmp_path / "grey", "--holdout", tmp_path / name)
        assert err.splitlines()[-1].endswith(way), err


def make(path, what):
    if what == "empty":
        path.mkdir()
    elif what == "corrupt":
        digits_folder(path)
        (path / "0" / "zz.png").write_bytes(b"\x89PNG nope")
    elif what == "mixed":
        digits_folder(path)
        Image.new("L", (9, 8)).save(path / "0" / "zz.png")
    elif what == "one":
        path.mkdir()
        Image.new("L", (8, 8)).save(path / "a.png")
    elif what == "equal":
        np.save(path.with_suffix(".npy"), np.full((5, 4, 4), 7, np.uint8))
        return path.with_suffix(".npy")
    elif what == "nan":
        np.save(path.with_suffix(".npy"), np.full((5, 4, 4), np.nan))
        return path.with_suffix(".npy")
    elif what == "range":
        np.save(path.with_suffix(".npy"), np.random.default_rng(0).random((5, 4, 4)) * 200)
        return path.with_suffix(".npy")
    return path


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "does not exist"),
        ("empty", "holds no images"),
        ("corrupt", "zz.png cannot be read"),
        ("mixed", "zz.png is 8 x 9, not 8 x 8"),
        ("one", "holds 1 image"),
        ("equal", "all 5 samples are equal"),
        ("nan", "NaN"),
        ("range", "outside the range"),
    ],
)
def test_bad_data_is_one_line_and_writes_nothing(capsys, tmp_path, what, words):
    source = make(tmp_path / "data", what)
    code, out, err = symbreak(capsys, "fit", "--data", source, "--out", tmp_path / "new" / "m.safetensors")
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "new").exists()


def test_skip_bad_counts(capsys, tmp_path):
    source = make(tmp_path / "data", "corrupt")
    code, out, err = symbreak(
        capsys, "fit", "--data", source, "--out", tmp_path / "m.safetensors", "--skip-bad", "--json"
    )
    assert code == 0
    assert json.loads(out)["count"] == 60
    assert "1 unusable images are left out" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("sample", "--start", "FIT", "--at", "5000"), "outside the schedule"),
        (("sample", "--start", "FIT", "--at", "sigma=x"), "expected speciation"),
        (("sample", "--start", "FIT", "--at", "foo=400"), "expected speciation"),
        (("sample", "--micro-batch", "0"), "at least 1"),
        (("sample", "--seeds", "99999999999999999999"), "2^63"),
        (("study", "--calls", "2,5"), "too few for pndm"),
        (("study", "--samplers", "heun"), "cannot spend exactly 10"),
        (("study", "--data", "absent.npy", "--skip-bad"), "does not exist"),
        (("sample", "--start", "none", "--sampler", "ipndm"), "unknown sampler"),
        (("sample", "--start", "absent"), "does not exist"),
        (("sample", "--seeds", "9-1"), "empty"),
        (("sample", "--model", "absent/there/x"), "does not exist"),
        (("study", "--calls", "three"), "expected numbers"),
        (("study", "--data", "absent.npy"), "does not exist"),
        (("evaluate", "--data", "digits"), "either --samples or --model"),
        (("report", "absent.json"), "cannot be read"),
        (("train", "--data", "digits", "--recipe", "absent.json"), "cannot be read"),
        (("fit", "--data", "digits", "--range", "a"), "LOW,HIGH"),
        (("fit", "--nope"), "requires an argument"),
        (("fit", "--data", "digits", "--nope"), "Unknown option: "),
        (("fit", "--data", "digits", "--rank", "few"), "into int"),
        (("nope",), 'Unknown command "nope"'),
    ],
)
def test_bad_arguments(capsys, tmp_path, argv, words):
    argv = list(argv)
    if "FIT" in argv:
        symbreak(capsys, "fit", "--data", "digits", "--out", tmp_path / "m.safetensors")
        argv[argv.index("FIT")] = tmp_path / "m.safetensors"
    if argv[0] in ("sample", "study", "train", "fit"):
        argv += ["--out", tmp_path / "out" / "x"]
    code, out, err = symbreak(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "out").exists()


def test_a_start_is_fitted_saved_and_used(capsys, tmp_path):
    path = tmp_path / "start.safetensors"
    fitting = ("--data", "digits", "--model", "digits", "--sampler", "dpm++2m", "--steps", "2", "--clusters", "8")
    code, out, _ = symbreak(capsys, "fit", "--start", *fitting, "--out", path, "--json")
    fitted = json.loads(out)
    assert code == 0
    assert fitted["calls"] == 2
    assert {c["law"] for c in fitted["choice"]["candidates"]} == {None, 0, 1, 2}
    assert fitted["choice"]["chosen"]["law"] is not None
    code, out, _ = symbreak(capsys, "sample", "--start", path, "--seeds", "0-3", "--out", tmp_path / "a", "--json")
    used = json.loads(out)
    assert code == 0
    assert used["level"] == fitted["level"]
    assert used["made"] == 4
    # What is chosen on the spot is the same start, and gives the same images.
    code, out, _ = symbreak(
        capsys, "sample", "--start", "auto", *fitting, "--seeds", "0-3", "--out", tmp_path / "b", "--json"
    )
    assert code == 0
    assert json.loads(out)["level"] == fitted["level"]
    for name in ("00000000.png", "00000003.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_grid_is_found_and_steps_are_learned(capsys, tmp_path):
    """What they are and what they cost stands on the terminal and in the record; the saved start samples with them."""
    path, small = tmp_path / "start.safetensors", ("--sampler", "dpm++2m", "--steps", "2", "--clusters", "4")
    code, out, err = symbreak(capsys, *FIT, *small, "--grid", "free", "--learn", "8", "--out", path)
    assert code == 0, err
    assert "levels of the 2 steps, then 0:" in out
    assert "6 of the network's own fine trajectories" in out
    assert "network evaluations of one sample, once" in out
    start = LateStart.load(path)
    assert start.grid is None or len(start.grid.sigmas) == 2
    assert (start.learned is None) == ("own steps stand" in out)
    for name in ("a", "b"):
        code, _, err = symbreak(capsys, "sample", "--start", path, "--seeds", "0-1", "--out", tmp_path / name, "--json")
        assert code == 0, err
    assert (tmp_path / "a" / "00000001.png").read_bytes() == (tmp_path / "b" / "00000001.png").read_bytes()
    record = json.loads((tmp_path / "a" / "sample.json").read_text())
    if start.learned is not None:
        assert record["learned"]["evaluations"] == start.learned.evaluations


def test_samplers_without_levels_say_so_on_the_terminal(capsys, tmp_path):
    """White noise only, and a scheduler that takes no levels keeps its own grids."""
    small = ("--sampler", "lms", "--steps", "2", "--clusters", "4", "--at", "standard", "--grid", "free", "--json")
    code, out, err = symbreak(capsys, *FIT, *small, "--out", tmp_path / "start.safetensors")
    fitted = json.loads(out)
    assert code == 0, err
    assert fitted["law"] is None
    assert "grid" not in fitted
    assert any("LMSDiscreteScheduler takes no levels" in note for note in fitted["notes"])


def test_an_evaluation_chooses_its_start(capsys, tmp_path):
    argv = ("evaluate", "--data", "digits", "--model", "digits", "--start", "auto", "--clusters", "6", "--steps", "2")
    code, out, _ = symbreak(capsys, *argv, "--seeds", "0-19", "--repeats", "2", "--json")
    content = json.loads(out)
    assert code == 0
    assert "Gaussian" in content["sampling"]["law_in_words"]
    assert content["sampling"]["law_in_words"] in content["verdict"][-1]
    assert content["sampling"]["calls"] == 2
    for more, words in (
        (("--samples", tmp_path, "--start", "auto"), "belongs to a network"),
        (("--model", "digits", "--clusters", "6"), "belongs to --start auto"),
    ):
        code, out, err = symbreak(capsys, "evaluate", "--data", "digits", *more)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert words in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("sample", "--start", "auto"), "--data is missing"),
        (("sample", "--start", "none", "--at", "400"), "no level to give"),
        (("sample", "--start", "none", "--data", "digits"), "belong to --start auto"),
        (("sample", "--start", "nowhere.safetensors"), "does not exist"),
        (("fit", "--data", "digits", "--steps", "3"), "Add --start"),
        (("fit", "--data", "digits", "--start"), "--model is missing"),
        (("fit", "--data", "digits", "--start", "--model", "digits", "--rank", "3"), "decides on the rank itself"),
        (("sample", "--start", "SAVED", "--steps", "4"), "brings its own sampler"),
        (("sample", "--start", "NEWER"), "newer symbreak"),
        (("sample", "--start", "OTHER"), "Fit a start for it"),
        (("sample", "--start", "FOLDER"), "is a folder"),
        (("fit", "--start", "--data", "digits", "--model", "digits", "--clusters", "5000"), "5000 clusters"),
        (("fit", "--data", "digits", "--grid", "free"), "Add --start"),
        (("fit", "--data", "digits", "--at", "standard"), "Add --start"),
        (("fit", "--data", "digits", "--learn", "8"), "Add --start"),
        ((*FIT, "--grid", "karras"), "free, entropic"),
        ((*FIT, "--at", "400"), "auto, standard"),
        ((*FIT, "--grid", "free", "--steps", "1200"), "more than the 1,000 levels"),
        ((*FIT, "--learn", "many"), "--learn"),
        ((*FIT, "--learn", "1"), "at least 2"),
        ((*FIT, "--learn", "8", "--steps", "10"), "leaves 6 trajectories to fit the 19 coefficients"),
        ((*FIT, "--learn", "32", "--sampler", "ddpm"), "draws noise"),
        ((*FIT, "--learn", "32", "--sampler", "heun"), "asks the network 9 times in 5 steps"),
        (("sample", "--start", "GRID"), "the given grid was made for a network of 1,000 weights"),
        (("sample", "--start", "LEARNED"), "learned steps were made for a network of 1,000 weights"),
        (("sample", "--start", "RISING"), "each below the one before"),
        (("sample", "--start", "LONGER"), "a grid of 3 levels for 4 steps"),
        (("sample", "--start", "FEWER"), "coefficients of 2 learned steps came for 3"),
    ],
)
def test_bad_starts(capsys, tmp_path, bad_files, argv, words):
    argv = [bad_files.get(a, a) for a in argv]
    code, out, err = symbreak(capsys, *argv, "--out", tmp_path / "out" / "x")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    # cyclopts quotes options and lists choices, every version in its own way
    assert words in err or words in err.translate(str.maketrans("", "", "\"'"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """Saved starts that are no good, by name."""
    tmp_path = tmp_path_factory.mktemp("starts")
    law = Gaussian(Moments.fit(images("digits")))
    path = late_start(scheduler("dpm++2m"), law, 3, check=False).save(tmp_path / "saved.safetensors")
    tensors, metadata = read_tensors(path)
    newer = write_tensors(tmp_path / "newer.safetensors", tensors, {**metadata, "version": "99"})
    other = late_start(scheduler("dpm++2m", prediction_type="v_prediction"), law, 3, check=False)
    other_path = other.save(tmp_path / "other.safetensors")
    names = {"SAVED": path, "NEWER": newer, "OTHER": other_path, "FOLDER": tmp_path}
    whose, base = (1000.0, 1.0), scheduler("dpm++2m")
    grid = on_grid(base, law, Grid("given", (3.0, 1.0, 0.3), whose))
    names["GRID"] = grid.save(tmp_path / "grid.safetensors")
    learned = [Learned(((0.1, 0.0),) * n, (6, 2), (0.1, 0.2), 800, whose) for n in (3, 2)]
    names["LEARNED"] = with_steps(late_start(base, law, 3, check=False), learned[0]).save(
        tmp_path / "steps.safetensors"
    )
    tensors, metadata = read_tensors(names["GRID"])
    about = json.loads(metadata["start"])
    for name, changed in (
        ("RISING", {"grid": about["grid"] | {"sigmas": [1.0, 3.0, 0.3]}}),
        ("LONGER", {"steps": 4}),
        ("FEWER", {"learned": learned[1].to_dict() | {"network": whose}}),
    ):
        text = json.dumps(about | changed)
        names[name] = write_tensors(tmp_path / f"{name}.safetensors", tensors, {**metadata, "start": text})
    return names


def test_images_of_two_samplers_do_not_mix(capsys, tmp_path):
    common = ("--steps", "2", "--out", tmp_path / "i")
    assert symbreak(capsys, "sample", "--sampler", "dpm++2m", "--seeds", "0-1", *common)[0] == 0
    code, _, err = symbreak(capsys, "sample", "--sampler", "sde-dpm++2m", "--seeds", "0-3", *common)
    assert code == 2
    assert "other settings" in err


def test_a_sketch_from_the_command_line(capsys, tmp_path):
    path = tmp_path / "m.safetensors"
    code, out, _ = symbreak(capsys, "fit", "--data", "digits", "--rank", "12", "--out", path, "--json")
    fitted = json.loads(out)
    assert code == 0
    exact = Gaussian(Moments.fit(images("digits")), rank=12).certificate(fitted["speciation"]["level"]["sigma"])
    # The certificate bounds what the exact truncation loses, and by little.
    assert 0.5 * exact.nats < fitted["certificate_nats"] < 10 * exact.nats
    code, _, _ = symbreak(capsys, "sample", "--start", path, "--steps", "2", "--seeds", "0-1", "--out", tmp_path / "i")
    assert code == 0


def test_an_output_folder_that_is_a_file(capsys, tmp_path):
    (tmp_path / "f").write_text("mine")
    for argv in (("study",), ("sample",), ("phases", "--data", "digits"), ("train", "--data", "digits")):
        code, _, err = symbreak(capsys, *argv, "--out", tmp_path / "f")
        assert code == 2
        assert "is a file" in err
    assert (tmp_path / "f").read_text() == "mine"


def test_below_the_spectral_level_is_a_warning(capsys, tmp_path):
    symbreak(capsys, "fit", "--data", "digits", "--out", tmp_path / "m.safetensors")
    argv = ("sample", "--start", tmp_path / "m.safetensors", "--at", "200", "--seeds", "0", "--out", tmp_path / "x")
    code, _, err = symbreak(capsys, *argv)
    assert code == 0
    assert "1.336" in " ".join(err.split())


def test_the_machine_fails_with_exit_code_1(capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("symbreak.moments.one_pass.write_tensors", full)
    code, _, err = symbreak(capsys, "fit", "--data", "digits", "--out", tmp_path / "m.safetensors")
    assert code == 1
    assert "No space left" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sent", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_interrupted_studies_leave_no_half_written_record(tmp_path, sent, code):
    out = tmp_path / "s"
    process = subprocess.Popen(
        [sys.executable, "-m", "symbreak", "study", "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # a test run in the background of a script ignores Ctrl-C, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("blocks-*/cells.json")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "continues from what is finished" in err
    assert "Traceback" not in err
    (stored,) = out.iterdir()  # the lock is gone
    assert sorted(p.name for p in stored.iterdir()) == ["cells.json", "identity.json"]
    json.loads((stored / "cells.json").read_text())
