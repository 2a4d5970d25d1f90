# All roles on CPUs, with the `torch` engine, for trying things on a laptop. The command selects the role.
FROM python:3.11.14-slim-bookworm AS wheel
WORKDIR /src
COPY requirements/cpu.txt /tmp/lock.txt
RUN python3 -m pip install --no-cache-dir --constraint /tmp/lock.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY services services
COPY clients clients
RUN python3 -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.11.14-slim-bookworm
COPY requirements/cpu.txt /tmp/lock.txt
# The lock lists everything but torch. PyPI's build contains CUDA; for a smaller one use
# --build-arg TORCH="torch==2.13.0+cpu --index-url ...".
ARG TORCH="torch==2.13.0"
# hadolint ignore=DL3013,SC2086
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    python3 -m pip install --no-cache-dir ${TORCH} && \
    python3 -m pip install --no-cache-dir --no-deps -r /tmp/lock.txt && \
    python3 -m pip install --no-cache-dir --no-deps /wheels/*.whl && \
    rm /tmp/lock.txt
RUN useradd --uid 10001 --user-group --no-create-home poise && install -d -o poise -g poise /models /state /runs
USER 10001:10001
ENV PYTHONUNBUFFERED=1
# The port of the health check depends on the role; compose.yaml and the chart define the checks.
HEALTHCHECK NONE
ENTRYPOINT ["python3", "-m"]
CMD ["poise.value"]
