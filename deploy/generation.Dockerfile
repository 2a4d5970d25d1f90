# The generation service: the upstream image of vLLM, of the version whose internals the worker follows.
FROM python:3.11.14-slim-bookworm AS wheel
WORKDIR /src
RUN pip install --no-cache-dir build==1.3.0
COPY pyproject.toml README.md LICENSE ./
COPY services services
COPY clients clients
RUN python -m build --wheel --outdir /wheels

FROM vllm/vllm-openai:v0.32.0
# vLLM, torch and what they alone stand on are the image's. What poise adds is of the versions that the tests ran with,
# beside this vLLM.
COPY requirements/cpu.txt /tmp/lock.txt
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    python3 -m pip install --no-cache-dir --upgrade-strategy only-if-needed --constraint /tmp/lock.txt /wheels/*.whl && \
    rm /tmp/lock.txt
RUN useradd --uid 10001 --user-group --no-create-home poise && install -d -o poise -g poise /models /state /runs
USER 10001:10001
ENV PYTHONUNBUFFERED=1
EXPOSE 50051 8051
HEALTHCHECK --start-period=900s CMD ["python3", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8051/healthz', timeout=5)"]
ENTRYPOINT ["python3", "-m", "poise.generation"]
