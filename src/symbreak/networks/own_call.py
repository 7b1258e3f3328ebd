"""What a pipeline of diffusers tells its network: seen in the pipeline's own call, whose first evaluation is stopped.

Every pipeline makes its own conditions of a prompt: embeddings, masks, sizes, guidance. So it is asked itself. No
network is evaluated, and nothing of the pipeline is changed.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from symbreak.networks.adapters import FAMILIES, Adapted, Condition, adapted, family_of
from symbreak.networks.samplers import fixed_shift
from symbreak.networks.types import Network, Pipeline, Scheduler
from symbreak.runtime.errors import InputError

__all__ = ["OwnCall", "network_in", "of_pipeline", "own_call"]

STATES = ("sample", "hidden_states", "x")  # what networks call the state
TIMES = ("timestep", "timesteps", "t")
UNSAID = ("return_dict", "img_ids", "img_shapes", "num_frames", "height", "width")  # adapters say them


@dataclass(frozen=True)
class OwnCall:
    """The first evaluation of a network in its pipeline's own call.

    Attributes:
        state: what the network would have seen [B, ...].
        time: what it would have been told of the time.
        condition: all else that it would have been told.
        sides: of packed states, what says their shape: img_ids, num_frames, height, width.
        scheduler: the pipeline's scheduler as it stood then.
        mu: the shift that the pipeline chose for its size; ``None`` for fixed ones.
    """

    state: torch.Tensor
    time: torch.Tensor
    condition: Condition
    sides: Condition
    scheduler: Scheduler
    mu: float | None


class _Seen(BaseException):
    """Ends a pipeline's call at the first evaluation of its network."""


def network_in(pipe: Pipeline) -> Network:
    """The network of a pipeline: its unet or its transformer.

    Raises:
        InputError: for a pipeline with neither, without a scheduler, or with two networks that take turns.
    """
    for name in ("transformer_2", "decoder"):
        if isinstance(getattr(pipe, name, None), torch.nn.Module) and hasattr(
            getattr(pipe, name).config, "in_channels"
        ):
            raise InputError(f"{type(pipe).__name__} has two networks that take turns; symbreak follows one.")
    network = next((v for k in ("transformer", "unet") if (v := getattr(pipe, k, None)) is not None), None)
    if network is None or getattr(pipe, "scheduler", None) is None:
        raise InputError(f"{type(pipe).__name__} has no unet or transformer and scheduler; symbreak samples with both.")
    return network


def own_call(pipe: Pipeline, arguments: Mapping[str, object]) -> OwnCall:
    """A pipeline's call up to the first evaluation of its network.

    Args:
        pipe: the pipeline.
        arguments: of its call; guidance is off unless they say it, and two steps are asked for.

    Raises:
        InputError: where the call cannot be made, in one line.
    """
    network = network_in(pipe)
    network = network.network if isinstance(network, Adapted) else network
    takes = inspect.signature(pipe.__call__).parameters
    unknown = [name for name in arguments if name not in takes]
    if unknown:
        raise InputError(f"{type(pipe).__name__} takes no {unknown[0]}. It takes {', '.join(takes)}.")
    defaults: Condition = {"num_inference_steps": 2, "output_type": "latent", "generator": _generator()}
    if not getattr(network.config, "guidance_embeds", False):
        defaults["guidance_scale"] = 1.0  # with a condition alone
    call = {k: v for k, v in defaults.items() if k in takes} | dict(arguments)
    scheduler, shifts, seen = copy.deepcopy(pipe.scheduler), list[float | None](), list[Condition]()
    timed = scheduler.set_timesteps

    @functools.wraps(timed)
    def set_timesteps(*args: object, **kwargs: object) -> None:
        mu = kwargs.get("mu")
        shifts.append(mu if isinstance(mu, float) else None)
        timed(*args, **kwargs)

    def look(module: torch.nn.Module, args: tuple[object, ...], kwargs: Condition) -> None:
        seen.append(dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments))
        raise _Seen

    before, hook = pipe.scheduler, network.register_forward_pre_hook(look, with_kwargs=True)
    pipe.scheduler, scheduler.set_timesteps = scheduler, set_timesteps
    try:
        with torch.no_grad():
            pipe(**call)
    except _Seen:
        pass
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # pipelines refuse in many ways
        what = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{type(pipe).__name__} cannot be called with {', '.join(arguments)}: {what}") from error
    finally:
        hook.remove()
        pipe.scheduler = before
        pipe.maybe_free_model_hooks()
        del scheduler.set_timesteps
    if not seen:
        raise InputError(f"{type(pipe).__name__} never evaluated its network with {', '.join(arguments)}.")
    passed = seen[0]
    for names in (STATES, TIMES):
        if not any(name in passed for name in names):
            raise InputError(
                f"{type(network).__name__} takes {', '.join(passed)}; expected one of {', '.join(names)}. Wrap "
                "it in a function of its state and time and pass that to sb.denoiser."
            )
    state, time = (next(passed.pop(name) for name in names if name in passed) for names in (STATES, TIMES))
    sides = {k: passed.pop(k) for k in UNSAID if k in passed}
    extra = passed.pop("kwargs", {})
    condition = {k: v for k, v in {**passed, **extra}.items() if v is not None and v != {}}
    dynamic = getattr(scheduler.config, "use_dynamic_shifting", False)
    return OwnCall(state, time, condition, sides, scheduler, shifts[-1] if shifts and dynamic else None)


