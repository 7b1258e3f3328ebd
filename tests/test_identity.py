"""What is resumed or cached is used again exactly when nothing that matters has changed: a generated table.

Rows are changes (data, weights, every option of the scheduler, ...), columns the commands that resume or cache. Studies
are stopped where they know whose parts they take; images, training and statistics are made, in tiny sizes.
"""

import importlib
import inspect
import json
import sys
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

import symbreak as sb
from symbreak.laws import Gaussian
from symbreak.metrics.extractors import FromFunction
from symbreak.metrics.feature_rows import extractor
from symbreak.metrics.reference import statistics
from symbreak.moments.one_pass import Moments
from symbreak.noise import NoiseLevel
from symbreak.runtime.files import InputError, read_tensors, write_tensors
from symbreak.runtime.identity import answers, differences, fixed_images, identity_of, of_callable
from symbreak.runtime.run import Run
from symbreak.start.fit import late_start
from symbreak.start.recipe import Recipe
from symbreak.start.sample import decisive, write_images
from symbreak.start.train import train_network
from symbreak.studies.compare_samplers import Study, run
from symbreak.studies.compare_starts import compare_starts
from symbreak.studies.evaluate import evaluate, evaluate_network
from symbreak.studies.measure import Measure
from symbreak.studies.sensitivity import sensitivity

DDIM = set(inspect.signature(DDIMScheduler).parameters)


RECIPE = Recipe(channels=(8,), steps=20, batch=8, warmup=1)


def bright(x):
    """Two features of an image."""
    return torch.stack([x.mean((1, 2, 3)), x.square().mean((1, 2, 3))], 1)


def brighter(x):
    """The same, but for bright images: what only answers to noise can tell."""
    return torch.where(x.amax((1, 2, 3))[:, None] > 1.5, 2 * bright(x), bright(x))


def twice(x):
    """Other features of every image."""
    return 2 * bright(x)


def pixels(seed, count=40):
    g = np.random.default_rng(seed)
    mode = g.normal(0, 60, (count, 1, 1)) * np.ones(8)  # of variance above 1, or there is no speciation level
    return (g.normal(128, 30, (count, 8, 8)) + mode).clip(1, 255).astype(np.uint8)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
        unet = UNet2DModel(8, 1, 1, layers_per_block=1, norm_num_groups=4, **blocks)
    return unet.eval()


@dataclass
class World:
    """What a command is given."""

    folder: object
    data: object = None
    holdout: object = None
    unet: object = None
    noise: object = None
    features: object = bright
    classify: object = bright
    level: float = 1.5
    seed: int = 0
    steps: int = 3
    micro_batch: int = 4
    recipe: Recipe = RECIPE
    precision: str = "fp32"

    def pipeline(self):
        return SimpleNamespace(unet=self.unet, scheduler=self.noise)

    def start(self):
        full = DDIMScheduler(**{k: v for k, v in self.noise.config.items() if k in DDIM})
        return late_start(full, Gaussian(Moments.fit(self.data)), self.steps, at=NoiseLevel(self.level), check=False)


@pytest.fixture
def world(tmp_path):
    for name, seed in (("data", 0), ("holdout", 1)):
        np.save(tmp_path / f"{name}.npy", pixels(seed))
    data, holdout = (sb.images(tmp_path / f"{name}.npy") for name in ("data", "holdout"))
    return World(tmp_path, data, holdout, network(), DDPMScheduler(num_train_timesteps=1000))


# --- commands: each says whether it took what was there, and by what it differs where it did not ----------------------


class Stop(Exception):
    pass


def of_study(call):
    """A study that stops where it knows whose parts it takes."""

    def command(world, monkeypatch, out):
        seen = []

        def identified(self, decides):
            seen.append(real(self, decides)._parts)
            raise Stop

        real = Run.identified
        with monkeypatch.context() as patch:
            patch.setattr(Run, "identified", identified)
            with pytest.raises(Stop):
                call(world, Run(out))
        (parts,) = seen
        stored = out / "identity-of-the-first.json"
        if not stored.exists():
            stored.write_text(json.dumps([parts.folder.name, parts.identity]))
        name, before = json.loads(stored.read_text())
        by = differences(before, parts.identity)
        assert (name == parts.folder.name) == (by == "")
        return by

    return command


