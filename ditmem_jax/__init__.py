"""Plug-and-play memory for frozen video diffusion transformers."""
