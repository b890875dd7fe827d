# The image of a node: pinned versions, no root, the code in /opt/raysed.
#   docker build -t REGISTRY/raysed:0.1.0 . && docker push REGISTRY/raysed:0.1.0
FROM python:3.11.14-slim-bookworm

# wget: KubeRay's probes call it; procps: Ray's stack dumps
RUN apt-get update \
 && apt-get install -y --no-install-recommends procps wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home raysed

WORKDIR /opt/raysed
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY raysed raysed
RUN pip install --no-cache-dir -c constraints.txt ".[aws]"
COPY jobs jobs

USER 1000
ENV RAY_AUTH_MODE=token RAY_num_workers_soft_limit=64 PYTHONUNBUFFERED=1
