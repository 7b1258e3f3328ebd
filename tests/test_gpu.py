"""A GPU, a precision and a compiler change the speed of a network, and the numbers as little as said here.

Tests marked ``gpu`` need a CUDA device. Tolerances: laws in float64 1e-10 (rounding is 1e-13); networks in float32,
without TF32, 1e-3 an image: a call differs by 1e-6 where sums run in another order, and no sampler carries that beyond
1e-4 in three steps (measured on a CPU). Under autocast trajectories part: an epsilon network's D = x - sigma eps
multiplies its rounding by sigma. So sets of images are compared there, the Fréchet distance between the same seeds in
two precisions with that between different seeds, which is chance.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import symbreak as sb
from symbreak.cli.commands import main
from symbreak.metrics.feature_rows import features, train_classifier
from symbreak.networks.denoiser import ask
from symbreak.noise import generator
from symbreak.runtime.files import InputError, write_json
from symbreak.start.late_start import standard_start

CUDA = "cuda"


def gpu(test):
    """A test that needs a CUDA device."""
    why = "no CUDA device on this machine"
    test = pytest.mark.skipif(not torch.cuda.is_available(), reason=why)(pytest.mark.gpu(test))
    return pytest.mark.usefixtures("single_precision")(test)


@pytest.fixture
def single_precision():
    """Float32 products of 24 bits: TF32 keeps 11."""
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept


@pytest.fixture(scope="module")
def digits():
    return sb.images("digits")


@pytest.fixture(scope="module")
def held_out():
    return sb.images("digits:held-out").tensor()


def network(pipe):
    return sb.denoiser(pipe.unet, pipe.scheduler)


def drawn(pipe, seeds, sampler="dpm++2m-karras", steps=5):
    start = standard_start(sb.scheduler(sampler, like=pipe.scheduler), steps)
    return sb.generate(pipe.unet, start, seeds)


def moments(x):
    return sb.Moments.fit([features(sb.extractor("digits-classifier"), x)], parts=1)


def refused(capsys, *argv):
    """The one line of a command that is refused with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in argv])
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def sampled(out, *options):
    """The images of eight seeds [8, H, W], as the command line writes them."""
    run = ["sample", "--seeds", "0-7", "--steps", "5", "--micro-batch", "8", "--out", str(out), *options]
    with pytest.raises(SystemExit) as left:
        main(run)
    assert left.value.code == 0
    return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted(out.glob("*.png"))])


# --- without a GPU --------------------------------------------------------------------------------


def test_a_precision_or_a_device_that_there_is_not_is_one_line(capsys, tmp_path):
    run = ("sample", "--out", tmp_path)
    assert "int3" in refused(capsys, *run, "--precision", "int3")
    assert "bf16" in refused(capsys, *run, "--precision", "int3")  # what is expected
    assert "Pass cpu" in refused(capsys, *run, "--device", "abacus")
    assert "Pass cpu" in refused(capsys, *run, "--device", "cuda:99")
    fit = ("fit", "--data", "digits", "--start", "--model", "digits", "--out", tmp_path / "start.safetensors")
    assert "int3" in refused(capsys, *fit, "--precision", "int3")
    samples = ("--samples", tmp_path, "--data", "digits")
    for run in (("phases", "--data", "digits"), ("evaluate", *samples), ("audit", *samples), fit[:3]):
        out = ("--out", tmp_path / "out")
        assert "belong to a network" in refused(capsys, *run, *out, "--precision", "bf16")
        assert "belong to a network" in refused(capsys, *run, *out, "--compile")
    with pytest.raises(InputError, match="precision 'fp64'"):
        sb.load_pipeline("digits", precision="fp64")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_gpu_is_one_line(capsys, tmp_path):
    assert "no device cuda here" in refused(capsys, "sample", "--out", tmp_path, "--device", "cuda")
    np.save(tmp_path / "x.npy", sb.images("digits").tensor()[:40].numpy())
    for command in ("evaluate", "audit"):
        run = (command, "--samples", tmp_path / "x.npy", "--data", "digits", "--device", "cuda")
        assert "no device cuda here" in refused(capsys, *run)
    recipe = write_json(tmp_path / "r.json", {"channels": [8], "steps": 2, "batch": 4, "warmup": 1})
    train = ("train", "--data", "digits", "--recipe", recipe, "--out", tmp_path / "net")
    assert "no device cuda here" in refused(capsys, *train, "--device", "cuda")


