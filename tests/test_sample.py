import diffusers
import pytest
import torch

from symbreak.data.readers import images
from symbreak.laws import Gaussian
from symbreak.moments.one_pass import Moments
from symbreak.networks.families import as_unet
from symbreak.networks.loading import load_pipeline
from symbreak.networks.samplers import scheduler
from symbreak.noise import NoiseLevel
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Run
from symbreak.start.fit import late_start
from symbreak.start.late_start import standard_start
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
