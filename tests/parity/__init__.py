"""Comparison with golden vectors of the released programs: `python -m tests.parity FILE...`."""
