"""Other people's files: pipelines, starts, laws and records that are broken or hostile end in one line."""

from __future__ import annotations

import json
import random
import resource
import shutil
import socket
import subprocess
import sys
from contextlib import suppress

import diffusers
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from symbreak.cli.commands import main
from symbreak.data.readers import images
from symbreak.laws import Gaussian
from symbreak.laws.saving import load_law, save_law
from symbreak.networks.foreign import from_hub
from symbreak.networks.samplers import scheduler
from symbreak.noise import NoiseLevel
from symbreak.report.record import Record
from symbreak.runtime.files import InputError
from symbreak.start.fit import late_start
from symbreak.start.late_start import LateStart, standard_start
from symbreak.start.loading import load_pipeline, refuse_conditional
from symbreak.start.pipeline import LateStartPipeline
from symbreak.start.sample import generate
from tests.guard import guarded
from tests.worlds import gaussian_moments

SHAPE = (1, 8, 8)


def network(**settings):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    small = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1} | blocks
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(**{"sample_size": 8, "in_channels": 1, "out_channels": 1, **small, **settings})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline, a start, a law and a record, well made."""
    root = tmp_path_factory.mktemp("well")
    base = diffusers.DDPMScheduler(clip_sample=False)
    diffusers.DDPMPipeline(network(), base).save_pretrained(root / "pipeline")
    law = Gaussian(gaussian_moments(eigenvalues=tuple(4.0 / k for k in range(1, 65)), shape=SHAPE))
    late_start(scheduler("dpm++2m", like=base), law, 3, at=NoiseLevel(3.0), check=False).save(
        root / "start.safetensors"
    )
    save_law(law, root / "law.safetensors")
    content = {"title": "t", "tables": [{"columns": ["a"], "rows": [[1.0]]}], "notes": ["n"], "level": 1.5}
    Record("evaluation", {"seed": 0}, content).save(root / "record")
    x = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    (root / "pictures" / "a").mkdir(parents=True)
    encoded = []
    for i, ending in enumerate(["png", "jpg", "gif", "tiff", "webp", "bmp"] * 2):
        path = root / "pictures" / "a" / f"{i}.{ending}"
        Image.fromarray(x[i]).save(path)
        encoded.append({"bytes": path.read_bytes(), "path": None})
    np.save(root / "a.npy", x)
    np.savez_compressed(root / "a.npz", images=x, labels=np.arange(12) % 3)
    labels = pa.array(list(range(12)))
    pq.write_table(pa.table({"image": encoded, "label": labels}), root / "a.parquet")
    return root


@pytest.fixture
def pipeline(saved, tmp_path):
    return shutil.copytree(saved / "pipeline", tmp_path / "pipeline")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder, match):
    with guarded(), pytest.raises(InputError, match=match) as error:
        load_pipeline(folder)
    assert "\n" not in str(error.value)


def test_the_guard_guards():
    with pytest.raises(RuntimeError, match="Popen"), guarded():
        subprocess.run([sys.executable, "-c", ""], check=True)
    with pytest.raises(RuntimeError, match="connect"), guarded(), socket.socket() as s:
        s.connect(("127.0.0.1", 9))
    with pytest.raises(AssertionError, match="Popen"), guarded(), suppress(RuntimeError):  # as a library might
        subprocess.run([sys.executable, "-c", ""], check=True)


EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Evil: pass\n"


def test_a_pipeline_folder_runs_no_code(pipeline):
    index = pipeline / "model_index.json"
    change(index, _class_name=["pipeline", "Evil"])
    refused(pipeline, "expected the name of a pipeline")
    (pipeline / "pipeline.py").write_text(EVIL)
    refused(pipeline, "expected the name of a pipeline")
    change(index, _class_name="DDPMPipeline")
    refused(pipeline, "is code, which symbreak never runs")
    (pipeline / "pipeline.py").unlink()
    (pipeline / "unet" / "evil.py").write_text(EVIL)
    change(index, unet=["evil", "Evil"])
    refused(pipeline, "from the library evil, which symbreak does not import")
    change(index, unet=["diffusers", "UNet2DModel"])
    refused(pipeline, "is code")
    (pipeline / "unet" / "evil.py").unlink()
    for library in ("antigravity", "os", "unittest", "symbreak"):
        change(index, unet=[library, "UNet2DModel"])
        refused(pipeline, f"from the library {library}")
        assert library != "antigravity" or library not in sys.modules
    for entry in (["diffusers"], [["diffusers"], "UNet2DModel"], ["diffusers", "../unet"], ["diffusers", 3]):
        change(index, unet=entry)
        refused(pipeline, "expected a library and a class")
    change(index, unet=["diffusers", "logging"])
    refused(pipeline, "lacks")
    change(index, unet=["diffusers", "UNet2DModel"])
    for file in ("unet/config.json", "scheduler/scheduler_config.json"):
        old = (pipeline / file).read_text()
        change(pipeline / file, more={"auto_map": {"AutoModel": "evil.Evil"}})
        refused(pipeline, "names code of its own")
        (pipeline / file).write_text(old)
    assert not list(pipeline.rglob("ran"))
    assert load_pipeline(pipeline).unet.config.sample_size == 8


def test_a_late_start_folder_runs_no_code(saved, tmp_path):
    start = LateStart.load(saved / "start.safetensors")
    LateStartPipeline(network(), start.scheduler, start).save_pretrained(tmp_path / "late")
    with guarded():
        assert LateStartPipeline.from_pretrained(tmp_path / "late").start.steps == 3
    (tmp_path / "late" / "unet" / "evil.py").write_text(EVIL)
    with guarded(), pytest.raises(InputError, match="is code"):
        LateStartPipeline.from_pretrained(tmp_path / "late")


def test_settings_that_no_network_has(pipeline):
    config, betas = pipeline / "unet" / "config.json", pipeline / "scheduler" / "scheduler_config.json"
    for path, name, value, match in (
        (config, "layers_per_block", 10**9, "more than any network has"),
        (config, "sample_size", 1e300, "more than any network has"),
        (betas, "num_train_timesteps", 10**10, "more than any network has"),
        (betas, "beta_end", float("nan"), "more than any network has"),
        (betas, "trained_betas", [0.1, float("nan")], "more than any network has"),
        (betas, "trained_betas", [0.1, 2.0, 0.1], "alpha-bar falling"),
        (config, "_class_name", ["a", "b"], "expected a name"),
        (config, "in_channels", "many", "cannot be loaded"),
    ):
        old = path.read_text()
        change(path, **{name: value})
        refused(pipeline, match)
        path.write_text(old)
    for text, match in (("[" * 100_000, "not JSON"), (json.dumps({"x": "y" * 2**21}), "more than 1,048,576 bytes")):
        betas.write_text(text)
        refused(pipeline, match)


def test_weights_that_are_missing_or_no_numbers(pipeline):
    path = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(path)
    name = "conv_in.weight"
    save_file({k: v for k, v in whole.items() if k != name}, path)
    refused(pipeline, "weights, its files hold")
    save_file(whole | {name: whole[name] * float("nan")}, path)
    refused(pipeline, "hold NaN or infinity")
    save_file(whole | {name: whole[name][:1]}, path)
    refused(pipeline, "weights, its files hold|cannot be loaded")
    data = bytearray()
    save_file(whole, path)
    data[:] = path.read_bytes()
    data[20] ^= 0x10  # in the header
    path.write_bytes(data)
    refused(pipeline, "no safetensors file|weights, its files hold|cannot be loaded")


def test_variants_and_bare_networks(pipeline):
    path = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    before = load_pipeline(pipeline).unet.state_dict()
    save_file(
        {k: v.half() for k, v in load_file(path).items()}, path.with_name("diffusion_pytorch_model.fp16.safetensors")
    )
    path.unlink()
    with guarded():
        unet = load_pipeline(pipeline).unet
    assert unet.dtype == torch.float32
    torch.testing.assert_close(dict(unet.state_dict()), dict(before), rtol=1e-3, atol=1e-4)  # half precision
    assert load_pipeline(pipeline, variant="fp16").unet.dtype == torch.float32
    with pytest.raises(InputError, match="no weights of the variant 'ema'"):
        load_pipeline(pipeline, variant="ema")
    # the network's own folder, with the scheduler that lies beside it, or one that is passed
    with guarded():
        alone = load_pipeline(pipeline / "unet")
    assert alone.scheduler.config.num_train_timesteps == load_pipeline(pipeline).scheduler.config.num_train_timesteps
    torch.testing.assert_close(dict(alone.unet.state_dict()), dict(unet.state_dict()))
    shutil.rmtree(pipeline / "scheduler")
    refused(pipeline / "unet", "holds a network alone, without its scheduler")
    own = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    assert load_pipeline(pipeline / "unet", scheduler=own).scheduler.config.beta_schedule == "squaredcos_cap_v2"
    change(pipeline / "unet" / "config.json", _class_name="Evil")
    refused(pipeline / "unet", "names the class 'Evil'")
    (pipeline / "unet" / "evil.py").write_text("raise SystemExit")
    refused(pipeline / "unet", "is code, which symbreak never runs")


def test_latents_are_no_images(pipeline):
    pipe = load_pipeline(pipeline)
    pipe.vae = torch.nn.Identity()
    with pytest.raises(InputError, match="works on latents, which are no images"):
        refuse_conditional(pipe, "x")


def test_nobody_asks_the_hub_without_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    refused("build/demmo", "does not exist")
    refused("a/b/c", "does not exist")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("nobody/nothing-of-the-kind", "HF_HUB_OFFLINE forbids to ask the hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    asked = []

    def download(*_, **__):
        asked.append(capsys.readouterr().err)
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    refused("nobody/nothing-of-the-kind", r"the hub did not give it \(no connection\)")
    assert asked == ["nobody/nothing-of-the-kind is no folder here; asking the Hugging Face hub for it\n"]


def test_a_cached_pipeline_takes_no_request(pipeline, monkeypatch):
    def snapshot(source, local_files_only=False, **_):
        assert local_files_only
        return str(pipeline)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with guarded():
        assert from_hub("owner/name") == pipeline


@pytest.mark.parametrize("value", ["owner/name", ["a"], 3, None])
def test_a_start_whose_scheduler_is_no_mapping(saved, tmp_path, value):
    from symbreak.runtime.files import read_tensors, write_tensors

    tensors, metadata = read_tensors(saved / "start.safetensors")
    about = json.loads(metadata["start"]) | {"scheduler": value}
    write_tensors(tmp_path / "s", tensors, metadata | {"start": json.dumps(about)})
    with guarded(), pytest.raises(InputError, match="expected names and values"):
        LateStart.load(tmp_path / "s")


def test_an_output_that_is_an_input_or_another_record_is_refused(saved, tmp_path, capsys):
    data, record = tmp_path / "d.npy", shutil.copytree(saved / "record", tmp_path / "r")
    np.save(data, np.zeros((20, 8, 8), np.uint8))
    before = {p: p.read_bytes() for p in (data, record / "record.json")}
    for line, why in (
        (["fit", "--data", data, "--out", data], "is an input, too (data)"),
        (["report", record, "--out", record / "record.json"], "is an input, too (record)"),
        (["report", record / "record.json", "--out", record / "record.json"], "is an input, too (record)"),
        (["phases", "--data", "digits", "--out", record], "of the kind evaluation, which phases does not replace"),
        (["study", "--out", record], "of the kind evaluation, which study"),
        (["audit", "--data", "digits", "--out", record], "of the kind evaluation, which audit"),
        (["train", "--data", "digits", "--out", record], "of the kind evaluation, which train"),
        (["sample", "--out", record], "of the kind evaluation, which sample"),
        (["world", "two-deltas", "--out", record / "record.json"], "of the kind evaluation, which world"),
        (["sample", "--model", saved / "pipeline", "--out", saved / "pipeline"], "is an input, too (model)"),
        (["evaluate", "--data", tmp_path, "--samples", data, "--out", tmp_path], "is an input, too (data)"),
    ):
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in line])
        said = capsys.readouterr().err
        assert (left.value.code, said.count("\n")) == (2, 1), said
        assert why in said
    assert {p: p.read_bytes() for p in before} == before


HOSTILE = [
    None, True, -1, 0, 10**6, 10**12, 2**70, 0.5, 1e308, float("nan"), float("inf"), "", "x", "../../etc/passwd",
    "owner/name", "\x1b[2J", "a" * 300, [], [[]], [1, "a"], {}, {"a": {"b": None}}, ["pipeline", "Evil"], [1e-4, -1.0],
]  # fmt: skip


def mutated(text: bytes, draw: random.Random) -> bytes:
    """JSON with another value somewhere, or bytes turned, cut out, doubled or cut off."""
    if draw.random() < 0.7:
        try:
            value = json.loads(text)
            places = [(d, k) for d in _containers(value) for k in (d if isinstance(d, dict) else range(len(d)))]
            place, key = draw.choice(places)
            place[key] = draw.choice(HOSTILE)
            return json.dumps(value).encode()
        except (ValueError, IndexError):
            pass
    data = bytearray(text)
    at = draw.randrange(min(len(data), draw.choice([16, 2000, len(data)])))
    match draw.randrange(4):
        case 0:
            data[at] ^= 1 << draw.randrange(8)
        case 1:
            del data[at:]
        case 2:
            del data[at : at + draw.randrange(1, 40)]
        case 3:
            data[at:at] = data[at : at + draw.randrange(1, 40)]
    return bytes(data)


def _containers(value):
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def use(name, path):
    """Load a file and ask it for something small."""
    if name == "pipeline":
        pipe = load_pipeline(path)
        refuse_conditional(pipe, str(path))
        generate(pipe.unet, standard_start(scheduler("ddim", like=pipe.scheduler), 2), [0], micro_batch=1)
    elif name == "start.safetensors":
        start = LateStart.load(path)
        start(torch.zeros(1, *SHAPE))
    elif name == "law.safetensors":
        load_law(path).denoise(torch.zeros(1, *SHAPE, dtype=torch.float64), 1.0)
    elif name == "record":
        Record.load(path)
    else:
        images(path).tensor()


MODELS = ("pipeline", "pipeline", "start.safetensors", "law.safetensors", "record")
DATA = ("pictures", "pictures", "a.npy", "a.npz", "a.parquet")


def hostile(saved, tmp_path, seeds, names=MODELS):
    """Mutated files, one a seed; what they do beside one line of `InputError` or a plain result."""
    before, wrong, lines = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [], 0
    for seed in seeds:
        draw = random.Random(seed)
        name = draw.choice(names)
        target = tmp_path / f"{seed}{(saved / name).suffix}"
        if (saved / name).is_dir():
            shutil.copytree(saved / name, target)
            files = sorted(p for p in target.rglob("*") if p.is_file())
        else:
            shutil.copy(saved / name, target)
            files = [target]
        path = draw.choice(files)
        path.write_bytes(mutated(path.read_bytes(), draw))
        try:
            with guarded():
                use(name, target)
        except InputError as error:
            lines += 1
            if "\n" in str(error) or "\x1b" in str(error):
                wrong.append((seed, name, path.name, str(error)))
        except Exception as error:
            wrong.append((seed, name, path.name, repr(error)[:200]))
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert not wrong, wrong
    assert lines > len(seeds) // 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: one GB


def test_hostile_files(saved, tmp_path):
    hostile(saved, tmp_path, range(60))


def test_hostile_data(saved, tmp_path):
    hostile(saved, tmp_path, range(60), DATA)


@pytest.mark.slow
@pytest.mark.parametrize("names", [MODELS, DATA], ids=["models", "data"])
def test_many_hostile_files(saved, tmp_path, names):
    hostile(saved, tmp_path, range(100, 600), names)
