"""What a record says, in a few plain sentences. The first thing that terminal and page show. Words, never computes.

No sentence claims more than the intervals: where they overlap, or where there are none, it says so.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable

from symbreak.report.tables import measured, noun_of, number, span
from symbreak.runtime.plain import Values

__all__ = ["headline", "sentences", "start_in_words"]

HALFWAY = "two samples that part there end in the same class with a probability halfway from chance to certainty"
MEANINGS = {
    "cloning": f"the class: {HALFWAY}",
    "spectral": "first: above, the noise hides even the strongest mode of the data",
}


def sentences(kind: str, content: Values) -> list[str]:
    """The verdict of a record: a few sentences, none for a kind that has no page.

    Args:
        kind: of the `Record`.
        content: its findings, plain values.

    Raises:
        KeyError, TypeError, ValueError: for a damaged record.
    """
    made = SENTENCES.get(kind)
    return [] if made is None else [sentence for sentence in made(content) if sentence]


# --- phases ---------------------------------------------------------------------------------------


def _phases(content: Values) -> list[str]:
    return [_decides(content), _start(content), _enough(content), _guide(content)]


def _row(content: Values, name: str, of: str) -> Values | None:
    """A criterion that was found."""
    rows = (c for c in content["criteria"] if (c["name"], c["of"]) == (name, of) and c["level"] is not None)
    return next(rows, None)


def _decision(content: Values) -> Values | None:
    """The criterion that says when it decides, as the page shades it."""
    chosen = content["regimes"].get("speciation")
    return None if chosen is None else _row(content, chosen["criterion"], chosen["of"])


def _at(critical: Values, steps: bool) -> str:
    """A level in words: the model's own step first, where there is a network."""
    sigma = f"sigma {span(critical, 'sigma')}"
    if not steps or critical["level"].get("step") is None:
        return sigma
    return f"step {span(critical, 'step', '.0f')} ({sigma})"


def _decides(content: Values) -> str:
    row, network, noun = _decision(content), content.get("network"), noun_of(content)
    unit = "sigma: noise over signal, pixels in [-1, 1]" if noun == "images" else "sigma: noise over signal"
    if row is None:
        reasons = (c["reason"] for c in content["criteria"] if c["name"] == "spectral" and c["reason"])
        return f"No level was found at which the data decide. {next(reasons, '')}".strip()
    of = {"network": "Your network decides", "class mixture": "The law of the classes decides"}
    where = _at(row, network is not None)
    step = f" of {content['schedule']}" if where.startswith("step") else ""
    # "step 314 [300, 327] of DDPMScheduler (sigma ...)"
    where = where.replace(" (sigma", f"{step} (sigma", 1)
    unsure = "" if row["low"] and row["high"] else ", without an interval"
    meaning = MEANINGS[row["name"]]
    return f"{of.get(row['of'], 'The data decide')} {meaning.replace(':', f' at {where}{unsure}:', 1)} ({unit})."


LAWS = {"Gaussian": "one Gaussian of the data", "class mixture": "one Gaussian a class"}


def _start(content: Values) -> str:
    """Where a network is no better than a law, and so where sampling may start."""
    if (top := (content.get("added") or {}).get("top")) is not None:
        return (
            f"Above sigma {number(top, '.3g')} the law that the network was trained with answers alone. So start there "
            "or below, from that law; `symbreak sample` takes the start that `symbreak train` put beside the network."
        )
    against = content.get("against") or {}
    if not against:
        return ""
    auto = "`symbreak fit --start` weighs this against the steps you have."
    starts = {law: a for law, a in against.items() if a["from"] is not None}
    if not starts:
        names = " and ".join(LAWS.get(law, law) for law in against)
        return f"The network's squared error on held-out samples is below that of {names} at every level. {auto}"
    law = min(starts, key=lambda name: float(starts[name]["from"]["sigma"]))
    start, worse = starts[law]["from"], starts[law]["worse"]
    said = f"At {_level(start)} and above the network denoises held-out samples no better than {LAWS.get(law, law)}"
    if worse is None:
        said += ": the intervals of their squared errors overlap there"
    else:
        most = measured(worse["value"] - 1, worse["low"] - 1, worse["high"] - 1, ".1%")
        said += f", and worse at {worse['levels']} of the levels tried there: by {most} at {_level(worse['at'])}"
    return f"{said}. So start there, from that law, instead of from white noise; {auto}"


