"""The tables of a record: the terminal and the page draw the same ones. Draws, never computes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from symbreak.report.figures import scale_of
from symbreak.report.record import Record
from symbreak.runtime.errors import visible
from symbreak.runtime.plain import Values, plain

__all__ = ["Cell", "Table", "measured", "noun_of", "number", "out_console", "show", "span", "tables", "verdict"]
__all__ += ["world_rows"]

MOST_COLUMNS = 30  # of a table of units
ADDED = 8  # levels of what a network adds
# Tables in a file or a pipe are not folded to 80 columns.
out_console = Console(width=None if sys.stdout.isatty() else 140)


class Cell(NamedTuple):
    """A field of a table.

    Attributes:
        text: a number or words.
        interval: of the number.
        remark: a line below, on the page only.
        kind: how the page shades it: ``"win"``, ``"lose"``, ``"tie"`` or ``"net"``.
    """

    text: str
    interval: str = ""
    remark: str = ""
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".strip()


@dataclass
class Table:
    """A table without a drawing.

    Attributes:
        title: what it is of.
        words, numbers, remarks: names of the columns, in this order: words stand left, numbers right.
        details: names of the last columns, of words that only the page has room for.
        rows: a cell a column.
        notes: sentences below.
    """

    title: str
    words: tuple[str, ...]
    numbers: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    details: tuple[str, ...] = ()
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str | Cell) -> None:
        """Add a row."""
        self.rows.append([c if isinstance(c, Cell) else Cell(c) for c in cells])

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Names, each with ``"words"``, ``"numbers"`` or ``"details"``."""
        kinds = (("words", self.words), ("numbers", self.numbers), ("words", self.remarks), ("details", self.details))
        return [(name, kind) for kind, names in kinds for name in names]


def number(value: float | str | None, form: str = ".4g") -> str:
    """A number as text; "-" where there is none.

    >>> number(1234, ","), number(0.12345, ".1%"), number(1e-17), number("inf")
    ('1,234', '12.3%', '0', 'inf')
    """
    if value is None or isinstance(value, str):
        return value or "-"  # records write an infinity as a string
    return f"{0 if abs(value) < 1e-12 else value:{form}}"  # rounding is no number to show


def measured(
    value: float | str | None, low: float | str | None, high: float | str | None, form: str = ".3g", remark: str = ""
) -> Cell:
    """A number with its interval, where both ends are known."""
    ends = "" if low is None or high is None else f"[{number(low, form)}, {number(high, form)}]"
    return Cell(number(value, form), ends, remark)


def span(critical: Values, key: str, form: str = ".3g") -> Cell:
    """A view of a critical time, such as ``"ou_time"``, with its interval."""
    level, *ends = (None if critical[w] is None else critical[w].get(key) for w in ("level", "low", "high"))
    low, high = reversed(ends) if key == "log_snr" else ends  # which falls where sigma rises
    return measured("none" if critical["level"] is None else level, low, high, form)


def verdict(standard: Values, late: Values, gain: Values | None = None) -> tuple[str, str]:
    """A sentence on late against standard start, and ``"win"``, ``"lose"`` or ``"tie"``.

    By the interval of the difference on the same seeds and reference, or, without it, by whether the intervals overlap.
    """
    ratio = standard["mean"] / late["mean"] if late["mean"] > 0 else float("inf")
    if gain is not None and gain["low"] is not None:
        better, worse = gain["low"] > 0, gain["high"] < 0
    else:
        known = None not in (standard["low"], standard["high"], late["low"], late["high"])
        better, worse = (known and a["high"] < b["low"] for a, b in ((late, standard), (standard, late)))
    if better:
        return f"{ratio:.2g} times nearer", "win"
    if worse:
        return f"loses: {1 / ratio:.2g} times farther", "lose"
    return f"within the intervals ({ratio:.2f})", "tie"


def noun_of(content: Values) -> str:
    """What the samples of a record are called: samples where they come with units of their own, else images."""
    return "samples" if content.get("data", {}).get("units") else "images"


def _distance(d: Values, remark: str = "") -> Cell:
    return measured(d["mean"], d["low"], d["high"], remark=remark)


