"""Training: losses beyond the models, data, stages, recipes."""
