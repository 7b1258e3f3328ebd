import math

import diffusers
import pytest
import torch

from symbreak.data.readers import images
from symbreak.laws import Gaussian
from symbreak.moments.one_pass import Moments
from symbreak.networks.families import as_unet, denoiser
from symbreak.networks.samplers import scheduler
from symbreak.noise import NoiseLevel
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Run
from symbreak.start.fit import late_start
from symbreak.start.late_start import standard_start
from symbreak.start.loading import load_pipeline
from symbreak.start.sample import generate, parse_seeds, write_images
from tests.worlds import gaussian_law


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("digits")


@pytest.fixture(scope="module")
def law():
    return Gaussian(Moments.fit(images("digits")))


@pytest.mark.parametrize("name", ["ddpm", "dpm++2m-karras", "euler-a", "pndm"])
def test_an_image_is_its_seed(pipe, law, name):
    start = late_start(scheduler(name, like=pipe.scheduler), law, 3)
    whole = generate(pipe.unet, start, range(20), micro_batch=8)
    again = generate(pipe.unet, start, [17, 3, 9], micro_batch=8)
    assert torch.equal(again, whole[[17, 3, 9]])  # bit for bit, whatever the neighbours and the order
    assert torch.equal(generate(pipe.unet, start, [5], micro_batch=8)[0], whole[5])
    assert not torch.equal(whole[0], whole[1])


def test_agrees_with_diffusers_own_pipeline(pipe):
    """The same seeds as a list of generators give the same images in DDIMPipeline."""
    s = scheduler("ddim", like=pipe.scheduler)
    ours = generate(pipe.unet, standard_start(s, 5), range(4), micro_batch=4)
    theirs = diffusers.DDIMPipeline(unet=pipe.unet, scheduler=s)
    theirs.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    out = theirs(batch_size=4, generator=generators, num_inference_steps=5, output_type="np").images
    # their images are scaled to [0, 1]; the network runs on the same batch size, so only rounding is left
    torch.testing.assert_close(torch.from_numpy(out).permute(0, 3, 1, 2) * 2 - 1, ours, atol=2e-6, rtol=0)


def test_noised_images_come_back_from_low_noise():
    law = gaussian_law()
    s = scheduler("ddim", clip_sample=False)
    clean = law.sample(5, 0.0, torch.Generator().manual_seed(0)).float()
    start = late_start(s, law, 2, at=NoiseLevel(0.02), check=False)
    out = generate(as_unet(law, s), start, range(5), micro_batch=4, clean=clean, clamp=False)
    # noise of 0.02 alone separates them: five standard deviations
    assert (out - clean).abs().max() < 0.1
    assert (out - clean).abs().max() > 1e-4


def test_progress_counts_images(pipe, law):
    seen = []
    start = late_start(scheduler("ddim", like=pipe.scheduler), law, 1)
    generate(pipe.unet, start, range(5), micro_batch=2, run=Run(progress=lambda _, d, n: seen.append((d, n))))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_bad_input(pipe, law):
    start = late_start(scheduler("ddim", like=pipe.scheduler), law, 2)
    with pytest.raises(InputError, match="no seeds"):
        generate(pipe.unet, start, [])
    with pytest.raises(InputError, match="at least 1"):
        generate(pipe.unet, start, [0], micro_batch=0)
    with pytest.raises(InputError, match="2 clean images for 1 seeds"):
        generate(pipe.unet, start, [0], clean=torch.zeros(2, 1, 8, 8))
    with pytest.raises(InputError, match="Fit it on such data"):
        generate(as_unet(gaussian_law(), scheduler("ddim")), start, [0])
    for text in ("x", "3-1", "1-2-3", ""):
        with pytest.raises(InputError, match="seed"):
            parse_seeds(text)
    assert parse_seeds("0-3, 9") == [0, 1, 2, 3, 9]


