import json

import pytest
import torch

from symbreak.data.readers import images
from symbreak.laws import Gaussian
from symbreak.moments.one_pass import Moments
from symbreak.networks.families import denoiser
from symbreak.runtime.files import InputError, read_tensors
from symbreak.runtime.run import Run
from symbreak.start.loading import load_pipeline
from symbreak.start.recipe import Recipe
from symbreak.start.train import train_network
from tests.test_cli import symbreak

SMALL = Recipe(channels=(8, 16), steps=30, batch=32, warmup=5, dropout=0.1)


def weights(folder):
    return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_interrupted_training_ends_with_the_same_bits(tmp_path):
    data = images("digits")
    whole = train_network(data, tmp_path / "a", SMALL)

    def stop(stage, done, total):
        if (stage, done) == ("steps", 20):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_network(data, tmp_path / "b", SMALL, run=Run(progress=stop))
    assert (tmp_path / "b" / "checkpoint.safetensors").exists()
    assert not (tmp_path / "b" / "model_index.json").exists()
    resumed = train_network(data, tmp_path / "b", SMALL)
    assert resumed["loss"] == whole["loss"]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert not (tmp_path / "b" / "checkpoint.safetensors").exists()
    assert train_network(data, tmp_path / "a", SMALL) == whole  # done: nothing is trained again
    with pytest.raises(InputError, match="other settings"):
        train_network(data, tmp_path / "a", Recipe(steps=3))


def test_a_training_that_diverges_stops_and_keeps_its_last_good_state(tmp_path):
    wild = Recipe(channels=(8, 8), steps=40, batch=8, warmup=0, lr=1e6, weight_decay=1e3)
    with pytest.raises(InputError, match=r"training diverged.*nothing was written\. Lower the recipe's lr"):
        train_network(images("digits"), tmp_path / "a", wild)
    assert not list((tmp_path / "a").glob("*"))
    with pytest.raises(InputError, match=r"the last good state is in .*checkpoint\.safetensors"):
        train_network(images("digits"), tmp_path / "b", wild, checkpoint_seconds=0.0)
    tensors, _ = read_tensors(tmp_path / "b" / "checkpoint.safetensors")
    assert all(bool(torch.isfinite(v).all()) for v in tensors.values())
    assert not (tmp_path / "b" / "unet").exists()


@pytest.mark.parametrize("name", ["unet/mine.txt", "scheduler/mine.txt", "model_index.json", ".stage/mine.txt"])
def test_what_others_wrote_stays(tmp_path, name):
    recipe = Recipe(channels=(8, 8), steps=2, batch=8)
    other = tmp_path / "proj" / name
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    with pytest.raises(InputError, match="of another pipeline, which stay"):
        train_network(images("digits"), tmp_path / "proj", recipe)
    assert other.read_text() == "mine"
    if name == ".stage/mine.txt":
        return

    def meanwhile(stage, done, total):  # while it trains, a folder of the same name appears
        target = tmp_path / "late" / name
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_text("mine")

    with pytest.raises(InputError, match="is not of this training, and is not replaced"):
        train_network(images("digits"), tmp_path / "late", recipe, run=Run(progress=meanwhile))
    assert (tmp_path / "late" / name).read_text() == "mine"


def test_training_touches_no_global_generator(tmp_path):
    state = torch.get_rng_state()
    train_network(images("digits"), tmp_path / "a", Recipe(channels=(8, 8), steps=2, batch=8))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trained_network_denoises_better_than_nothing(tmp_path):
    train_network(images("digits"), tmp_path / "a", Recipe(channels=(8, 16), steps=150, batch=32, lr=3e-3, warmup=10))
    pipe = load_pipeline(tmp_path / "a")
    x = images("digits:held-out").tensor()[:200]
    noisy = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = ((denoiser(pipe.unet, pipe.scheduler)(noisy, 1.0) - x) ** 2).sum((1, 2, 3)).mean()
    variance = ((x - images("digits").tensor().mean(0)) ** 2).sum((1, 2, 3)).mean()
    assert error < 0.8 * variance  # a constant guess of the mean scores 1.0


