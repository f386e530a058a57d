"""What `scripts/peers.py` measures: subjects, rows, and the report."""
