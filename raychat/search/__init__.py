"""Baseline searches: what is tried, what came out, which differences are real. Ray Tune runs the trials, in `raychat.on_ray`."""
