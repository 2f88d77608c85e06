#!/usr/bin/env bash
# The tests marked slow: compilation of whole models, mainly.
cd "$(dirname "$0")/.." && exec python -m pytest -m slow --timeout 1800 "$@"
