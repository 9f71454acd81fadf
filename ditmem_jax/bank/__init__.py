"""The bank of reference videos: which of them tell about a prompt."""

from ditmem_jax.bank.lexical import LexicalEmbedder as LexicalEmbedder
from ditmem_jax.bank.search import EMBEDDER_FILE as EMBEDDER_FILE
from ditmem_jax.bank.search import Bank as Bank
from ditmem_jax.bank.search import retrieve_for as retrieve_for
