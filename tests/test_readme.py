"""What the README says runs."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert tuple(names["images"].shape) == (16, 1, 8, 8)
    assert names["start"].calls == 5
    assert "decides below sigma 1.35" in capsys.readouterr().out


def test_linked_files_and_named_functions_exist():
    import symbreak

    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (README.parent / target).exists(), target
    table = text.split("## Question, function, paper")[1].split("\n\nEvery command")[0]
    for name in re.findall(r"`([a-zA-Z_]+)[(.`]", table):
        assert hasattr(symbreak, name) or name in ("symbreak",), name
