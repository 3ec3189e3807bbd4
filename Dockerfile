# Two stages: build with the compilers, run with the libraries alone.
#
#   docker build -t asynctlsd .
#   docker run -p 8000:8000 -e ASYNCTLSD_API_KEY=secret asynctlsd
#   docker run -p 8000:8000 -e ASYNCTLSD_API_KEY=secret -v /models/qwen3:/model:ro asynctlsd --model /model
#
# For NVIDIA GPUs (with NVIDIA's container toolkit on the host):
#
#   docker build --build-arg VARIANT=cuda -t asynctlsd:cuda .
#   docker run --gpus all --ulimit memlock=-1 -p 8000:8000 ... asynctlsd:cuda --model /model
#
# Stop it with a time-out longer than drain-timeout: docker stop --time 60.

ARG VARIANT=cpu

# ---- what each variant adds to the two stages

FROM debian:12-slim AS tools
RUN apt-get update && apt-get install -y --no-install-recommends gcc make libc6-dev libuv1-dev \
    libmicrohttpd-dev libcjson-dev libutf8proc-dev libxxhash-dev \
    && rm -rf /var/lib/apt/lists/*

FROM debian:12-slim AS libraries
RUN apt-get update && apt-get install -y --no-install-recommends libuv1 libmicrohttpd12 libcjson1 \
    libutf8proc2 curl \
    && rm -rf /var/lib/apt/lists/*

# NVIDIA's packages for Debian; only the CUDA variant fetches them.
FROM debian:12-slim AS cuda-packages
ADD https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/cuda-keyring_1.1-1_all.deb \
    /cuda-keyring.deb

FROM tools AS tools-cpu
ENV MAKE_VARIANT="CUDA=0"

FROM tools AS tools-cuda
RUN --mount=from=cuda-packages,target=/packages \
    apt-get update && apt-get install -y --no-install-recommends ca-certificates g++ \
    && dpkg -i /packages/cuda-keyring.deb \
    && apt-get update && apt-get install -y --no-install-recommends cuda-nvcc-13-0 \
    cuda-cudart-dev-13-0 libcublas-dev-13-0 \
    && rm -rf /var/lib/apt/lists/*
ENV MAKE_VARIANT="CUDA=1 NVCC=/usr/local/cuda-13.0/bin/nvcc \
CUDA_LIB=/usr/local/cuda-13.0/targets/x86_64-linux/lib"

FROM libraries AS libraries-cpu

FROM libraries AS libraries-cuda
RUN --mount=from=cuda-packages,target=/packages \
    apt-get update && apt-get install -y --no-install-recommends ca-certificates \
    && dpkg -i /packages/cuda-keyring.deb \
    && apt-get update && apt-get install -y --no-install-recommends cuda-cudart-13-0 \
    libcublas-13-0 \
    && rm -rf /var/lib/apt/lists/*
# What NVIDIA's container runtime brings from the host.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/cuda-13.0/targets/x86_64-linux/lib

# ---- build

# hadolint ignore=DL3006
FROM tools-${VARIANT} AS build
WORKDIR /src
COPY Makefile ./
COPY engine engine
COPY kernels kernels
COPY server server
# The variables are words of their own on purpose.
# hadolint ignore=SC2086
RUN make -j"$(nproc)" $MAKE_VARIANT B=/src/out all

# ---- run

# hadolint ignore=DL3006
FROM libraries-${VARIANT}
# A number, so that a cluster can see that it is not root's.
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin asynctlsd
COPY --from=build /src/out/asynctlsd /usr/local/bin/asynctlsd
COPY configs/asynctlsd.conf /etc/asynctlsd/asynctlsd.conf
COPY models/asynctlsd-books-9m /usr/share/asynctlsd/models/asynctlsd-books-9m
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Healthy is also who still loads; who must not get requests yet says so at /ready.
HEALTHCHECK --start-period=120s --interval=15s --timeout=3s \
    CMD curl -fsS "http://127.0.0.1:${ASYNCTLSD_PORT}/health" || exit 1
# In the environment, so that options given to `docker run` are added to these and win.
ENV ASYNCTLSD_HOST=0.0.0.0 \
    ASYNCTLSD_PORT=8000 \
    ASYNCTLSD_MODEL=/usr/share/asynctlsd/models/asynctlsd-books-9m
ENTRYPOINT ["/usr/local/bin/asynctlsd", "--config", "/etc/asynctlsd/asynctlsd.conf"]