def _scales(phases: Values) -> Table:
    """The spectral level, of pixels at both of their scales."""
    top = phases["eigenvalues"][0]
    numbers = ("Lambda", "sigma", "OU time", "log-SNR", f"step ({phases['schedule']})")
    what = "pixels in" if "[-1, 1]" in phases["speciation"] else "values in"
    table = Table("Spectral speciation, Lambda exp(-2 tau) = 1", (what,), numbers)
    for scale, c in phases["speciation"].items():
        views = (span(c, key, ".4g") for key in ("sigma", "ou_time", "log_snr", "step"))
        table.add(scale, number(top * (0.25 if scale == "[0, 1]" else 1)), *views)
        if c["reason"]:
            table.notes.append(f"{what.capitalize()} {scale}: {c['reason']}")
    return table


def _units(content: Values) -> Table | None:
    """The levels between which a sample is new, in the units of every column; none where values are as they are."""
    units = content["data"].get("units")
    if not units or units["std"] is None:
        return None
    levels = [(k, v["sigma"]) for k, v in content["regimes"].items() if v]
    table = Table(
        f"In the columns' own units (sigma counts {units['text']})",
        ("column",),
        ("mean", "standard deviation", *(f"sigma of {k}" for k, _ in levels)),
    )
    for name, mean, std in list(zip(units["columns"], units["mean"], units["std"]))[:MOST_COLUMNS]:
        table.add(name, number(mean), number(std), *(number(std * sigma) for _, sigma in levels))
    if len(units["columns"]) > MOST_COLUMNS:
        table.notes.append(f"The first {MOST_COLUMNS} of {len(units['columns']):,} columns.")
    return table


def _study(record: Record, content: Values) -> tuple[dict[str, Table], list[str]]:
    """Standard against late starts, row by row."""
    floor, reference = content["floor"], content.get("reference")
    cell = content["rows"][0]["standard"]["distance"] if content["rows"] else floor
    chooses = any(row.get("auto") for row in content["rows"])  # records of before have none
    table = Table(
        f"Fréchet distance in {cell['extractor']}, {cell['samples']} images x {cell['repeats']} repeats"
        + (" (smoke, not evidence)" if content["smoke"] else ""),
        ("sampler",),
        ("NFE", "standard start", "late, at speciation", "late, best of sweep", "data noised to that level")
        + ("chooses itself",) * chooses,
        ("best late start",) + ("start that chooses itself",) * chooses,
    )
    for row in content["rows"]:
        cells = [_distance(row["standard"]["distance"], row["standard"]["spacing"])]
        for key in ("spectral", "best", "noised"):
            cells.append(_distance(row[key]["distance"], f"sigma {row[key]['level']['sigma']:.3g}"))
        said, kind = verdict(row["standard"]["distance"], row["best"]["distance"], row.get("gain"))
        remarks = [Cell(said, kind=kind)]
        if chooses:
            cell, remark = _auto(row)
            cells.append(cell)
            remarks.append(remark)
        table.add(row["sampler"], number(row["calls"]), *cells, *remarks)
    table.notes = [_won(table, name, i - len(table.remarks)) for i, name in enumerate(table.remarks)]
    guidance = content.get("sampling", {}).get("guidance")
    if guidance:
        low, high = guidance["window"]
        end = "infinity" if high is None else number(high)
        table.notes.append(
            f"Guidance of scale {guidance['scale']:g} at sigma {low:.4g} to {end}; NFE count both branches, so guided "
            "rows take fewer steps."
        )
    table.notes += [
        f"Floor, real training images, {floor['samples']} x {floor['repeats']} repeats: {_distance(floor)}."
    ]
    if reference:
        slow = f"For comparison, standard DDIM with {reference['calls']} network evaluations"
        table.notes.append(f"{slow}: {_distance(reference['distance'])}.")
    return {"scales": _scales(content["phases"]), "starts": table}, []


