"""Names of weights: reversible rules, recognition, opened views, adapters, the cache of converted weights, filling."""
