import diffusers
import pytest
import torch

from symbreak.networks.denoiser import as_denoiser, score
from symbreak.networks.families import as_unet, denoiser
from symbreak.networks.samplers import scheduler
from symbreak.noise import NoiseLevel
from symbreak.runtime.files import InputError
from symbreak.start.loading import load_pipeline
from tests.worlds import gaussian_law

KINDS = [
    diffusers.DDPMScheduler(),
    diffusers.DDPMScheduler(prediction_type="v_prediction"),
    diffusers.DDPMScheduler(prediction_type="sample"),
    diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    diffusers.EDMEulerScheduler(),
    diffusers.EDMEulerScheduler(prediction_type="v_prediction"),
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
]


class Learned(torch.nn.Module):
    """A network that appends variance channels, as improved-DDPM networks do."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, x, t, return_dict=True, **_):
        out = self.inner(x, t, return_dict=False)[0]
        return (torch.cat([out, 7 + out], 1),)


@pytest.mark.parametrize("kind", KINDS, ids=lambda s: f"{type(s).__name__}-{s.config.get('prediction_type')}")
def test_network_to_denoiser_inverts_law_to_network(kind):
    law = gaussian_law()
    unet = as_unet(law, kind)
    x = 3 * torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = denoiser(unet, kind)
    assert d.shape == (1, 2, 2)
    for sigma in (0.3, 2.0, 15.0):
        # epsilon prediction divides and multiplies by sigma: float64 rounding only
        torch.testing.assert_close(d(x, sigma), law.denoise(x, sigma), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(denoiser(Learned(unet), kind)(x, sigma), d(x, sigma))
    each = torch.tensor([0.3, 2.0, 2.0, 15.0])
    torch.testing.assert_close(d(x, each), law.denoise(x, each), rtol=1e-6, atol=1e-6)


def test_scores_agree():
    law = gaussian_law()
    kind = diffusers.DDPMScheduler()
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(
        score(denoiser(as_unet(law, kind), kind), x, 1.3), law.score(x, 1.3), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        score(law, x, torch.tensor([1.0, 2.0, 3.0])), law.score(x, torch.tensor([1.0, 2.0, 3.0]))
    )
    with pytest.raises(TypeError, match="neither a law"):
        as_denoiser(3)


def test_outside_the_range_and_the_wrong_shape():
    kind = diffusers.DDPMScheduler()
    d = denoiser(as_unet(gaussian_law(), kind), kind)
    with pytest.raises(ValueError, match="outside the schedule"):
        d(torch.zeros(1, 1, 2, 2), 1e4)
    with pytest.raises(InputError, match="Resize"):
        d(torch.zeros(1, 1, 3, 3), 1.0)
    with pytest.raises(InputError, match="prediction type"):
        denoiser(as_unet(gaussian_law(), kind), diffusers.DDPMScheduler(prediction_type="magic"))


def test_conditions_are_bound_before():
    class Conditional(torch.nn.Module):
        config = diffusers.configuration_utils.FrozenDict(in_channels=1, sample_size=2)

        def forward(self, x, t, class_labels=None, return_dict=True):
            return (x * class_labels.reshape(-1, 1, 1, 1),)

    d = denoiser(Conditional(), diffusers.DDPMScheduler(prediction_type="sample"))
    x = torch.ones(2, 1, 2, 2)
    out = d.bind(class_labels=torch.tensor([0.0, 2.0]))(x, 1.0)
    assert out[0].abs().max() == 0
    assert out[1].min() == pytest.approx(2 * NoiseLevel(1.0).alpha)


def test_schedulers_by_name():
    like = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)
    s = scheduler("dpm++2m-karras", like=like)
    assert (s.config.prediction_type, s.config.use_karras_sigmas) == ("v_prediction", True)
    torch.testing.assert_close(s.alphas_cumprod, like.alphas_cumprod)
    # Karras sigmas must not leak into the next sampler through `like`.
    assert not scheduler("dpm++2m", like=s).config.use_karras_sigmas
    assert scheduler("ddim", timestep_spacing="trailing").config.timestep_spacing == "trailing"
    with pytest.raises(InputError, match="unknown sampler 'magic'"):
        scheduler("magic")
    with pytest.raises(InputError, match="of the kind edm"):
        scheduler("edm-euler", like=like)


def test_pipelines_load_from_folders_without_pickles(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(tmp_path / "p")
    pipe = load_pipeline(tmp_path / "p")
    x = torch.zeros(1, 1, 8, 8)
    torch.testing.assert_close(pipe.unet(x, 5).sample, unet.eval()(x, 5).sample)
    weights = tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(unet.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_pipeline(tmp_path / "p")
    with pytest.raises(InputError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_pipeline(tmp_path / "q")
    (tmp_path / "p" / "model_index.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_pipeline(tmp_path / "p")
    (tmp_path / "p" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(InputError, match="no unet and scheduler"):
        load_pipeline(tmp_path / "p")
