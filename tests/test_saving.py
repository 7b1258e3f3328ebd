import hashlib
import json
import subprocess
import sys

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from symbreak.data.readers import images
from symbreak.laws import Empirical, Gaussian, Mixture, PrincipalMixture
from symbreak.laws.saving import load_law, save_law
from symbreak.moments.one_pass import Moments
from symbreak.networks.families import as_unet
from symbreak.networks.samplers import SAMPLERS, scheduler
from symbreak.noise import NoiseLevel, generator
from symbreak.phases.speciation import speciation_time
from symbreak.runtime.files import InputError, read_tensors, write_tensors
from symbreak.start.fit import late_start
from symbreak.start.late_start import LateStart, standard_start
from symbreak.start.sample import generate
from tests.worlds import full_mixture, gaussian_law, isotropic_mixture, low_rank_mixture

LAWS = {
    "gaussian": gaussian_law,
    "digits": lambda: Gaussian(Moments.fit(images("digits"))),
    "full": full_mixture,
    "low rank": low_rank_mixture,
    "isotropic": isotropic_mixture,
    # weights 1/7 .. whose sum is not exactly one
    "weights": lambda: full_mixture(k=7, dim=3),
    "low-rank gaussian": lambda: Gaussian(Moments.fit(images("digits"), rank=12)),
    "another floor": lambda: Gaussian(Moments.fit(images("digits")), rank=12, floor=0.25),
    "classes": lambda: Mixture.fit(images("digits"), labels=True, rank=5),
    "principal": lambda: PrincipalMixture.fit(images("digits"), labels=True, components=20),
    "principal over low rank": lambda: PrincipalMixture.fit(
        images("digits"), components=8, gaussian=Gaussian(Moments.fit(images("digits"), rank=30))
    ),
}


def noise(law, n=6, dtype=torch.float64):
    return torch.randn(n, *law.shape, generator=generator(3), dtype=torch.float64).to(dtype)


def edited(path, tensors=None, **metadata):
    """The file with some tensors (None removes one) and metadata replaced."""
    old, head = read_tensors(path)
    new = {k: v for k, v in {**old, **(tensors or {})}.items() if v is not None}
    save_file({k: v.contiguous().clone() for k, v in new.items()}, path, metadata={**head, **metadata})
    return path


@pytest.mark.parametrize("name", LAWS)
def test_a_saved_law_is_the_law_bit_for_bit(name, tmp_path):
    law = LAWS[name]()
    back = load_law(save_law(law, tmp_path / "law.safetensors"))
    assert type(back) is type(law)
    assert back.shape == law.shape
    for dtype in (torch.float32, torch.float64):
        z = noise(law, dtype=dtype)
        assert torch.equal(back.transport(z, 0.7), law.transport(z, 0.7))
        assert torch.equal(back.denoise(z, 0.7), law.denoise(z, 0.7))
        assert torch.equal(back.log_prob(z, 0.7), law.log_prob(z, 0.7))
    if getattr(law, "classes", None) is not None:
        assert torch.equal(back.classes, law.classes)
        some = law.classes[:6]
        assert torch.equal(back.transport(z, 0.7, labels=some), law.transport(z, 0.7, labels=some))
    if hasattr(law, "certificate"):
        assert back.certificate(0.7) == law.certificate(0.7)
    assert torch.equal(back.moments.mean, law.moments.mean)
    assert back.moments.count == law.moments.count
    # a second round trip changes nothing either
    again = load_law(save_law(back, tmp_path / "again.safetensors"))
    assert torch.equal(again.transport(z, 0.7), law.transport(z, 0.7))


