# Ray head, Ray workers and the agent, with torch for the jobs. From the top of the repository:
#   docker build -f deploy/worker.Dockerfile -t phalanx-worker .
#   docker build -f deploy/worker.Dockerfile -t phalanx-worker --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# A CUDA build brings CUDA with it; the driver comes from the node (NVIDIA container toolkit).
# EXTRA_PACKAGES: what jobs find installed, and what checkpoint URLs need (s3fs).
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRA_PACKAGES=""
# Whoever drops root (head, agent; workers without own users) is this user. Ray makes its sockets and logs readable to
# everybody: they lie in a directory that no tenant's rank can enter.
RUN useradd --uid 10001 --user-group --home-dir /home/phalanx --create-home --shell /usr/sbin/nologin phalanx \
    && install --directory --mode 0700 --owner phalanx --group phalanx /var/lib/ray \
    && install --directory --mode 0755 --owner phalanx --group phalanx /var/lib/phalanx
WORKDIR /src
COPY requirements.lock ./
# Into the image's own Python, which every user can read: ranks of each tenant run under a user of their own. torch
# first and by itself: whatever index it is from, the rest comes from PyPI.
RUN pip install --no-cache-dir --no-deps --index-url ${TORCH_INDEX} "$(grep '^torch==' requirements.lock)"
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY server server
COPY worker worker
COPY migrations migrations
RUN pip install --no-cache-dir --constraint requirements.lock ".[worker]" ${EXTRA_PACKAGES}
ENV PYTHONUNBUFFERED=1 \
    RAY_TMPDIR=/var/lib/ray \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_memory_monitor_refresh_ms=0
WORKDIR /
# No USER: a worker starts as root with few capabilities, and the chart says who else is whom.
CMD ["phalanx", "agent", "--help"]
