"""`d2l bench`: ratios against baselines measured in the same run, on the same work."""
