"""Floor 3: what things cost. FLOPs by site, shares of time, paired timing, kernel counts."""
