"""Videos to records: latents of the VAE and text embeddings, on disk."""