def _level(level: Values) -> str:
    sigma = f"sigma {number(level['sigma'], '.3g')}"
    return sigma if level.get("step") is None else f"step {level['step']:.0f} ({sigma})"


def _enough(content: Values) -> str:
    """Whether there are enough training samples, and what a perfect score of them would replay."""
    bound, decision = _row(content, "collapse", "data"), _decision(content)
    n, noun = content["data"]["count"], noun_of(content)
    copies = content.get("copies")
    copied = ""
    if copies is not None:
        share = measured(copies["share"], copies["low"], copies["high"], ".1%")
        copied = (
            f" Of {copies['of']:,} samples of the network {share} lie less than a third as far from one training "
            f"{noun[:-1]} as from the next; `symbreak audit` says whether that is copying."
        )
    if bound is None:
        return f"The level below which {n:,} {noun} are only replayed was not found.{copied}"
    said = f"below {_at(bound, content.get('network') is not None)} a perfect denoiser of the {n:,} {noun} replays them"
    if decision is None:
        return f"{said[0].upper()}{said[1:]}.{copied}"
    first = (decision["low"] or decision["level"])["sigma"]
    last = (decision["high"] or decision["level"])["sigma"]
    low, high = ((bound[end] or bound["level"])["sigma"] for end in ("low", "high"))
    if high < first:
        return f"{n:,} {noun} are enough to decide without copying: only {said}.{copied}"
    if low > last:
        return f"{n:,} {noun} are too few: already {said}, before anything is decided.{copied}"
    return f"Whether {n:,} {noun} are enough cannot be told: {said}, and this overlaps the decision.{copied}"


def _guide(content: Values) -> str:
    """Between which levels guidance acts, of a class-conditional network or of a prompt."""
    for name in ("class information", "condition information"):
        high, low = (_row(content, f"{name}, {share} %", "network") for share in (10, 90))
        if low is not None and high is not None:
            return f"Guide between {_at(high, True)} and {_at(low, True)}."
    return ""


# --- study ----------------------------------------------------------------------------------------


def headline(content: Values) -> Values:
    """The row that a study is told by: fewest evaluations, and the sampler whose standard start is the best there.

    It is chosen on other seeds than those that are reported.
    """
    fewest = min(row["calls"] for row in content["rows"])
    rows = (row for row in content["rows"] if row["calls"] == fewest)
    best: Values = min(rows, key=lambda row: float(min(row["spacings"].values())))
    return best


def _nearer(row: Values, key: str, noun: str) -> str:
    """A late start beside the standard start of the same sampler, in words."""
    gain = (row.get("gains") or {}).get(key)
    if gain is None or gain["low"] is None:
        share = row[key]["distance"]["mean"] / max(row["standard"]["distance"]["mean"], 1e-30)
        return f"has {number(share, '.2g')} times the standard start's distance to held-out {noun}, without an interval"
    if gain["low"] > 1:
        times = measured(gain["value"], gain["low"], gain["high"], ".2g")
        return f"is {times} times nearer to held-out {noun} than the standard start"
    if gain["high"] < 1:
        times = measured(1 / gain["value"], 1 / gain["high"], 1 / gain["low"], ".2g")
        return f"is {times} times farther from held-out {noun} than the standard start"
    times = measured(gain["value"], gain["low"], gain["high"], ".2g")
    return f"is not told from the standard start by its distance to held-out {noun} (ratio {times})"


