"""A study: a grid of runs, what they have recorded, and its tables and figures beside those of the original study."""