def test_the_bits_hold_in_another_process(tmp_path):
    law = LAWS["digits"]()
    path = save_law(law, tmp_path / "law.safetensors")
    z = noise(law)
    save_file({"z": z}, tmp_path / "z.safetensors")
    code = (
        "import sys, hashlib; from safetensors.torch import load_file; from symbreak import load_law\n"
        "x = load_law(sys.argv[1]).transport(load_file(sys.argv[2])['z'], 0.7)\n"
        "print(hashlib.sha256(x.numpy().tobytes()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "z.safetensors")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == hashlib.sha256(law.transport(z, 0.7).numpy().tobytes()).hexdigest()


def test_a_saved_gaussian_keeps_the_interval_of_its_speciation_time(tmp_path):
    law = LAWS["digits"]()
    back = load_law(save_law(law, tmp_path / "law.safetensors"))
    ours, theirs = speciation_time(law), speciation_time(back)
    assert (ours.low.sigma, ours.level.sigma, ours.high.sigma) == (
        theirs.low.sigma,
        theirs.level.sigma,
        theirs.high.sigma,
    )
    assert ours.low.sigma < ours.high.sigma


def test_classes_of_components_are_kept(tmp_path):
    law = full_mixture()
    law.classes = torch.tensor([4, 0, 4])
    assert load_law(save_law(law, tmp_path / "law.safetensors")).classes.tolist() == [4, 0, 4]


def test_files_are_safetensors_with_plain_metadata(tmp_path):
    tensors, metadata = read_tensors(save_law(full_mixture(), tmp_path / "law.safetensors"))
    assert (metadata["format"], metadata["version"], metadata["kind"]) == ("symbreak.law", "1", "mixture")
    assert {t.dtype for t in tensors.values()} == {torch.float64}
    assert [p.name for p in tmp_path.iterdir()] == ["law.safetensors"]  # nothing is left beside it


MIXTURE_DAMAGE = [
    ({}, {"format": "else"}, "holds no law"),
    ({}, {"version": "2"}, "written by a newer symbreak .law version 2, this one reads 1"),
    ({}, {"kind": "copula"}, "unknown kind 'copula'"),
    ({}, {"mixture": "{"}, "broken mixture"),
    ({}, {"mixture": "{}"}, "broken mixture"),
    ({"means": None}, {}, "no means"),
    ({"floor": torch.zeros(2)}, {}, r"floor of shape \(2,\); expected \(3,\)"),
    ({"vectors": torch.zeros(3, 5, 4)}, {}, r"vectors of shape \(3, 5, 4\); expected \(3, 4, 4\)"),
    ({"weights": torch.tensor([0.5, 0.5, 0.5])}, {}, "sum to 1.5"),
    ({"means": torch.full((3, 4), torch.nan)}, {}, "NaN"),
    ({"eigenvalues": -torch.ones(3, 4)}, {}, "negative variance"),
    ({"classes": torch.zeros(2, dtype=torch.int64)}, {}, "classes of shape"),
]


@pytest.mark.parametrize(("tensors", "metadata", "match"), MIXTURE_DAMAGE)
def test_damaged_mixtures(tensors, metadata, match, tmp_path):
    path = edited(save_law(full_mixture(), tmp_path / "law.safetensors"), tensors, **metadata)
    with pytest.raises(InputError, match=match) as caught:
        load_law(path)
    assert "\n" not in str(caught.value)
    assert "law.safetensors" in str(caught.value) or "sum to" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "metadata", "match"),
    [
        ({"moments.cov": None}, {}, "law.safetensors holds no moments"),
        ({"moments.cov": torch.eye(3)}, {}, "covariance of shape"),
        ({"eigenvalues": None}, {}, "no eigenvalues"),
        ({"eigenvectors": torch.eye(3)}, {}, r"eigenvectors of shape \(3, 3\)"),
        ({}, {"gaussian": "[]"}, "broken gaussian|holds no"),
    ],
)
def test_damaged_gaussians(tensors, metadata, match, tmp_path):
    path = edited(save_law(gaussian_law(), tmp_path / "law.safetensors"), tensors, **metadata)
    with pytest.raises(InputError, match=match) as caught:
        load_law(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_law(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_law(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(InputError, match="no safetensors file"):
        load_law(tmp_path / "text.safetensors")
    with pytest.raises(InputError, match="Empirical cannot be saved"):
        save_law(Empirical([[0.0], [1.0]]), tmp_path / "points.safetensors")
    with pytest.raises(InputError, match="holds no law"):
        load_law(Moments.fit([torch.eye(3)]).save(tmp_path / "moments.safetensors"))


def settings(s):
    """A config without what diffusers notes down about how it was made."""
    return {k: v for k, v in s.config.items() if not k.startswith("_")}


def same(a, b):
    assert type(a.scheduler) is type(b.scheduler)
    assert torch.equal(torch.as_tensor(a.scheduler.timesteps), torch.as_tensor(b.scheduler.timesteps))
    assert (a.level, a.steps, a.calls, a.asked, a.notes) == (b.level, b.steps, b.calls, b.asked, b.notes)
    assert a.explain() == b.explain()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_saved_start_is_the_start(name, tmp_path):
    law = gaussian_law()
    s = scheduler(name)
    start = late_start(s, law, 4, at=NoiseLevel(2.5), check=False)
    back = LateStart.load(start.save(tmp_path / "start.safetensors"))
    same(start, back)
    z = noise(law, dtype=torch.float32)
    assert torch.equal(back(z), start(z))
    # the full scheduler came back, so that another start can be made of it
    assert settings(back.full) == settings(start.full)
    # and the images are the same, bit for bit
    unet = as_unet(law, s)
    assert torch.equal(generate(unet, back, [1, 5], micro_batch=4), generate(unet, start, [1, 5], micro_batch=4))


def test_notes_and_mixtures_come_back(tmp_path):
    law = low_rank_mixture()
    with pytest.warns(UserWarning, match="below the spectral"):
        start = late_start(scheduler("ddim"), law, 3, at=NoiseLevel(0.9))
    assert len(start.notes) >= 1
    back = LateStart.load(start.save(tmp_path / "start.safetensors"))
    same(start, back)
    z = noise(law)
    assert torch.equal(back(z), start(z))
    assert isinstance(back.law, Mixture)


@pytest.mark.parametrize(
    ("full", "spacing"),
    [
        (diffusers.DDIMScheduler(), None),
        (diffusers.DDIMScheduler(), "trailing"),
        (diffusers.DDIMScheduler(rescale_betas_zero_snr=True), "trailing"),  # begins at infinite sigma
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), None),
        (diffusers.TCDScheduler(), None),  # cannot be cut, but sampled
    ],
)
def test_standard_starts_too(full, spacing, tmp_path):
    start = standard_start(full, 5, spacing)
    back = LateStart.load(start.save(tmp_path / "start.safetensors"))
    same(start, back)
    assert back.law is None
    z = torch.randn(2, 1, 2, 2, generator=generator(0))
    assert torch.equal(back(z), start(z))


def broken_start(path, **changes):
    about = {**json.loads(read_tensors(path)[1]["start"]), **changes}
    return edited(path, start=json.dumps(about))


def test_broken_starts(tmp_path):
    def fresh():
        return late_start(scheduler("dpm++2m"), gaussian_law(), 5, at=NoiseLevel(2.0)).save(tmp_path / "s.safetensors")

    for damage, match in [
        (lambda p: edited(p, version="4"), r"saved by a newer symbreak \(start version 4, this one reads 1, 2, 3\)"),
        (lambda p: edited(p, format="symbreak.law"), "holds no start"),
        (lambda p: edited(p, start="{"), "broken start"),
        (lambda p: edited(p, {"asked": None}), "broken start"),
        (lambda p: edited(p, {"asked": torch.tensor([-1.0, 1.0])}), "broken start"),
        (lambda p: broken_start(p, steps=0), "broken start"),
        (lambda p: broken_start(p, scheduler={"solver_type": "magic"}), "broken start .*magic"),
        # a class of diffusers that is no scheduler is not made
        (lambda p: broken_start(p, **{"class": "DDPMPipeline"}), "which diffusers does not have"),
        (lambda p: broken_start(p, **{"class": "IPNDMScheduler"}), "IPNDMScheduler cannot be cut"),
        (lambda p: broken_start(p, steps=4), "other timesteps"),
        (lambda p: broken_start(p, law=False), "other timesteps"),
        (lambda p: edited(p, {"law.moments.cov": None}), "holds no moments"),
        (lambda p: edited(p, **{"law.version": "7"}), "law version 7"),
        (lambda p: edited(p, {"law.eigenvectors": torch.eye(5)}), "eigenvectors of shape"),
    ]:
        path = damage(fresh())
        with pytest.raises(InputError, match=match) as caught:
            LateStart.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="does not exist"):
        LateStart.load(tmp_path / "none.safetensors")


def test_a_scheduler_of_ones_own_is_not_written(tmp_path):
    class Own(diffusers.DDIMScheduler):
        pass

    with pytest.raises(InputError, match="diffusers has no such class"):
        standard_start(Own(), 3).save(tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_same_content_is_the_same_file(tmp_path):
    """A start's images remember the hash of its file; safetensors by itself orders metadata anew in every process."""
    metadata = {name: f'{name} "é\n' for name in "hcadgbfe"}
    path = write_tensors(tmp_path / "x.safetensors", {"a": torch.arange(3.0), "b": torch.ones(2, 2)}, metadata)
    tensors, found = read_tensors(path)
    assert found == metadata
    assert tensors["a"].tolist() == [0, 1, 2]
    raw = path.read_bytes()
    places = [raw.index(f'"{name}":"{name}'.encode()) for name in sorted(metadata)]
    assert places == sorted(places)
