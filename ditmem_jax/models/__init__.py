"""The networks: frozen video transformer, memory encoder, video VAE, text encoder."""
