"""Every example runs, prints the numbers of its paper and draws its figure."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("one_dimensional_potential", "alpha = 0.6435942529, OU time 0.4406867935"),
        ("gaussian_mixture_speciation", "d = 16384: free-entropy tau = 4.8520 (1/2 log d = 4.8520), phi there 0.7752"),
        ("classes_by_covariance", "exact free entropy: 0.256"),
        ("late_start_pipeline", "restored to the same bits: True"),
        ("gaussian_mixture_collapse", "d = 256: tau_C = 1.4731, to leading order with n / 2 samples 1.4731"),
    ],
    ids=lambda text: text if " " not in text else "",
)
def test_examples(name, told, tmp_path, capsys, monkeypatch):
    script = EXAMPLES / f"{name}.py"
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert "# %%" in text
    if name == "one_dimensional_potential":  # one as users start it; of a process of its own each takes 4 s to import
        done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        said = done.stdout
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(script)])
        monkeypatch.setattr("symbreak.studies.ask_data.DRAWS", 500)  # for curves of which only the picture is seen
        runpy.run_path(str(script), run_name="__main__")
        said = capsys.readouterr().out
    assert told in said
    figure = tmp_path / "build" / f"{name}.png"
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert figure.stat().st_size > 10_000  # an empty pair of axes is smaller
