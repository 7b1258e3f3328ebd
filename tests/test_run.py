"""Long work goes on where it was, and what is kept belongs to one run."""

import numpy as np
import pytest
import torch

from symbreak.runtime.files import InputError
from symbreak.runtime.run import Run, renamed


def folders(path):
    return sorted(path.glob("blocks-*"))


def test_parts_go_on_where_they_were(tmp_path):
    made, seen = [], []

    def make(item):
        assert torch.is_inference_mode_enabled()
        made.append(item)
        return {"square": np.array(item**2)}

    def stop(_, done, total):
        if done == 2:
            raise KeyboardInterrupt

    def squares(number, progress=None):
        run = Run(tmp_path, progress=progress).identified({"run": number})
        return [int(part["square"]) for part in run.parts("squares", [5, 6, 7], make)], run

    with pytest.raises(KeyboardInterrupt):
        squares(1, stop)
    values, run = squares(1, lambda *at: seen.append(at))
    assert values == [25, 36, 49]
    assert made == [5, 6, 7]
    assert seen == [("squares", 1, 3), ("squares", 2, 3), ("squares", 3, 3)]
    # Another run does not see them, and a damaged part is made again.
    squares(2)
    assert made == [5, 6, 7] * 2
    next(tmp_path.rglob("*/squares-1.safetensors")).write_bytes(b"damaged")
    for number in (1, 2):
        assert squares(number)[0] == [25, 36, 49]
    assert made == [5, 6, 7] * 2 + [6]
    run.close()
    other = Run(tmp_path).identified({"run": 2})
    assert len(folders(tmp_path)) == 1
    other.close()
    assert not folders(tmp_path)
    # Nothing is stored without a folder.
    for _ in range(2):
        Run().parts("squares", [8], make)
    assert made[-2:] == [8, 8]


def test_values_belong_to_one_run_and_are_made_once(tmp_path):
    made = []

    def make(value):
        made.append(value)
        return value

    def run(number):
        return Run(tmp_path).identified({"run": number})

    first = run(1)
    for _ in range(2):
        assert first.value("a", lambda: make({"x": (1, 2)})) == {"x": (1, 2)}
    assert run(1).value("a", lambda: make("fresh")) == {"x": [1, 2]}
    (stored,) = folders(tmp_path)
    assert sorted(p.name for p in stored.iterdir()) == ["cells.json", "identity.json"]
    # A run that asks for no value leaves the file of another one alone.
    run(2).close()
    assert run(1).value("a", lambda: make("fresh")) == {"x": [1, 2]}
    assert run(2).value("a", lambda: make("other")) == "other"
    # A file of which a letter changed is made again.
    (other,) = (p for p in folders(tmp_path) if p != stored)
    (other / "cells.json").write_text((other / "cells.json").read_text().replace("other", "otter"))
    again = run(2)
    assert again.value("a", lambda: make("again")) == "again"
    again.close()
    first.close()
    assert not folders(tmp_path)
    # Without a folder a value is still made once.
    loose = Run()
    assert [loose.value("a", lambda: make("loose")) for _ in range(2)] == ["loose"] * 2
    assert made == [{"x": (1, 2)}, "other", "again", "loose"]


def test_one_budget_is_shared_by_one_rule():
    run = Run(memory=2**30)
    assert run.bytes() == 2**30
    assert run.share(1 / 4).bytes(1 / 2) == 2**27
    assert Run().bytes(1 / 2, default=2**32) == 2**31
    with pytest.raises(InputError, match="at least 1 MiB"):
        Run(memory=1000)


def test_progress_has_the_name_of_the_outermost_stage():
    seen = []
    run = Run(progress=lambda *at: seen.append(at))
    run.named("clones").tell(1, 2)
    with run.timed("network") as stage:
        stage.named("clones").tell(2, 2)
    assert seen == [("clones", 1, 2), ("network", 2, 2)]
    assert list(run.timings) == ["network"]


def test_a_part_is_found_again_for_its_own_settings_and_identity_only(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"x": np.arange(3)}

    run = Run(tmp_path).identified({"seed": 1})
    for settings in ((1, torch.zeros(2)), (1, torch.zeros(2)), (2, torch.zeros(2)), (1, torch.ones(2))):
        assert run.part("a", make, *settings)["x"].tolist() == [0, 1, 2]
    assert len(made) == 3
    Run(tmp_path).identified({"seed": 2}).part("a", make, 1, torch.zeros(2))
    assert len(made) == 4
    run.close()
    assert len(folders(tmp_path)) == 1  # of the other identity


def test_arguments_of_the_old_spelling_name_the_new_one():
    @renamed(pairs="count=...")
    def measure(x, *, count=1, run=None):
        return x * count

    assert measure(3, count=2) == 6
    with pytest.raises(InputError, match=r"measure\(memory=...\) is now measure\(run=sb.Run\(memory=...\)\)"):
        measure(3, memory=5)
    with pytest.raises(InputError, match=r"measure\(pairs=...\) is now measure\(count=...\)"):
        measure(3, pairs=5)
    with pytest.raises(TypeError):
        measure(3, nonsense=5)