def of_pipeline(
    pipe: Pipeline, shape: Sequence[int] | None, arguments: Mapping[str, object]
) -> tuple[Network, Scheduler, Condition]:
    """A pipeline's network behind the common face, its scheduler with a fixed shift, and what its call tells it.

    Args:
        pipe: the pipeline.
        shape: sample shape S; by default what the network says, or sees in the pipeline's call.
        arguments: of the pipeline's call, such as ``prompt``; others go to the network. The prompt ``None`` is what the
            pipeline's own guidance leads away from: the prompt ``""``, or zeros where its config says so, as SDXL's.
    """
    network, takes = network_in(pipe), inspect.signature(pipe.__call__).parameters
    passed = {k: v for k, v in arguments.items() if k in takes}
    nothing = "prompt" in passed and passed["prompt"] is None
    passed |= {"prompt": ""} if nothing else {}
    rest = {k: v for k, v in arguments.items() if k not in takes}
    if "prompt" in rest:
        raise InputError(f"{type(pipe).__name__} takes no prompt: its network has no text. Leave it out.")
    family = network.family if isinstance(network, Adapted) else family_of(network)
    if "class_labels" in passed and len(passed) == 1:  # the network's own condition, and the pipeline's alike
        rest, passed = {**rest, **passed}, {}
    if not passed:
        return adapted(network, None, shape), pipe.scheduler, rest
    call = own_call(pipe, passed)
    if shape is None:
        shape = _unpacked(family, call)
    condition = {**call.condition, **rest}
    if nothing and getattr(pipe.config, "force_zeros_for_empty_prompt", False):
        condition = _without_text(condition)
    scheduler = pipe.scheduler if call.mu is None else fixed_shift(pipe.scheduler, call.mu)
    whole = None if family == "unet" and tuple(shape) == _said(network) else shape
    return adapted(network, None, whole), scheduler, condition


def _without_text(condition: Condition) -> Condition:
    """A condition whose embeddings of text, and their summary beside sizes, are zeros."""
    out = dict(condition)
    for name, value in condition.items():
        if name == "encoder_hidden_states":
            out[name] = torch.zeros_like(value)
        elif name == "added_cond_kwargs":
            out[name] = {k: torch.zeros_like(v) if k == "text_embeds" else v for k, v in value.items()}
    return out


def _said(network: Network) -> tuple[int, ...] | None:
    """The shape that a network says it has, where it does."""
    of = getattr(network, "family", None) or family_of(network)
    shape = FAMILIES[of].shape(network)
    return None if shape is None else tuple(shape)


def _unpacked(family: str, call: OwnCall) -> tuple[int, ...]:
    """The sample shape of the states that a network sees, before they are packed."""
    if family == "packed":
        if "img_shapes" in call.sides:
            _, h, w = call.sides["img_shapes"][0][0]
        else:
            _, h, w = (int(v) + 1 for v in call.sides["img_ids"].reshape(-1, 3).amax(0))
        return call.state.shape[-1] // 4, 2 * h, 2 * w
    if family == "packed-video":
        return call.state.shape[-1], *(int(call.sides[k]) for k in ("num_frames", "height", "width"))
    return tuple(call.state.shape[1:])


def _generator() -> torch.Generator:
    """Of its own, so that nobody's random numbers move on."""
    return torch.Generator().manual_seed(0)