def measure(world):
    return {"holdout": world.holdout, "measure": Measure(FromFunction(world.features, "bright"), 4, 2, 4)}


def study(world, run_):
    settings = Study(
        str(world.data.name), "a model", str(world.holdout.name), ("ddim",), (world.steps,), 8, 2, 4, micro_batch=4
    )
    name = "symbreak.studies.compare_samplers.extractor"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, lambda *_, **__: FromFunction(world.features, "bright"))
        run(settings, world.pipeline(), run_)


def phases(world, run_):
    sb.diagnose(world.data, world.pipeline(), holdout=world.holdout, classify=world.classify, seed=world.seed, run=run_)


def audit(world, run_):
    samples = torch.from_numpy(pixels(2)).float()[:, None] / 127.5 - 1
    features = FromFunction(world.features, "bright")
    sb.audit(world.data, samples, holdout=world.holdout, features=features, seed=world.seed, run=run_)


def evaluated(world, run_):
    seeds = range(world.seed, world.seed + 4)
    more = {"precision": world.precision, "model": str(world.folder)}
    options = {"micro_batch": world.micro_batch, "identity": more, "run": run_, "cache": False, "repeats": 2}
    evaluate_network(world.unet, world.start(), seeds, world.data, world.holdout, **options)


def audited_network(world, run_):
    sampling = sb.Sampling(4, "ddim", world.steps, range(world.seed, world.seed + 4))
    sb.audit(world.data, model=world.pipeline(), sampling=sampling, holdout=world.holdout, run=run_)


def sample(world, monkeypatch, out):
    more = {"precision": world.precision, "model": str(world.folder)}
    settings = decisive(world.unet, world.start(), world.micro_batch, more)
    made = (out / "sample.json").exists()
    try:
        count = write_images(world.unet, world.start(), [3, 4], out, settings, micro_batch=world.micro_batch)
    except InputError as error:
        return str(error).partition("settings: ")[2].partition(". Choose")[0]
    assert count == (0 if made else 2)
    return ""


def training(world, monkeypatch, out):
    """Stopped after a checkpoint, and gone on with."""

    def stop(stage, done, total):
        if stage == "steps" and done % 10 == 0:
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            train_network(world.data, out, world.recipe, precision=world.precision, run=Run(progress=stop))
    except InputError as error:
        return str(error).partition("settings: ")[2].partition(". Choose")[0]
    return ""


def cached(world, monkeypatch, out):
    before = set(out.glob("*.safetensors"))
    made = statistics(world.features, world.holdout, rows=5, seed=world.seed, cache=out)
    fresh = statistics(world.features, world.holdout, rows=5, seed=world.seed)
    assert torch.equal(made.rows, fresh.rows)  # whatever happened: the cache gives what is right
    assert torch.equal(made.whole.cov, fresh.whole.cov)
    return "another file" if before and set(out.glob("*.safetensors")) != before else ""


COMMANDS = {
    "study": of_study(study),
    "phases": of_study(phases),
    "audit": of_study(audit),
    "audit of a network": of_study(audited_network),
    "evaluate": of_study(evaluated),
    "sensitivity": of_study(lambda w, r: sensitivity(w.data, w.pipeline(), ("ddim",), (3,), run=r, **measure(w))),
    "compare_starts": of_study(lambda w, r: compare_starts(w.data, w.pipeline(), "ddim", (3,), run=r, **measure(w))),
    "sample": sample,
    "train": training,
    "cache": cached,
}
NETWORK = ["study", "phases", "audit of a network", "evaluate", "sensitivity", "compare_starts", "sample"]
MEASURED = ["study", "audit", "sensitivity", "compare_starts", "cache"]


# --- changes: (what it does, the commands that it matters to, the name that says so) -----------------


def other_data(name, seed):
    def change(world, patch):
        x = np.load(world.folder / f"{name}.npy")
        x[seed, 0, 0] ^= 1  # one bit
        np.save(world.folder / "other.npy", x)
        return replace(world, **{name: sb.images(world.folder / "other.npy")})

    return change


