"""What the README says runs."""

import re
from pathlib import Path

from tests.worlds import small_choice

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    with small_choice():
        exec(compile(code, "README.md", "exec"), names)
    assert tuple(names["images"].shape) == (16, 1, 8, 8)
    assert names["start"].calls == 5
    assert "decides below sigma 1.33" in capsys.readouterr().out


def test_the_readme_is_short_enough_to_read():
    assert len(README.read_text(encoding="utf-8").splitlines()) < 130
