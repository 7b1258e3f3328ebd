"""What an installed symbreak must be able to do: `make dist` runs it in a clean environment, outside the clone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import symbreak as sb


def main() -> None:
    if Path(sb.__file__).is_relative_to(Path(__file__).parents[1] / "src"):
        raise SystemExit("this is the symbreak of the clone; expected the installed one.")
    data, pipe = sb.images("digits"), sb.load_pipeline("digits")
    start = sb.fit_start(data, pipe.unet, sb.scheduler("dpm++2m", like=pipe.scheduler), steps=3, check=False)
    images = sb.generate(pipe.unet, start, seeds=range(4))
    if tuple(images.shape) != (4, 1, 8, 8) or not images.isfinite().all():
        raise SystemExit(f"images of {tuple(images.shape)}; expected four digits.")
    command = [str(Path(sys.executable).with_name("symbreak")), "world", "two-deltas", "--json", "--out", "smoke.html"]
    world = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if not Path(world["out"]).read_text(encoding="utf-8").startswith("<!doctype html>"):
        raise SystemExit("the page of a world is none.")
    Path(world["out"]).unlink()
    print(f"symbreak {sb.__version__}: {start!r}")


if __name__ == "__main__":
    main()