def spelled_otherwise(world, patch):
    """Everything that is a path or an object is another one of the same content."""
    (world.folder / "elsewhere").mkdir(exist_ok=True)
    new = {}
    for name in ("data", "holdout"):
        (world.folder / "elsewhere" / f"{name}-2.npy").write_bytes((world.folder / f"{name}.npy").read_bytes())
        patch.chdir(world.folder)
        new[name] = sb.images(f"./elsewhere/../elsewhere/{name}-2.npy")
    noise = DDPMScheduler(**{k: world.noise.config[k] for k in reversed(CONFIG)})
    return replace(world, folder=world.folder / "elsewhere", unet=deepcopy(world.unet), noise=noise, **new)


def other_weight(world, patch):
    unet = deepcopy(world.unet)
    with torch.no_grad():
        unet.conv_out.bias[0] += 1e-3
    return replace(world, unet=unet)


def option(name, value):
    return lambda world, patch: replace(world, noise=DDPMScheduler(**{**CONFIG, name: value}))


def threads(world, patch):
    patch.setattr(torch, "get_num_threads", lambda: 77)
    return world


def version(package):
    def change(world, patch):
        real = importlib.metadata.version
        patch.setattr("importlib.metadata.version", lambda name: "99" if name == package else real(name))
        return world

    return change


def other(name, value):
    return lambda world, patch: replace(world, **{name: value})


def in_recipe(name, value):
    return lambda world, patch: replace(world, recipe=replace(world.recipe, **{name: value}))


