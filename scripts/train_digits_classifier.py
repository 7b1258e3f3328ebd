"""Train the feature network that ships with the package: the classifier of the 8 x 8 digits.

Trained on the training half only; the accuracy it prints is on the held-out half.

    python scripts/train_digits_classifier.py
"""

from pathlib import Path

import torch

from symbreak.data.readers import images
from symbreak.metrics.feature_rows import save_classifier, train_classifier

torch.set_num_threads(1)
out = Path(__file__).parents[1] / "src" / "symbreak" / "weights" / "digits-classifier.safetensors"
model = train_classifier(images("digits"), held_out=images("digits:held-out"))
save_classifier(model, out, "digits-classifier")
print(f"{out}: held-out accuracy {model.accuracy:.4f}, {out.stat().st_size:,} bytes")
