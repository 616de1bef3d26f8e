"""Metrics, tables per site, doubt, pictures and baselines: what predictions are worth on unseen sites."""
