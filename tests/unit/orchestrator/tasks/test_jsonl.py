"""A file of problems is taken whole, or refused with every wrong line named."""

from __future__ import annotations

import json
import logging

import pytest

from poise.orchestrator.tasks.config import JsonlTask
from poise.orchestrator.tasks.jsonl import MAX_LINE_BYTES, read_problems
from poise.orchestrator.tasks.problem import TaskError

GOOD = '{"prompt": "2+2=", "answer": "4"}'


@pytest.fixture
def file(tmp_path):
    return tmp_path / "own.jsonl"


def read(file, text=None, limit=None, **settings):
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_problems(JsonlTask(path=file, **settings), file, limit)


def refused(file, text=None, **settings) -> list[str]:
    with pytest.raises(TaskError) as caught:
        read(file, text, **settings)
    return str(caught.value).splitlines()


def test_text_and_messages_numbers_and_domains_are_read(file):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3?"}]
    lines = [
        GOOD,
        "",
        json.dumps({"prompt": chat, "answer": 5, "domain": "sums", "metadata": {"level": 1}}),
        '{"prompt": "Grüße\\u00df", "answer": 0.5}',
    ]
    first, second, third = read(file, "\n".join(lines), verifier="numeric", domain="mine")
    assert (first.prompt, first.answer, first.domain, first.verifier) == ("2+2=", "4", "mine", "numeric")
    assert (second.prompt, second.answer, second.domain, second.metadata) == (chat, 5, "sums", {"level": 1})
    assert (third.prompt, third.answer) == ("Grüßeß", 0.5)


def test_byte_order_mark_and_windows_line_ends_do_no_harm(file):
    assert len(read(file, b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n")) == 1


def test_system_message_goes_before_prompts_that_bring_none(file):
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "a"}]
    texts = [
        {"prompt": "a", "answer": "b"},
        {"prompt": own[1:], "answer": "c"},
        {"prompt": own, "answer": "d"},
    ]
    text, chat, kept = read(file, "\n".join(map(json.dumps, texts)), system="mine")
    wanted = [{"role": "system", "content": "mine"}, own[1]]
    assert text.prompt == wanted
    assert chat.prompt == wanted
    assert kept.prompt == own


def test_all_wrong_lines_are_told_at_once_by_number(file):
    said = refused(file, f'{{"prompt": "a"}}\n{GOOD}\n\n{{"prompt": "a", "answer": null}}\n')
    assert said == [
        f"{file}:1: answer: missing; every line needs prompt and answer",
        f"{file}:4: answer: is null; must be text or a number",
    ]


def test_telling_stops_after_twenty_lines(file):
    said = refused(file, "{}\n" * 50)
    assert len(said) == 21
    assert said[19].startswith(f"{file}:20: ")
    assert "more lines may be wrong" in said[20]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "answr": "b"}', "answr: unknown; did you mean 'answer'?; answer: missing"),
        ('{"ask": "a", "answer": "b"}', "ask: unknown; known: prompt, answer, domain, metadata; prompt: missing"),
        ('{"prompt": "a", "answer": "b", "prompt": "c"}', "prompt: given twice; keep one"),
        ('{"prompt": "", "answer": "b"}', "prompt: is empty"),
        ('{"prompt": 3, "answer": "b"}', "prompt: is a number; must be text, or a list"),
        ('{"prompt": [], "answer": "b"}', "prompt: must end with a message of the user"),
        ('{"prompt": [{"role": "assistant", "content": "a"}], "answer": "b"}', "prompt: must end with a message of"),
        (
            '{"prompt": [{"role": "robot", "content": "a"}], "answer": "b"}',
            "prompt[0].role: is 'robot'; must be one of",
        ),
        ('{"prompt": [{"role": ["user"], "content": "a"}], "answer": "b"}', "prompt[0].role: is ['user']; must be one"),
        ('{"prompt": [{"role": "user", "content": 1}], "answer": "b"}', "prompt[0].content: is a number; must be text"),
        ('{"prompt": [{"role": "user"}], "answer": "b"}', "prompt[0]: must be an object of role and content"),
        ('{"prompt": ["a"], "answer": "b"}', "prompt[0]: must be an object of role and content"),
        ('{"prompt": "a", "answer": true}', "answer: is true or false; must be text or a number"),
        ('{"prompt": "a", "answer": " "}', "answer: is empty"),
        ('{"prompt": "a", "answer": NaN}', "line: NaN is not JSON"),
        ('{"prompt": "a", "answer": ' + "9" * 5000 + "}", "line: holds a number of thousands of digits"),
        ('{"prompt": "a", "answer": 1e999}', "answer: is too large a number"),
        (
            '{"prompt": "a", "answer": "b", "domain": "two words"}',
            "domain: is 'two words'; must be 1 to 128 characters",
        ),
        ('{"prompt": "a", "answer": "b", "domain": 3}', "domain: is a number; must be text"),
        ('{"prompt": "a", "answer": "b", "metadata": []}', "metadata: is a list; must be an object"),
        ('["a", "b"]', "line: is a list; must be an object"),
        ("prompt,answer", "line: is not JSON at column 1"),
        ('{"prompt": "a\\ud800", "answer": "b"}', "line: holds half of a surrogate pair"),
        ("[" * 200_000, "line: is nested too deep"),
    ],
)
def test_wrong_line_is_told_by_field_with_what_would_be_right(file, line, said):
    assert refused(file, f"{GOOD}\n{line}\n")[0].startswith(f"{file}:2: {said}")


