import pytest

from poise.errors import InvalidRequest
from poise.runtime.rpc.validation import Violations


def test_one_error_names_all_wrong_fields():
    wrong = Violations()
    assert wrong.check(True, "fine", "unused")
    assert not wrong.check(False, "n", "is 0; required: at least 1")
    wrong.add("groups[3].id", "is empty")
    assert wrong
    with pytest.raises(InvalidRequest) as caught:
        wrong.raise_if_any()
    assert [(v.field, v.description) for v in caught.value.violations] == [
        ("n", "is 0; required: at least 1"),
        ("groups[3].id", "is empty"),
    ]


def test_valid_request_raises_nothing():
    wrong = Violations()
    wrong.raise_if_any()
    assert not wrong


@pytest.mark.parametrize("value", ["a", "run-1", "math/7:train.x_Y", "x" * 128])
def test_identifier_is_accepted(value):
    wrong = Violations()
    assert wrong.identifier("run_id", value)
    assert not wrong


@pytest.mark.parametrize("value", ["", "x" * 129, "a b", "a\n", "naïve", "a\0"])
def test_invalid_identifier_is_rejected_with_the_rule(value):
    wrong = Violations()
    assert not wrong.identifier("run_id", value)
    with pytest.raises(InvalidRequest, match=r"run_id: is .*; required: 1 to 128 characters") as caught:
        wrong.raise_if_any()
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("value", ["final", "step-8_b.v2", "x" * 64])
def test_folder_name_is_accepted(value):
    assert Violations().folder_name("name", value)


@pytest.mark.parametrize("value", ["", ".", "..", ".hidden", "a/b", "../a", "a\\b", "a:b", "x" * 65, "a\n"])
def test_path_is_not_a_folder_name(value):
    wrong = Violations()
    assert not wrong.folder_name("name", value)
    assert wrong
