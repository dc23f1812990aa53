"""Turn stored values into encoder inputs: representation, standardisation, augmentation."""
