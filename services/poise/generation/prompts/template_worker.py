"""The process that renders chat templates for `ChatTemplates`. Reads requests from stdin, writes responses to stdout.

    → {"template": "...", "messages": [...], "variables": {...}, "max_chars": 1000}
    ← {"text": "..."} or {"error": "..."} or {"error": "...", "out_of_memory": true}

The first line it writes is `{"ready": true}`. Arguments: memory limit in bytes, CPU seconds per request.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any


def main() -> None:
    """Respond to requests until stdin ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    max_bytes, max_cpu_s = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    responses = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # keep the output of libraries out of the responses
    responses.write('{"ready": true}\n')
    responses.flush()
    for line in sys.stdin:
        _limit_cpu(max_cpu_s)
        responses.write(json.dumps(_respond(line, render_jinja_template)) + "\n")
        responses.flush()


def _respond(line: str, render: Any) -> dict[str, Any]:
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
    except Exception as error:  # templates are programs and raise any type
        return {"error": (str(error) or type(error).__name__)[:2000]}
    if len(text) > request["max_chars"]:
        return {"error": f"it produces {len(text)} characters; required: at most {request['max_chars']}"}
    return {"text": text}


def _limit_cpu(seconds: int) -> None:
    """Limit the CPU time of the next request, so that this process ends even if the service was killed."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
