# One image for every Moray process: Ray nodes, the controller, workers and routers.
#
#   docker build -t moray:0.1.0 .
#       torch as PyPI has it, with CUDA
#   docker build -t moray:0.1.0 --build-arg PIP_EXTRA_INDEX_URL=INDEX_OF_CPU_BUILDS .
#       torch for CPUs only: gigabytes less
#   buildah bud -t moray:0.1.0 --build-arg BASE_IMAGE=localhost/debian .
#       on another base: anything with Python 3.11 to 3.13, venv and bash, or with apt to install them from
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
# Unset = pip's own defaults.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# Optional extras of the package, e.g. [otel] or [nixl,otel].
ARG EXTRAS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -c "import ensurepip, venv" 2>/dev/null \
    || { apt-get update \
         && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
            python3 python3-venv ca-certificates \
         && rm -rf /var/lib/apt/lists/*; }
# The native kernels are compiled here; the final image needs no compiler, only OpenMP's library.
RUN command -v g++ > /dev/null \
    || { apt-get update \
         && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ \
         && rm -rf /var/lib/apt/lists/*; }
RUN python3 -m venv /opt/venv
WORKDIR /src
# torch, by far the largest and the slowest to change, is a layer of its own.
COPY constraints.txt ./
RUN /opt/venv/bin/pip install -c constraints.txt "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY router router
COPY workers workers
COPY model model
COPY wire wire
COPY cluster cluster
COPY assets assets
RUN /opt/venv/bin/pip install -c constraints.txt ".${EXTRAS}" && /opt/venv/bin/moray --help > /dev/null

FROM ${BASE_IMAGE}
RUN { python3 -c "import venv" 2>/dev/null && command -v bash > /dev/null; } \
    || { apt-get update \
         && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
            python3 python3-venv bash ca-certificates \
         && rm -rf /var/lib/apt/lists/*; }
RUN ldconfig -p | grep -q libgomp.so.1 \
    || { apt-get update \
         && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends libgomp1 \
         && rm -rf /var/lib/apt/lists/*; }
COPY --from=build /opt/venv /opt/venv
# KubeRay may start Ray in a login shell, which forgets PATH; /usr/local/bin is on every shell's path.
RUN ln -s /opt/venv/bin/ray /opt/venv/bin/moray /usr/local/bin/ \
    && echo 'moray:x:10001:10001:moray:/var/cache/moray:/bin/bash' >> /etc/passwd \
    && echo 'moray:x:10001:' >> /etc/group \
    && mkdir -p /var/cache/moray /etc/moray /models \
    && chown 10001:10001 /var/cache/moray
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/var/cache/moray \
    MORAY_CACHE_DIR=/var/cache/moray \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
WORKDIR /var/cache/moray
EXPOSE 50051 8000 6379 8265 6390 6391
CMD ["moray", "--help"]
