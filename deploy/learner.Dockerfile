# The learner service: CUDA PyTorch.
FROM python:3.11.14-slim-bookworm AS wheel
WORKDIR /src
COPY requirements/cpu.txt /tmp/lock.txt
RUN python3 -m pip install --no-cache-dir --constraint /tmp/lock.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY services services
COPY clients clients
RUN python3 -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
# The image's own torch stays: the lock lists everything but torch. Its Python is marked as managed by the distribution
# (PEP 668), so pip needs an override; a virtual environment would hide this Python from the image's torchrun.
COPY requirements/cpu.txt /tmp/lock.txt
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    wheel=$(echo /wheels/*.whl) && \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    python3 -m pip install --no-cache-dir --constraint /tmp/lock.txt "${wheel}[torch]" && \
    rm /tmp/lock.txt
RUN useradd --uid 10001 --user-group --no-create-home poise && install -d -o poise -g poise /models /state /runs
USER 10001:10001
ENV PYTHONUNBUFFERED=1
EXPOSE 50053 8053
HEALTHCHECK --start-period=600s CMD ["python3", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8053/healthz', timeout=5)"]
ENTRYPOINT ["python3", "-m", "poise.learner"]
