"""Self-supervised objectives: masked reconstruction, contrast between sensors, latent prediction."""
