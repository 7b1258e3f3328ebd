"""Tiny random networks of every family, built in memory, each with a pipeline where diffusers has one."""

from __future__ import annotations

import functools
import inspect

import diffusers
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput as Output

from symbreak.networks.families import as_unet
from symbreak.networks.samplers import scheduler

C, SIDE = 4, 8  # latents


def seeded(make):
    """A network with weights that are always the same."""
    torch.manual_seed(0)
    return make().eval()


def unet(**more):
    """A UNet2DModel for pictures of 8 x 8."""
    return seeded(lambda: diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=more.pop("out_channels", 1), block_out_channels=(8, 8),
        layers_per_block=1, norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        **more,
    ))  # fmt: skip


def conditional_unet(**more):
    """Stable Diffusion's kind."""
    return seeded(lambda: diffusers.UNet2DConditionModel(
        sample_size=SIDE, in_channels=C, out_channels=C, block_out_channels=(8, 16), norm_num_groups=4,
        layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **more,
    ))  # fmt: skip


def sdxl_unet():
    """Which is told sizes and a pooled text, too."""
    return conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8
    )


def dit():
    """Ten classes and a null class, learned variances."""
    return seeded(lambda: diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=C, out_channels=2 * C, num_layers=1, sample_size=SIDE,
        patch_size=2, num_embeds_ada_norm=10,
    ))  # fmt: skip


def pixart():
    """Text, learned variances."""
    return seeded(lambda: diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=C, out_channels=2 * C, num_layers=1,
        cross_attention_dim=16, sample_size=SIDE, patch_size=2, caption_channels=16, use_additional_conditions=False,
    ))  # fmt: skip


def sd3():
    """Text and pooled text."""
    return seeded(lambda: diffusers.SD3Transformer2DModel(
        sample_size=SIDE, patch_size=2, in_channels=C, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=C,
        pos_embed_max_size=8,
    ))  # fmt: skip


def sana():
    """Text; linear attention."""
    return seeded(lambda: diffusers.SanaTransformer2DModel(
        in_channels=C, out_channels=C, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=SIDE, patch_size=1,
    ))  # fmt: skip


def flux(**more):
    """Packed latents."""
    return seeded(lambda: diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4 * C, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), **more,
    ))  # fmt: skip


def qwen():
    """Packed latents whose sides are said."""
    return seeded(lambda: diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=4 * C, out_channels=C, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    ))  # fmt: skip


def ltx():
    """Packed videos."""
    return seeded(lambda: diffusers.LTXVideoTransformer3DModel(
        in_channels=C, out_channels=C, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=16,
    ))  # fmt: skip


def wan():
    """Videos."""
    return seeded(lambda: diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=C, out_channels=C, text_dim=16,
        freq_dim=16, ffn_dim=16, num_layers=1,
    ))  # fmt: skip


def signal_unet():
    """Signals of 64 values."""
    return seeded(lambda: diffusers.UNet1DModel(
        sample_size=64, in_channels=2, out_channels=2, extra_in_channels=64, block_out_channels=(32, 32, 64),
    ))  # fmt: skip


def video_unet():
    """Videos, with text."""
    return seeded(lambda: diffusers.UNet3DConditionModel(
        sample_size=SIDE, in_channels=C, out_channels=C, block_out_channels=(4, 8), norm_num_groups=2,
        layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ))  # fmt: skip


class Small(torch.nn.Module):
    """A convolution that sees the time and the class; whose face is its family's."""

    def __init__(self, channels=1, out=1, classes=0):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(channels, out, 3, padding=1)
        self.of_class = torch.nn.Embedding(classes or 1, out)

    def body(self, x, t, y=None):
        """[B, out, H, W]."""
        out = self.conv(x) * (1 + 0.1 * t.reshape(-1, 1, 1, 1).to(x)).reciprocal()
        return out if y is None else out + self.of_class(y)[:, :, None, None]


class GuidedDiffusion(Small):
    """net(x, timesteps, y), variances learned."""

    in_channels, image_size, num_classes = 1, 8, 10

    def __init__(self):
        super().__init__(1, 2, 10)

    def forward(self, x, timesteps, y=None):
        assert (y is not None) == (self.num_classes is not None)
        return self.body(x, timesteps, y)


class DenoisingDiffusionPytorch(Small):
    """net(x, time)."""

    channels = 1

    def forward(self, x, time, x_self_cond=None):
        return self.body(x, time)


class TorchCfm(Small):
    """net(t, x), data at t = 1."""

    def forward(self, t, x, y=None):
        assert float(t.min()) >= 0
        assert float(t.max()) <= 1
        return self.body(x, t)


