"""The networks of Wan 2.1 and 2.2: transformer, video VAE, text encoder and tokeniser."""
