# The project with everything it needs; the GPU's driver comes from the host.
#
#   docker build -t transformerlm .
#   docker run --gpus all --shm-size 8g -v "$PWD/runs:/app/runs" -v "$PWD/data:/app/data" transformerlm \
#       transformerlm-train --config config/resources/simplestories.toml --resume
#
# --init is not needed: tini passes signals on, so that `docker stop` saves the run (give it --time 300).
FROM python:3.12-slim-bookworm

# Without the keys of sshd, which would be the same wherever the image runs; infra/start_pod.sh makes some.
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl git openssh-server rsync tini tmux \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*
RUN pip install --no-cache-dir uv rust-just

WORKDIR /app
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 PATH=/app/.venv/bin:$PATH

# Dependencies change seldom: a layer of their own.
COPY pyproject.toml uv.lock README.md LICENSE ./
RUN uv sync --frozen --no-dev --no-install-project
COPY . .
RUN uv sync --frozen --no-dev
# What is installed is what runs: no command looks for something newer.
ENV UV_NO_SYNC=1

ENTRYPOINT ["tini", "--"]
CMD ["transformerlm-train", "--help"]