class Edm(Small):
    """net(x, sigma, class_labels), classes as rows of one 1; EDM2's do not say their levels."""

    img_channels, img_resolution, label_dim, sigma_data = 1, 8, 10, 0.5

    def __init__(self):
        super().__init__(1, 1, 10)

    def forward(self, x, sigma, class_labels=None, force_fp32=False, **_):
        x, s = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        class_labels = torch.zeros(len(x), 10) if class_labels is None else class_labels.reshape(-1, 10)
        return x / (1 + s * s) + 0.1 * (class_labels @ self.of_class.weight)[:, :, None, None]


class KDiffusion(Small):
    """model(x, sigma)."""

    def forward(self, x, sigma):
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


class AzulaDenoiser(Small):
    """denoiser(x_t, t) -> a posterior with a mean, and a schedule (alpha_t, sigma_t)."""

    def schedule(self, t):
        return torch.cos(1.55 * t), torch.sin(1.55 * t) + 1e-4

    def forward(self, x_t, t):
        alpha, std = (v.reshape(-1, 1, 1, 1) for v in self.schedule(t))
        return type("Posterior", (), {"mean": alpha * x_t / (alpha**2 + std**2)})()


def text(n=1):
    """Embeddings of n prompts of 3 tokens."""
    return torch.randn(n, 3, 16, generator=torch.Generator().manual_seed(5))


def pooled(n=1):
    """One vector a prompt."""
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(6))


FLOW = {"encoder_hidden_states": text(), "pooled_projections": pooled()}
MASK = {"encoder_attention_mask": torch.ones(1, 3)}
CLASS = {"class_labels": torch.tensor([3])}
VIDEO = (C, 2, SIDE, SIDE)
# name: network, scheduler's name (of a denoiser none), shape where it has to be said, condition
FAMILIES = {
    "UNet2DModel": (unet, "ddpm", None, {}),
    "UNet2DModel, classes": (lambda: unet(num_class_embeds=11), "ddpm", None, CLASS),
    "Stable Diffusion": (conditional_unet, "ddim", None, {"encoder_hidden_states": text()}),
    "SDXL": (
        sdxl_unet,
        "euler",
        None,
        {"encoder_hidden_states": text(), "added_cond_kwargs": {"text_embeds": pooled(), "time_ids": torch.ones(1, 6)}},
    ),
    "DiT": (dit, "ddim", None, CLASS),
    "PixArt": (pixart, "dpm++2m", None, {"encoder_hidden_states": text(), **MASK}),
    "SD3": (sd3, "flow-euler", None, FLOW),
    "Sana": (sana, "flow-dpm++2m", None, {"encoder_hidden_states": text(), **MASK}),
    "Flux": (flux, "flow-euler", (C, SIDE, SIDE), FLOW),
    "Qwen-Image": (
        qwen,
        "flow-euler",
        (C, SIDE, SIDE),
        {"encoder_hidden_states": text(), "encoder_hidden_states_mask": torch.tensor([[1, 1, 0]])},
    ),
    "LTX": (ltx, "flow-euler", VIDEO, {"encoder_hidden_states": text(), **MASK}),
    "Wan": (wan, "flow-unipc", VIDEO, {"encoder_hidden_states": text()}),
    "UNet1DModel": (signal_unet, "ddpm", None, {}),
    "UNet3DConditionModel": (video_unet, "ddim", VIDEO, {"encoder_hidden_states": text()}),
    "guided-diffusion": (GuidedDiffusion, "ddpm", None, CLASS),
    "denoising-diffusion-pytorch": (DenoisingDiffusionPytorch, "ddpm", (1, 8, 8), {}),
    "torchcfm": (TorchCfm, "flow-euler", (1, 8, 8), {}),
    "EDM": (Edm, None, None, CLASS),
    "k-diffusion": (KDiffusion, None, (1, 8, 8), {}),
    "azula": (AzulaDenoiser, None, (1, 8, 8), {}),
}


def scheduler_of(name):
    """What samples of a family are drawn with; it does not cut them to pixels."""
    made = FAMILIES[name][1]
    if made is None:
        return scheduler("edm-euler", sigma_min=0.02, sigma_max=20.0)
    return scheduler(made, **({"clip_sample": False} if made in ("ddpm", "ddim") else {}))


# Exact laws behind their faces.


