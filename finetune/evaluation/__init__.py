"""Predict with fine-tuned models and score the predictions."""
