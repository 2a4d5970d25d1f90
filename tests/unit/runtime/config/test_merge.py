"""What is left of a lower layer of settings."""

from __future__ import annotations

from poise.runtime.config.merge import left_of, merged, spelled_out


def test_sections_are_merged_setting_by_setting() -> None:
    below = {"a": {"b": 1, "c": {"d": 2, "e": 3}}, "f": 4}
    assert merged(below, {"a": {"c": {"e": 5}}, "g": 6}) == {"a": {"b": 1, "c": {"d": 2, "e": 5}}, "f": 4, "g": 6}
    assert merged(below, {"a": 7}) == {"a": 7, "f": 4}
    assert below == {"a": {"b": 1, "c": {"d": 2, "e": 3}}, "f": 4}


def test_a_section_of_another_kind_gives_way_whole() -> None:
    below = {"x": {"a": {"kind": "one", "of_one": 1}}}
    assert merged(below, {"x": {"a": {"kind": "two", "of_two": 2}}}) == {"x": {"a": {"kind": "two", "of_two": 2}}}
    assert merged(below, {"x": {"a": {"kind": "one", "more": 2}}})["x"]["a"] == {"kind": "one", "of_one": 1, "more": 2}
    assert merged(below, {"x": {"a": {"more": 2}}})["x"]["a"] == {"kind": "one", "of_one": 1, "more": 2}
    assert left_of(below, {"x": {"a": {"kind": "two"}}}) == {"x": {}}


def test_a_word_over_a_section_is_its_kind() -> None:
    below = {"x": {"a": {"kind": "one", "of_one": 1}, "b": "word"}}
    assert merged(below, {"x": {"a": "one"}}) == below
    assert merged(below, {"x": {"a": "two", "b": "other"}}) == {"x": {"a": {"kind": "two"}, "b": "other"}}
    assert spelled_out({"x": {"a": "one"}, "y": "one"}, below) == {"x": {"a": {"kind": "one"}}, "y": "one"}