def test_the_bundled_network_beats_the_best_linear_denoiser():
    pipe = load_pipeline("digits")
    d = denoiser(pipe.unet, pipe.scheduler)
    law = Gaussian(Moments.fit(images("digits")))
    x = images("digits:held-out").tensor()[:500]  # enough for five standard errors
    for sigma in (0.3, 0.7):
        noisy = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            network = ((d(noisy, sigma) - x) ** 2).sum((1, 2, 3))
        linear = ((law.denoise(noisy, sigma) - x) ** 2).sum((1, 2, 3))
        gap = (linear - network).double()
        assert gap.mean() > 5 * gap.std() / len(gap) ** 0.5


def test_the_bundled_network_is_what_its_recipe_says():
    from importlib import resources

    folder = resources.files("symbreak") / "weights" / "digits"
    made = json.loads((folder / "training.json").read_text())
    assert made["fingerprint"] == images("digits").fingerprint()
    assert sum(p.numel() for p in load_pipeline("digits").unet.parameters()) == made["parameters"]
    size = sum(f.stat().st_size for f in (folder / "unet").iterdir())
    assert size < 4e6
    recipe = Recipe.load("recipes/digits.json")
    assert made["recipe"]["steps"] == recipe.steps
    assert tuple(made["recipe"]["channels"]) == recipe.channels


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"stepps": 3}', "stepps"),
        ('{"channels": [7]}', "multiples of 8"),
        ('{"steps": 0}', ">= 1"),
        ('{"dropout": 1}', "dropout"),
        ('{"steps": "many"}', "recipe steps 'many'; expected a whole number"),
        ('{"channels": [8.0]}', "recipe channels 8.0; expected a whole number"),
        ('{"channels": 8}', "'int' object is not iterable"),
        ('{"lr": "1e-3"}', "recipe lr '1e-3'; expected a number"),
        ('{"lr": null}', "recipe lr None; expected a number"),
        ('{"minutes": true}', "recipe minutes True; expected a number"),
        ('{"clusters": "a"}', "recipe clusters 'a'; expected a whole number"),
        ('{"clusters": 1.5}', "recipe clusters 1.5; expected a whole number"),
        ('{"clusters": -3}', "recipe clusters -3; expected at least 1"),
        ('{"folds": true}', "recipe folds True; expected a whole number"),
        ('{"conditional": "no"}', "recipe conditional 'no'; expected true or false"),
        ('{"top": [1]}', r"recipe top \[1\]; expected a number"),
        ("[]", "no settings"),
        ("{", "not JSON"),
    ],
)
def test_bad_recipes(tmp_path, text, match):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=match):
        Recipe.load(tmp_path / "r.json")


def test_minutes_of_zero_are_no_default_and_steps_win_over_a_recipes_minutes(tmp_path, capsys):
    (tmp_path / "r.json").write_text('{"channels": [8, 8], "batch": 8, "warmup": 0, "minutes": 500}')
    train = ("train", "--data", "digits", "--out", tmp_path / "a", "--recipe", tmp_path / "r.json")
    assert symbreak(capsys, *train, "--minutes", 0)[2].count("minutes 0; expected a number above 0") == 1
    code, out, _ = symbreak(capsys, *train, "--steps", 2, "--json")
    assert code == 0
    assert json.loads(out)["recipe"]["steps"] == 2


def test_images_that_do_not_fit(tmp_path):
    known = {"law": "auto", "recipe": SMALL}
    with pytest.raises(InputError, match="9 x 9 do not fit"):  # before a law is fitted, which would want more of them
        train_network(images(torch.rand(4, 9, 9)), tmp_path / "a", **known)
    with pytest.raises(InputError, match=r"at least 160\. Pass more, or train without a law"):
        train_network(images(torch.rand(20, 8, 8)), tmp_path / "a", **known)
    with pytest.raises(InputError, match="pad them"):
        train_network(images(torch.rand(4, 9, 9)), tmp_path / "a", SMALL)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        train_network(images("digits"), tmp_path / "file", SMALL)