def _auto(row: Values) -> tuple[Cell, Cell]:
    """The start that chooses itself, and how it stands beside the standard start."""
    auto, gain = row.get("auto"), (row.get("gains") or {}).get("auto")
    if not auto:
        return Cell(number(None)), Cell(row.get("no_auto", ""))
    cell = _distance(auto["distance"], f"sigma {row['auto']['level']['sigma']:.3g}, {auto['law_in_words']}")
    if gain is None or gain["low"] is None:
        return cell, Cell(*verdict(row["standard"]["distance"], auto["distance"])[:1], kind="tie")
    ends = f"[{number(gain['low'], '.2g')}, {number(gain['high'], '.2g')}]"
    if gain["low"] > 1:
        return cell, Cell(f"{number(gain['value'], '.2g')} times nearer", ends, kind="win")
    if gain["high"] < 1:
        return cell, Cell(f"loses: {number(gain['value'], '.2g')} times as near", ends, kind="lose")
    return cell, Cell(f"within the interval ({number(gain['value'], '.2f')})", ends, kind="tie")


def _won(table: Table, name: str, column: int) -> str:
    """In how many rows a start wins."""
    kinds = [row[column].kind for row in table.rows]
    won, lost = kinds.count("win"), kinds.count("lose")
    return f"The {name} is nearer than the standard start in {won} of {len(kinds)} rows beyond the intervals, " + (
        f"farther in {lost}."
    )


def _phases(record: Record, content: Values) -> tuple[dict[str, Table], list[str]]:
    """Every criterion with the reasons of those that have no level, and the checks."""
    data = content["data"]
    criteria = Table(
        f"The criteria for {data['name']} ({data['count']:,} {noun_of(content)}, {scale_of(content)})",
        ("criterion", "of", "flow, frame"),
        ("sigma", "OU time", f"step ({content['schedule']})", "seconds"),
        ("interval",),
        ("source",),
    )
    for c in content["criteria"]:
        where = ", ".join(w.upper() for w in (c["flow"], c["frame"]) if w)
        views = (span(c, key) for key in ("sigma", "ou_time", "step"))
        seconds = number(record.timings.get(c["stage"]), ".1f")
        criteria.add(c["name"], c["of"], where, *views, seconds, c.get("interval", ""), c["source"] or "")
        if c["level"] is None and c["reason"]:
            criteria.notes.append(f"{c['name']} ({', '.join(filter(None, (c['of'], where)))}): {c['reason']}")
    checks = Table("Checks", ("check", "verdict"), ("measured", "asked for"), ("in words",))
    word = {True: ("holds", "win"), False: ("does not hold", "lose"), None: ("cannot be said", "tie")}
    for c in content["checks"]:
        said, kind = word[c["holds"]]
        checks.add(c["name"], Cell(said, kind=kind), c["value_text"], c["expected_text"], c["sentence"])
    units = _units(content)
    more = {} if units is None else {"units": units}
    notes, added = content["notes"], content.get("added")  # records of before have none
    if added:
        more["added"], notes = _added(content), [added["sentence"], *notes]
    return {"scales": _scales(content), "criteria": criteria, **more, "checks": checks}, notes


def _attributes(record: Record, content: Values) -> tuple[dict[str, Table], list[str]]:
    """The level of every attribute, highest first."""
    data, least = content["data"], content["resolved"]
    table = Table(
        f"Attributes of {data['name']} ({data['count']:,} images, in {content['modes']} modes)",
        ("attribute",),
        ("share", "sigma, halfway", "OU time", f"step ({content['schedule']})", "sigma, free entropy", "told apart"),
        ("resolved",),
    )
    for row in content["rows"]:
        said = Cell("yes", kind="win") if row["resolved"] else Cell("no", kind="lose")
        views = (span(row, key) for key in ("sigma", "ou_time", "step"))
        right = row["balanced_accuracy"]
        accuracy = measured(right["value"], right["low"], right["high"], ".1%")
        table.add(
            row["attribute"], number(row["share"], ".1%"), *views, span(row["free_entropy"], "sigma"), accuracy, said
        )
        if row["level"] is None and row["reason"]:
            table.notes.append(f"{row['attribute']}: {row['reason']}")
    spectral, unresolved = content["spectral"], sum(not row["resolved"] for row in content["rows"])
    table.notes += [
        "Halfway: where images that the laws were not fitted to are told apart by half of what they are without noise. "
        f"{unresolved} of {len(content['rows'])} attributes are not resolved: their balanced accuracy without noise "
        f"(told apart) is below {least:.0%}, and their levels say little.",
        f"Spectral speciation of all images: sigma {span(spectral, 'sigma')}. Intervals: 95 % over the images.",
    ]
    more = {"network": _attributes_of_network(content)} if content.get("network") else {}
    return {"attributes": table, **more}, [*content["notes"], *content.get("network_notes", [])]


