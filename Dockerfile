# finetune-job: `docker build -t finetune-job .`
#
# BASE is any Debian or Ubuntu with Python 3.11 or later. For a build that repeats itself pin it by digest:
#   --build-arg BASE=nvidia/cuda@sha256:...
# pip's settings (a mirror, its password) and a CA that the network needs come as secrets, which leave no trace:
#   --secret id=pip.conf,src=pip.conf   --secret id=ca.pem,src=ca.pem   with `cert = /run/ca.pem` in pip.conf
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE} AS packages
ARG DEBIAN_FRONTEND=noninteractive
# No versions: the distribution's newest security fixes are wanted.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends binutils ca-certificates python3 python3-venv \
    && apt-get clean && rm -rf /var/lib/apt/lists/*
COPY requirements.lock /build/
# --no-deps: the lock is complete and hashed, and one of its packages asks for a version that is not always available.
# What no text model on this CUDA needs goes in the same layer: bitsandbytes for other CUDAs, for AMD and Intel; Unsloth's
# web studio; static libraries; Triton's debug symbols; pip itself. Modules that a run imports are compiled here, since
# a read-only root cannot keep them: on a CPU, and (UNSLOTH_ALLOW_CPU) as if there were a GPU.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca.pem,target=/run/ca.pem \
    python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --no-compile --no-deps --require-hashes -r /build/requirements.lock \
    && /opt/venv/bin/pip uninstall --yes --quiet pip \
    && site=$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
    && cuda=$(/opt/venv/bin/python -c 'import torch; print(torch.version.cuda.replace(".", ""))') \
    && find "$site/bitsandbytes" -name 'libbitsandbytes_*.so' \
        ! -name "libbitsandbytes_cuda$cuda.so" ! -name 'libbitsandbytes_cpu.so' -delete \
    && rm -rf "$site/studio" "$site/torch/test" \
    && find "$site/triton" "$site/nvidia" -name '*.a' -delete \
    && strip --strip-debug "$site"/triton/_C/*.so \
    && for path in FORCE ALLOW; do \
        env HOME=/tmp HF_HUB_OFFLINE=1 UNSLOTH_DISABLE_STATISTICS=1 "UNSLOTH_${path}_CPU=1" \
            UNSLOTH_COMPILE_LOCATION=/tmp/unsloth XDG_CACHE_HOME=/tmp/cache \
            /opt/venv/bin/python -c 'import unsloth, trl, peft, bitsandbytes, datasets, boto3, awscrt, tiktoken, sentencepiece' \
            || exit 1; \
    done \
    && /opt/venv/bin/python -c 'import structlog, environs, filelock, prometheus_client, psutil, pynvml, tenacity, jinja2, rich' \
    && /opt/venv/bin/python -m compileall -q "$site/unsloth" "$site/unsloth_zoo" "$site/cut_cross_entropy" \
    && find /opt/venv -type d -name __pycache__ -exec chmod -R go+rX {} + \
    && rm -rf /tmp/*

FROM ${BASE}
ARG DEBIAN_FRONTEND=noninteractive
# gcc, libc's and Python's headers: Triton compiles its launchers when a run begins. tini reaps and passes signals on.
# No versions: the distribution's newest security fixes are wanted.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev tini \
    && apt-get clean && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --gid 0 --no-log-init --no-create-home --home-dir /scratch finetune \
    && install -d -m 1777 -o 10001 -g 0 /scratch
COPY --from=packages /opt/venv /opt/venv
COPY LICENSE /app/LICENSE
COPY job /app/job
RUN /opt/venv/bin/python -m compileall -q /app/job

ARG VERSION=0.1.0
ARG REVISION=unknown
ARG BASE
LABEL org.opencontainers.image.title="finetune-job" \
      org.opencontainers.image.description="Unattended LoRA fine-tuning: environment variables in, S3 in, S3 out, safe to kill" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"

# /scratch is all that a run writes on this machine: downloads, caches, checkpoints on their way.
# LD_LIBRARY_PATH and LIBRARY_PATH: where GKE and the CUDA images mount the driver.
# PYTHONSAFEPATH: no modules from the working directory, wherever a platform starts the process.
# FINETUNE_JOB_*: what `python -m job env` says of the image.
ENV FINETUNE_JOB_VERSION=${VERSION} \
    FINETUNE_JOB_REVISION=${REVISION} \
    PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/scratch \
    TMPDIR=/scratch \
    TUNE_DEVICE=cuda \
    TUNE_LOG_FORMAT=json \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    LIBRARY_PATH=/usr/local/nvidia/lib64 \
    DO_NOT_TRACK=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    UNSLOTH_DISABLE_STATISTICS=1
WORKDIR /app
USER 10001:0
VOLUME /scratch
ENTRYPOINT ["/usr/bin/tini", "--", "python", "-m", "job"]
CMD ["train"]
