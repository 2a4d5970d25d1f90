# The generation service, based on vLLM's own image of the version whose internals the worker uses. It can also run the
# learner, which needs vLLM for `push.transport: nccl`.
FROM python:3.11.14-slim-bookworm AS wheel
WORKDIR /src
COPY requirements/cpu.txt /tmp/lock.txt
RUN python3 -m pip install --no-cache-dir --constraint /tmp/lock.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY services services
COPY clients clients
RUN python3 -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM vllm/vllm-openai:v0.32.0
# vLLM, torch and their dependencies come with the image. Packages that poise adds have the versions that were tested with
# this vLLM. The image's Python may be marked as managed by the distribution (PEP 668).
COPY requirements/cpu.txt /tmp/lock.txt
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    wheel=$(echo /wheels/*.whl) && \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    python3 -m pip install --no-cache-dir --upgrade-strategy only-if-needed --constraint /tmp/lock.txt "${wheel}[torch]" && \
    rm /tmp/lock.txt
RUN useradd --uid 10001 --user-group --no-create-home poise && install -d -o poise -g poise /models /state /runs
USER 10001:10001
ENV PYTHONUNBUFFERED=1
EXPOSE 50051 8051
HEALTHCHECK --start-period=900s CMD ["python3", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8051/healthz', timeout=5)"]
ENTRYPOINT ["python3", "-m", "poise.generation"]