def _study(content: Values) -> list[str]:
    row, floor, noun = headline(content), content["floor"], noun_of(content)
    key = "auto" if row.get("auto") else "best"
    name = "the start that chooses itself" if key == "auto" else "the late start at its best level"
    standard, late = (number(row[k]["distance"]["mean"], ".3g") for k in ("standard", key))
    said = [
        f"With {row['calls']} network evaluations (NFE) a sample, {name} {_nearer(row, key, noun)}: Fréchet distance "
        f"{late} instead of {standard}, where as many training {noun} have {number(floor['mean'], '.3g')}. The sampler "
        f"is {row['sampler']}, the best one for the standard start."
    ]
    same = [r for r in content["rows"] if r["sampler"] == row["sampler"] and r["calls"] > row["calls"] and r.get(key)]
    said += [f"With {r['calls']} NFE it {_nearer(r, key, noun)}." for r in same]
    slow = content.get("reference")
    if slow:
        far = number(slow["distance"]["mean"], ".3g")
        said.append(f"For comparison: standard DDIM with {slow['calls']} NFE has {far}.")
    nearest = min(row[k]["distance"]["mean"] for k in ("standard", key))
    if floor["low"] is not None and nearest < floor["low"]:
        said.append(f"Nearer than real {noun} are only samples that lack their variety or detail: look at them, too.")
    gain = (row.get("gains") or {}).get(key)
    if gain is not None and gain["low"] is not None and gain["high"] < 1:
        said.append("So sample from the standard start.")
    elif key == "auto" and row[key].get("law_in_words") != "white noise":
        said.append(f"To sample so: `{_command(content, row)}`.")
    return ["Smoke run: too few samples to be evidence."] * bool(content.get("smoke")) + said


def _command(content: Values, row: Values) -> str:
    """What makes the samples of a row with the start that chooses itself."""
    of = content["data"]
    data, model = (shlex.quote(str(x)) for x in (of.get("source", of["name"]), content["network"]["source"]))
    return (
        f"symbreak sample --start auto --data {data} --model {model} --sampler {row['sampler']} "
        f"--steps {row['steps']} --out samples"
    )


def start_in_words(content: Values) -> list[str]:
    """The law, the network and the start of a study's headline, in one sentence each."""
    row, network, noun = headline(content), content["network"], noun_of(content)
    key = "auto" if row.get("auto") else "best"
    start, count = row[key], content["data"]["count"]
    law = start.get("law_in_words") or ("one Gaussian" if key == "best" else "white noise")
    level = start["level"]
    return [
        f"The law: {law}, fitted to training {noun} ({count:,} there are); it is sampled without any network.",
        f"The network: {network['parameters']:,} parameters, {network['prediction']} prediction, from "
        f"{network['source']}; it was not changed.",
        f"The start: a draw from the law at sigma {number(level['sigma'], '.3g')}, then {start['calls']} network "
        f"evaluations with {row['sampler']}; the standard start begins at sigma "
        f"{number(row['standard']['level']['sigma'], '.3g')}.",
    ]


# --- evaluation -----------------------------------------------------------------------------------


def _evaluation(content: Values) -> list[str]:
    d, floor, noun = content["distance"], content["floor"], noun_of(content)
    of = f"{d['name']} {_interval(d)} to {d['reference']:,} held-out {noun} in {d['extractor']}"
    said = [f"The samples have the {of}, {d['samples']:,} at a time."]
    if floor is not None:
        said = [f"The samples have the {of}; as many training {noun} have {_interval(floor)}: {_beside(d, floor)}."]
    near = content["neighbours"]
    made, real = near["samples"], near["held_out"]
    share = measured(made["memorized"], made["memorized_low"], made["memorized_high"], ".1%")
    copies = f"Of {made['count']:,} samples {share} lie less than a third as far from one training {noun[:-1]} as "
    copies += "from the next"
    if real is not None:
        beside = measured(real["memorized"], real["memorized_low"], real["memorized_high"], ".1%")
        known = None not in (made["memorized_low"], real["memorized_high"])
        more = known and made["memorized_low"] > real["memorized_high"]
        copies += f", of held-out {noun} {beside}: " + ("it copies" if more else "no sign of copies at these counts")
    said.append(f"{copies}.")
    sampling = content.get("sampling") or {}
    if sampling.get("law_in_words"):
        at = sampling["level"]["sigma"]
        begins = "" if isinstance(at, str) else f", at sigma {number(at, '.3g')}"
        said.append(
            f"They were made with {sampling['calls']} network evaluations a sample, from "
            f"{sampling['law_in_words']}{begins}."
        )
    return said


def _interval(d: Values) -> str:
    return str(measured(d["mean"], d["low"], d["high"], ".3g"))


