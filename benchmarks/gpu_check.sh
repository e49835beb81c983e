#!/usr/bin/env bash
# A quarter of an hour on an NVIDIA GPU: the tests that need one, then the course with Llama 3.2 1B's shape, held to the
# memory of a P100, beside transformers and peft where they are installed. Rows, reports and logs: $OUT (default runs/gpu).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
python course.py --doctor | tee "$OUT/doctor.txt"
timeout 150 python -m pytest -q -m gpu 2>&1 | tail -40 | tee "$OUT/tests.txt"
timeout 400 python course.py --minutes=6 --memory_limit_gb=16 --out_dir="$OUT/course" 2>&1 | tee "$OUT/course.txt"
