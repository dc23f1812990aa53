"""The training engine of pretraining and fine-tuning: ``trainer.Trainer``."""
