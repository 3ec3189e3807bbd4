# Two stages: build with the compilers, run with the libraries alone.
#
#   docker build -t asynctlsd .
#   docker run -p 8000:8000 -e ASYNCTLSD_API_KEY=secret asynctlsd
#   docker run -p 8000:8000 -e ASYNCTLSD_API_KEY=secret -v /models/qwen3:/model:ro asynctlsd --model /model
#
# Stop it with a time-out longer than drain-timeout: docker stop --time 60.

FROM debian:12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc make libc6-dev libuv1-dev \
    libmicrohttpd-dev libcjson-dev libutf8proc-dev libxxhash-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Makefile ./
COPY engine engine
COPY kernels kernels
COPY server server
COPY configs configs
RUN make -j"$(nproc)" CUDA=0 B=/src/out all

FROM debian:12-slim
RUN apt-get update && apt-get install -y --no-install-recommends libuv1 libmicrohttpd12 libcjson1 \
    libutf8proc2 curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --no-create-home --shell /usr/sbin/nologin asynctlsd
COPY --from=build /src/out/asynctlsd /usr/local/bin/asynctlsd
COPY configs/asynctlsd.conf /etc/asynctlsd/asynctlsd.conf
COPY models/asynctlsd-books-9m /usr/share/asynctlsd/models/asynctlsd-books-9m
USER asynctlsd
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s --interval=15s --timeout=3s \
    CMD curl -fsS http://127.0.0.1:8000/health || exit 1
# In the environment, so that options given to `docker run` are added to these and win.
ENV ASYNCTLSD_HOST=0.0.0.0 \
    ASYNCTLSD_MODEL=/usr/share/asynctlsd/models/asynctlsd-books-9m
ENTRYPOINT ["/usr/local/bin/asynctlsd", "--config", "/etc/asynctlsd/asynctlsd.conf"]
