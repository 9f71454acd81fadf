"""The bank of reference videos: which of them tell about a prompt."""

from ditmem_jax.bank.embedders import Embedder as Embedder
from ditmem_jax.bank.embedders import make_embedder as make_embedder
from ditmem_jax.bank.search import Bank as Bank
from ditmem_jax.bank.search import Results as Results
from ditmem_jax.bank.table import Table as Table
