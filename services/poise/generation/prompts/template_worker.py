"""The process that renders chat templates for `ChatTemplates`: requests on standard input, answers on standard output.

    → {"template": "...", "messages": [...], "variables": {...}, "max_chars": 1000}
    ← {"text": "..."} or {"error": "..."} or {"error": "...", "out_of_memory": true}

The first line that it writes is `{"ready": true}`. Arguments: most bytes of memory, most CPU seconds of one request.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any


def main() -> None:
    """Answer requests until standard input ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    max_bytes, max_cpu_s = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints must not look like an answer
    answers.write('{"ready": true}\n')
    answers.flush()
    for line in sys.stdin:
        _limit_cpu(max_cpu_s)
        answers.write(json.dumps(_answer(line, render_jinja_template)) + "\n")
        answers.flush()


def _answer(line: str, render: Any) -> dict[str, Any]:
    try:
        request = json.loads(line)
        ((text,), _) = render(
            [request["messages"]],
            chat_template=request["template"],
            add_generation_prompt=True,
            **request["variables"],
        )
    except MemoryError:
        return {"error": "MemoryError", "out_of_memory": True}
    except Exception as error:  # templates are programs: they raise what they like
        return {"error": (str(error) or type(error).__name__)[:2000]}
    if len(text) > request["max_chars"]:
        return {"error": f"it makes {len(text)} characters; at most {request['max_chars']} are tokenised"}
    return {"text": text}


def _limit_cpu(seconds: int) -> None:
    """End this process after so much more work: no caller may be left to end it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
