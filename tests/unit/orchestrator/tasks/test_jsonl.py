"""Reading of JSON Lines files; invalid lines are reported by number."""

from __future__ import annotations

import json
import os

import pytest

from poise.orchestrator.tasks.config import JsonlTask
from poise.orchestrator.tasks.jsonl import MAX_LINE_BYTES, read_file
from poise.orchestrator.tasks.problem import TaskError

GOOD = '{"prompt": "2+2=", "answer": "4"}'


@pytest.fixture
def file(tmp_path):
    return tmp_path / "own.jsonl"


def read(file, text=None, limit=None, **settings):
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_file(JsonlTask(path=file, **settings), file, limit=limit).problems


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


def test_byte_order_mark_and_crlf_are_accepted(file):
    assert len(read(file, b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n")) == 1


def test_system_message_is_added_to_prompts_without_one(file):
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


def test_all_invalid_lines_are_listed(file):
    said = refused(file, f'{{"prompt": "a"}}\n{GOOD}\n\n{{"prompt": "a", "answer": null}}\n')
    assert said == [
        f"{file}:1: answer: missing; every line needs prompt and answer",
        f"{file}:4: answer: is null; must be text or a number",
        f"{file}: 2 of 3 rows are invalid. Fix them, or set on_bad_row: skip to leave them out.",
    ]


def test_five_bad_rows_are_shown_and_all_counted(file):
    said = refused(file, f"{GOOD}\n" + "{}\n" * 50)
    assert [line.split(": ")[0] for line in said] == [*(f"{file}:{number}" for number in range(2, 7)), str(file)]
    assert "50 of 51 rows are invalid, showing the first 5. Fix them" in said[-1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "answr": "b"}', "answr: unknown; did you mean 'answer'?; answer: missing"),
        ('{"ask": "a", "answer": "b"}', "ask: unknown; known: prompt, answer, domain, metadata; prompt: missing"),
        ('{"prompt": "a", "answer": "b", "prompt": "c"}', "prompt: appears twice; keep one"),
        ('{"prompt": "", "answer": "b"}', "prompt: is empty"),
        ('{"prompt": "a\tb", "answer": "b"}', "line: contains an unescaped control character at column 14; escape it"),
        ('{"prompt": "a", "ans' + "\0" * 40, "line: contains NUL bytes: the file is damaged"),
        ('{"prompt": 3, "answer": "b"}', "prompt: is a number; must be text, or a list"),
        ('{"prompt": [], "answer": "b"}', "prompt: the last message must have the role user"),
        (
            '{"prompt": [{"role": "assistant", "content": "a"}], "answer": "b"}',
            "prompt: the last message must have the role",
        ),
        (
            '{"prompt": [{"role": "robot", "content": "a"}], "answer": "b"}',
            "prompt[0].role: is 'robot'; must be one of",
        ),
        ('{"prompt": [{"role": ["user"], "content": "a"}], "answer": "b"}', "prompt[0].role: is ['user']; must be one"),
        ('{"prompt": [{"role": "user", "content": 1}], "answer": "b"}', "prompt[0].content: is a number; must be text"),
        ('{"prompt": [{"role": "user"}], "answer": "b"}', "prompt[0]: must be an object with exactly role and content"),
        ('{"prompt": ["a"], "answer": "b"}', "prompt[0]: must be an object with exactly role and content"),
        ('{"prompt": "a", "answer": true}', "answer: is true or false; must be text or a number"),
        ('{"prompt": "a", "answer": " "}', "answer: is empty"),
        ('{"prompt": "a", "answer": NaN}', "line: NaN is not JSON"),
        ('{"prompt": "a", "answer": ' + "9" * 5000 + "}", "line: contains a number with thousands of digits"),
        ('{"prompt": "a", "answer": 1e999}', "answer: is too large for a double"),
        (
            '{"prompt": "a", "answer": "b", "domain": "two words"}',
            "domain: is 'two words'; must be 1 to 128 characters",
        ),
        ('{"prompt": "a", "answer": "b", "domain": 3}', "domain: is a number; must be text"),
        ('{"prompt": "a", "answer": "b", "metadata": []}', "metadata: is a list; must be an object"),
        ('["a", "b"]', "line: is a list; must be an object"),
        ("prompt,answer", "line: is not JSON at column 1"),
        ('{"prompt": "a\\ud800", "answer": "b"}', "line: contains half of a surrogate pair"),
        ("[" * 200_000, "line: is nested too deep"),
        ('{"prompt": " \\n\\t", "answer": "b"}', "prompt: is empty"),
        ('{"prompt": [{"role": "user", "content": " "}], "answer": "b"}', "prompt[0].content: is empty"),
        ('{"prompt": "a\\u0000b", "answer": "b"}', "line: contains the character NUL"),
        ('{"prompt": "a", "answer": "b", "metadata": {"k": ["\\u0000"]}}', "line: contains the character NUL"),
        ('{"prompt": "a\x00b", "answer": "b"}', "line: contains NUL bytes"),
        ('{"prompt": "a", "answer": "b", "\\udfff": 1}', "line: contains half of a surrogate pair"),
        ('{"\\udfff": 1, "\\udfff": 1}', "\\udfff: appears twice"),
        ('{"a\\u001b[31m": 1, "prompt": "a", "answer": "b"}', "a\\x1b[31m: unknown"),
        (
            '{"prompt": "a", "answer": "b"} {"prompt": "c", "answer": "d"}',
            "line: is not JSON at column 32 (Extra data)",
        ),
        ("# a comment", "line: is not JSON at column 1"),
        ("null", "line: is null; must be an object"),
        ('{"prompt": {"role": "user"}, "answer": "b"}', "prompt: is an object; must be text, or a list"),
        ('{"prompt": [{"role": "user", "content": "a", "name": "x"}], "answer": 1}', "prompt[0]: must be an object"),
        ('{"prompt": "a", "answer": "b", "metadata": null}', "metadata: is null; must be an object"),
    ],
)
def test_invalid_lines_are_reported_by_field_with_a_remedy(file, line, said):
    assert refused(file, f"{GOOD}\n{line}\n")[0].startswith(f"{file}:2: {said}")


