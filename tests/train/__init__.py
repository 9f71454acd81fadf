"""Tests of `ditmem_jax.train`; a package, since another folder has a `test_folder.py` too."""
