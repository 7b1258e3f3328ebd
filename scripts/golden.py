"""Golden results: does a change of the code change a number?

    python scripts/golden.py make DIR                 # two minutes of one core; one JSON file a command or topic
    python scripts/golden.py compare A B [--rtol R]   # lists every number that differs; exit code 1 where one does

``make`` runs the ``symbreak`` that the interpreter finds, so PYTHONPATH chooses the checkout. Its settings are far too
small for evidence. The same code gives the same bits on one machine with one number of threads.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DIGITS = "--data digits --model digits"
COMMANDS = {
    "study": "study --quick --samplers ddim,dpm++2m --calls 3 --out study",
    "phases": "phases --data digits --quick --out phases",
    "phases-model": f"phases {DIGITS} --quick --pairs 24 --steps 8 --branches 4 --out phases-model",
    "audit": f"audit {DIGITS} --count 100 --steps 4 --out audit",
    "evaluate": f"evaluate {DIGITS} --seeds 0-199 --steps 3 --no-cache --out evaluate",
    "fit": "fit --data digits --out fit.safetensors",
    "fit-start": f"fit {DIGITS} --start --sampler dpm++2m --steps 3 --out fit-start.safetensors",
    "sample": "sample --start fit-start.safetensors --seeds 0-7 --out sample",
    "world-two-deltas": "world two-deltas --out two-deltas.html",
    "world-mixture": "world mixture --out mixture.html",
}
HELD = 2000  # numbers of an array that are written one by one; of larger ones sums and the first

# Names that are not public: where they are looked for.
HOMES = {
    "class_counts": ("metrics.diversity.class_counts", "metrics.composition.class_counts"),
    "class_entropy": ("phases.information.class_entropy", "phases.class_entropy.class_entropy"),
    "class_entropy_bound": ("phases.information.class_entropy", "phases.class_entropy.class_entropy_bound"),
    "cloning_time": ("phases.speciation.cloning_time",),
    "composition": ("metrics.diversity.composition", "metrics.composition.composition"),
    "conditional_entropy": ("phases.information.conditional_entropy", "phases.losses.conditional_entropy"),
    "entropic_levels": ("phases.information.entropic_levels", "phases.losses.entropic_levels"),
    "kid": ("metrics.kernel.kid", "metrics.kernel_distance.kid"),
    "ladder": ("phases.speciation.ladder",),
    "precision_recall": ("metrics.diversity.precision_recall", "metrics.coverage.precision_recall"),
    "reverse_states": ("phases.gaussianity.reverse_states", "phases.reverse_paths.reverse_states"),
}


def plain(value: Any) -> Any:
    """Results as JSON: tensors, arrays and dataclasses become lists and dictionaries, laws their names."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if not f.name.startswith("_")}
    if type(value).__module__.split(".")[0] not in ("numpy", "torch"):
        return type(value).__name__
    value = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if value.size <= HELD:
        return value.tolist()
    return {"shape": list(value.shape), **sums(value), "first": value.reshape(-1)[:8].tolist()}


def sums(array: np.ndarray) -> dict[str, float]:
    wide = array.astype(np.float64)
    return {"sum": float(wide.sum()), "sum_squares": float((wide * wide).sum())}


# The functions, on worlds that are known exactly and on the digits


