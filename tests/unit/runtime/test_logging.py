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


def test_text_line_has_time_level_and_name(capsys):
    configure()
    logging.getLogger("poise.oven").info("hot: %d", 200)
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO    poise\.oven: hot: 200\n", capsys.readouterr().err)


def test_json_line_contains_the_traceback(capsys):
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


def test_libraries_log_only_from_warning(capsys):
    configure(level="DEBUG")
    logging.getLogger("poise.oven").debug("own")
    logging.getLogger("uvicorn.error").info("chatter")
    logging.getLogger("uvicorn.error").warning("a library's warning")
    configure(level="ERROR")
    logging.getLogger("poise.oven").warning("too little")
    logging.getLogger("poise_client").error("enough")
    messages = [line.split(": ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert messages == ["own", "a library's warning", "enough"]


def test_configuring_twice_logs_once(capsys):
    configure()
    configure()
    logging.getLogger("poise").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_warnings_are_logged_to_standard_error(capsys):
    configure(format="json")
    warnings.simplefilter("always")
    warnings.warn("soft butter", UserWarning, stacklevel=1)
    output = capsys.readouterr()
    assert "soft butter" in json.loads(output.err)["message"]
    assert output.out == ""