def _attributes_of_network(content: Values) -> Table:
    """What a network says of every attribute."""
    known = [row for row in content["rows"] if row["network"] is not None]
    informed = [row for row in known if row["network"]["information"] is not None]
    table = Table(
        f"The same of a network of {content['network']['parameters']:,} parameters, as classifiers read its images",
        ("attribute",),
        ("share of its images", "sigma, clones", f"step ({content['schedule']})", "sigma, U-turns")
        + ("sigma, information 10 %", "90 %") * bool(informed)
        + ("classifier right",),
        ("resolved",),
    )
    for row in known:
        of = row["network"]
        views = [_or_beyond(of["clones"]), span(of["clones"], "step"), _or_beyond(of["u_turns"])]
        if informed:
            ends = of["information"] or {}
            views += [span(ends[k], "sigma") if ends else Cell("") for k in ("high", "low")]
        right, said = of["classifier"], Cell("no", kind="lose")
        said = Cell("yes", kind="win") if right["resolved"] else said
        accuracy = measured(right["value"], right["low"], right["high"], ".1%")
        table.add(row["attribute"], number(of["share"], ".1%"), *views, accuracy, said)
        for name, critical in (("clones", of["clones"]), ("U-turns", of["u_turns"])):
            if critical["level"] is None and critical["reason"] and not critical.get("beyond"):
                table.notes.append(f"{row['attribute']}, {name}: {critical['reason']}")
    table.notes += [
        "Above and below: outside the levels asked about.",
        "Clones: ways down that part there have the same value at their ends, halfway from chance to always. U-turns: "
        "images noised to there and denoised have another value, half as often as images that have nothing in common. "
        "Classifiers are measured on held-out images; what they get wrong in half of the cases is no attribute of "
        f"the samples: below {content['resolved']:.0%} levels say little.",
    ]
    return table


def _or_beyond(critical: Values) -> Cell | str:
    """A level with its interval, or the end of the levels asked about beyond which it is."""
    beyond = critical.get("beyond")
    return span(critical, "sigma") if not beyond else f"{beyond['side']} {number(beyond['sigma'])}"