def another(value):
    """A value of the same kind that is another one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value / 2 if isinstance(value, float) and value else 0.25


TEXTS = {
    "beta_schedule": "scaled_linear",
    "variance_type": "fixed_large",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "trained_betas": np.linspace(1e-4, 0.03, 1000).tolist(),
}
CONFIG = {k: v for k, v in DDPMScheduler().config.items() if not k.startswith("_")}
OPTIONS = {k: TEXTS.get(k, another(v)) for k, v in CONFIG.items()}
SETTINGS = {f.name: getattr(RECIPE, f.name) for f in fields(Recipe)}

CHANGES = {
    "nothing": (lambda world, patch: world, [], ""),
    "spelling": (spelled_otherwise, [], ""),
    "data": (other_data("data", 3), [c for c in COMMANDS if c not in ("audit of a network", "cache")], ""),
    "holdout": (other_data("holdout", 3), [*MEASURED, "phases"], "holdout.content"),
    "weights": (other_weight, NETWORK, "weights"),
    "features": (other("features", twice), MEASURED, "features"),
    # An audit's parts rest on the features of its own images, which are the same.
    "features, noised": (other("features", brighter), [m for m in MEASURED if m != "audit"], "features"),
    "classifier": (other("classify", brighter), ["phases"], "classify"),
    "level": (other("level", 1.8), ["evaluate", "sample"], "level"),
    "steps": (other("steps", 5), ["study", "audit of a network", "evaluate", "sample"], ""),
    "seed": (other("seed", 5), ["phases", "audit", "audit of a network", "evaluate", "cache"], "seed"),
    "micro batch": (other("micro_batch", 2), ["evaluate", "sample"], "micro_batch"),
    "precision": (other("precision", "bf16"), ["evaluate", "sample", "train"], "precision"),
    "threads": (threads, list(COMMANDS), "threads"),
    **{
        f"version of {package}": (version(package), list(COMMANDS), f"versions.{package}")
        for package in ("symbreak", "torch", "diffusers", "numpy", "scikit-learn")
    },
    # Samples, and an audit of them, rest on what their sampler (DDIM) takes, studies on all settings of the network.
    **{
        f"option {k}": (
            option(k, v),
            [c for c in NETWORK if k in DDIM or c not in ("sample", "evaluate", "audit of a network")],
            f"scheduler.{k}",
        )
        for k, v in OPTIONS.items()
    },
    **{
        f"recipe {k}": (in_recipe(k, (8, 8) if k == "channels" else another(v)), ["train"], f"recipe.{k}")
        for k, v in SETTINGS.items()
    },
}
QUICK = {"study": "o", "sample": "o", "train": "r", "cache": "", "phases": "", "audit": "", "evaluate": ""}


def cells():
    for change in CHANGES:
        for command in COMMANDS:
            few = change.startswith(("option", "recipe", "version"))
            quick = command in QUICK and (change == "version of torch" or not few or change[0] == QUICK[command])
            quick &= not (command == "study" and change.startswith("option") and change not in PICKED)
            quick &= command != "train" or change in ("nothing", "data", "threads", "recipe lr", "recipe seed")
            yield pytest.param(change, command, marks=[] if quick else [pytest.mark.slow])


PICKED = ("option clip_sample", "option timestep_spacing", "option steps_offset")


@pytest.mark.parametrize(("change", "command"), list(cells()))
def test_the_table_of_changes(world, monkeypatch, tmp_path, capsys, change, command):
    make, matters, name = CHANGES[change]
    out = tmp_path / "out"
    out.mkdir()
    act = COMMANDS[command]
    assert act(world, monkeypatch, out) == ""
    with monkeypatch.context() as patch:
        by = act(make(world, patch), monkeypatch, out)
    assert bool(by) == (command in matters), f"differs by: {by or 'nothing'}"
    if by and command != "cache":
        assert name in by


# --- what was wrong before ----------------------------------------------------------------------------------------


def test_a_module_whose_code_changed_gives_its_own_features(tmp_path, monkeypatch):
    """Equal weights, another ``forward``: the cache is of the old code."""
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (
        "import torch\nclass F(torch.nn.Module):\n"
        "    def forward(self, x):\n        return x.flatten(1)[:, :3] {}\nf = F().eval()\n"
    )
    data, held_out = sb.images("digits", limit=60), sb.images("digits:held-out", limit=60)
    found = {}
    for change in ("", "* 5"):
        (tmp_path / "own_features.py").write_text(text.format(change))
        sys.modules.pop("own_features", None)
        importlib.invalidate_caches()
        sys.dont_write_bytecode = True
        options = {"features": extractor("own_features:f"), "repeats": 2, "classify": None}
        reference = tmp_path / "reference.safetensors"
        kept = evaluate(data, data, held_out, cache=tmp_path / "cache", **options)
        fresh = evaluate(data, data, held_out, cache=False, **options)
        assert kept["distance"] == fresh["distance"]
        assert kept["floor"] == fresh["floor"]
        found[change] = kept["distance"]["pooled"]
        if not change:
            evaluate(data, data, held_out, cache=False, reference=reference, **options)
        else:
            with pytest.raises(InputError, match="whose answers to fixed images are others now"):
                evaluate(data, data, held_out, cache=False, reference=reference, **options)
    assert found["* 5"] == pytest.approx(25 * found[""], rel=1e-6)


def test_a_callable_that_answers_differently_every_time_is_not_cached(tmp_path, capsys):
    torch.manual_seed(0)
    made = statistics(lambda x: bright(x) + torch.rand(len(x), 2), sb.images("digits"), rows=3, cache=tmp_path)
    assert made.count == 898
    assert not list(tmp_path.iterdir())
    assert "differ from call to call" in capsys.readouterr().err


def test_functions_that_agree_on_clean_images_are_told_apart():
    clean = fixed_images((3, 8, 8))
    assert torch.equal(bright(clean), brighter(clean))
    assert answers(bright, clean) != answers(brighter, clean)
    # Code tells apart what answers do not, and where it was written does not count.
    far = lambda x: bright(x) if x.shape[0] < 1000 else x.flatten(1)  # noqa: E731
    again = lambda x: bright(x) if x.shape[0] < 1000 else x.flatten(1)  # noqa: E731
    assert of_callable(far, clean)["answers"] == of_callable(bright, clean)["answers"]
    assert of_callable(far, clean) != of_callable(bright, clean)
    assert of_callable(far, clean) == of_callable(again, clean)


def test_an_identity_is_flat_and_survives_json():
    one = identity_of("x", a={"b": (1, 2.5), "c": torch.arange(3)}, d=None, e=np.float32(2), f=float("nan"))
    assert json.loads(json.dumps(one)) == one
    assert one["a.b"] == [1, 2.5]
    assert len(one["a.c"]) == 16
    assert differences(one, {**one, "a.b": [1], "d": 1}) == "a.b, d"
    assert "older symbreak" in differences({"weights": "a"}, one)


def test_a_flipped_bit_in_a_stored_tensor_is_noticed(tmp_path, world, capsys):
    path = write_tensors(tmp_path / "x.safetensors", {"a": torch.arange(4.0)}, {"about": "b"})
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="other bits than were written"):
        read_tensors(path)
    save_file({"a": torch.ones(2)}, path)  # a file of others has no digest
    assert read_tensors(path)[1] == {}
    # A finished part, and cached statistics: made again, with a line.
    made = []
    run_ = Run(tmp_path / "run").identified({"a": 1})

    def part():
        made.append(1)
        return {"x": np.arange(5.0)}

    run_.part("p", part)
    for file, again in (
        (next((tmp_path / "run").rglob("p.safetensors")), lambda: run_.part("p", part)["x"].sum()),
        (None, lambda: float(statistics(bright, world.data, rows=5, cache=tmp_path / "cache").whole.cov.sum())),
    ):
        before = again()
        file = file or next((tmp_path / "cache").glob("*.safetensors"))
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 1
        file.write_bytes(raw)
        capsys.readouterr()
        assert again() == before
        assert "other bits" in capsys.readouterr().err
    assert len(made) == 2


def test_cells_of_other_settings_stay_and_are_named(tmp_path, capsys):
    one = Run(tmp_path).identified({"kind": "study", "weights": "a"})
    one.value("x", lambda: 1)
    two = Run(tmp_path).identified({"kind": "study", "weights": "b"})
    said = capsys.readouterr().err
    assert "is not used: weights." in said
    assert said.count("\n") == 1
    assert two.value("x", lambda: 2) == 2
    two.close()
    assert Run(tmp_path).identified({"kind": "study", "weights": "a"}).value("x", lambda: 3) == 1
    Run(tmp_path).identified({"kind": "audit", "weights": "b"})  # of another kind: nothing to say
    assert capsys.readouterr().err == ""


def test_only_our_own_images_count_as_made(tmp_path, world):
    start = world.start()

    def make():
        return write_images(world.unet, start, range(4), tmp_path / "out", micro_batch=4)

    assert make() == 4
    whole = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.png")}
    first = tmp_path / "out" / "00000000.png"
    first.write_bytes(b"")  # nothing is lost with it
    assert make() == 1
    assert first.read_bytes() == whole[first.name]
    foreign = Image.fromarray(np.zeros((8, 8), np.uint8))
    for spoil, said in (
        (lambda: foreign.save(first), "was not made here"),
        (lambda: first.write_text("a note"), "no image that can be read"),
        (lambda: first.write_bytes(whole[first.name][:-30]), "no image that can be read"),
    ):
        spoil()
        left = first.read_bytes()
        with pytest.raises(InputError, match=said):
            make()
        assert first.read_bytes() == left
    # Pictures of others in a folder without images of ours
    (tmp_path / "theirs").mkdir()
    foreign.save(tmp_path / "theirs" / "00000001.png")
    with pytest.raises(InputError, match=r"00000001.png was not made here"):
        write_images(world.unet, start, range(4), tmp_path / "theirs", micro_batch=4)
    assert not (tmp_path / "theirs" / "sample.json").exists()


def test_a_finished_training_has_its_network(tmp_path, world, monkeypatch, capsys):
    out = tmp_path / "out"
    made = train_network(world.data, out, world.recipe)
    assert train_network(world.data, out, world.recipe) == made
    capsys.readouterr()
    with monkeypatch.context() as patch:  # a finished network does not depend on who asks for it
        assert train_network(world.data, out, threads(world, patch).recipe) == made
    assert "trained with other threads" in capsys.readouterr().err
    weights = out / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v + 1 for k, v in tensors.items()}, weights)
    with pytest.raises(InputError, match=r"diffusion_pytorch_model.safetensors was changed"):
        train_network(world.data, out, world.recipe)
    weights.unlink()
    with pytest.raises(InputError, match=r"diffusion_pytorch_model.safetensors is missing"):
        train_network(world.data, out, world.recipe)
