"""Values of callers as plain Python values: what is taken for a number, and what is refused."""

import dataclasses
from decimal import Decimal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tdjax.config import SamplerConfig, SLAConfig, VideoSize, values
from tdjax.errors import UsageError
from tdjax.pipeline.options import PipelineOptions

SCALARS = [np.int8(33), np.uint64(33), np.float32(33), np.float16(33), 33.0, jnp.int32(33)]
STRANGE = [None, True, np.True_, "33", b"33", 33.5, float("nan"), float("inf"), 3 + 0j, [33], {}]
STRANGE += [np.array([33]), np.array([]), Decimal(33), object(), 10**5000, -(10**30), Path("33")]


@pytest.mark.parametrize("value", SCALARS)
def test_numbers_of_other_types_become_pythons_own(value):
    for number in (values.whole("n", value), VideoSize(frames=value).frames):
        assert type(number) is int and number == 33


ARRAYS = [np.array(0.5), np.array(0.5, np.float16), jnp.float32(0.5), jnp.bfloat16(0.5)]
ARRAYS += [jnp.asarray(0.5, jnp.float8_e4m3fn), np.float64(0.5)]


@pytest.mark.parametrize("value", ARRAYS, ids=lambda value: f"{type(value).__name__}-{value.dtype}")
def test_numbers_that_arrays_hold(value):
    number = values.real("x", value)
    assert type(number) is float and number == 0.5
    assert values.reals("x", value.reshape(1)) == (0.5,)


@pytest.mark.parametrize(
    "value",
    [np.array([0.5]), np.array(True), np.array("1"), np.array(1j), np.array(None), np.zeros(2)]
    + [np.zeros((), [("a", "f4")]), np.datetime64("2020"), jnp.ones((1, 1))],
    ids=lambda value: str(value.dtype),
)
def test_arrays_that_hold_no_number(value):
    with pytest.raises(UsageError, match="x is"):
        values.real("x", value)


@pytest.mark.parametrize("value", STRANGE, ids=lambda value: type(value).__name__)
def test_what_is_no_whole_number_is_refused_by_name(value):
    with pytest.raises(UsageError, match="num_frames is") as error:
        VideoSize(frames=value)
    assert str(error.value).count("\n") == 2 and len(str(error.value)) < 300


@pytest.mark.parametrize("cls", [VideoSize, SamplerConfig, SLAConfig, PipelineOptions])
def test_no_field_takes_what_it_is_not(cls):
    for field in dataclasses.fields(cls):
        for value in (object(), b"x", {}, np.zeros((2, 2))):
            with pytest.raises(UsageError):
                cls(**{field.name: value})


def test_numbers_and_lists_of_them():
    assert values.real("x", np.float32(0.5)) == 0.5 and type(values.real("x", 80)) is float
    assert values.reals("x", np.array([1.5, 1])) == (1.5, 1.0)
    for value in ("1.5", None, True, [1], 10**400):
        with pytest.raises(UsageError, match="x is"):
            values.real("x", value)
    for value in (1.5, "1.5", ["a"], np.zeros((1, 1)), {1.5: 1}):
        with pytest.raises(UsageError, match="x is"):
            values.reals("x", value)


class Named:
    """What has a path."""

    def __init__(self, name):
        self.name = name

    def __fspath__(self):
        return self.name


def test_switches_and_paths():
    assert values.switch("x", np.True_) is True
    for value in ("false", 0, 1, None):
        with pytest.raises(UsageError, match="x is"):
            values.switch("x", value)
    assert values.path("x", Path("a/b")) == Path("a/b")
    for value in (
        Named(b"a"),
        "~nobody-of-this-name/x",
        "",
        b"a",
        3,
        "nul\0",
        "half \ud83d",
        "n" * 300,
        "a/" + "n" * 5000,
    ):
        with pytest.raises(UsageError, match="x is"):
            values.path("x", value)


WORDS = ["1_000", "٣", "²", "1e3", "", "0x10", "9" * 5000, "1 0", "+-1"]


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word[:9])
def test_whole_numbers_are_written_in_plain_digits(word):
    with pytest.raises(ValueError, match="not a whole number"):
        values.parse_whole(word)


REALS = ["1_0.0", "٣.5", "", ".", "1e99999", "9" * 5000, "infinity", "1,5"]


@pytest.mark.parametrize("word", REALS, ids=lambda word: word[:9])
def test_numbers_are_written_in_plain_digits(word):
    with pytest.raises(ValueError, match="not a number"):
        values.parse_real(word)


def test_written_numbers():
    assert [values.parse_whole(w) for w in ("-1", "+3", " 007 ")] == [-1, 3, 7]
    assert [values.parse_real(w) for w in (".5", "1.", "-2e-3")] == [0.5, 1.0, -0.002]
