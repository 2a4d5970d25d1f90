"""Limits on time, memory and output of chat templates, which a separate process renders."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import transformers.utils.chat_template_utils as templates

from poise.generation.prompts import chat_template
from poise.generation.prompts.chat_template import ChatTemplates, TemplateRejected
from poise.generation.prompts.time_limit import LimitReached, TimeLimit

CHAT: list[Any] = [{"role": "user", "content": "x" * 1000}]
VARIABLES = {"bos_token": "<s>", "extra": ["a", "b"]}
HARMLESS = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
LOOPS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% for i in range(99999) %}{{ f(n - 1) if n else '' }}{% endfor %}{% endmacro %}"
    "{{ f(5) }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "product of powers": "{% set n = 7 ** 9999999 %}{{ (n * n * n) % 1000 }}",
    "sort": "{% for i in range(99999) %}{% set x = range(99999) | sort | list | length %}{% endfor %}",
}
EXPLOSIONS = {
    "string times": "{{ 'a' * 10 ** 10 }}",
    "list times": "{{ ([0] * 10 ** 10) | length }}",
    "doubling": "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "list doubling": "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "format": "{{ '%9999999999d' | format(1) }}",
    "replace": "{{ messages[0].content.replace('x', 'y' * 10 ** 7) }}",
    "indent": "{{ messages | tojson(indent=10 ** 10) }}",
    "ranges": "{{ (range(99999) | map('string') | join).replace('1', 'y' * 10 ** 6) }}",
}


@pytest.fixture(scope="module")
def renderer() -> Iterator[ChatTemplates]:
    yield ChatTemplates()


def render(renderer: ChatTemplates, template: str, limit: TimeLimit | None = None) -> str:
    return renderer.render(template, CHAT, VARIABLES, limit or TimeLimit(3600.0, each_s=3600.0))


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


@pytest.mark.parametrize("template", LOOPS.values(), ids=LOOPS)
def test_template_that_takes_too_long_is_stopped(renderer: ChatTemplates, template: str) -> None:
    with pytest.raises(LimitReached, match=r"takes more than 0\.2 s"):
        render(renderer, template, TimeLimit(3600.0, each_s=0.2))


@pytest.mark.parametrize("template", EXPLOSIONS.values(), ids=EXPLOSIONS)
def test_template_that_fills_memory_is_stopped(renderer: ChatTemplates, template: str) -> None:
    with pytest.raises((LimitReached, TemplateRejected), match=r"512 MiB of memory|long|large|big|limit|memory"):
        render(renderer, template)
    assert render(renderer, "ok") == "ok"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(9999) %}{{ messages[0].content }}{% endfor %}",
        "{{ messages[0].content * 9999 }}",
        "{% macro f() %}{{ messages[0].content }}{% endmacro %}{% for i in range(9999) %}{{ f() }}{% endfor %}",
    ],
)
def test_template_that_produces_too_much_text_is_rejected(renderer: ChatTemplates, template: str) -> None:
    with pytest.raises(TemplateRejected, match="produces 9999000 characters; required: at most 50000"):
        render(renderer, template, TimeLimit(3600.0, each_s=3600.0, max_chars=50_000))


@pytest.mark.parametrize(
    "template", [HARMLESS, "{{ messages | tojson }}", "{{ extra | join('ü\\n\\0') }}", "{% if 0 %}x{% endif %}"]
)
def test_text_equals_that_of_transformers(renderer: ChatTemplates, template: str) -> None:
    ((expected,), _) = templates.render_jinja_template(
        [CHAT], chat_template=template, add_generation_prompt=True, **VARIABLES
    )
    assert render(renderer, template) == expected


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('one turn only') }}", "one turn only"),
        ("{{ messages[7].content.nothing }}", "has no element 7|no attribute|undefined"),
        ("{% for %}", "unexpected|Expected"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_error_of_the_template_is_reported(renderer: ChatTemplates, template: str, said: str) -> None:
    with pytest.raises(TemplateRejected, match=said):
        render(renderer, template)


def test_all_conversations_share_the_total_time(renderer: ChatTemplates) -> None:
    render(renderer, "started")
    with pytest.raises(LimitReached, match=r"prompts of the request took more than 0\.1 s"):
        render(renderer, LOOPS["nested loops"], TimeLimit(0.1, each_s=3600.0))


def test_another_thread_cancels_it(renderer: ChatTemplates) -> None:
    limit = TimeLimit(3600.0, each_s=3600.0)
    threading.Timer(0.1, limit.cancel).start()
    with pytest.raises(LimitReached, match="was cancelled"):
        render(renderer, LOOPS["power"], limit)


def test_a_killed_process_is_replaced(renderer: ChatTemplates) -> None:
    before = children()
    fresh = ChatTemplates()
    render(fresh, "ok")
    (pid,) = children() - before
    os.kill(pid, 9)
    assert render(fresh, "ok") == "ok"


def test_no_process_outlives_its_owner() -> None:
    before = children()
    owner = ChatTemplates()
    render(owner, "ok")
    assert children() != before
    del owner
    assert children() == before


def test_process_without_a_caller_ends_at_its_cpu_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_MAX_CPU_S", 1)
    with pytest.raises(LimitReached, match="process that renders the chat template exited"):
        render(ChatTemplates(), LOOPS["power"])


def test_conversations_of_many_threads_do_not_mix(renderer: ChatTemplates) -> None:
    found: dict[int, str] = {}

    def work(number: int) -> None:
        for _ in range(20):
            found[number] = render(renderer, f"{{{{ {number} * 3 }}}}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: str(3 * number) for number in range(4)}


def test_a_paused_clock_can_still_be_cancelled() -> None:
    limit = TimeLimit(0.0, each_s=1.0)
    time.sleep(0.001)
    with limit.paused():
        limit.check()
        limit.cancel()
        with pytest.raises(LimitReached):
            limit.check()
