"""Floor 3: what things cost. FLOPs by site, and paired timing."""
