# The README's two commands on a CPU: docker build -t ko-dialogue-engine . && docker run --rm ko-dialogue-engine
# The tests: docker run --rm ko-dialogue-engine bash tools/test.sh --quick
# Keep what a run writes: docker run --rm -v "$PWD/experiments:/app/experiments" ko-dialogue-engine
FROM python:3.11-slim

# torch's default wheel brings CUDA along. An index of its CPU wheels makes a small image: --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL

RUN useradd --create-home --uid 1000 engine && install -d -o engine /app
USER engine
WORKDIR /app
COPY --chown=engine . .
# No compiler, no git: every pin has a wheel.
RUN bash -c 'set -euo pipefail; source tools/environment.sh; prepare_environment'
CMD ["bash", "tools/quickstart.sh"]
