"""What is measured beside Tables 1 to 3, each `python -m benchmarks.<name>`, and what all measuring shares."""
