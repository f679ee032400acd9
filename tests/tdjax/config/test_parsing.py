"""JSON, types of JSON values, and arrays that others wrote: a ValueError that says what is wrong,
and nothing else."""

import io
import json
import math
import zipfile
from typing import Any, NotRequired, TypedDict

import numpy as np
import pytest
from generated import examples
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tdjax.config.parsing import json_object, json_value, mismatch, npy_array, npz_arrays


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 200_000, "nested too deep"),
        ('{"a":' * 200_000, "nested too deep"),
        (b'{"a": "\xff"}', "codec"),
        ("9" * 5000, "digits"),
        ("", "Expecting value"),
        ("[1]", "not a table"),
        ('{"a": 1, "a": 2}', "twice"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        json_object(text, unique=True)


@pytest.mark.parametrize("text", ['\ufeff{"a": "é"}', '\ufeff{"a": "é"}'.encode(), '{"a": "é"}'])
def test_a_byte_order_mark_is_no_part_of_json(text):
    assert json_object(text) == {"a": "é"}


class Inner(TypedDict):
    words: list[str]


class Form(TypedDict):
    count: int
    size: tuple[int, str]
    share: NotRequired[float]
    flag: NotRequired[bool]
    maybe: NotRequired[str | None]
    inner: NotRequired[Inner]
    free: NotRequired[dict[str, Any]]
    by_name: NotRequired[dict[str, list[int]]]


GOOD = {"count": 3, "size": [1, "a"]}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share": 1},
        {"share": 0.5, "flag": False, "maybe": None},
        {"inner": {"words": []}, "free": {"x": [{}]}, "by_name": {"a": [1]}, "unknown": object},
    ],
)
def test_values_that_fit(changes):
    assert mismatch(GOOD | changes, Form) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"count": "3"}, "count is '3', not int"),
        ({"count": True}, "count is True, not int"),
        ({"count": 2.0}, "count is 2.0, not int"),
        ({"count": 10**30}, "count is a number of 100 bits, not int"),
        ({"size": [1]}, "size has 1 items, not 2"),
        ({"size": [1, 2]}, r"size\[1\] is 2, not str"),
        ({"size": {"a": 1}}, "size is a table, not a list"),
        ({"share": math.nan}, "share is nan, not float"),
        ({"share": 10**400}, "share is a number"),
        ({"share": None}, "share is None, not float"),
        ({"flag": 1}, "flag is 1, not bool"),
        ({"maybe": 1}, "maybe is 1, not str"),
        ({"maybe": "\ud83d"}, "maybe is .*, not str"),
        ({"inner": []}, "inner is a list of 0, not a table"),
        ({"inner": {}}, "inner has no words"),
        ({"inner": {"words": [1]}}, r"words\[0\] is 1, not str"),
        ({"by_name": {"a": "x"}}, r"by_name\['a'\] is 'x', not a list"),
    ],
)
def test_values_that_do_not(changes, message):
    with pytest.raises(AssertionError, match=message):
        assert mismatch(GOOD | changes, Form) is None, mismatch(GOOD | changes, Form)


def test_a_field_that_is_missing():
    assert mismatch({"count": 1}, Form) == "it has no size"
    assert mismatch([], Form) == "it is a list of 0, not a table"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.mark.slow
@examples(30)
@given(JSON)
def test_any_json_value_has_an_answer(value):
    line = mismatch({**GOOD, "inner": value, "size": value}, Form)
    assert line is None or len(line) < 200
    assert json_value(json.dumps(0)) == 0


# Arrays
# --------------------------------------------------------------------------------------------------


def saved(array, **options) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, **options)
    return out.getvalue()


@examples(100)
@given(
    arrays.arrays(
        st.sampled_from(["f4", ">f8", "i1", "?", "c8", "<u2"]),
        arrays.array_shapes(min_dims=0, max_dims=4, max_side=4),
    ),
    st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    st.booleans(),
)
def test_arrays_as_numpy_writes_them(array, version, column_major):
    array = np.asfortranarray(array) if column_major else array
    got = npy_array(saved(array, version=version))
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)


WHOLE = saved(np.zeros((3, 5), np.float32))


@pytest.mark.parametrize(
    "old, new, message",
    [
        (b"(3, 5)", b"(3, 4)", "60 bytes follow"),
        (b"(3, 5)", b"(3, 9 ** 9)", "header"),
        (b"(3, 5)", b"(3, -5)", "shape"),
        (b"(3, 5)", b"(3, 5.)", "shape"),
        (b"(3, 5)", b"3 ,  5", "header"),
        (b"(3, 5)", b"(3L,5)", "header"),
        (b"<f4", b"|O8", "dtype"),
        (b"<f4", b"<f9", "header"),
        (b"<f4", b"<V0", "header|shape"),
        (b"False", b"00000", "header|shape"),
        (b"{", b"(" * 60, "header|bytes follow"),
        (b"{", b"\xff", "header"),
        (b"NUMPY", b"NUMPI", "not one array"),
        (b"\x76\x00{", b"\xff\xff{", "header has"),
    ],
)
def test_headers_that_are_refused(old, new, message):
    assert old in WHOLE
    with pytest.raises(ValueError, match=message):
        npy_array(WHOLE.replace(old, new))


def test_archives(tmp_path):
    path = tmp_path / "a.npz"
    want = {"x/y": np.arange(6.0).reshape(2, 3), "n": np.uint8([1, 2])}
    for save in (np.savez, np.savez_compressed):
        save(path, **want)
        got = npz_arrays(path)
        assert got.keys() == want.keys()
        for name, array in want.items():
            np.testing.assert_array_equal(got[name], array)
    np.savez(path, **want)
    whole = path.read_bytes()
    at = whole.index(want["x/y"].tobytes())
    path.write_bytes(whole[: at + 9] + bytes([whole[at + 9] ^ 1]) + whole[at + 10 :])
    with pytest.raises(ValueError, match="CRC"):
        npz_arrays(path)
    # A comment of the first entry that takes the second one in.
    at = whole.index(b"PK\1\2") + 32
    second = whole.index(b"PK\5\6") - whole.index(b"PK\1\2", at)
    path.write_bytes(whole[:at] + second.to_bytes(2, "little") + whole[at + 2 :])
    assert len(np.load(path).files) == 1
    with pytest.raises(ValueError, match="table of entries"):
        npz_arrays(path)


def test_an_archive_that_would_fill_the_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as z:
        info = zipfile.ZipInfo("a.npy")
        with z.open(info, "w", force_zip64=True) as f:
            f.write(b"\x93NUMPY")
        info.file_size = 2**40
    with pytest.raises(ValueError, match="would have 1099511627776 bytes"):
        npz_arrays(tmp_path / "a.npz")
