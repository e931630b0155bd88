"""Baseline searches: what is tried, what came out, which differences are real. `raychat.on_ray` has Ray Tune run the trials."""