def test_finished_blocks_are_kept_and_belong_to_what_made_them(pipe, law, tmp_path):
    start, other = (late_start(scheduler("ddim", like=pipe.scheduler), law, n) for n in (1, 2))
    run = Run(tmp_path)
    whole = generate(pipe.unet, start, range(5), micro_batch=2, run=run)
    assert torch.equal(whole, generate(pipe.unet, start, range(5), micro_batch=2))
    parts = list(tmp_path.rglob("*.safetensors"))
    assert len(parts) == 1
    assert torch.equal(generate(pipe.unet, start, range(5), micro_batch=2, run=run), whole)
    assert list(tmp_path.rglob("*.safetensors")) == parts
    again = generate(pipe.unet, other, range(5), micro_batch=2, run=run)
    assert torch.equal(again, generate(pipe.unet, other, range(5), micro_batch=2))
    with pytest.raises(InputError, match=r"generate\(progress=\.\.\.\) is now"):
        generate(pipe.unet, start, [0], progress=print)


def test_images_are_written_once(pipe, law, tmp_path):
    start = late_start(scheduler("ddim", like=pipe.scheduler), law, 1)
    assert write_images(pipe.unet, start, range(3), tmp_path, micro_batch=2) == 3
    assert write_images(pipe.unet, start, range(5), tmp_path, micro_batch=2) == 2
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [f"{s:08d}.png" for s in range(5)]
    with pytest.raises(InputError, match="other settings: micro_batch"):
        write_images(pipe.unet, start, range(3), tmp_path, micro_batch=4)


class Diverged(torch.nn.Module):
    """A network whose answers turn to NaN below a level."""

    def __init__(self, inner, below=1e9):
        super().__init__()
        self.inner, self.config, self.below = inner, inner.config, below

    def forward(self, x, t, return_dict=True, **_):
        out = self.inner(x, t, return_dict=False)[0]
        return (torch.where(t.reshape(-1, 1, 1, 1) < self.below, math.nan, out),)


def test_nan_is_an_error_that_names_step_and_level_and_nothing_is_written(tmp_path):
    base = scheduler("dpm++2m")
    unet = as_unet(gaussian_law(), base)
    start = standard_start(base, 4)  # at steps 999, 749, 500, 250
    first = r"step 1 of 4 of DPMSolverMultistepScheduler, sigma 157\.4: the network's answer"
    with pytest.raises(InputError, match=first):
        generate(Diverged(unet), start, [0])
    with pytest.raises(InputError, match=r"step 4 of 4 .*the network's answer holds NaN"):
        generate(Diverged(unet, below=300), start, [0])
    assert bool(torch.isfinite(generate(Diverged(unet, below=100), start, [0])).all())
    with pytest.raises(InputError, match="step 4 of 4"):
        write_images(Diverged(unet, below=300), start, [0], tmp_path / "out", {"any": 1})
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("base", "steps"),
    [
        (diffusers.DDPMScheduler(variance_type="fixed_large_log"), 10),
        (diffusers.UniPCMultistepScheduler(solver_type="bh1", beta_schedule="squaredcos_cap_v2"), 10),
        (diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), 10),
        (diffusers.DPMSolverMultistepScheduler(timestep_spacing="leading"), 999),
    ],
    ids=["fixed_large_log", "bh1", "epsilon at no signal", "too many steps"],
)
def test_a_sampler_gives_numbers_or_one_line(base, steps):
    unet = as_unet(gaussian_law(), scheduler("ddim", like=base))
    said = ""
    try:
        x = generate(unet, standard_start(base, steps), [0, 1])
    except InputError as error:
        said, x = str(error), torch.zeros(1)
    assert bool(torch.isfinite(x).all())
    assert not said or ("step " in said and "\n" not in said)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++2m"])
