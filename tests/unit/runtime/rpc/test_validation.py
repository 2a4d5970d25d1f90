import pytest

from poise.errors import InvalidRequest
from poise.runtime.rpc.validation import Violations


def test_all_wrong_fields_are_told_in_one_refusal():
    wrong = Violations()
    assert wrong.check(True, "fine", "unused")
    assert not wrong.check(False, "n", "is 0; required: at least 1")
    wrong.add("groups[3].id", "is empty")
    assert wrong
    with pytest.raises(InvalidRequest) as refused:
        wrong.raise_if_any()
    assert [(v.field, v.description) for v in refused.value.violations] == [
        ("n", "is 0; required: at least 1"),
        ("groups[3].id", "is empty"),
    ]


def test_nothing_wrong_raises_nothing():
    wrong = Violations()
    wrong.raise_if_any()
    assert not wrong


@pytest.mark.parametrize("value", ["a", "run-1", "math/7:train.x_Y", "x" * 128])
def test_identifiers_pass(value):
    wrong = Violations()
    assert wrong.identifier("run_id", value)
    assert not wrong


@pytest.mark.parametrize("value", ["", "x" * 129, "a b", "a\n", "naïve", "a\0"])
def test_what_is_no_identifier_is_refused_with_the_rule(value):
    wrong = Violations()
    assert not wrong.identifier("run_id", value)
    with pytest.raises(InvalidRequest, match=r"run_id: is .*; required: 1 to 128 characters") as refused:
        wrong.raise_if_any()
    assert len(refused.value.message) < 200


@pytest.mark.parametrize("value", ["final", "step-8_b.v2", "x" * 64])
def test_folder_names_pass(value):
    assert Violations().folder_name("name", value)


@pytest.mark.parametrize("value", ["", ".", "..", ".hidden", "a/b", "../a", "a\\b", "a:b", "x" * 65, "a\n"])
def test_what_may_leave_the_folder_is_no_folder_name(value):
    wrong = Violations()
    assert not wrong.folder_name("name", value)
    assert wrong