@pytest.mark.parametrize("kept", [25, 13, 5, 1])
def test_cut_off_last_line_is_told_as_such(file, kept):
    said = refused(file, f"{GOOD}\n{GOOD[:kept]}")
    assert said[0].startswith(f"{file}:2: line: is not JSON")
    assert "the file was cut off here" in said[0]


def test_file_that_is_not_utf8_is_refused_with_the_line(file):
    said = refused(file, GOOD.encode() + b'\n{"prompt": "Gr\xfc\xdfe", "answer": "a"}')
    assert said == [f"{file}:2: line: byte 15 is not UTF-8; save the file as UTF-8"]


def test_huge_line_is_refused_unread(file):
    said = refused(file, '{"prompt": "' + "a" * MAX_LINE_BYTES + '", "answer": "b"}')
    assert said == [f"{file}:1: line is longer than 1048576 bytes; put one JSON object on each line"]


def test_line_of_the_greatest_length_is_read(file):
    frame = '{"prompt": "", "answer": "b"}\n'
    text = frame.replace('""', '"' + "a" * (MAX_LINE_BYTES - len(frame)) + '"')
    assert len(text) == MAX_LINE_BYTES
    assert len(read(file, text)) == 1


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file_is_refused(file, text):
    assert "holds no problem; put one on each line" in refused(file, text)[0]


def test_missing_file_and_folder_are_refused(file, tmp_path):
    assert "own.jsonl: cannot be read: No such file" in refused(file)[0]
    assert "cannot be read: Is a directory" in refused(tmp_path)[0]


def test_pattern_that_does_not_compile_is_refused(file):
    said = refused(file, '{"prompt": "a", "answer": "(b"}', verifier="regex")
    assert "answer: is no regular expression: missing )" in said[0]
    assert len(read(file, '{"prompt": "a", "answer": "(b"}', verifier="exact")) == 1


@pytest.mark.parametrize(
    ("literal", "answer"),
    [
        ("5", 5),
        ("5.0", 5.0),
        ("1e16", 1e16),
        ("0.00001", 1e-5),
        ("123456789012345678901", 123456789012345678901),
        ("3.14159265358979323846", "3.14159265358979323846"),
        ("1e-400", "1e-400"),
        ("1e-99999999999999999999", "1e-99999999999999999999"),
        ("123456789012345678.5", "123456789012345678.5"),
        ('"5"', "5"),
    ],
)
def test_answer_keeps_the_value_and_type_of_its_literal(file, literal, answer):
    (problem,) = read(file, f'{{"prompt": "a", "answer": {literal}}}', verifier="numeric")
    assert (type(problem.answer), problem.answer) == (type(answer), answer)


def test_repeated_problem_is_left_out_and_told(file, caplog):
    caplog.set_level(logging.WARNING)
    same_prompt = GOOD.replace('"4"', '"four"')
    assert [problem.answer for problem in read(file, f"{GOOD}\n{GOOD}\n{same_prompt}\n")] == ["4", "four"]
    assert "1 lines repeat a problem and are left out" in caplog.text


def test_reading_stops_at_the_limit(file):
    assert len(read(file, f"{GOOD}\n{GOOD.replace('2+2', '1+3')}\nnot JSON", limit=2)) == 2
