# make run   generate text with the embedded model and compare the KV cache on and off
# make demo  a web page on the embedded model, at http://127.0.0.1:7860, and an API beside it (docs/demo.md)
# make reports  from the measured rows: the tables and charts of the documents, the results page, the course reports
# make course  everything that the assignment asks for, measured on this machine, and the three reports of it
# make page  the results page alone, reports/index.html
# make model fetch a small trained model, SmolLM2-135M-Instruct, into models/
# make test  lint, check formatting, run the tests
# make test-slow  the tests that take minutes: every single fault, 10,000 flipped bits
# make mutate  plants 600 small mistakes in the program, one at a time, and counts those that its tests notice; hours
# make audit  look all installed packages up in the package index's list of vulnerabilities
# Each sets up a virtual environment in .venv first; delete it to start over.

PYTHON ?= python3

.PHONY: run model demo course reports page test test-slow mutate audit
run: .venv/run.stamp
	.venv/bin/python inference.py
	.venv/bin/python inference.py --compare --max_gen_len=96 --prompt="Once upon a time, there was a little fox named"

model: .venv/run.stamp
	.venv/bin/python -m data.model

demo: .venv/demo.stamp
	.venv/bin/python demo.py

course: .venv/dev.stamp
	.venv/bin/python course.py

reports: page .venv/dev.stamp
	.venv/bin/python -m reports.build readme
	.venv/bin/python -m reports.build pdf

page: .venv/run.stamp
	.venv/bin/python -m reports.build page

test: .venv/dev.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest

test-slow: .venv/dev.stamp .venv/demo.stamp
	.venv/bin/python -m pytest -m slow

audit: .venv/dev.stamp .venv/demo.stamp
	$(PYTHON) -m venv .venv/audit && .venv/audit/bin/pip install -q pip-audit==2.10.1
	.venv/audit/bin/pip-audit --strict --path $$(echo .venv/lib/python*/site-packages)

mutate: .venv/dev.stamp
	COVERAGE_FILE=$(CURDIR)/runs/coverage .venv/bin/python -m pytest --cov --cov-context=test --cov-report= --junitxml=runs/times.xml -o junit_duration_report=call
	.venv/bin/python -m tests.trust.mutate --times=runs/times.xml --state=runs/mutants.jsonl

.venv/bin/python:
	@$(PYTHON) early.py
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/run.stamp: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.venv/dev.stamp: requirements.txt requirements-dev.txt | .venv/bin/python
	.venv/bin/python -m pip install -q -r requirements-dev.txt
	-.venv/bin/python -m pip install -q --no-deps fairscale==0.4.13  # built here; one test is skipped without it
	touch $@ .venv/run.stamp

.venv/demo.stamp: requirements.txt requirements-demo.txt | .venv/bin/python
	.venv/bin/python -m pip install -q -r requirements-demo.txt
	touch $@ .venv/run.stamp
