"""Clips from prompts: what a bank finds, the networks that make clips, and the files."""