def _added(content: Values) -> Table:
    """What a network adds to its law, at some of the levels."""
    added = content["added"]
    title = f"What the network adds to the law, {added['images']:,} held-out {noun_of(content)}, paired"
    numbers = ("sigma", "error, law", "error, both", "difference", "law's share of D", "of the score", "nats above")
    table, count = Table(title, (), numbers), len(added["nats"]["sigma"])
    for i in range(count - 1, -1, -max(1, count // ADDED)):
        means = (added["nats"]["sigma"], added["law"]["value"], added["sum"]["value"])
        cells = [Cell(number(values[i], ".3g")) for values in means]
        for key, form in (("gain", ".3g"), ("share", ".1%"), ("score", ".1%"), ("nats", ".4g")):
            value, low, high = (added[key][k][i] for k in ("value", "low", "high"))
            cells.append(measured(value, low, high, form))
        table.add(*cells)
    return table


def _evaluation(record: Record, content: Values) -> tuple[dict[str, Table], list[str]]:
    """Distances, diversity, composition and copies."""
    d, floor, beyond, near = (content[k] for k in ("distance", "floor", "extrapolated", "neighbours"))
    title = f"{d['name']} in {d['extractor']}, to {d['reference']:,} held-out images"
    table = Table(title, ("quantity",), ("value", "samples", "reference"), ("note",), ("in",))

    def add(name: str, values: Values, key: str, note: str = "", ends: str | None = None) -> None:
        """The ends of the interval are named after the key, or ``low`` and ``high``."""
        low, high = (values.get(end if ends == "" else f"{key}_{end}") for end in ("low", "high"))
        counts = (number(v, ",") if isinstance(v, int) else v or "" for v in (values["samples"], values["reference"]))
        table.add(name, measured(values[key], low, high, ".4g"), *counts, note, values["extractor"])

    add(f"{d['name']}, all samples", {**d, "samples": d["count"]}, "pooled", "interval: spread, not bias")
    add(f"{d['name']}, mean of {d['repeats']} repeats", d, "mean", ends="")
    if beyond is not None:
        both = beyond.get("parts", 1) > 1  # one part of the reference keeps its bias
        counts = {"samples": "infinite", "reference": "infinite" if both else beyond["reference"]}
        add(
            f"{d['name']}, infinitely many {'on both sides' if both else 'samples'}",
            {**beyond, **counts},
            "value",
            ends="",
        )
    if floor is not None:
        add("floor: training images, all", {**floor, "samples": floor["count"]}, "pooled")
        said = "what nothing real beats at this count"
        add(f"floor: training images, {floor['repeats']} repeats", floor, "mean", said, "")
    if content["kid"] is not None:
        add(content["kid"]["name"], content["kid"], "value", content["kid"]["kernel"], "")
    for part, names in (("precision_recall", ("precision", "recall")), ("density_coverage", ("density", "coverage"))):
        for name in names if content[part] is not None else ():
            add(name, content[part], name, f"k = {content[part]['k']}")
    if (vendi := content["vendi"]) is not None:
        add("Vendi score", {"reference": None, **vendi}, "value", ends="")
        swapped = {**vendi, "samples": None, "reference": vendi["samples"]}
        add("Vendi score", swapped, "reference_value", "of the held-out images")
    _two_samples(content, add)
    copies = Table("Copies? Nearest training images", ("images",), ("count", "median distance, pixels", "d1/d2 < 1/3"))
    for key, name in (("samples", "samples"), ("held_out", "held-out images")):
        if (n := near[key]) is not None:
            copies.add(name, *map(number, (n["count"], n["median_nearest"], n["memorized"]), (",", ".3g", ".2%")))
    composed = {f"composition {i}": _composition(t) for i, t in enumerate(content["composition"]) if not _listed(t)}
    if listed := [t for t in content["composition"] if _listed(t)]:
        composed = {"attributes": _attribute_shares(listed), **composed}
    return {"numbers": table, "copies": copies, **composed}, content["notes"]


def _two_samples(content: Values, add: Callable[..., None]) -> None:
    """Distances that suit tables; records of pictures have none."""
    if (sliced := content.get("sliced_wasserstein")) is not None:
        add("sliced Wasserstein distance", sliced, "value", f"{sliced['directions']} directions; spread, not bias", "")
        if sliced["floor"] is not None:
            add("floor: training images", {**sliced["floor"], "extractor": sliced["extractor"]}, "value", ends="")
    if (test := content.get("two_sample")) is not None:
        for name, words in (("logistic", "logistic regression"), ("knn", "nearest neighbours")):
            counts = {k: test[k] for k in ("samples", "reference", "extractor")}
            said = f"1/2 where it cannot; p = {number(test[name]['p_value'], '.2g')}"
            if test["floor"] is not None:
                said += f"; of training images {number(test['floor'][name]['share'], '.3g')}"
            add(f"told apart by {words}", {**test[name], **counts}, "share", said, "")


def _composition(composed: Values) -> Table:
    """Shares of the classes among training images and samples."""
    entropy, counts, accuracy = composed["entropy"], composed["counts"], composed["held_out_accuracy"]
    read = f"{composed['attribute']}, as {composed['classifier']} reads them"
    read += "" if accuracy is None else f" (held-out accuracy {accuracy:.1%})"
    table = Table(read, ("class",), tuple(f"{k} ({counts[s]:,})" for s, k in SIDES))
    for row in composed["rows"]:
        cells = (measured(c["share"], c["share_low"], c["share_high"], ".1%") for c in (row[side] for side, _ in SIDES))
        table.add(row["class"], *cells)
    ends = (measured(e["value"], e["low"], e["high"], ".4g") for e in (entropy[side] for side, _ in SIDES))
    table.add(f"entropy, bits (at most {number(entropy['largest'])})", *ends)
    return table


def _listed(composed: Values) -> bool:
    """Whether a composition is that of an attribute with two classes, which stand together in one table."""
    return composed.get("balanced_accuracy") is not None and len(composed["rows"]) == 2


def _attribute_shares(listed: list[Values]) -> Table:
    """Shares and entropies of attributes with two classes, one a row."""
    counts, one = listed[0]["counts"], "share, {} ({:,})"
    shares, bits = (one.format(k, counts[s]) for s, k in SIDES), (f"entropy, {k}, bits" for _, k in SIDES)
    numbers = (*shares, *bits, "held-out balanced accuracy")
    table = Table(f"Attributes, as {listed[0]['classifier']} reads them", ("attribute",), numbers, ("resolved",))
    for composed in listed:
        last, accuracy = composed["rows"][-1], composed["balanced_accuracy"]
        said = Cell("yes", kind="win") if accuracy["resolved"] else Cell("no", kind="lose")
        ends = (measured(c["share"], c["share_low"], c["share_high"], ".1%") for c in (last[s] for s, _ in SIDES))
        entropies = (measured(e["value"], e["low"], e["high"]) for e in (composed["entropy"][s] for s, _ in SIDES))
        right = measured(accuracy["value"], accuracy["low"], accuracy["high"], ".1%")
        table.add(composed["attribute"], *ends, *entropies, right, said)
    table.notes.append("Unresolved: read right in fewer than 70 % of held-out images, every class counting alike.")
    return table


SIDES = (("train", "training images"), ("samples", "samples"))


def _audit(record: Record, content: Values) -> tuple[dict[str, Table], list[str]]:
    """Duplicates, memorized samples, the comparison and the verdict."""
    count, twins, compared = content["data"]["count"], content["duplicates"], content["comparison"]
    near = twins["near"]
    title = f"Duplicates among {count:,} training images"
    tables = {"duplicates": Table(title, ("duplicates",), ("groups", "images", "could go", "largest"))}
    for key, name in (("exact", "equal in every pixel"), ("near", "near duplicates, among the different images")):
        tables["duplicates"].add(name, *(number(twins[key][k], ",") for k in ("groups", "images", "spare", "largest")))
    tables["duplicates"].notes = [
        f"{twins['different']:,} of {count:,} images differ, {twins['deduplicated']:,} by more than near duplicates "
        f"do: pairs within {near['radius']:.4g}, or joined by a chain of such pairs. That is {near['fraction']:.3g} of "
        f"the median distance of a training image to its eighth neighbour, {near['scale']:.4g}."
    ]
    table = Table(
        f"Memorized: d1/d2 < {content['threshold']:.3g} in {content['features']}",
        ("of",),
        ("images", "memorized", "share", "equal pixels", "median d1", "median d1/d2"),
    )
    for key, name in (("samples", "samples"), ("held_out", "held-out images")):
        if (m := content["memorized"][key]) is not None:
            share = measured(m["share"], m["low"], m["high"], ".2%")
            middle = (measured(q[1], q[0], q[2]) for q in (m["nearest"], m["ratio"]))
            table.add(name, number(m["of"], ","), number(m["count"], ","), share, number(m["exact"], ","), *middle)
    for key, name in (("samples", "samples"), ("held_out", "held-out images")):
        if (m := content.get("transformed", {}).get(key)) is not None:  # records of before have none
            share = measured(m["share"], m["low"], m["high"], ".2%")
            said = f"{name}, flipped, shifted or paler"
            table.add(said, number(m["of"], ","), number(m["count"], ","), share, *[number(None)] * 3)
    if table.rows:
        tables["memorized"] = table
    if compared is not None:
        table = Table(
            "Nearer to training than to held-out images? 50 % without copying",
            (),
            ("nearer to training", "samples", "p, one-sided", "images on either side", "they count as"),
        )
        least = "<= " * (compared["p_value"] <= 1 / (1 + compared["permutations"]))  # permutations say no more
        share = measured(compared["share"], compared["low"], compared["high"], ".1%")
        numbers = (number(compared[k], ",.0f") for k in ("references", "effective"))
        table.add(share, number(compared["of"], ","), least + number(compared["p_value"], ".2g"), *numbers)
        tables["comparison"] = table
    return tables, [*content["notes"]]


FLOWS = {"sde": "reverse SDE", "ode": "probability flow", None: "any flow"}


def _critical(content: Values) -> list[Values]:
    """Critical times of a world's law and network: what they are called, and where they hold."""
    rows = (*content["critical"], *(content["network"]["critical"] if content["network"] else ()))
    # None of the criteria without a flow depends on one: they ask the noised law, not a process.
    return [
        {
            **row,
            "name": row["name"] + (" (network)" if row["network"] else ""),
            "where": f"{FLOWS[row['flow']]}, {row['frame'].upper() if row['frame'] else 'any'} frame",
        }
        for row in rows
    ]


def world_rows(content: Values) -> list[Values]:
    """What the markers of a world's critical times need."""
    levels = (("sigma", "level"), ("low", "low"), ("high", "high"))
    return [
        {**{k: row[k] for k in ("name", "where", "network")}, **{k: row[w] and row[w]["sigma"] for k, w in levels}}
        for row in _critical(content)
    ]


def _world(record: Record, content: Values) -> tuple[dict[str, Table], list[str]]:
    """Every critical time, and where the network breaks the symmetry."""
    numbers = ("sigma", "alpha (VP)", "OU time", "log-SNR", "DDPM step")
    table = Table(content["title"], ("criterion", "flow and frame"), numbers, (), ("source",))
    for row in _critical(content):
        sigma, tau, log_snr = (span(row, key, ".5g") for key in ("sigma", "ou_time", "log_snr"))
        alpha, step = ("none" if row[k] is None else number(row[k], ".5g") for k in ("alpha_vp", "ddpm_step"))
        name = Cell(row["name"], kind="net" if row["network"] else "")
        table.add(name, row["where"], sigma, alpha, tau.text, log_snr.text, step, row["source"])
        if row["note"]:
            table.notes.append(f"{row['name']}, {row['where']}: {row['note']}")
    network = content["network"]
    if network is None:
        return {"critical": table}, []
    made, alpha = network["training"], network["alpha"]
    said = f"A network of {made['parameters']:,} parameters, trained for {made['steps']:,} steps, "
    if alpha is None:
        said += f"has no bifurcation; the law's is at alpha = {network['alpha_exact']:.5f}."
    else:
        said += (
            f"breaks the symmetry at alpha = {alpha:.5f} ({network['criterion']}, reverse SDE, VP frame); the law "
            f"does at {network['alpha_exact']:.5f}: {network['relative_error']:+.2%}."
        )
    return {"critical": table}, [said]


TABLES: dict[str, Callable[[Record, Values], tuple[dict[str, Table], list[str]]]] = {
    "study": _study,
    "phases": _phases,
    "attributes": _attributes,
    "audit": _audit,
    "evaluation": _evaluation,
    "world": _world,
}


def tables(record: Record) -> tuple[dict[str, Table], list[str]]:
    """The tables of a record by name, and what is said beside them."""
    content = plain(record.content)
    made, said = TABLES[record.kind](record, content)
    if record.kind in ("audit", "evaluation", "study") and noun_of(content) == "samples":
        for table in made.values():
            _reword(table)
    return made, said


def _reword(table: Table) -> None:
    """Say samples and values instead of images and pixels."""

    def of(text: str) -> str:
        for word, other in (("image", "sample"), ("pixel", "value")):
            text = re.sub(rf"\b{word}(s?)\b", rf"{other}\1", text)
        return text

    table.title = of(table.title)
    table.words, table.numbers, table.remarks = (
        tuple(map(of, names)) for names in (table.words, table.numbers, table.remarks)
    )
    table.rows = [[cell._replace(text=of(cell.text)) for cell in row] for row in table.rows]
    table.notes = [of(note) for note in table.notes]


def show(record: Record, path: Path | None = None) -> None:
    """Print the tables of a record, and where its page was written."""
    parts, said = tables(record)
    for sentence in record.verdict:
        out_console.print(visible(sentence), markup=False, highlight=False)
    for table in parts.values():
        if table.rows:
            drawn = RichTable(title=escape(table.title))
            columns = [(name, kind) for name, kind in table.columns if kind != "details"]
            for name, kind in columns:
                drawn.add_column(escape(name), justify="right" if kind == "numbers" else "left")
            for row in table.rows:
                drawn.add_row(*(escape(visible(str(cell))) for cell in row[: len(columns)]))
            out_console.print(drawn)
        for note in table.notes:
            out_console.print(visible(note), markup=False, highlight=False)
    for sentence in said:
        out_console.print(visible(sentence), markup=False, highlight=False)
    if path is not None:
        sys.stdout.write(visible(f"report: {path}\n"))
