"""The edge: raychat on Ray Data and Ray Train. Nothing outside this package and `jobs/` imports ray."""