@pytest.mark.parametrize("kept", [25, 13, 5, 1])
def test_cut_off_last_line_is_reported(file, kept):
    said = refused(file, f"{GOOD}\n{GOOD[:kept]}")
    assert said[0].startswith(f"{file}:2: line: is not JSON")
    assert "the file was cut off here" in said[0]


def test_file_that_is_not_utf8_is_rejected_with_the_line(file):
    said = refused(file, GOOD.encode() + b'\n{"prompt": "Gr\xfc\xdfe", "answer": "a"}')
    assert said[:1] == [f"{file}:2: line: byte 15 is not UTF-8; save the file as UTF-8"]


@pytest.mark.parametrize("length", [MAX_LINE_BYTES, MAX_LINE_BYTES + 1, 3 * MAX_LINE_BYTES])
def test_a_line_that_is_too_long_is_an_invalid_row(file, length):
    huge = '{"prompt": "' + "a" * length + '", "answer": "b"}'
    said = refused(file, f"{huge}\n{GOOD}\n{{}}\n")
    assert said[0] == f"{file}:1: line: is longer than 1048576 bytes; put one JSON object on each line"
    assert said[1].startswith(f"{file}:3: prompt: missing")


def test_a_line_of_maximum_length_is_read(file):
    frame = '{"prompt": "", "answer": "b"}\n'
    text = frame.replace('""', '"' + "a" * (MAX_LINE_BYTES - len(frame)) + '"')
    assert len(text) == MAX_LINE_BYTES
    assert len(read(file, text)) == 1


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file_is_rejected(file, text):
    assert "contains no problem; put one on each line" in refused(file, text)[0]


def test_missing_file_and_folder_are_rejected(file, tmp_path):
    assert "own.jsonl: is not readable: No such file" in refused(file)[0]
    assert "is not readable: Is a directory" in refused(tmp_path)[0]


def test_pattern_that_does_not_compile_is_rejected(file):
    said = refused(file, '{"prompt": "a", "answer": "(b"}', verifier="regex")
    assert "answer: is not a valid regular expression: missing )" in said[0]
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


def test_repeated_problems_are_skipped_and_reported(file):
    same_prompt = GOOD.replace('"4"', '"four"')
    file.write_text(f"{GOOD}\n{GOOD}\n{same_prompt}\n\n{GOOD}\n")
    found = read_file(JsonlTask(path=file), file)
    assert [(problem.answer, problem.line) for problem in found.problems] == [("4", 1), ("four", 3)]
    assert found.describe_skipped() == [f"{file}: 2 rows repeat an earlier one and are left out: lines 2, 5"]


def test_reading_stops_at_the_limit(file):
    assert len(read(file, f"{GOOD}\n{GOOD.replace('2+2', '1+3')}\nnot JSON", limit=2)) == 2


def test_an_escaped_backslash_before_u0000_is_not_nul(file):
    (problem,) = read(file, '{"prompt": "a\\\\u0000b", "answer": "b"}')
    assert problem.prompt == "a\\u0000b"


def test_rows_have_file_and_line(file):
    first, second = read(file, f"\r\n{GOOD}\r\n\r\n{GOOD.replace('2+2', '1+3')}")
    assert [first.origin, second.origin] == [f"{file}:2", f"{file}:4"]


def test_skipped_rows_are_left_out_counted_and_shown(file):
    file.write_text("\n".join(["{}", GOOD, *["[]"] * 6]))
    found = read_file(JsonlTask(path=file), file, "skip")
    assert [problem.line for problem in found.problems] == [2]
    told = found.describe_skipped()
    assert told[0] == f"{file}: 7 of 8 rows are left out (on_bad_row: skip), showing the first 5"
    assert [line.split(": ")[0] for line in told[1:]] == [f"{file}:{number}" for number in (1, 3, 4, 5, 6)]


def test_a_file_without_valid_rows_is_rejected(file):
    file.write_text("{}\n[]\n")
    with pytest.raises(TaskError, match=r"(?s)contains no problem.*:1: prompt: missing.*:2: line: is"):
        read_file(JsonlTask(path=file), file, "skip")


def test_the_hash_covers_only_lines_read(file):
    task = JsonlTask(path=file)
    file.write_text(f"{GOOD}\n")
    first = read_file(task, file).sha256
    file.write_text(f"{GOOD}\n\n")
    assert read_file(task, file).sha256 == first  # blank lines are no rows
    file.write_text(f"{GOOD}\n{GOOD.replace('2+2', '1+3')}\n")
    assert read_file(task, file).sha256 != first
    assert read_file(task, file, limit=1).sha256 == first


def test_a_pipe_is_rejected(tmp_path):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    assert "is not a regular file; name a JSON Lines file" in refused(pipe)[0]


def test_path_with_nul_is_rejected(tmp_path):
    path = tmp_path / "a\0b"
    assert "a\\x00b': contains the character NUL" in refused(path)[0]
