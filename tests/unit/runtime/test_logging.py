import datetime
import json
import logging
import re
import warnings

import pytest

from poise.runtime.config.settings import LoggingConfig
from poise.runtime.logging import configure_logging


@pytest.fixture(autouse=True)
def _logging_as_before():
    root, names = logging.getLogger(), ("", "poise", "poise_client", "__main__")
    handlers, levels = list(root.handlers), {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        yield
        logging.captureWarnings(False)
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def configure(**values):
    configure_logging(LoggingConfig(**values))


def test_text_lines_hold_time_level_and_name(capsys):
    configure()
    logging.getLogger("poise.oven").info("hot: %d", 200)
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO    poise\.oven: hot: 200\n", capsys.readouterr().err)


def test_json_is_one_object_a_line_with_the_traceback_in_it(capsys):
    configure(format="json")
    logger = logging.getLogger("poise.oven")
    logger.warning("two\nlines, naïve: %s", '"')
    try:
        raise RuntimeError("burnt")
    except RuntimeError:
        logger.exception("it failed")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first.keys() == {"time", "level", "logger", "message"}
    assert (first["level"], first["logger"], first["message"]) == ("WARNING", "poise.oven", 'two\nlines, naïve: "')
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(first["time"])
    assert datetime.timedelta() <= age < datetime.timedelta(minutes=5)
    assert second["traceback"].endswith("RuntimeError: burnt")


def test_own_loggers_follow_the_level_and_libraries_are_heard_from_warning_on(capsys):
    configure(level="DEBUG")
    logging.getLogger("poise.oven").debug("own")
    logging.getLogger("uvicorn.error").info("chatter")
    logging.getLogger("uvicorn.error").warning("a library's warning")
    configure(level="ERROR")
    logging.getLogger("poise.oven").warning("too little")
    logging.getLogger("poise_client").error("enough")
    messages = [line.split(": ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert messages == ["own", "a library's warning", "enough"]


def test_configuring_twice_says_everything_once(capsys):
    configure()
    configure()
    logging.getLogger("poise").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_warnings_are_logged_and_nothing_goes_to_standard_output(capsys):
    configure(format="json")
    warnings.simplefilter("always")
    warnings.warn("soft butter", UserWarning, stacklevel=1)
    output = capsys.readouterr()
    assert "soft butter" in json.loads(output.err)["message"]
    assert output.out == ""
