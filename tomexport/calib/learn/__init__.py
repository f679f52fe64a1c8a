"""DTEM's embedding, trained on calibration images beside a frozen model."""