def test_a_network_trained_in_one_precision_is_not_taken_for_another(capsys, tmp_path):
    recipe = write_json(tmp_path / "r.json", {"channels": [8], "steps": 2, "batch": 4, "warmup": 1})
    train = ("train", "--data", "digits", "--recipe", recipe, "--out", tmp_path / "net")
    with pytest.raises(SystemExit, match="0"):
        main([str(a) for a in (*train, "--precision", "bf16")])
    capsys.readouterr()
    assert "other settings" in refused(capsys, *train)
    assert "needs no scaled loss" in refused(capsys, *train, "--precision", "fp16")


def test_autocast_changes_images_by_little_but_not_by_nothing(tmp_path):
    plain = sampled(tmp_path / "fp32", "--device", "cpu")
    assert (sampled(tmp_path / "again", "--device", "cpu") == plain).all()
    gap = np.abs(sampled(tmp_path / "bf16", "--device", "cpu", "--precision", "bf16") - plain)
    others = np.abs(np.roll(plain, 1, axis=0) - plain)
    assert gap.max() > 0
    assert gap.mean() < 0.2 * others.mean()  # the same images: those of other seeds lie five times further
    info = [json.loads((tmp_path / kind / "sample.json").read_text()) for kind in ("fp32", "bf16")]
    assert [i["precision"] for i in info] == ["fp32", "bf16"]


def test_images_of_two_precisions_do_not_share_a_folder(capsys, tmp_path):
    sampled(tmp_path, "--device", "cpu")
    run = ("sample", "--seeds", "0-9", "--steps", 5, "--micro-batch", 8, "--out", tmp_path, "--precision", "bf16")
    assert "other settings" in refused(capsys, *run)


def test_autocast_leaves_weights_and_states_alone():
    pipe = sb.load_pipeline("digits", device="cpu", precision="bf16")
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    x = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    assert network(pipe)(x, 1.0).dtype == torch.float64
    assert drawn(pipe, [0], steps=1).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")  # only inside the network's calls


def test_a_compiled_network_gives_the_same_images(monkeypatch, tmp_path):
    """Traced by the compiler but run by PyTorch: what the compiler itself does to the numbers is the slow test's."""
    plain = sampled(tmp_path / "plain", "--device", "cpu")
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_(module, backend="eager"))
    torch.compiler.reset()
    assert (sampled(tmp_path / "traced", "--device", "cpu", "--compile") == plain).all()
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    torch.compiler.reset()


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_images_in_full(tmp_path):
    torch.compiler.reset()
    plain = sampled(tmp_path / "plain", "--device", "cpu")
    compiled = sampled(tmp_path / "compiled", "--device", "cpu", "--compile")
    assert np.abs(compiled - plain).max() <= 1  # a number between two grey levels may be rounded to either


# --- laws -----------------------------------------------------------------------------------------


def law_of(name, digits):
    x = digits.tensor()
    return {
        "gaussian": lambda: sb.Gaussian.fit(digits),
        "gaussian, rank 8": lambda: sb.Gaussian(sb.Moments.fit(digits), rank=8),
        "mixture": lambda: sb.Mixture.fit(digits, labels=True),
        "mixture, rank 5": lambda: sb.Mixture.fit(digits, labels=True, rank=5),
        "isotropic": lambda: sb.Mixture.fit(digits, labels=True, kind="isotropic"),
        "principal": lambda: sb.PrincipalMixture.fit(digits, labels=True),
        "empirical": lambda: sb.Empirical(x[:300].double()),
        "sphere": lambda: sb.Sphere(64, 3.0),
    }[name]()


