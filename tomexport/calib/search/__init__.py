"""The best schedule, method and precision for a model on a machine."""
