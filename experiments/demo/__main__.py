"""`python -m experiments.demo` is `ditmem demo`."""

import runpy

runpy.run_module("ditmem_jax.demo", run_name="__main__", alter_sys=True)
