# The value service: CPUs, no torch.
FROM python:3.11.14-slim-bookworm AS wheel
WORKDIR /src
COPY requirements/cpu.txt /tmp/lock.txt
RUN python3 -m pip install --no-cache-dir --constraint /tmp/lock.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY services services
COPY clients clients
RUN python3 -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.11.14-slim-bookworm
# All versions are those of the tested lock.
COPY requirements/cpu.txt /tmp/lock.txt
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    wheel=$(echo /wheels/*.whl) && \
    python3 -m pip install --no-cache-dir --constraint /tmp/lock.txt "${wheel}[value]" && \
    rm /tmp/lock.txt
RUN useradd --uid 10001 --user-group --no-create-home poise && install -d -o poise -g poise /models /state /runs
USER 10001:10001
ENV PYTHONUNBUFFERED=1
EXPOSE 50052 8052
HEALTHCHECK --start-period=60s CMD ["python3", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8052/healthz', timeout=5)"]
ENTRYPOINT ["python3", "-m", "poise.value"]
