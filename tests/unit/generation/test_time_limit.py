import sys
import threading
import time

import pytest
import transformers.utils.chat_template_utils as templates

from poise.generation.time_limit import LimitReached, TimeLimit

LOOPS = {
    "flat": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% for i in range(99999) %}{{ f(n - 1) if n else '' }}{% endfor %}{% endmacro %}"
    "{{ f(5) }}",
    "silent": "{% set ns = namespace(x=0) %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% set ns.x = j %}{% endfor %}{% endfor %}",
    "filter": "{% for i in range(99999) %}{% for m in messages %}{% set s = m.content | upper | trim %}{% endfor %}"
    "{% endfor %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
}
MESSAGES = [{"role": "user", "content": "x" * 1000}]


def render(template):
    return templates.render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=True)[0][0]


@pytest.mark.parametrize("template", LOOPS.values(), ids=LOOPS)
def test_a_looping_template_is_ended(template):
    with pytest.raises(LimitReached, match=r"more than 0\.2 s"), TimeLimit(60.0).bounded(0.2, 10**9):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
        "{% macro f() %}{{ messages[0].content }}{% endmacro %}{% for i in range(9999) %}{{ f() }}{% endfor %}",
        "{% for i in range(9999) %}{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    ],
)
def test_a_template_that_multiplies_text_is_ended(template):
    with pytest.raises(LimitReached, match="characters"), TimeLimit(60.0).bounded(60.0, 50_000):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        "{% if false %}" + "a long template that is compiled at its first use " * 500 + "{% endif %}ok",
    ],
)
def test_a_template_within_its_limits_is_left_alone(template):
    before = sys.gettrace()
    with TimeLimit(60.0).bounded(60.0, 5000):
        bounded = render(template)
    assert bounded == render(template)
    assert sys.gettrace() is before


def test_all_pieces_share_the_whole_time():
    limit = TimeLimit(0.0)
    time.sleep(0.01)
    with pytest.raises(LimitReached, match="all of them"), limit.bounded(60.0, 100):
        raise AssertionError("it ran")


def test_another_thread_ends_it():
    limit = TimeLimit(60.0)
    ended = []

    def run():
        try:
            with limit.bounded(60.0, 10**9):
                render(LOOPS["flat"])
        except LimitReached as error:
            ended.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    limit.cancel()
    thread.join()
    assert ended == ["it is not wanted any more"]