class Golden:
    """Exact worlds, the digits and their network; every method ``g_...`` puts down quantities by name."""

    def __init__(self) -> None:
        import torch

        import symbreak as sb

        self.sb, self.torch = sb, torch
        self.found: dict[str, Any] = {}
        self.failed: list[str] = []
        self.data, self.held = sb.images("digits"), sb.images("digits:held-out")
        self.pipe = sb.load_pipeline("digits")
        self.network = sb.denoiser(self.pipe.unet, self.pipe.scheduler)
        self.moments = sb.Moments.fit(self.data)
        self.gaussian = sb.Gaussian(self.moments)
        self.two = sb.Mixture.from_parameters([[-1.5, 0.0], [1.5, 0.0]], [0.25, 0.25])
        turn = torch.tensor([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
        values = torch.tensor([[0.5, 0.1, 0.2], [0.2, 0.2, 0.2], [0.1, 0.3, 0.4]], dtype=torch.float64)
        means = [[2.0, 0.0, 0.5], [-1.0, 1.5, 0.0], [-1.0, -1.5, -0.5]]
        self.three = sb.Mixture.from_parameters(means, turn @ torch.diag_embed(values) @ turn.T, [0.5, 0.3, 0.2])
        self.simplex = sb.Empirical(torch.eye(3, dtype=torch.float64) - 1 / 3)
        self.cloud = torch.tensor(means).double().repeat(100, 1) + 0.5 * self.noise(5, 300, 3)
        self.points = sb.Empirical(self.cloud)
        self.sphere = sb.Sphere(3, 1.5)
        self.levels = [0.3, 1.0, 3.0]

    def generator(self, seed: int) -> Any:
        return self.torch.Generator().manual_seed(seed)

    def noise(self, seed: int, *shape: int) -> Any:
        return self.torch.randn(shape, generator=self.generator(seed), dtype=self.torch.float64)

    def named(self, name: str) -> Callable[..., Any]:
        """A function of the package, or one of `HOMES` where it is not public."""
        if name in self.sb.__all__:
            return getattr(self.sb, name)
        for home in HOMES.get(name, ()):
            module, _, own = home.rpartition(".")
            try:
                return getattr(importlib.import_module(f"symbreak.{module}"), own)
            except (ImportError, AttributeError):
                continue
        raise AttributeError(f"{name} is neither public nor in {HOMES.get(name, ())}")

    def call(self, function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        """A function's value; settings that it no longer takes go into an argument object, ``paths=sb.Paths(...)``."""
        takes = inspect.signature(function).parameters
        moved = {k: settings.pop(k) for k in list(settings) if k not in takes}
        for name in takes if moved and "condition" not in takes else ():
            kind = getattr(self.sb, name.capitalize(), None) if name not in settings else None
            if inspect.isclass(kind):
                own = {k: moved.pop(k) for k in list(moved) if k in inspect.signature(kind).parameters}
                settings |= {name: kind(**own)} if own else {}
        return function(*args, **settings, **moved)

    def put(self, name: str, function: Any, *args: Any, **settings: Any) -> Any:
        """Put down the value of a function, named or given; one that fails is said and left out."""
        try:
            function = self.named(function) if isinstance(function, str) else function
            value = self.call(function, *args, **settings)
            self.found[name] = plain(value)
        except Exception as error:
            self.failed.append(name)
            sys.stderr.write(f"{name}: {type(error).__name__}: {error}\n")
            return None
        return value

    def g_laws(self) -> None:
        sb, data, put = self.sb, self.data, self.put
        laws = {
            "two": self.two,
            "three": self.three,
            "sphere": self.sphere,
            "points": self.points,
            "gaussian": self.gaussian,
            "gaussian, rank 9": sb.Gaussian(self.moments, rank=9),
            "gaussian, sketch": sb.Gaussian.fit(data, rank=9),
            "low frequencies": sb.Gaussian.low_frequency(data, 4),
            "digits": sb.Empirical(data.tensor()),
            "classes": sb.Mixture.fit(data, labels=True),
            "clusters": sb.Mixture.fit(data, components=6, rank=5),
            "isotropic": sb.Mixture.fit(data, components=4, kind="isotropic", method="em"),
            "principal": sb.PrincipalMixture.fit(data, labels=True),
            "principal clusters": sb.PrincipalMixture.fit(data, components=12, seed=1),
        }
        s = self.torch.tensor(self.levels, dtype=self.torch.float64)
        for name, law in laws.items():
            z, v, x = self.noise(1, 3, 3, *law.sample(1).shape[1:])
            x = x + s.reshape(3, *[1] * (z.ndim - 1)) * z
            for k in ("denoise", "score", "log_prob", "responsibilities", "participation"):
                if hasattr(law, k):
                    put(f"{name} {k}", getattr(law, k), x, s)
            put(f"{name} denoise, float32", law.denoise, x.float(), 1.0)
            put(f"{name} sb.score", "score", law, x, 0.7)
            put(f"{name} covariance", law.posterior_covariance, x, v, s)
            put(f"{name} sample", law.sample, 4, 0.5, self.generator(3))
            put(f"{name} transport", law.transport, z, 0.6)
            put(f"{name} transport from a level", law.transport, 4 * x, 0.6, 4.0)
        put("principal transport of a class", laws["principal"].transport, z, 0.6, labels=[0, 3, 9])

    def g_moments(self) -> None:
        sb, m, put = self.sb, self.moments, self.put
        low, halves = sb.Moments.fit(self.data, rank=8), [sb.Moments.fit(part) for part in self.data.split()]
        put("mean and covariance", lambda: [m.mean, m.cov])
        put("merged", lambda: halves[0].merge(halves[1]).cov)
        put("spectrum", m.spectrum, 12)
        put("spectrum, sketch", low.spectrum, 8)
        put("certificate", low.certificate, 1.3)
        put("certificate, truncated", lambda: m.truncate(8).certificate(1.3))
        put("frechet", "frechet_distance", *halves)
        put("frechet of laws", "frechet_distance", self.three.moments, self.sphere.moments)

    def g_speciation(self) -> None:
        put, levels = self.put, self.levels
        for name, law in (("two", self.two), ("three", self.three)):
            for kind in ("spectral", "signal-to-noise", "free-entropy"):
                put(f"{name} {kind}", "speciation_time", law, kind, samples=2000)
            put(f"{name} cloning", "cloning_time", law, samples=2000)
            put(f"{name} phi", "cloning_probability", law, levels, samples=2000)
        for kind in ("spectral", "signal-to-noise"):
            put(f"digits {kind}", "speciation_time", self.moments, kind, 1.5)
        labels = (self.cloud[:, 0] > 0.5).long()
        put("points phi", "cloning_probability", self.points, levels, samples=500, labels=labels)
        put("ladder", "ladder", self.moments, 4)

    def g_bifurcation(self) -> None:
        line = self.torch.tensor([[-2.0, 0.1], [0.0, 0.0], [2.0, 0.3]], dtype=self.torch.float64)
        laws = {"two": self.two, "three": self.three, "simplex": self.simplex, "sphere": self.sphere}
        for flow, frame in (("sde", "vp"), ("sde", "ve"), ("ode", "vp"), ("ode", "ve")):
            for name, law in laws.items():
                for kind in ("centre", "wells") if name != "sphere" else ("centre",):
                    self.put(f"{name} {flow} {frame} {kind}", "bifurcation", law, flow, frame, criterion=kind)
            self.put(f"fixed points {flow} {frame}", "fixed_points", self.two, [0.5, 1.0, 2.0], flow, frame)
            self.put(f"potential {flow} {frame}", "potential", self.two, line, 0.6, flow, frame)
        self.put("fixed points, simplex", "fixed_points", self.simplex, [0.2, 0.5])

    def g_clones(self) -> None:
        put, three, points, levels = self.put, self.three, self.points, self.levels
        small = {"steps": 10, "resamples": 50}
        put("three", "clones", three, levels, pairs=60, **small)
        put("nearest", "clones", points, levels, self.sb.nearest_of(self.cloud), pairs=40, **small)
        put("agreement", "clone_agreement", self.two, levels, pairs=60, steps=10)
        put("turns", "u_turns", three, self.cloud[:40], levels, turns=2, **small)
        for flow in ("sde", "ode"):
            put(f"opportunity {flow}", "opportunity", three, levels, samples=40, flow=flow, **small)
        put("flips", "nearest_flips", points, points, trajectories=20, steps=12)

    def g_losses(self) -> None:
        put, three, levels, network = self.put, self.three, [0.3, 0.6, 1.2, 2.4, 5.0], self.network
        x, gaussian = self.cloud[:100], self.sb.Gaussian(three.moments)
        found = put("losses", "loss_curve", three, x, levels, {"gaussian": gaussian})
        put("mmse", lambda: found.mmse)
        put("difference", lambda: found.difference("gaussian"))
        put("rate", "entropy_rate", found)
        put("rate, rescaled", "entropy_rate", found, rescaled=True)
        put("conditional entropy", "conditional_entropy", found)
        put("entropic levels", "entropic_levels", found, 6)
        nats = put("nats", "non_gaussianity", three, gaussian, x, [0.3, 1.0])
        put("nats, time", lambda: nats.time(resamples=50))
        for name, law in (("two", self.two), ("three", three)):
            entropy = put(f"class entropy, {name}", "class_entropy", law, levels, samples=2000)
            put(f"class entropy, {name}, time", lambda entropy=entropy: entropy.time(resamples=50))
        fit, held = self.data.subset(200), self.held.subset(100)
        sets = (held.tensor(), held.labels, fit.tensor(), fit.labels)
        put("class entropy, network", "class_entropy_bound", network, [0.5, 2.0], *sets)
        put("losses, network", "loss_curve", network, held, [0.5, 2.0], {"gaussian": self.gaussian})

    def g_collapse(self) -> None:
        points, small = self.points, {"queries": 100, "draws": 2000}
        for name, law in {"gaussian": self.gaussian, "two": self.two, "three": self.three, "points": points}.items():
            n = {} if law is points else {"samples": 300}
            self.put(f"{name} time", "collapse_time", law, **n, **small)
            self.put(f"{name} excess", "excess_entropy", law, self.levels, **n, **small)
            self.put(f"{name} information", "mutual_information", law, self.levels, **small)
            self.put(f"{name} needed", "samples_needed", law, self.levels, **small)
        digits = self.sb.Empirical(self.data.tensor()[:300])
        for axis, sizes in (("samples", [100, 300]), ("components", [4, 16]), ("pixels", [4, 8])):
            self.put(f"scaling {axis}", "collapse_scaling", digits, axis, sizes, queries=50)

    def g_gaussianity(self) -> None:
        put, small = self.put, {"directions": 4, "simulations": (99, 999)}
        law = put("three", "gaussianity", self.three, [0.3, 3.0], modes=2, samples=200, **small)
        for test in law.p_values:
            put(f"first rejection, {test}", "first_rejection", law, test)
        states = put("states", "reverse_states", self.network, [1.0, 3.0], paths=40, steps=6)
        put("network", "gaussianity", states, modes=3, **small)

    def g_network(self) -> None:
        sb, put, unet, base = self.sb, self.put, self.pipe.unet, self.pipe.scheduler
        x = 2.0 * self.noise(8, 3, *self.data.shape).float()
        for sigma in (0.05, 0.5, 2.0, 20.0):
            put(f"denoiser {sigma}", lambda sigma=sigma: self.network(x, sigma))
        put("stability", "network_stability", self.network, [20.0, 5.0, 2.5])
        put("arc", "arc_potential", self.network, [5.0, 1.0], points=9, candidates=3)
        put("arc, three", "arc_potential", self.three, [5.0, 0.5], points=9, candidates=4)
        for name in ("ddpm", "ddim", "pndm", "dpm++2m-karras", "sde-dpm++2m", "unipc", "heun", "euler-a", "lcm"):
            scheduler = sb.scheduler(name, like=base)
            late = sb.late_start(scheduler, self.gaussian, 4, sb.NoiseLevel(2.0))
            for kind, start in (("late", late), ("standard", sb.standard_start(scheduler, 4))):
                put(f"{kind} {name}", lambda start=start: [start.calls, start.level])
                put(f"{kind} {name} images", "generate", unet, start, range(3), micro_batch=4)
        arguments = (sb.scheduler("ddim"), [self.gaussian], 3, "auto", self.network, self.held.subset(64))
        put("auto", lambda: [(v.level, v.calls, v.choice) for v in [sb.late_start(*arguments)]])
        for name in ("ddpm-linear", "cosine", "ou", "edm"):
            put(f"schedule {name}", lambda name=name: [sb.schedule(name).time(s) for s in (0.1, 1.0, 10.0)])
        put("late sigmas", "late_sigmas", 3.0, 5, 0.02)

    def g_metrics(self) -> None:
        put, a, b = self.put, 0.8 * self.noise(9, 120, 5) + 0.1, self.noise(10, 120, 5)
        judge, images = self.sb.extractor("digits-classifier"), self.held.tensor()
        put("kid", "kid", a, b, subsets=5, subset_size=50)
        put("precision and recall", "precision_recall", a, b)
        put("features", judge, images[:5])
        counts = [put(f"counts {n}", "class_counts", judge.logits, [images[:n]]) for n in (600, 200)]
        put("composition", "composition", *counts, {})

    def g_starts(self) -> None:
        small = {"holdout": self.held, "extract": self.sb.extractor("digits-classifier")}
        small |= {"samples": 20, "repeats": 2, "micro_batch": 40}
        first = (self.data, self.pipe)
        self.put("sensitivity", "sensitivity", *first, ("dpm++2m",), (3,), [0.8, 1.5, 4.0], **small)
        self.put("compare_starts", "compare_starts", *first, "ddim", (3,), [0.8, 2.0], **small)


def functions() -> int:
    """Print all quantities, by method."""
    golden, found = Golden(), {}
    for name in [name for name in vars(Golden) if name.startswith("g_")]:
        golden.found = found[name[2:]] = {}
        golden.put(name, getattr(golden, name))
        golden.found.pop(name, None)
    sys.stdout.write(json.dumps(found) + "\n")
    return 1 if golden.failed else 0


# Making


def environment(folder: Path) -> dict[str, str]:
    """One thread, no accelerator, no network and no cache; a relative PYTHONPATH made absolute."""
    paths = [str(Path(p).resolve()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **env, "PYTHONPATH": os.pathsep.join(paths), "SYMBREAK_CACHE": str(folder / "cache")}


def png(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image).astype(int)


def outputs(folder: Path, stem: str, out: dict[str, Any]) -> dict[str, Any]:
    """What a command printed, its record where that says more, and what is in the tensors and pictures it wrote."""
    from safetensors.numpy import load_file

    found: dict[str, Any] = {"json": out}
    record, tensors, made = folder / stem / "record.json", folder / f"{stem}.safetensors", {}
    if record.exists():
        saved = json.loads(record.read_text())
        found |= {} if all(out.get(k) == v for k, v in saved.items()) else {"record": saved}
    if tensors.exists():
        read = sorted(load_file(tensors).items())
        found["tensors"] = {k: {"shape": list(v.shape), **sums(v)} for k, v in read if v.dtype.kind in "biuf"}
    for path in sorted((folder / stem).glob("*.png")):
        pixels = png(path.read_bytes()).astype(np.uint8)
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        made[path.stem] = {"pixels_sha256": digest, "png": base64.b64encode(path.read_bytes()).decode()}
    return found | ({"images": made} if made else {})


def make(target: Path) -> int:
    """Run everything in a folder of its own; 1 where something failed."""
    target.mkdir(parents=True, exist_ok=True)
    if any(target.glob("*.json")):
        raise SystemExit(f"{target} holds results already. Choose another folder.")
    failed, began = [], time.perf_counter()
    runs = [(name, ["-m", "symbreak", *line.split(), "--json"]) for name, line in COMMANDS.items()]
    runs += [("functions", [str(Path(__file__).resolve()), "functions"])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        env = environment(folder)
        where = "import os, symbreak; print(os.path.dirname(symbreak.__file__))"
        subprocess.run([sys.executable, "-c", where], cwd=folder, env=env, stdout=sys.stderr, check=True)
        for stem, arguments in runs:
            start = time.perf_counter()
            done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
            sys.stderr.write(f"{stem}: {time.perf_counter() - start:.1f} s\n")
            if done.returncode:
                failed.append(stem)
                sys.stderr.write(f"exit code {done.returncode}\n{done.stderr[-6000:]}\n")
            try:
                value = json.loads(done.stdout)
            except ValueError:
                continue  # it failed
            parts = {stem: outputs(folder, stem, value)} if stem in COMMANDS else value
            for part, content in parts.items():
                name = part if stem in COMMANDS else f"functions-{part}"
                (target / f"{name}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    sys.stderr.write(f"{time.perf_counter() - began:.0f} s{'; FAILED: ' + ', '.join(failed) if failed else ''}\n")
    return 1 if failed else 0


# Comparing

IGNORED = {"timings", "seconds", "version", "versions", "_diffusers_version", "out", "report"}
IGNORED |= {"fingerprint", "identity", "probe", "sha256", "pixels_sha256"}
NOTES = {"caption", "explain", "label", "note", "notes", "reason", "sentence", "source", "title"}
WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
PNG, HASH = "iVBORw0KGgo", re.compile(r"[0-9a-f]{12,64}")


def leaves(value: Any, path: str = "", key: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of everything that counts; hashes and notes do not."""
    if isinstance(value, dict):
        for k in value.keys() - IGNORED:
            yield from leaves(value[k], f"{path}.{k}", k)
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from leaves(v, f"{path}[{i}]", key)
    elif isinstance(value, str) and key not in NOTES and not HASH.fullmatch(value):
        yield path, WORDS.get(value, value)
    elif isinstance(value, int | float) or (value is None and key not in NOTES):
        yield path, value


def difference(a: Any, b: Any) -> tuple[float, float]:
    """Relative and absolute difference of two leaves; texts are the same to it, a text and a number are not."""
    if isinstance(a, str) and isinstance(b, str):
        if not (a.startswith(PNG) and b.startswith(PNG)):
            return 0.0, 0.0
        x, y = (png(base64.b64decode(v)) for v in (a, b))
        gap = float(np.abs(x - y).max()) if x.shape == y.shape else math.inf
        return gap / 255, gap
    if a == b or (a is None) != (b is None) or isinstance(a, str) or isinstance(b, str):
        return (0.0, 0.0) if a == b else (math.inf, math.inf)
    if math.isnan(a) or math.isnan(b) or math.isinf(a) or math.isinf(b):
        return (0.0, 0.0) if math.isnan(a) and math.isnan(b) else (math.inf, math.inf)
    return abs(a - b) / max(abs(a), abs(b)), float(abs(a - b))


def shown(value: Any) -> str:
    return "png" if isinstance(value, str) and value.startswith(PNG) else repr(value)


def compare(one: Path, other: Path, rtol: float, atol: float, say: Callable[[str], Any]) -> int:
    """Say what differs between two folders; 1 where a number differs by more than allowed, or something is missing."""
    names = sorted({p.name for folder in (one, other) for p in folder.glob("*.json")})
    if not any(one.glob("*.json")):
        raise SystemExit(f"{one} holds no golden results.")
    counts, within = {"same": 0, "within": 0, "different": 0, "missing": 0, "new": 0}, 0.0
    for name in names:
        a, b = (dict(leaves(json.loads(p.read_text()))) if (p := d / name).exists() else None for d in (one, other))
        if a is None or b is None:
            say(f"{'new' if a is None else 'missing'}  {name}")
            counts["new" if a is None else "missing"] += 1
            continue
        for path in sorted(a.keys() | b.keys()):
            if path not in a or path not in b:
                kind, value = ("new", b[path]) if path not in a else ("missing", a[path])
                say(f"{kind}  {name[:-5]}{path}  {shown(value)}")
            else:
                relative, absolute = difference(a[path], b[path])
                kind = "same" if relative == 0 else "different"
                if kind == "different" and (relative <= rtol or absolute <= atol):
                    kind, within = "within", max(within, relative if relative <= rtol else 0.0)
                elif kind == "different":
                    gap = f"{relative:.3g}, absolute {absolute:.3g}"
                    say(f"different  {name[:-5]}{path}  {shown(a[path])}  {shown(b[path])}  relative {gap}")
            counts[kind] += 1
    largest = f" (largest relative difference within: {within:.3g})" if within else ""
    say(", ".join(f"{v} {k}" for k, v in counts.items()) + largest)
    return 1 if counts["different"] + counts["missing"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="run everything and write one JSON file each")
    making.add_argument("target", metavar="DIR", type=Path)
    comparing = commands.add_parser("compare", help="list what differs between two folders")
    comparing.add_argument("folders", metavar="DIR", type=Path, nargs=2)
    comparing.add_argument("--rtol", type=float, default=0.0, help="relative difference that is none (default 0)")
    comparing.add_argument("--atol", type=float, default=0.0, help="absolute difference that is none (default 0)")
    commands.add_parser("functions", help="print what ``make`` asks the functions for")
    given = parser.parse_args()
    if given.command == "functions":
        return functions()
    if given.command == "make":
        return make(given.target)
    return compare(*given.folders, given.rtol, given.atol, lambda line: sys.stdout.write(line + "\n"))


if __name__ == "__main__":
    raise SystemExit(main())
