"""Speed and memory, measured: each program prints a table and writes results.json."""
