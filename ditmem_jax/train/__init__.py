"""Training a memory encoder against a frozen transformer."""
