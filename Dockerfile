# An image for GPU nodes: Ubuntu 24.04, CUDA 13, Python 3.12, torch, Transformer Engine, megatron-core,
# and this package with its operations, for H100 and H200. docs/installation.md tells how to use it.
#
#   docker build --tag megatron_kanana .
#   docker build --tag megatron_kanana --build-arg WITH_APEX=1 .
#
# The steps are those of tools/set_up_cluster.sh, the slow ones first: a change of the package's code
# leaves their layers as they are.
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

ENV ENVIRONMENT=/opt/megatron_kanana \
    TORCH_CUDA_ARCH_LIST=9.0a
ENV PATH=${ENVIRONMENT}/bin:${PATH}
ARG MAX_JOBS=8
ARG WITH_APEX=0

WORKDIR /src/megatron_kanana
COPY tools/set_up_cluster.sh tools/
RUN tools/set_up_cluster.sh system && rm -rf /var/lib/apt/lists/*
COPY constraints.txt pyproject.toml ./
RUN tools/set_up_cluster.sh --to "${ENVIRONMENT}" environment torch
# hadolint ignore=DL3059
RUN tools/set_up_cluster.sh --to "${ENVIRONMENT}" transformer_engine
# hadolint ignore=DL3059
RUN if [ "${WITH_APEX}" = 1 ]; then tools/set_up_cluster.sh --to "${ENVIRONMENT}" apex; fi
# hadolint ignore=DL3059
RUN tools/set_up_cluster.sh --to "${ENVIRONMENT}" dependencies
COPY . .
RUN tools/set_up_cluster.sh --to "${ENVIRONMENT}" project check \
    && useradd --create-home --uid 10001 kanana

# Runs write to mounted folders, as whoever starts them; nothing in the image needs root.
USER 10001
WORKDIR /home/kanana
CMD ["python3", "-m", "megatron_kanana.train", "--help"]
