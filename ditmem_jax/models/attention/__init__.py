"""Attention over video tokens and a memory: one function, its kernels, and the ring over devices."""

from ditmem_jax.models.attention.with_memory import attention as attention