LAWS = ("gaussian", "gaussian, rank 8", "mixture", "mixture, rank 5", "isotropic", "principal", "empirical", "sphere")


@gpu
@pytest.mark.parametrize("name", LAWS)
def test_laws_in_float64(name, digits):
    law = law_of(name, digits)
    x = law.sample(9, 0.8, generator(1))
    v, s = torch.randn(x.shape, generator=generator(2), dtype=x.dtype), torch.linspace(0.2, 3.0, 9, dtype=x.dtype)
    steps = {} if isinstance(law, sb.Gaussian) else {"steps": 4}

    def asked(x, v, s):
        found = {
            "denoise": law.denoise(x, 0.8),
            "denoise, a level each": law.denoise(x, s),
            "score": law.score(x, s),
            "log_prob": law.log_prob(x, s),
            "covariance": law.posterior_covariance(x, v, s),
            "flow from noise": law.transport(v, 0.8, **steps),
            "flow": law.transport(x, 0.4, 0.8, **steps),
        }
        if hasattr(law, "responsibilities"):
            found["responsibilities"] = law.responsibilities(x, s)
        if getattr(law, "classes", None) is not None:
            found["flow of classes"] = law.transport(v, 0.8, labels=torch.arange(9, device=x.device), **steps)
        return found

    here, there = asked(x, v, s), asked(x.to(CUDA), v.to(CUDA), s.to(CUDA))
    for key, value in here.items():
        assert there[key].device.type == CUDA, key
        torch.testing.assert_close(there[key].cpu(), value, rtol=1e-10, atol=1e-10, msg=f"{name}: {key}")


@gpu
@pytest.mark.parametrize("sigma", [0.05, 0.5, 2.0])
def test_the_empirical_law_in_float32(sigma, digits):
    """Both lie within 3e-6 of the exact mean, by the law's own bound, and float32 rounding of it."""
    points = digits.tensor()
    law = sb.Empirical(points)
    x = points[:200] + sigma * torch.randn(200, 1, 8, 8, generator=generator(3))
    here, there = law.denoise(x, sigma), law.denoise(x.to(CUDA), sigma).cpu()
    gap = (here - there).flatten(1).norm(dim=1) / here.flatten(1).norm(dim=1)
    assert there.dtype == torch.float32
    assert float(gap.max()) < 1e-5


# --- networks -------------------------------------------------------------------------------------


@gpu
def test_a_pipeline_goes_where_it_is_sent():
    pipe = sb.load_pipeline("digits", device=CUDA)
    assert {p.device.type for p in pipe.unet.parameters()} == {CUDA}
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}


@gpu
def test_states_go_to_the_network_and_answers_come_back(held_out):
    here, there = (network(sb.load_pipeline("digits", device=device)) for device in ("cpu", CUDA))
    with torch.no_grad():
        wanted = ask(here, held_out[:70], 0.7)
        for call in (ask, lambda d, x, s: d(x, s), lambda d, x, s: d(x, torch.full((len(x),), s))):
            from_cpu, from_gpu = call(there, held_out[:70], 0.7), call(there, held_out[:70].to(CUDA), 0.7)
            assert (from_cpu.device.type, from_gpu.device.type) == ("cpu", CUDA)
            torch.testing.assert_close(from_cpu, wanted, rtol=0, atol=1e-5)
            torch.testing.assert_close(from_gpu.cpu(), wanted, rtol=0, atol=1e-5)
        assert ask(there, held_out[:2].double(), 0.7).dtype == torch.float64


@gpu
def test_conditions_and_networks_that_are_denoisers_go_there_too():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, x, sigma, class_labels=None):
            return self.gain[class_labels].reshape(-1, 1) * x / (1 + sigma.reshape(-1, 1))

    d = sb.denoiser(Net().to(CUDA), shape=(3,), sigma_range=(0.1, 10.0))
    with torch.no_grad():
        found = ask(d, torch.ones(2, 3), 1.0, torch.tensor([0, 1]))
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, torch.tensor([[0.5] * 3, [1.0] * 3]))