def test_twice_the_output_channels(name, variance):
    """Networks that learned a variance, with samplers that use it and those that do not."""
    like = diffusers.DDPMScheduler(variance_type=variance, clip_sample=False)
    unet = as_unet(gaussian_law(), like)

    class Learned(torch.nn.Module):
        config = unet.config

        def forward(self, x, t, return_dict=True, **_):
            out = unet(x, t, return_dict=False)[0]
            return (torch.cat([out, 0 * out], 1),)

    base = scheduler(name, like=like)
    x = generate(Learned(), standard_start(base, 5), [0, 1])
    assert tuple(x.shape) == (2, 1, 2, 2)
    if variance == "fixed_small":
        assert torch.equal(x, generate(unet, standard_start(base, 5), [0, 1]))


@pytest.mark.parametrize("size", [None, "big", 0, (2,), 2.5])
def test_networks_that_do_not_say_their_size(size):
    unet = as_unet(gaussian_law(), scheduler("ddim"))
    unet.config = type(unet.config)(dict(unet.config) | {"sample_size": size})
    base = scheduler("ddim")
    for ask in (lambda: generate(unet, standard_start(base, 2), [0]), lambda: denoiser(unet, base)):
        with pytest.raises(InputError, match="expected whole numbers above 0"):
            ask()


def test_a_size_that_the_network_cannot_halve_and_one_row_of_a_condition():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    small = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, **blocks}
    odd = diffusers.UNet2DModel(sample_size=7, in_channels=1, out_channels=1, **small)
    with pytest.raises(InputError, match=r"the network cannot take states of shape \(64, 1, 7, 7\)"):
        generate(odd, standard_start(scheduler("ddim"), 2), [0])
    text = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    small |= {"block_out_channels": (8,), **text}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, cross_attention_dim=4, **small
    ).eval()
    row = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    start = standard_start(scheduler("ddim"), 2)
    one = generate(unet, start, [0, 1, 2], micro_batch=3, encoder_hidden_states=row)
    three = row.expand(3, 3, 4)
    torch.testing.assert_close(one, generate(unet, start, [0, 1, 2], micro_batch=3, encoder_hidden_states=three))
    d = denoiser(unet, scheduler("ddim"), encoder_hidden_states=row)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(d(x, 1.0), d.bind(encoder_hidden_states=three)(x, 1.0))


class Edm(torch.nn.Module):
    """A network in the manner of EDM: a denoiser of its own, without a config."""

    img_channels, img_resolution, sigma_min, sigma_max = 1, 2, 0.002, 80.0

    def forward(self, x, sigma):
        return gaussian_law().denoise(x.double(), sigma.double()).to(x)


def test_edm_networks_are_taken_as_they_are():
    start = standard_start(scheduler("edm-euler"), 40)
    base = scheduler("edm-euler")
    x = generate(as_unet(denoiser(Edm()), base), start, range(8), clamp=False)
    for network in (Edm(), denoiser(Edm())):
        assert torch.equal(generate(network, start, range(8), clamp=False), x)
    torch.testing.assert_close(x, generate(as_unet(gaussian_law(), base), start, range(8), clamp=False))


def test_stored_images_belong_to_the_law_of_every_class(tmp_path):
    from symbreak.laws import Mixture

    x = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(200) % 2
    moved = x.clone()
    moved[y == 1] += 0.5
    laws = [Mixture.fit([v], labels=y) for v in (x, moved)]
    base = scheduler("ddim", clip_sample=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
            layers_per_block=1, num_class_embeds=2, down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )  # fmt: skip
    labels, made = torch.tensor([0, 1, 1, 1]), []
    for law in laws:  # the class of the first label has the same law in both
        start = late_start(base, law, 2, at=NoiseLevel(1.0), check=False)
        made.append(generate(network, start, range(4), labels, run=Run(tmp_path), clamp=False))
    assert torch.equal(made[0][0], made[1][0])
    assert not torch.equal(made[0][1:], made[1][1:])


def test_a_number_of_seeds_is_no_list_of_them():
    with pytest.raises(InputError, match=r"seeds=8; expected a list of them, such as range\(8\)"):
        generate(gaussian_law(), standard_start(scheduler("edm-euler"), 4), 8)
