"""Self-supervised objectives: masked reconstruction, contrastive learning across sensors, latent prediction."""