@gpu
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "pndm", "dpm++2m-karras", "sde-dpm++2m", "unipc", "heun", "lms"])
def test_an_image_is_its_seed_there_too(sampler):
    here, there = (drawn(sb.load_pipeline("digits", device=device), range(12), sampler) for device in ("cpu", CUDA))
    assert there.device.type == "cpu"
    torch.testing.assert_close(there, here, rtol=0, atol=1e-3)


@gpu
def test_an_image_knows_nothing_of_its_neighbours_there_either():
    pipe = sb.load_pipeline("digits", device=CUDA)
    assert torch.equal(drawn(pipe, range(20))[[3, 17]], drawn(pipe, [3, 17]))


@gpu
def test_late_starts(digits, held_out):
    law = sb.PrincipalMixture.fit(digits, labels=True)
    found = {}
    for device in ("cpu", CUDA):
        pipe = sb.load_pipeline("digits", device=device)
        start = sb.late_start(sb.scheduler("dpm++2m", like=pipe.scheduler), law, 3)
        ready = sb.LateStartPipeline(pipe.unet, start.scheduler, start)
        ready.set_progress_bar_config(disable=True)
        seeds = [torch.Generator().manual_seed(i) for i in range(4)]
        found[device] = [
            sb.generate(pipe.unet, start, range(4)),
            sb.generate(pipe.unet, start, range(4), clean=held_out[:4].to(device)),
            ready(4, generator=seeds, output_type="pt").images.cpu(),
            ask(start.denoiser(network(pipe)), held_out[:4], start.level.sigma / 2).detach(),
        ]
    for here, there in zip(found["cpu"], found[CUDA]):
        torch.testing.assert_close(there, here, rtol=0, atol=1e-3)


@gpu
@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.1), ("fp16", 0.02)])
def test_the_law_of_the_images_outlives_a_precision(precision, share):
    """On a CPU the shares were 0.04 and 0.002: rounding is of 8 and 11 bits, and the distance is a square."""
    plain = drawn(sb.load_pipeline("digits", device=CUDA), range(400))
    rough = drawn(sb.load_pipeline("digits", device=CUDA, precision=precision), range(400))
    assert not torch.equal(rough, plain)
    chance = sb.frechet_distance(moments(plain[:200]), moments(plain[200:]))
    assert sb.frechet_distance(moments(rough), moments(plain)) < share * chance


@gpu
@pytest.mark.slow
def test_compiled():
    torch.compiler.reset()
    here = drawn(sb.load_pipeline("digits"), range(8))
    there = drawn(sb.load_pipeline("digits", device=CUDA, compiled=True), range(8))
    torch.testing.assert_close(there, here, rtol=0, atol=1e-3)


# --- measurements ---------------------------------------------------------------------------------


@gpu
def test_experiments_on_a_network(held_out):
    judge, x = sb.extractor("digits-classifier").logits, held_out[:40]
    found = []
    for device in ("cpu", CUDA):
        d = network(sb.load_pipeline("digits", device=device))
        pairs = sb.clones(d, [0.5, 2.0], judge, pairs=60, steps=6)
        turns = sb.u_turns(d, x.to(device), [0.5, 2.0], judge, steps=6, turns=1)
        losses = sb.loss_curve(d, x.to(device), [0.3, 1.0], labels=None)
        path = torch.stack([x[0], x[1]]).double()
        found.append(
            {
                "labels": pairs.labels,
                "turns": turns.features.value,
                "mmse": losses.mmse.value,
                "potential": sb.potential(d, path.to(device), 1.0, tolerance=1e-3).value,
            }
        )
    here, there = found
    # An image on the border of two classes may change sides.
    assert (np.asarray(here["labels"]) != np.asarray(there["labels"])).mean() < 0.02
    np.testing.assert_allclose(there["turns"], here["turns"], atol=1e-4)
    np.testing.assert_allclose(there["mmse"], here["mmse"], rtol=1e-5)
    np.testing.assert_allclose(there["potential"], here["potential"], rtol=1e-4, atol=1e-4)


