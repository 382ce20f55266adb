# `just` alone lists what there is.
_default:
    @just --list

# Install everything into .venv, development tools included
setup:
    uv sync
    uv run pre-commit install

# Format and fix what can be fixed
fmt:
    uv run ruff format .
    uv run ruff check --fix .

# All static checks: format, lint, types, import rules
check:
    uv run ruff format --check .
    uv run ruff check .
    uv run pyright
    uv run lint-imports

# Tests; for instance `just test -m "not slow and not gpu"`
test *args:
    uv run pytest {{ args }}

# Kill training 200 times, anywhere, and compare every bit with the undisturbed run (about 10 minutes)
torture:
    uv run pytest tests/faults -m torture -s

# The loop against a hand-written one
bench:
    uv run python -m benchmarking.bench_loop
