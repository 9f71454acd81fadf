"""Checkpoints in and out: tables of tensor names, and one strict engine."""