def posed(name, law):
    """The network of a family with a law's answers in place of its own; its condition is checked, then ignored."""
    make, _, _, condition = FAMILIES[name]
    net = make()
    if FAMILIES[name][1] is None:
        return _posed_denoiser(net, law)
    unet = as_unet(law, scheduler_of(name))

    def answer(x, t, said):
        missing = set(condition) - {k for k, v in said.items() if v is not None}
        assert not missing - {"class_labels"}, missing
        return unet(x, t, return_dict=False)[0]

    def forward(*args, **kwargs):
        said = dict(inspect.signature(own).bind(*args, **kwargs).arguments)
        x = said.pop("hidden_states", said.pop("sample", said.pop("x", None)))
        t = said.pop("timestep", said.pop("timesteps", said.pop("time", said.pop("t", None))))
        if isinstance(net, TorchCfm):
            return -answer(x, 1000 * (1 - t), said)
        if name in ("Flux", "Qwen-Image"):
            square = 8 * SIDE  # of pixels, of which a latent has 8 x 8
            x = diffusers.FluxPipeline._unpack_latents(x, square, square, 8)
            out = answer(x, 1000 * t, said)
            out = diffusers.FluxPipeline._pack_latents(out, len(x), C, SIDE, SIDE)
        elif name == "LTX":
            b, _, c = x.shape
            x = x.reshape(b, 2, SIDE, SIDE, c).permute(0, 4, 1, 2, 3)
            out = diffusers.LTXPipeline._pack_latents(answer(x, t, said))
        else:
            out = answer(x, t / (net.config.timestep_scale if name == "Sana" else 1), said)
        if name in ("DiT", "PixArt", "guided-diffusion"):
            out = torch.cat([out, 7 + 0 * out], 1)  # variances
        plain = isinstance(net, Small)
        return out if plain else (out,) if said.get("return_dict") is False else Output(sample=out)

    own = net.forward
    net.forward = functools.wraps(own)(forward)
    return net


def _posed_denoiser(net, law):
    def forward(x, sigma, **_):
        if isinstance(net, AzulaDenoiser):
            alpha, std = net.schedule(sigma)  # which is its time
            out = law.denoise(x.double() / alpha.reshape(-1, 1, 1, 1), (std / alpha).double()).to(x)
            return type("Posterior", (), {"mean": out})()
        return law.denoise(x.double(), sigma.double()).to(x)

    net.forward = functools.wraps(net.forward)(forward)
    return net


def text_pipelines(name, net, schedule):
    """The pipeline of a family with the network, without autoencoder and text encoders: prompts come as embeddings."""
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    two = none | dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    made = {
        "Stable Diffusion": lambda: diffusers.StableDiffusionPipeline(
            **none, unet=net, scheduler=schedule, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        ),
        "SDXL": lambda: diffusers.StableDiffusionXLPipeline(**two, unet=net, scheduler=schedule),
        "PixArt": lambda: diffusers.PixArtAlphaPipeline(**none, transformer=net, scheduler=schedule),
        "SD3": lambda: diffusers.StableDiffusion3Pipeline(
            **two, text_encoder_3=None, tokenizer_3=None, transformer=net, scheduler=schedule
        ),
        "Sana": lambda: diffusers.SanaPipeline(**none, transformer=net, scheduler=schedule),
        "Flux": lambda: diffusers.FluxPipeline(**two, transformer=net, scheduler=schedule),
        "Qwen-Image": lambda: diffusers.QwenImagePipeline(**none, transformer=net, scheduler=schedule),
        "LTX": lambda: diffusers.LTXPipeline(**none, transformer=net, scheduler=schedule),
        "Wan": lambda: diffusers.WanPipeline(**none, transformer=net, scheduler=schedule),
    }[name]()  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def prompts(name, n):
    """What the call of such a pipeline needs for n prompts, guidance off."""
    whole = {"prompt_embeds": text().expand(n, -1, -1), "output_type": "latent"}
    one = {"pooled_prompt_embeds": pooled().expand(n, -1)}
    mask = {"prompt_attention_mask": torch.ones(n, 3), "negative_prompt": None, "use_resolution_binning": False}
    more = {
        "Stable Diffusion": {"guidance_scale": 1.0},
        "SDXL": one | {"guidance_scale": 1.0, "height": 8 * SIDE, "width": 8 * SIDE},
        "PixArt": mask | {"guidance_scale": 1.0},
        "SD3": one | {"guidance_scale": 1.0},
        "Sana": mask | {"guidance_scale": 1.0},
        "Flux": one,
        "Qwen-Image": {"prompt_embeds_mask": torch.tensor([[1, 1, 0]]).expand(n, 3)},
        "LTX": {"prompt_attention_mask": torch.ones(n, 3), "guidance_scale": 1.0},
        "Wan": {"guidance_scale": 1.0},
    }
    return whole | more[name]


def vae():
    """A tiny autoencoder, 16 x 16 colours to 8 x 8."""
    return seeded(lambda: diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.3,
    ))  # fmt: skip


def lumina():
    """A transformer whose time runs the other way, which no family of ours knows."""
    return seeded(lambda: diffusers.Lumina2Transformer2DModel(
        sample_size=SIDE, in_channels=C, hidden_size=16, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(16, 16, 16), cap_feat_dim=16,
    ))  # fmt: skip
