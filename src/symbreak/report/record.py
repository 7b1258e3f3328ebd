"""Record: everything a run found and everything needed to run it again, as JSON. No torch.

The same settings give the same record bit for bit on one machine; only ``timings`` differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from symbreak.report.summary import draw_summary
from symbreak.runtime.files import InputError, output_folder, read_json, write_json
from symbreak.runtime.plain import Values, plain
from symbreak.runtime.shown import LONGEST, Shown, axes, brief, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Record"]

FORMAT = "symbreak.record"
VERSION = 1


@dataclass
class Record(Shown):
    """What a run found.

    Attributes:
        kind: ``"study"``, ``"phases"``, ``"attributes"``, ``"audit"``, ``"evaluation"`` or ``"world"``.
        settings: every argument that decides the content.
        content: the findings, plain values only.
        versions: package versions.
        timings: seconds by stage; not part of what is reproducible.
    """

    kind: str
    settings: Values
    content: Values
    versions: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        parts = ", ".join(f"{k}={brief(v)}" for k, v in sorted(self.settings.items()) if v not in (None, [], {}))
        took = f", {sum(self.timings.values()):.0f} s" if self.timings else ""
        return f"Record({self.kind}: {shortened(parts, LONGEST - 100)}{took}; content: {len(self.content)} entries)"

    def plot(self, ax: Axes | None = None) -> Axes:
        """What it found, in one picture; the axes, new ones where none came. `write_report` draws everything.

        Raises:
            InputError: for a record of another kind or with missing parts.
        """
        ax = axes(ax)
        draw_summary(self.kind, plain(self.content), ax)
        return ax

    @property
    def verdict(self) -> list[str]:
        """What it says, in a few plain sentences; none in records of before and of kinds without a page."""
        verdict = self.content.get("verdict")
        told = verdict.get("sentences") if isinstance(verdict, dict) else verdict
        return [str(sentence) for sentence in told] if isinstance(told, list) else []

    def to_dict(self) -> Values:
        """Plain values, ready for JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "settings": plain(self.settings),
            "content": plain(self.content),
            "versions": dict(self.versions),
            "timings": plain(self.timings),
        }

    def save(self, folder: str | Path) -> Path:
        """Write ``folder/record.json``; the file appears whole or not at all."""
        return write_json(output_folder(folder) / "record.json", self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a record from its file or folder.

        Raises:
            InputError: where it is missing, no record, or written by a newer version.
        """
        path = Path(path)
        raw = read_json(path / "record.json" if path.is_dir() else path)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise InputError(f"{path} is no symbreak record. Expected the record.json that a run wrote.")
        if raw.get("version") != VERSION:
            raise InputError(f"{path} was written by another version (format {raw.get('version')}). Run it again.")
        parts = [raw.get(k) for k in ("settings", "content", "versions", "timings")]
        if not isinstance(raw.get("kind"), str) or not all(isinstance(p, dict) for p in parts):
            raise InputError(f"{path} is a damaged record: a part is missing. Run it again.")
        return cls(raw["kind"], *parts)  # type: ignore[arg-type]
