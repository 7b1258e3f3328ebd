"""Other people's pipelines: what is looked at before any library opens them.

A pipeline folder is data, JSON and safetensors. diffusers can be asked by such a folder to import modules and to run
code that lies in it; so the folder is read here first, and one that asks for it is an error (docs/security.md).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import diffusers
import huggingface_hub
from safetensors import SafetensorError, safe_open

from symbreak.runtime.files import InputError
from symbreak.runtime.plain import Values

__all__ = ["check_network", "check_pipeline", "check_settings", "from_hub", "quiet", "stored_numbers", "variant_of"]

LIBRARIES = ("diffusers", "transformers")
OURS = ["symbreak.networks.residual", "Mlp"]  # the one network of this package
CODE = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib"}
RUNS_CODE = {"auto_map", "custom_pipeline", "custom_pipelines"}  # keys by which a JSON file names code
MAX_JSON = 2**20  # bytes of an index or of settings
MAX_FILES = 10_000
MAX_NUMBER = 2**20  # steps, channels, pixels: beyond what any network has
MAX_LAYERS = 128
# Whatever of a repository on the hub a pipeline is made of; never code, never pickles.
PATTERNS = ["model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model"]


def _json(path: Path) -> Values:
    """A JSON object of bounded size."""
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_JSON + 1)
        value = json.loads(text) if len(text) <= MAX_JSON else None
    except OSError:
        raise InputError(f"{path} cannot be read. Check the path.") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not JSON. Save the pipeline again with save_pretrained.") from None
    if len(text) > MAX_JSON:
        raise InputError(f"{path} has more than {MAX_JSON:,} bytes; settings of a pipeline are shorter.")
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no settings. Save the pipeline again with save_pretrained.")
    return value


def _entries(value: object, name: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """Every plain value under its nearest name, and every name of a mapping with None."""
    if depth > 32:
        raise ValueError("settings within settings without end")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key), None
            yield from _entries(inner, str(key), depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _entries(inner, name, depth + 1)
    else:
        yield name, value


def check_settings(config: object, where: str | Path) -> None:
    """Settings that are no mapping, name code, or ask for more than any network has raise an error."""
    if not isinstance(config, Mapping):
        raise InputError(f"{where} holds settings of the type {type(config).__name__}; expected names and values.")
    try:
        entries = list(_entries(config))
    except ValueError as error:
        raise InputError(f"{where} holds {error}. Save it again.") from None
    for name, value in entries:
        if name in RUNS_CODE:
            raise InputError(f"{where} names code of its own ({name}), which symbreak never runs. Take it out.")
        unbounded = name == "lambda_min_clipped" and value == -math.inf  # diffusers' own default
        if (
            not unbounded
            and isinstance(value, int | float)
            and not abs(value) <= (MAX_LAYERS if "layers" in name else MAX_NUMBER)
        ):
            raise InputError(f"{where} says {name} = {value:g}, more than any network has. Save it again.")
    for key in ("_class_name", "_diffusers_version"):
        if key in config and not isinstance(config[key], str):
            raise InputError(f"{where} has a {key} of the type {type(config[key]).__name__}; expected a name.")


def _check_component(name: str, entry: object, index: Path) -> None:
    """A component of a pipeline's index that is no class of diffusers or transformers raises an error."""
    if not isinstance(entry, list):
        return  # a setting of the pipeline
    if entry == OURS:
        return
    if len(entry) != 2 or not all(v is None or (isinstance(v, str) and v.isidentifier()) for v in entry):
        raise InputError(f"{index} names {str(entry)[:60]} as {name}; expected a library and a class, as names.")
    library, class_name = entry
    in_diffusers = library is not None and (Path(diffusers.__file__).parent / "pipelines" / library).is_dir()
    if library is not None and library not in LIBRARIES and not in_diffusers:
        raise InputError(
            f"{index} takes {name} from the library {library}, which symbreak does not import; expected "
            f"{' or '.join(LIBRARIES)}."
        )
    if library == "diffusers" and not hasattr(getattr(diffusers, str(class_name), None), "from_pretrained"):
        raise InputError(f"{index} takes {name} from diffusers as {class_name}, which diffusers {_version()} lacks.")


def _version() -> str:
    return str(diffusers.__version__)


