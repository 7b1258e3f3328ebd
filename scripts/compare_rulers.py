"""Are images that stand for starts ranked alike in EfficientNet features, random convolutions, logits and pixels?

    python scripts/compare_rulers.py    # a minute or two of a core; no network; needs SYMBREAK_DATA with the faces

300 images a set, 32 x 32; Fréchet distance to 300 test faces: all at once, and of three repeats with their interval.
"""

import os
from itertools import combinations
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import nn

import symbreak as sb
from symbreak.metrics.attributes import attribute_classifier
from symbreak.metrics.frechet import distance

N, REPEATS = 300, 3


def other_rulers(train, attributes):
    """Features that no training on other pictures decides: {name: function of images [B, C, H, W] to rows [B, F]}."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        layers = (nn.Conv2d(train.shape[0], 64, 5, stride=2), nn.Conv2d(64, 128, 3, stride=2), nn.Conv2d(128, 256, 3))
    stack = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), nn.AdaptiveAvgPool2d(1))
    rulers = {"random convolutions": lambda x: stack(x).flatten(1)}
    if attributes:
        judge = attribute_classifier(train, None, sb.extractor("pixels"))
        rulers["attribute logits"] = lambda x: torch.cat([scores[:, 1:] for scores in judge(x).values()], 1)
    return {**rulers, "pixels, 8 x 8": lambda x: nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)}


def main():
    root = Path(os.environ["SYMBREAK_DATA"])
    train, test = (
        sb.images(str(root / f"celeba10k-{half}.parquet"), size=32, crop=70, labels="none")
        for half in ("train", "test")
    )
    gaussian = sb.Gaussian.fit(train)
    clusters = sb.PrincipalMixture.fit(train, components=60, gaussian=gaussian)
    rulers = {"EfficientNet-Lite0, 64": sb.extractor("efficientnet-lite0-64"), **other_rulers(train, True)}
    some = train.tensor()[torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[: 2 * N]]
    real, x = some[:N], some[N:]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    sets = {
        "training faces": real,
        "faces with noise .1": x + 0.1 * noise,
        "faces with noise .3": x + 0.3 * noise,
        "noised to sigma 1, a Gaussian's answer": gaussian.denoise(x + noise, 1.0),
        "noised to sigma 3, a Gaussian's answer": gaussian.denoise(x + 3 * noise, 3.0),
        "noised to sigma 3, 60 clusters' answer": clusters.denoise(x + 3 * noise, 3.0),
        "draws of one Gaussian": gaussian.sample(N, generator=torch.Generator().manual_seed(3)),
        "draws of 60 clusters": clusters.sample(N, generator=torch.Generator().manual_seed(4)),
    }
    all_at_once = {}
    for name, ruler in rulers.items():

        def rows(images, ruler=ruler):
            with torch.inference_mode():
                return torch.cat([ruler(block.float().clamp(-1, 1)) for block in images.split(100)]).double()

        reference = sb.Moments.fit([rows(test.tensor()[:N])])
        measured = {key: distance(rows(images), reference, REPEATS, name) for key, images in sets.items()}
        all_at_once[name] = [d.pooled for d in measured.values()]
        for key, d in measured.items():
            print(f"{name} | {key} | {d.pooled:.3g} | {d.mean:.3g} [{d.low:.3g}, {d.high:.3g}]", flush=True)
    for a, b in combinations(all_at_once, 2):
        print(f"rank correlation {spearmanr(all_at_once[a], all_at_once[b])[0]:+.2f}: {a}, {b}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
