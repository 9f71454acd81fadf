"""A bank as a page to look into and to change: `python -m ditmem_jax.bank serve`."""