@gpu
def test_a_fixed_point():
    here, there = (
        sb.network_stability(network(sb.load_pipeline("digits", device=device)), [20.0], wells=False).eigenvalues
        for device in ("cpu", CUDA)
    )
    np.testing.assert_allclose(there, here, rtol=1e-3)  # forward-mode products of a float32 network


@gpu
def test_a_fitted_start(digits):
    here, there = (
        sb.fit_start(digits, pipe.unet, sb.scheduler("dpm++2m", like=pipe.scheduler), 3)
        for pipe in (sb.load_pipeline("digits", device=device) for device in ("cpu", CUDA))
    )
    assert repr(here.law) == repr(there.law)
    assert here.level == there.level


@gpu
def test_samples_on_a_gpu_are_evaluated_and_audited(digits, held_out):
    kept = sb.images("digits:held-out")
    x = held_out[:60]
    here, there = (sb.evaluate(v, digits, kept, repeats=2, cache=False) for v in (x, x.to(CUDA)))
    assert here["distance"] == there["distance"]
    assert sb.audit(digits, x).content == sb.audit(digits, x.to(CUDA)).content
    assert torch.equal(sb.Moments.fit([x.to(CUDA)]).cov, sb.Moments.fit([x]).cov)


@gpu
def test_a_scheduler_that_has_noised_images_on_a_gpu(digits, held_out):
    fresh = sb.scheduler("ddpm")
    used = sb.scheduler("ddpm")
    used.add_noise(held_out[:2].to(CUDA), held_out[2:4].to(CUDA), torch.tensor([3, 900], device=CUDA))
    law = sb.Gaussian.fit(digits)
    assert sb.schedule(used).sigma_range == sb.schedule(fresh).sigma_range
    assert sb.late_start(used, law, 5).level == sb.late_start(fresh, law, 5).level


@gpu
def test_global_generators_are_left_alone(digits):
    before = torch.cuda.get_rng_state()
    train_classifier(digits, epochs=1)
    sb.generate(sb.load_pipeline("digits", device=CUDA).unet, standard_start(sb.scheduler("ddpm"), 2), [0])
    assert torch.equal(torch.cuda.get_rng_state(), before)


# --- the command line -----------------------------------------------------------------------------


@gpu
def test_the_command_line_on_a_gpu(tmp_path):
    plain = sampled(tmp_path / "cpu", "--device", "cpu")
    there = sampled(tmp_path / "cuda", "--device", "cuda")
    assert np.abs(there - plain).max() <= 1  # 1e-3 is an eighth of a grey level
    assert (sampled(tmp_path / "auto") == there).all()  # a GPU where there is one
    rough = sampled(tmp_path / "bf16", "--precision", "bf16")
    assert 0 < np.abs(rough - there).mean() < 0.2 * np.abs(np.roll(there, 1, axis=0) - there).mean()


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices on this machine")
def test_two_gpus_give_the_answer_of_one(tmp_path):
    x = torch.rand(501, 1, 6, 6, generator=generator(3)).numpy()
    np.save(tmp_path / "x.npy", x)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "symbreak"]
    runs = [
        ["fit", "--data", str(tmp_path / "x.npy"), "--out", str(tmp_path / "two.safetensors")],
        ["sample", "--seeds", "0-99", "--steps", "2", "--micro-batch", "16", "--out", str(tmp_path / "two")],
    ]
    for run in runs:
        done = subprocess.run(
            [*launch, *run], capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        with pytest.raises(SystemExit, match="0"):
            main([a.replace("two", "one") for a in run])
    one, two = (sb.Moments.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    np.testing.assert_allclose(two.cov, one.cov, rtol=1e-12, atol=1e-12)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).glob("*.png")} for name in ("one", "two")]
    assert len(files[0]) == 100
    assert files[0] == files[1]
