"""Samples of any shape: arrays and tables read right, measured in units of their own, or one line that says why not."""

import bz2
import gzip
import io
import json
import lzma

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine

import symbreak as sb
from symbreak.cli.commands import main
from symbreak.data.samples import opened
from symbreak.runtime.errors import InputError
from symbreak.start.train import train_network

SHAPES = {"vector": (3,), "signal": (2, 16), "latent": (4, 4, 4), "five channels": (5, 6, 6), "volume": (1, 4, 5, 6)}


def draws(shape, n=40, seed=0):
    return 3.0 + 2.0 * np.random.default_rng(seed).normal(size=(n, *shape))


def cli(*args, capsys):
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in args])
    out = capsys.readouterr()
    return left.value.code, out.out, out.err


def frame(n=12):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {"height": rng.normal(170, 8, n), "income": rng.normal(4e4, 1e4, n), "kind": ["a", "b", "c"] * (n // 3)}
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("suffix", ["array", "tensor", "npy", "npz"])
def test_samples_of_any_shape_as_they_are(tmp_path, shape, suffix):
    x = draws(shape)
    y = np.arange(len(x)) % 2
    if suffix == "npy":
        np.save(tmp_path / "x.npy", x)
        data = sb.samples(tmp_path / "x.npy", labels=y)
    elif suffix == "npz":
        np.savez(tmp_path / "x.npz", x=x, y=y)
        data = sb.samples(tmp_path / "x.npz")
    else:
        data = sb.samples(x if suffix == "array" else torch.from_numpy(x), labels=y)
    assert data.shape == shape
    assert data.units.text == "the values as they are"
    assert data.classes == ("0", "1")
    np.testing.assert_array_equal(data.tensor(), x.astype(np.float32))
    np.testing.assert_array_equal(data.take(np.array([3, 7]), "two").tensor(), x[[3, 7]].astype(np.float32))
    assert torch.equal(data.unscaled(data.tensor()), data.tensor().double())
    np.testing.assert_allclose(sb.Moments.fit(data).mean, x.mean(0), rtol=1e-5)
    first, second = data.split()
    assert len(first) == len(second) == 20
    assert first.fingerprint() != second.fingerprint()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_standard_units_are_of_columns_or_channels_and_lead_back(shape):
    x = draws(shape) * (1 + np.arange(shape[0])).reshape(-1, *[1] * (len(shape) - 1))
    data = sb.samples(x, scale="standard")
    z = data.tensor().double()
    axes = (0, *range(2, z.ndim))
    assert torch.allclose(z.mean(axes), torch.zeros(shape[0]).double(), atol=1e-6)
    assert torch.allclose(z.var(axes, unbiased=False), torch.ones(shape[0]).double(), atol=1e-6)
    np.testing.assert_allclose(data.unscaled(z), x, rtol=1e-5, atol=1e-5)  # z is in single precision
    std = x.std((0, *range(2, x.ndim)))
    np.testing.assert_allclose(data.units.sigma(0.5), 0.5 * std)
    kind = "column" if len(shape) == 1 else "channel"
    assert data.units.text == f"standard deviations of each {kind}"
    assert f"each {kind}" in data.notes[0]
    again = sb.samples(x + 1, scale=data)
    np.testing.assert_allclose(data.unscaled(again.tensor()), x + 1, rtol=1e-5, atol=1e-5)
    pair = sb.samples(x, scale=(data.units.mean, data.units.std))
    assert torch.equal(pair.tensor(), data.tensor())
    assert pair.fingerprint() == data.fingerprint() != sb.samples(x).fingerprint()


def test_standard_units_in_double_precision():
    """A clock of 1.7e9 seconds that ticks by hundredths, which single precision cannot hold."""
    t = 1.7e9 + 0.01 * np.arange(100.0)[:, None]
    with pytest.raises(InputError, match=r"column 0 .* single precision cannot tell apart. Pass scale='standard'"):
        sb.samples(t)
    z = sb.samples(t, scale="standard").tensor().double().numpy()
    np.testing.assert_allclose(z, (t - t.mean()) / t.std(), atol=1e-5)


@pytest.mark.parametrize("kind", ["csv", "tsv", "semicolons", "with an index", "parquet", "frame"])
def test_tables(tmp_path, kind):
    table, path = frame(), tmp_path / "t.csv"
    if kind == "parquet":
        path = tmp_path / "t.parquet"
        table.to_parquet(path)
    elif kind == "frame":
        path = table
    else:
        path = path.with_suffix(".tsv") if kind == "tsv" else path
        separator = {"tsv": "\t", "semicolons": ";"}.get(kind, ",")
        table.to_csv(path, sep=separator, index=kind == "with an index")
    data = sb.samples(path, labels="kind", scale="standard")
    assert data.units.columns == ("height", "income")
    assert data.shape == (2,)
    assert data.classes == ("a", "b", "c")
    assert data.labels.tolist() == [0, 1, 2] * 4
    np.testing.assert_allclose(data.unscaled(data.tensor()), table[["height", "income"]].to_numpy(), rtol=1e-6)
    # A table of which the labels are missing and the columns are turned round, in the other's units.
    held = sb.samples(table[["income", "height"]], scale=data)
    assert torch.allclose(held.tensor(), data.tensor(), atol=1e-6)


def test_tables_without_a_header_and_of_lists(tmp_path):
    (tmp_path / "bare.csv").write_text("1.5,2\n3,4.5\n5,6\n")
    bare = sb.samples(tmp_path / "bare.csv")
    assert bare.tensor().tolist() == [[1.5, 2], [3, 4.5], [5, 6]]
    assert bare.units.columns == ("column 0", "column 1")
    assert "no names" in bare.notes[0]
    lists = pd.DataFrame({"signal": [[1.0, 2, 3], [4, 5, 6]], "label": ["x", "y"]})
    lists.to_parquet(tmp_path / "s.parquet")
    data = sb.samples(tmp_path / "s.parquet")
    assert data.tensor().tolist() == [[1, 2, 3], [4, 5, 6]]
    assert data.classes == ("x", "y")


def test_a_column_called_label_is_read_as_labels_unless_it_is_a_number():
    wine = sb.samples(load_wine(as_frame=True).frame)
    assert wine.shape == (13,)
    assert len(wine.classes) == 3
    assert "target is read as labels" in wine.notes[0]
    assert sb.samples(load_wine(as_frame=True).frame, labels="none").shape == (14,)
    diabetes = sb.samples(load_diabetes(as_frame=True).frame, scale="standard")
    assert diabetes.shape == (11,)
    assert diabetes.labels is None
    assert "214 different values: it is read as numbers" in diabetes.notes[0]


def test_one_large_column_is_said_and_scaled_away():
    wine = load_wine()
    raw, scaled = sb.samples(wine.data), sb.samples(wine.data, scale="standard")
    assert "differ by a factor of 2,530 (column 12: 314" in raw.notes[0]
    assert "scale='standard'" in raw.notes[0]
    # The covariance of standardized columns is n / (n - 1) of their correlation, whose trace is d.
    top = np.linalg.eigvalsh(np.corrcoef(wine.data.T))[-1] * 178 / 177
    assert sb.Moments.fit(scaled).spectrum(1).values[0] == pytest.approx(top, rel=1e-5)
    cancer = load_breast_cancer()
    assert "differ by a factor" in sb.samples(cancer.data).notes[0]
    assert not sb.samples(load_diabetes().data).notes  # its columns come in one scale


def bad_table(tmp_path, **columns):
    table = frame()
    for name, (row, value) in columns.items():
        table[name] = table[name].astype(object)
        table.loc[row, name] = value
    table.to_csv(tmp_path / "bad.csv", index=False)
    return tmp_path / "bad.csv"


BAD = {
    "unknown label column": (lambda t: (frame(), {"labels": "species"}), "no label column 'species'.* height, income"),
    "constant column": (lambda t: ([[1.0, 2], [1, 3]], {"scale": "standard"}), "column 0 of array is constant"),
    "text": (lambda t: (bad_table(t, income=(4, "n/a?")), {"labels": "kind"}), "row 4 .*'n/a\\?' in the column 'inc"),
    "text column": (lambda t: (bad_table(t), {}), "row 0 .*'a' in the column 'kind'.*labels=kind"),
    "missing value": (lambda t: (bad_table(t, income=(4, "")), {"labels": "kind"}), "1 of 12 .*first: row 4, income"),
    "NaN": (lambda t: ([[1.0, 2], [np.nan, 3], [4, np.inf]], {}), "2 of 3 samples .*first: row 1, column 0"),
    "length of labels": (lambda t: (np.ones((4, 2)), {"labels": [0, 1, 0]}), r"labels of shape \(3,\) for 4 samples"),
    "labels of a table": (
        lambda t: (frame()[["height"]], {"labels": [0, 1]}),
        r"labels of shape \(2,\) for 12 samples",
    ),
    "label column of an array": (lambda t: (np.ones((4, 2)), {"labels": "kind"}), "no columns, so labels='kind'"),
    "scale": (lambda t: (np.ones((4, 2)), {"scale": "minmax"}), "expected 'standard', a pair"),
    "pair": (lambda t: (np.eye(4), {"scale": (0, [1, 2])}), "of one number or of 4, one a column"),
    "no spread given": (lambda t: (np.eye(4), {"scale": (0, 0)}), "standard deviation above 0"),
    "not a pair": (lambda t: (np.eye(4), {"scale": 3}), "expected 'standard', or"),
    "pictures as units": (lambda t: (np.eye(4), {"scale": sb.images("digits")}), "which are pictures"),
    "other columns": (lambda t: (np.eye(4), {"scale": sb.samples(np.eye(3))}), "4 columns, array 3"),
    "one dimension": (lambda t: (np.ones(4), {}), r"expected \[N, \*S\]"),
    "empty": (lambda t: (np.ones((0, 4)), {}), "there are no values"),
    "masked": (lambda t: (np.ma.masked_greater(np.eye(4), 0.5), {}), "4 of 4 samples .*first: row 0, column 0"),
    "too large": (lambda t: (np.eye(4) * 1e40, {}), "column 0 of array holds values up to 1e[+]40; expected at most"),
    "too large to square": (lambda t: (np.eye(4) * 1e200, {"scale": "standard"}), "expected at most 1e[+]150"),
    "percent": (
        lambda t: ((t / "a.csv").write_text("a\n1%\n2%\n") and t / "a.csv", {}),
        "row 0 .*'1%' in the column 'a'",
    ),
    "a series": (lambda t: (pd.Series([1.0, 2.0]), {}), "samples of the type Series"),
    "complex": (lambda t: (np.ones((4, 2), complex), {}), "complex128 values; expected numbers"),
    "ragged": (lambda t: ([[1.0], [2.0, 3.0]], {}), "different shapes"),
    "an option of pictures": (lambda t: (np.eye(4), {"size": 8}), r"size= \(--size\) belongs to pictures"),
    "a range": (lambda t: (np.eye(4), {"value_range": (0, 1)}), r"value_range= \(--range\) belongs to pictures"),
    "a typo": (lambda t: (np.eye(4), {"scales": "standard"}), "no option 'scales'"),
    "no file": (lambda t: (t / "none.csv", {}), "does not exist"),
    "another file": (lambda t: ((t / "a.json").write_text("{}") and t / "a.json", {}), "is a .json file"),
    "columns of one name": (lambda t: ((t / "a.csv").write_text("a,a\n1,2\n") and t / "a.csv", {}), "two columns 'a'"),
    "one row": (lambda t: ((t / "a.csv").write_text("a,b\n1,2\n") and t / "a.csv", {}), "holds 1 sample"),
    "no rows": (lambda t: ((t / "a.csv").write_text("a,b\n") and t / "a.csv", {}), "there are no values"),
    "an empty file": (lambda t: ((t / "a.csv").write_text("\n") and t / "a.csv", {}), "cannot be read as a table"),
    "ragged lines": (
        lambda t: ((t / "a.csv").write_text("a,b\n1,2\n3\n") and t / "a.csv", {}),
        "cannot be read as a t",
    ),
    "bytes": (lambda t: ((t / "a.csv").write_bytes(b"\xff\xfe\x00\x81") and t / "a.csv", {}), "no text in UTF-8"),
    "other lists": (lambda t: (pd.DataFrame({"a": [[1.0], [2.0, 3.0]]}), {}), "lists of different lengths"),
    "dates": (lambda t: (pd.DataFrame({"a": pd.to_datetime(["2020-01-01", "2020-01-02"])}), {}), "row 0 .*'2020-01-01"),
    "mixed values": (lambda t: (pd.DataFrame({"a": [1, "2"]}), {}), "no table of numbers .*column a"),
    "complex column": (lambda t: (pd.DataFrame({"a": [1j, 2]}), {}), "no table of numbers .*column a"),
    "two columns of one name": (lambda t: (pd.DataFrame(np.eye(2), columns=["a", "a"]), {}), "Duplicate column names"),
    "a missing number of a list": (lambda t: (pd.DataFrame({"v": [[1.0, None]] * 2}), {}), "row 0, column 1"),
    "no values": (lambda t: (torch.empty(3, 2, device="meta"), {}), "a tensor of torch.float32 on meta"),
    "labels of two columns": (
        lambda t: (np.savez(t / "a.npz", x=np.eye(3), labels=np.eye(3)) or t / "a.npz", {}),
        r"labels of shape \(3, 3\) for 3 samples",
    ),
    "an infinite label": (lambda t: (np.eye(3), {"labels": [0, np.inf, 1]}), "infinite label"),
    "half a limit": (lambda t: (np.eye(3), {"limit": 2.5}), "subset of 2.5 samples"),
    "only labels": (lambda t: (pd.DataFrame({"a": [1, 2, 3]}), {"labels": "a"}), "no columns of numbers beside"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(tmp_path, case):
    make, said = BAD[case]
    source, options = make(tmp_path)
    with pytest.raises(InputError, match=said) as raised:
        sb.samples(source, **options)
    assert "\n" not in str(raised.value)


def test_other_tables(tmp_path):
    import datasets

    table = frame()
    rows = datasets.Dataset.from_pandas(table)
    assert torch.equal(sb.samples(rows, labels="kind").tensor(), sb.samples(table, labels="kind").tensor())
    numbered = pd.DataFrame(np.c_[np.eye(4), [0, 1, 0, 1]])
    data = sb.samples(numbered, labels=4)
    assert data.shape == (4,)
    assert data.labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match="samples that are no pictures"):
        sb.images(data, size=8)
    with pytest.raises(InputError, match="one of digits and array is pictures"):
        sb.evaluate(sb.samples(np.random.default_rng(0).normal(size=(20, 1, 8, 8))), sb.images("digits"), cache=False)


def test_rows_with_nan_are_left_out_when_asked(tmp_path):
    x = np.arange(12.0).reshape(6, 2)
    x[1, 1], x[4, 0] = np.nan, np.inf
    data = sb.samples(x, labels=[0, 0, 0, 1, 1, 1], skip_bad=True, scale="standard")
    assert len(data) == 4
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.skipped == ("row 1: holds NaN or infinity", "row 4: holds NaN or infinity")
    np.testing.assert_allclose(data.unscaled(data.tensor()), x[[0, 2, 3, 5]], atol=1e-5)
    assert "2 unusable samples are left out (first: row 1" in data.notes[-1]


def test_what_can_be_no_pictures_is_read_as_samples(tmp_path):
    for name, shape in {"v": (8, 4), "p": (8, 5, 6, 6), "vol": (8, 1, 4, 4, 4)}.items():
        np.save(tmp_path / f"{name}.npy", draws(shape[1:], 8))
        assert opened(str(tmp_path / f"{name}.npy")).shape == shape[1:]
    np.save(tmp_path / "grey.npy", np.random.default_rng(0).random((8, 6, 6)).astype(np.float32))
    assert opened(str(tmp_path / "grey.npy")).units is None
    assert opened(str(tmp_path / "grey.npy"), scale="none").shape == (6, 6)
    assert opened(str(tmp_path / "grey.npy"), scale="0,2").units.std.tolist() == [2.0] * 6
    frame().to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(InputError, match=r"Open it with sb\.samples"):
        sb.images(str(tmp_path / "t.csv"))


def test_the_command_line_reads_tables(tmp_path, capsys):
    frame(60).to_csv(tmp_path / "t.csv", index=False)
    fit = ("fit", "--data", tmp_path / "t.csv", "--labels", "kind", "--out", tmp_path / "m.safetensors")
    code, out, err = cli(*fit, "--scale", "standard", "--json", capsys=capsys)
    value = json.loads(out)
    assert code == 0
    assert value["shape"] == [2]
    assert value["units"]["columns"] == ["height", "income"]
    sigma = value["speciation"]["level"]["sigma"]
    np.testing.assert_allclose(value["units"]["speciation"], sigma * np.array(value["units"]["std"]))
    assert "1 is one standard deviation of each column" in err
    code, out, _ = cli(*fit, "--scale", "standard", capsys=capsys)
    assert code == 0
    assert "60 samples of 2" in out
    assert "standard deviations of each column (height" in out
    code, _, err = cli(*fit, capsys=capsys)
    assert code == 0
    assert "--scale standard" in err
    for more, said in (
        (("--scale", "standard", "--range", "0,1"), "--range and --scale came together"),
        (("--size", "8"), "size= (--size) belongs to pictures"),
        (("--crop", "center"), "crop= (--crop) belongs to pictures"),
        (("--mode", "L"), "mode= (--mode) belongs to pictures"),
        (("--pad", "8"), "pad= (--pad) belongs to pictures"),
        (("--scale", "wide"), "expected 'standard'"),
        (("--scale", "1,x"), "expected standard, none, or MEAN,STD"),
        (("--labels", "species"), "no label column 'species'. It has: height, income, kind"),
    ):
        code, out, err = cli(*fit, *more, capsys=capsys)
        assert (code, out, err.count("\n")) == (2, "", 1), (more, err)
        assert said in err


PIECES = [b",", b"\n", b'"', b"NaN", b"inf", b"1e999", b"\0", b";;", b"\r", b"-", b"\xff", b"a"]


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A file with some bytes changed, cut, doubled, or replaced by what tables may hold."""
    out = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(out))) if out else 0
        kind = rng.integers(5)
        if kind == 0:
            out[at : at + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            del out[at : at + int(rng.integers(1, 40))]
        elif kind == 2:
            out[at:at] = out[at : at + int(rng.integers(1, 40))]
        elif kind == 3:
            out[at:at] = rng.choice(PIECES)
        else:
            out = out[:at]
    return bytes(out)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "npy", "npz"])
def test_damaged_files_are_read_or_one_line(tmp_path, suffix):
    table, path = frame(30), tmp_path / f"t.{suffix}"
    if suffix in ("npy", "npz"):
        x = table[["height", "income"]].to_numpy()
        np.save(path, x) if suffix == "npy" else np.savez(path, x=x)
    else:
        table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    content, rng, lines = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(100):
        path.write_bytes(damaged(content, rng))
        options = {"scale": str(rng.choice(["none", "standard"])), "labels": rng.choice([None, "kind", "none"])}
        said = ""
        try:
            data = opened(str(path), **options)
            assert bool(torch.isfinite(data.tensor()).all())
        except InputError as error:
            said = str(error)
            lines += 1
        assert "\n" not in said
    assert lines > 20


TEXTS = {  # the lines of a table with the columns a and b, its name, and what is said of it
    "decimal commas": ("a;b\n1,5;2\n-3,25;4e0\n", "t.csv", "Commas in numbers are read as decimal points"),
    "bars": ("a|b\n1.5|2\n-3.25|4\n", "t.csv", ""),
    "blanks": (" 1.5   2.0\n-3.25  4.0\n", "t.txt", "columns have no names"),
    "blanks under names": ("a b\n1.5 2\n-3.25 4\n", "t.csv", ""),
    "savetxt": ("# a b\n1.5e+00 2.0e+00\n-3.25e+00 4.0e+00\n", "t.txt", ""),
    "comments": ("# by a camera\n# in 2020\na,b\n1.5,2\n-3.25,4\n", "t.csv", ""),
    "blanks behind commas": ("a, b\n1.5, 2\n-3.25, 4\n", "t.csv", ""),
    "a last comma": ("a,b,\n1.5,2,\n-3.25,4,\n", "t.csv", ""),
    "shuffled rows": (",a,b\n7,1.5,2\n3,-3.25,4\n", "t.csv", "'' only numbers the rows"),
    "rows with an ID": ("ID,a,b\n31,1.5,2\n20,-3.25,4\n", "t.csv", "'ID' only numbers the rows"),
    "a Label": ("a,b,Label\n1.5,2,0\n-3.25,4,1\n", "t.csv", "The column Label is read as labels"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_tables_as_programs_write_them(tmp_path, text):
    content, name, said = TEXTS[text]
    (tmp_path / name).write_text(content)
    data = opened(str(tmp_path / name))
    assert data.tensor().tolist() == [[1.5, 2.0], [-3.25, 4.0]]
    assert data.units.columns == (("column 0", "column 1") if "no names" in said else ("a", "b"))
    assert (said in data.notes[0]) if said else not data.notes
    assert (data.labels is not None) == ("Label" in text)


def test_one_column_whose_name_has_blanks(tmp_path):
    (tmp_path / "t.csv").write_text("my column\n1\n2\n")
    assert opened(str(tmp_path / "t.csv")).units.columns == ("my column",)


def test_parquet_files_of_structs_are_no_paths_of_pictures(tmp_path):
    pd.DataFrame({"v": [{"x": 1}, {"x": 2}]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match="in the column 'v'; expected a number"):
        opened(str(tmp_path / "t.parquet"))


def test_tensors_as_they_come():
    x = torch.arange(6.0).reshape(3, 2)
    for like in (x.to_sparse(), (x * 1j).conj().imag.neg(), x.to(torch.float8_e4m3fn), x.clone().requires_grad_()):
        assert torch.equal(sb.samples(like).tensor(), x)
    assert torch.equal(sb.samples([row.clone().requires_grad_() for row in x]).tensor(), x)


def test_a_column_of_lists_names_its_numbers():
    data = sb.samples(pd.DataFrame({"v": [[1.0, 20.0], [3.0, 80.0]]}), scale="standard")
    assert data.units.columns == ("column 0", "column 1")
    assert data.units.sigma(0.5).tolist() == [0.5, 15.0]


def test_labels_in_one_column_and_masked_ones(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.eye(4), labels=[[0], [1], [0], [1]])
    assert opened(str(tmp_path / "a.npz")).labels.tolist() == [0, 1, 0, 1]
    data = sb.samples(np.eye(4), labels=np.ma.masked_equal([0, 1, 7, 1], 7))
    assert data.labels.tolist() == [0, 1, 1]
    assert any("1 of 4 samples have no label" in note for note in data.notes)


def test_channels_that_come_last_are_said(tmp_path):
    np.save(tmp_path / "rgba.npy", np.random.default_rng(0).integers(0, 255, (4, 8, 6, 4)))
    assert "read as 8 channels of 6 x 4. Where channels come last" in opened(str(tmp_path / "rgba.npy")).notes[0]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tables_are_read_as_they_are(tmp_path, kind, monkeypatch):
    pack = {"gz": gzip, "bz2": bz2, "xz": lzma}[kind]
    text = "a,b,label\n" + "".join(f"{i / 8},{i % 5 - 1},{'xy'[i % 2]}\n" for i in range(30))
    (tmp_path / "t.csv").write_text(text)
    packed = tmp_path / f"t.csv.{kind}"
    packed.write_bytes(pack.compress(text.encode()))
    plain, data = sb.samples(tmp_path / "t.csv"), opened(str(packed))
    assert torch.equal(data.tensor(), plain.tensor())
    assert (data.units.columns, data.classes) == (("a", "b"), ("x", "y"))
    spaced = tmp_path / f"s.txt.{kind}"
    spaced.write_bytes(pack.compress(b"# a b\n1 2\n3 4\n"))
    assert sb.samples(spaced).tensor().tolist() == [[1, 2], [3, 4]]
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"cannot be unpacked|cannot be read as a table"):
        sb.samples(packed)
    monkeypatch.setattr("symbreak.data.tables.UNPACKED", 1000)
    packed.write_bytes(pack.compress(b"a,b\n" + b"1,2\n" * 100_000))
    with pytest.raises(InputError, match=r"unpacks to more than [\d,]+ bytes. Unpack it"):
        sb.samples(packed)


@pytest.mark.parametrize("name", ["x.npy.gz", "x.zip", "x.tar", "x.parquet.xz"])
def test_other_packed_files_say_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    for open_ in (opened, sb.samples):
        with pytest.raises(InputError, match=r"is packed.*[Uu]npack it"):
            open_(str(tmp_path / name))


def test_bytes_beside_numbers_are_left_out(tmp_path):
    numbers = {"a": np.arange(20.0) ** 2, "b": np.arange(20.0)}
    pq.write_table(pa.table({**numbers, "blob": [b"%d" % i for i in range(20)]}), tmp_path / "t.parquet")
    data = opened(str(tmp_path / "t.parquet"))
    assert data.units.columns == ("a", "b")
    assert any("'blob' hold bytes" in note for note in data.notes)
    stream = io.BytesIO()
    Image.new("L", (5, 6)).save(stream, "PNG")  # bytes of pictures beside numbers are pictures
    pq.write_table(pa.table({**numbers, "blob": [stream.getvalue()] * 20}), tmp_path / "p.parquet")
    assert opened(str(tmp_path / "p.parquet")).shape == (1, 6, 5)


@pytest.mark.parametrize("large", [70_000, 10**12])
def test_a_huge_label_is_a_name_and_no_number_of_classes(large):
    x = np.random.default_rng(0).normal(size=(6, 2))
    data = sb.samples(x, labels=[3, large, 3, -1, large, 3])
    assert data.classes == ("3", str(large))
    assert data.labels.tolist() == [0, 1, 0, 1, 0]
    assert any(f"The labels 3, {large} are numbered 0 .. 1" in note for note in data.notes)


def test_rgba_arrays_are_said_where_they_cannot_be_trained(tmp_path):
    data = sb.samples(np.random.default_rng(0).random((40, 8, 8, 4)))
    with pytest.raises(InputError, match=r"read as 8 channels of 8 x 4\. .*sb\.images\(x\[\.\.\., :3\]\)"):
        train_network(data, tmp_path / "net")


def test_units_of_a_start_lead_to_the_same_samples():
    x = np.random.default_rng(0).normal(5, 3, (40, 2))
    data = sb.samples(x, scale="standard")
    again = type(data.units).of(json.loads(json.dumps(data.units.to_dict())))
    assert data.units.same(again)
    assert torch.equal(sb.samples(x, scale=again).tensor(), data.tensor())
    assert not data.units.same(sb.samples(x).units)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e9])
def test_units_of_any_size_are_told_apart(size):
    """In metres or in nanometres: a spread three times as large, or another mean, is another unit."""
    x = size * np.random.default_rng(0).normal(size=(50, 2))
    units, again = (sb.samples(x * (1 + e), scale="standard").units for e in (0, 1e-9))
    assert units.same(again)
    assert not units.same(sb.samples(3 * x, scale="standard").units)
    assert not units.same(sb.samples(x + 0.01 * size, scale="standard").units)
    assert not units.same(sb.samples(x).units)
