"""FID, KID, precision and recall against torch-fidelity, in its own environment: `make test-fid`.

The Inception network has random weights, which the tests save: the published ones are not needed to see that two
programs do the same with an image.
"""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from symbreak.cli.commands import main
from symbreak.data.readers import images
from symbreak.metrics import extractor, features
from symbreak.metrics.kernel_distance import kid
from symbreak.metrics.pretrained import INCEPTION_SHA256
from symbreak.runtime.files import InputError, file_hash

fidelity = pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed: make test-fid")
pytestmark = pytest.mark.fid
COUNT = 64


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Bare(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            return None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Bare("random", ["2048"], feature_extractor_weights_path=empty)
    g = torch.Generator().manual_seed(0)
    state = network.state_dict()
    for name, value in state.items():
        if value.ndim == 4:  # keeps the variance through the rectifiers, so that all features are alive
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=g)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=g)
        elif name.endswith(("running_mean", "bn.bias")):
            value.normal_(0, 0.1, generator=g)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sets of smooth colour images; the first with a cast, so that the distances are far from 0."""
    rng = np.random.default_rng(0)
    out = []
    for cast in (40, 0):
        folder = tmp_path_factory.mktemp("images")
        for i in range(COUNT):
            coarse = rng.integers(0, 216, (4, 4, 3), dtype=np.uint8)
            coarse[..., 0] += np.uint8(cast)
            Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
        out.append(folder)
    return out


@pytest.fixture(scope="module")
def oracle(weights, folders):
    return fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        cuda=False,
        fid=True,
        kid=True,
        kid_subsets=1,
        kid_subset_size=COUNT,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        batch_size=16,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )


def run(capsys, *argv):
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def test_the_command_agrees_with_torch_fidelity(capsys, weights, folders, oracle):
    samples, real = folders
    code, out, err = run(
        capsys,
        *("evaluate", "--samples", samples, "--data", real, "--holdout", real, "--repeats", 3, "--no-cache", "--json"),
        *("--features", "inception", "--weights", weights, "--weights-sha256", file_hash(weights)),
    )
    assert code == 0, err
    found = json.loads(out)
    wanted = oracle["frechet_inception_distance"]
    assert wanted > 1
    assert found["distance"]["pooled"] == pytest.approx(wanted, rel=1e-3)
    # Weights other than the published ones give no FID, and the name says so.
    assert found["distance"]["name"] == "Fréchet distance"
    assert found["extractor"]["name"] == f"inception-{file_hash(weights)[:8]}"
    assert found["extractor"]["features"] == 2048
    assert any("64 samples for 2,048 features" in note for note in found["notes"])
    # One subset of all images is the whole estimate; theirs adds single-precision kernels.
    wanted = oracle["kernel_inception_distance_mean"]
    assert found["kid"]["value"] == pytest.approx(wanted, rel=1e-3)
    assert found["kid"]["subsets_mean"] == pytest.approx(wanted, rel=1e-3)
    # A tie broken by single precision may turn one image of 64.
    for name in ("precision", "recall"):
        assert found["precision_recall"][name] == pytest.approx(oracle[name], abs=1.01 / COUNT)


def test_subsets_spread_like_torch_fidelitys(weights):
    from torch_fidelity.metric_kid import kid_features_to_metric

    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(400, 16, generator=g) + 0.5, torch.randn(500, 16, generator=g)
    wanted = kid_features_to_metric(x, y, kid_subsets=100, kid_subset_size=100, verbose=False)
    found = kid(x, y, subsets=100, subset_size=100)
    std = wanted["kernel_inception_distance_std"]
    # Means of 100 subsets each, drawn by two generators: 4 standard errors of their difference. A standard deviation
    # of 100 draws is known to 7 %; 4 errors of a ratio of two are 40 %.
    assert found["subsets_mean"] == pytest.approx(wanted["kernel_inception_distance_mean"], abs=4 * 2**0.5 * std / 10)
    assert found["subsets_std"] == pytest.approx(std, rel=0.4)


def test_an_images_features_do_not_depend_on_its_neighbours(weights, folders):
    extract = extractor("inception", weights=weights, sha256=file_hash(weights))
    x = images(folders[0]).tensor()[:20]
    whole = features(extract, [x])
    assert torch.equal(features(extract, x.flip(0).split(3)).flip(0), whole)
    grey = x[:2, :1]
    assert torch.equal(features(extract, [grey]), features(extract, [grey.expand(-1, 3, -1, -1)]))


def test_wrong_weights_are_refused_with_the_hash(weights, tmp_path):
    with pytest.raises(InputError, match=INCEPTION_SHA256):
        extractor("inception", weights=weights)
    other = tmp_path / "other.pth"
    torch.save({"a": torch.zeros(2)}, other)
    with pytest.raises(InputError, match="weights of another network"):
        extractor("inception", weights=other, sha256=file_hash(other))
    # a pickle that runs code is not even opened
    import pickle

    bomb = tmp_path / "bomb.pth"
    bomb.write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(InputError, match="no plain weights"):
        extractor("inception", weights=bomb, sha256=file_hash(bomb))