def _beside(d: Values, floor: Values) -> str:
    """A distance beside that of as many real samples; both are of one reference."""
    ends = [d["low"], d["high"], floor["low"], floor["high"]]
    if None in ends:
        return "there is no interval to tell them apart"
    if d["low"] > floor["high"]:
        return f"{number(d['mean'] / max(floor['mean'], 1e-30), '.2g')} times as far as real ones, beyond the intervals"
    if d["high"] < floor["low"]:
        return (
            "nearer than real ones beyond the intervals: blurred samples, few of them beside many features, or copies "
            "of what is held out"
        )
    return "the intervals overlap, so they are not told apart from real ones at this count"


# --- audit ----------------------------------------------------------------------------------------


def _audit(content: Values) -> list[str]:
    said, samples = [content["verdict"]["sentence"]], content["memorized"]["samples"]
    if samples is not None:
        said.append(
            f"At most {number(samples['high'], '.2%')} of all its samples are so near to one training "
            f"{noun_of(content)[:-1]} (97.5 %, Clopper-Pearson), if the {samples['of']:,} are independent."
        )
    made = content["samples"] or {}
    if made.get("start"):
        said.append(f"The samples came from {made['start']}.")
    twins, noun = content["duplicates"], noun_of(content)
    spare = content["data"]["count"] - twins["different"]
    if spare:
        said.append(f"{spare:,} of the {content['data']['count']:,} training {noun} repeat others exactly.")
    return said


# --- attributes -----------------------------------------------------------------------------------


def _attributes(content: Values) -> list[str]:
    return [*_attributes_of_data(content), *_attributes_of_network(content)]


def _attributes_of_network(content: Values) -> list[str]:
    """Whether a network decides the attributes later than two Gaussians tell them apart, by its clones."""
    pairs = [
        (row, row["network"]["clones"])
        for row in content["rows"]
        if row["resolved"] and row["level"] and row.get("network") and row["network"]["classifier"]["resolved"]
    ]
    above, said = [clones["beyond"] for _, clones in pairs if (clones.get("beyond") or {}).get("side") == "above"], []
    if above:
        said = [
            f"Of {len(above)} of {len(pairs)} attributes the network's clones agree halfway at more than sigma "
            f"{number(above[0]['sigma'])}, the highest level asked about: it decides them while the data leave them "
            "open, as networks do that are poor at high noise."
        ]
    pairs = [(row, clones) for row, clones in pairs if clones["level"] is not None]
    if not pairs:
        return said
    ratios = sorted(clones["level"]["sigma"] / row["level"]["sigma"] for row, clones in pairs)
    middle = ratios[len(ratios) // 2]
    first = max(pairs, key=lambda pair: float(pair[1]["level"]["sigma"]))
    last = min(pairs, key=lambda pair: float(pair[1]["level"]["sigma"]))
    return [
        *said,
        f"By its clones the network decides {first[0]['attribute']} first, at {_at(first[1], False)}, and "
        f"{last[0]['attribute']} last, at {_at(last[1], False)}: at {middle:.2g} times the level of the data, in the "
        f"median of {len(pairs)} attributes.",
    ]


def _attributes_of_data(content: Values) -> list[str]:
    rows = [row for row in content["rows"] if row["resolved"] and row["level"] is not None]
    if not rows:
        return [f"None of the {len(content['rows'])} attributes is told apart well enough to say when it is decided."]
    rows.sort(key=lambda row: -float(row["level"]["sigma"]))
    first, last = rows[0], rows[-1]
    said = f"Of {len(content['rows'])} attributes {len(rows)} are told apart. "
    if first is last:
        return [f"{said}{first['attribute']} is decided at {_at(first, False)}."]
    apart = first["low"] and last["high"] and first["low"]["sigma"] > last["high"]["sigma"]
    order = "" if apart else ", but their intervals overlap: which comes first is not told"
    return [
        f"{said}The first to be decided is {first['attribute']}, at {_at(first, False)}; the last is "
        f"{last['attribute']}, at {_at(last, False)}{order}."
    ]


SENTENCES: dict[str, Callable[[Values], list[str]]] = {
    "phases": _phases,
    "attributes": _attributes,
    "study": _study,
    "evaluation": _evaluation,
    "audit": _audit,
}
