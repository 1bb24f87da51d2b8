# Three images. `cpu` and `gpu` run workers; `client` runs what needs no decoder and no torch: the
# deliverer, the janitor, submit, watch, result. None contains a model, a compiler, or pip.
#
#     docker build --target cpu --tag ralf:cpu .
#
# The base image is pinned by digest; `deploy/pin_bases.sh` prints the digest that its tag has now.
# docs/operations.md has the sizes and says what each target is for. `deploy/prove_image.py` runs
# these steps without a container engine.

ARG PYTHON=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d


FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/ralf
# Dependencies are installed from these files alone, so a change of code adds only a small layer. Every
# file that pip takes must have a hash of deploy/locks (`make locks`); exceptions are named below.
COPY deploy/locks locks
RUN /opt/ralf/bin/pip install --require-hashes --no-deps -r locks/build.txt
COPY constraints.txt pyproject.toml README.md LICENSE NOTICE ./
RUN mkdir kernels worker train
COPY ralf ralf


FROM build AS build-client
RUN /opt/ralf/bin/pip install --require-hashes --no-deps -r locks/client.txt \
 && /opt/ralf/bin/pip check
COPY kernels kernels
COPY worker worker
COPY train train
RUN /opt/ralf/bin/pip install --no-deps --no-build-isolation . \
 && /opt/ralf/bin/pip uninstall --yes pip setuptools


FROM build AS build-cpu
# An index whose torch is built without CUDA makes this image several gigabytes smaller. It is asked for
# torch and torchvision alone, and instead of the registry: beside it, either could hand out the other's
# packages. Their files are not checked by hash then.
ARG TORCH_INDEX=
# hadolint ignore=SC2046
RUN if [ -n "$TORCH_INDEX" ]; then \
      /opt/ralf/bin/pip install --no-deps --index-url "$TORCH_INDEX" \
        $(grep -oE '^(torch|torchvision)==[0-9.]+' locks/torch.txt); \
    else /opt/ralf/bin/pip install --require-hashes --no-deps -r locks/torch.txt; fi
RUN /opt/ralf/bin/pip install --require-hashes --no-deps -r locks/cpu.txt \
 && /opt/ralf/bin/pip check
COPY kernels kernels
COPY worker worker
COPY train train
RUN /opt/ralf/bin/pip install --no-deps --no-build-isolation . \
 && /opt/ralf/bin/pip uninstall --yes pip


FROM build AS build-gpu
# gpu installs torch-tensorrt, gpu-rtx its variant for RTX cards. Never install both. Only gpu-rtx has a
# lock: see deploy/lock.sh.
ARG GPU_EXTRA=gpu
RUN if [ "$GPU_EXTRA" = gpu-rtx ]; then \
      /opt/ralf/bin/pip install --require-hashes --no-deps -r locks/gpu-rtx.txt; \
    else /opt/ralf/bin/pip install -c constraints.txt ".[${GPU_EXTRA},stores]"; fi \
 && /opt/ralf/bin/pip check
COPY kernels kernels
COPY worker worker
COPY train train
RUN /opt/ralf/bin/pip install --no-deps --no-build-isolation --force-reinstall . \
 && /opt/ralf/bin/pip uninstall --yes pip


FROM ${PYTHON} AS runtime
# tini reaps processes that a child process leaves behind, and passes signals on to the worker.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends 'tini=0.19.0-*' \
 && rm -rf /var/lib/apt/lists/* /usr/local/lib/python3.*/ensurepip /usr/local/bin/pip* \
      /usr/local/lib/python3.*/site-packages/pip* \
      /usr/local/lib/python3.*/site-packages/setuptools* \
      /usr/local/lib/python3.*/site-packages/wheel* \
 && groupadd --gid 10001 ralf \
 && useradd --uid 10001 --gid ralf --no-create-home --home-dir /work --shell /usr/sbin/nologin ralf \
 && install --directory --owner ralf --group ralf --mode 700 /work \
 && install --directory /models
# The root may be read-only: everything is written to /work, a volume or tmpfs; /models is mounted.
ENV PATH=/opt/ralf/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TMPDIR=/work \
    TRITON_CACHE_DIR=/work/triton \
    TORCHINDUCTOR_CACHE_DIR=/work/inductor \
    RALF_WORK_DIR=/work \
    RALF_MODELS_DIR=/models \
    RALF_HTTP_HOST=0.0.0.0 \
    RALF_HTTP_PORT=9100
WORKDIR /work
USER 10001:10001
EXPOSE 9100
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as web; web.urlopen(f'http://127.0.0.1:{os.environ[\"RALF_HTTP_PORT\"]}/healthz', timeout=4)"]
ENTRYPOINT ["tini", "--", "ralf"]


FROM runtime AS client
COPY --from=build-client /opt/ralf /opt/ralf
CMD ["--help"]


FROM runtime AS gpu
# On Kubernetes the pod must set the same variables: there the image's environment is not enough.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=video,compute,utility \
    RALF_DEVICE=cuda
COPY --from=build-gpu /opt/ralf /opt/ralf
CMD ["worker"]


# A build without --target makes the last stage, so the CPU image comes last.
FROM runtime AS cpu
ENV RALF_DEVICE=cpu
COPY --from=build-cpu /opt/ralf /opt/ralf
CMD ["worker"]
