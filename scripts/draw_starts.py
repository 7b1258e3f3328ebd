"""Draw docs/figures/choosing.png: the two costs of a start on the digits, and the same seeds from three starts."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

import symbreak as sb

CALLS, SEEDS = 3, range(24)


def main() -> None:
    data, pipe = sb.images("digits"), sb.load_pipeline("digits")
    scheduler = sb.scheduler("dpm++2m", like=pipe.scheduler)
    auto = sb.fit_start(data, pipe.unet, scheduler, CALLS, check=False)
    choice = auto.choice
    figure = Figure(figsize=(11, 3.8), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    for i, name in enumerate(("one Gaussian", "classes", "clusters")):
        curve = sorted((c for c in choice.candidates if (c.law, c.grid) == (i, "Karras")), key=lambda c: c.level.sigma)
        left.plot(
            [c.level.sigma for c in curve],
            [c.law_cost if c.law_cost > 0 else float("nan") for c in curve],
            color=f"C{i}",
            label=name,
        )
    left.plot([c.level.sigma for c in curve], [c.sampler_cost for c in curve], "k--", label=f"sampler, {CALLS} NFE")
    total = [c.cost for c in curve]
    left.plot([c.level.sigma for c in curve], total, color="C2", lw=3, alpha=0.35, label="clusters + sampler")
    left.plot(choice.chosen.level.sigma, choice.chosen.cost, "o", color="C3", label="chosen")
    left.axhline(choice.standard.cost, color="0.6", lw=1, label="standard start")
    left.set(xscale="log", yscale="log", xlabel="start level sigma", ylabel="squared error of an image, pixel²")
    left.set(title="what a start costs", ylim=(5e-3, None))
    left.set_xticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    left.minorticks_off()
    left.legend(fontsize=7)
    gaussian = sb.late_start(scheduler, sb.Gaussian.fit(data), CALLS, at=auto.level, check=False)
    rows = [("standard", sb.standard_start(scheduler, CALLS, "leading")), ("Gaussian", gaussian), ("auto", auto)]
    h, w = data.shape[1:]
    for r, (name, start) in enumerate(rows):
        images = sb.generate(pipe.unet, start, SEEDS).clamp(-1, 1)
        for k, image in enumerate(images):
            x, y = (k % 12) * (w + 1), (2 * r + k // 12) * (h + 1) + 5 * r
            right.imshow(image[0], cmap="gray_r", vmin=-1, vmax=1, extent=(x, x + w, y + h, y))
        right.text(-2, 2 * r * (h + 1) + 5 * r + h, name, ha="right", va="center", fontsize=8)
    right.set(xlim=(-22, 12 * (w + 1)), ylim=(6 * (h + 1) + 10, -1), title=f"the same seeds, {CALLS} NFE of DPM++ 2M")
    right.set_axis_off()
    path = Path(__file__).parents[1] / "docs" / "figures" / "choosing.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
