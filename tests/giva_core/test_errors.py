"""Errors: their text, their kinds, and that only what was cleared may leave a site."""

from __future__ import annotations

import inspect

import pytest

from giva_core import errors
from giva_core.errors import ConfigError, DataError, GivaError, public_reason

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, GivaError)]


def test_text_has_all_parts_in_order() -> None:
    error = GivaError("a file is missing.", got="nothing", expected="rows", cause="a wrong path.", remedy="correct it.")
    assert str(error) == (
        "a file is missing; got nothing; expected rows. Probable cause: a wrong path. Remedy: correct it."
    )


def test_text_leaves_out_what_was_not_said() -> None:
    assert str(GivaError("it broke")) == "it broke."
    assert str(GivaError("it broke", expected=3)) == "it broke; expected 3."


def test_zero_and_empty_text_count_as_found() -> None:
    assert str(GivaError("too few", got=0, expected="")) == "too few; got 0; expected ."


def test_every_error_has_a_kind_of_its_own() -> None:
    kinds = [kind.kind for kind in KINDS]
    assert len(KINDS) > 10
    assert len(set(kinds)) == len(kinds)


def test_only_a_wrong_setting_is_a_usage_error() -> None:
    assert {kind for kind in KINDS if kind.exit_code == 2} == {ConfigError}
    assert {kind.exit_code for kind in KINDS} == {1, 2}


def test_public_reason_is_the_kind_and_the_cleared_sentence() -> None:
    assert public_reason(DataError("row 7 of /data/x.jsonl says 'secret'")) == "data"
    assert public_reason(DataError("row 7 says 'secret'", public="3 rows lack a label")) == "data: 3 rows lack a label"


@pytest.mark.parametrize(
    "error", [ValueError("secret row"), KeyError("secret label"), FileNotFoundError("/secret/path")]
)
def test_public_reason_of_foreign_errors_has_no_content(error: Exception) -> None:
    assert public_reason(error) == f"internal: {type(error).__name__}"