def check_pipeline(folder: str | Path) -> Values:
    """The index of a pipeline folder, once it is known that the folder runs no code and asks for nothing outside.

    Raises:
        InputError: for a class name that is no text, a library other than diffusers and transformers, a file of code,
            settings that name code, are broken or ask for more than any network has, and parts that lie elsewhere.
    """
    folder = Path(folder)
    index = folder / "model_index.json"
    parts = _json(index)
    name = parts.get("_class_name")
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"{index} names the class {str(name)[:60]!r}; expected the name of a pipeline of diffusers.")
    check_settings({k: v for k, v in parts.items() if not isinstance(v, list)}, index)
    for part, entry in parts.items():
        if not part.startswith("_"):
            _check_component(part, entry, index)
    count = 0
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        count += len(files)
        if count > MAX_FILES:
            raise InputError(f"{folder} holds more than {MAX_FILES:,} files; a pipeline has fewer.")
        for file in files:
            path = Path(root, file)
            if path.suffix.lower() in CODE:
                raise InputError(f"{path} is code, which symbreak never runs. Take it out of the pipeline's folder.")
            if file.endswith("config.json"):
                check_settings(_json(path), path)
            elif file.endswith(".index.json"):  # which files hold which weights
                shards = _json(path).get("weight_map")
                if not isinstance(shards, dict) or any(Path(str(v)).name != v for v in shards.values()):
                    raise InputError(f"{path} names weights outside of its own folder. Save the pipeline again.")
    return parts


def check_network(path: Path, kind: str = "ModelMixin") -> Values:
    """The settings of a network's own folder, or of a file of settings, once it is known that they run no code.

    Raises:
        InputError: for settings that are broken or name code, a class that diffusers lacks, or code beside them.
    """
    if path.is_dir():
        for file in path.iterdir():
            if file.suffix.lower() in CODE:
                raise InputError(f"{file} is code, which symbreak never runs. Take it out of the network's folder.")
        path = path / "config.json"
    config = _json(path)
    check_settings(config, path)
    name = config.get("_class_name")
    known = getattr(diffusers, str(name), None)
    if not (isinstance(known, type) and issubclass(known, getattr(diffusers, kind))):
        raise InputError(f"{path} names the class {str(name)[:60]!r}, which diffusers {_version()} lacks.")
    return config


def variant_of(folder: Path) -> str | None:
    """The variant of the weights in a network's folder where there are no plain ones: "fp16" or another."""
    names = sorted(p.name for p in folder.glob("diffusion_pytorch_model*.safetensors"))
    endings = [name.removeprefix("diffusion_pytorch_model").removesuffix(".safetensors") for name in names]
    plain = [e for e in endings if "." not in e]
    return None if plain or not endings else endings[0].split("-")[0].strip(".")


def stored_numbers(folder: Path, variant: str | None) -> int:
    """How many numbers a network's weight files hold; a broken file is one line of `InputError`."""
    total = 0
    for path in folder.glob("diffusion_pytorch_model*.safetensors"):
        middle = path.name.removeprefix("diffusion_pytorch_model").removesuffix("safetensors")
        if (variant is None and "." not in middle.strip(".")) or (variant is not None and variant in middle):
            try:
                with safe_open(str(path), framework="pt") as file:
                    shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
            except (SafetensorError, OSError, ValueError) as error:
                raise InputError(f"{path} is no safetensors file ({str(error)[:80]}).") from None
            total += sum(map(math.prod, shapes))
    return total


def from_hub(source: str, say: Callable[[str], object] | None = None) -> Path:
    """A pipeline of the Hugging Face hub as a folder: from the local cache without a request, else downloaded.

    Args:
        source: owner/name.
        say: called with one line before any request is made.

    Raises:
        InputError: where the hub has no such pipeline, cannot be reached, or is not to be asked (HF_HUB_OFFLINE).
    """
    try:
        folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=PATTERNS, local_files_only=True))
        parts = check_pipeline(folder)
        if all((folder / k).is_dir() for k, v in parts.items() if isinstance(v, list) and v[0] is not None):
            return folder
    except (InputError, OSError, ValueError):
        pass  # not in the cache, or only a part of it
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise InputError(f"{source} is no folder here, and HF_HUB_OFFLINE forbids to ask the hub. Check the path.")
    if say is not None:
        say(f"{source} is no folder here; asking the Hugging Face hub for it")
    try:
        index = huggingface_hub.hf_hub_download(source, "model_index.json")
        check_pipeline(Path(index).parent)
        ignored = ["*.fp16*", "*.bf16*", "*.non_ema*"]  # other copies of the same weights
        folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=PATTERNS, ignore_patterns=ignored))
        if not list((folder / "unet").glob("*.safetensors")):
            folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=PATTERNS))
    except InputError:
        raise
    except Exception as error:  # no such repository, a private one, no connection
        what = " ".join(str(error).split())[:120]
        raise InputError(f"{source} is no folder here, and the hub did not give it ({what}). Check the path.") from None
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars and warnings of diffusers."""
    logs = diffusers.utils.logging
    bars, verbosity = logs.is_progress_bar_enabled(), logs.get_verbosity()
    logs.disable_progress_bar()
    logs.set_verbosity(logs.CRITICAL)
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()
