"""Notebooks for Colab: sources in jupytext's percent format, and the notebooks made from them."""
