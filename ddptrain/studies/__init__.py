"""Studies: comparisons of many small runs, made in one launch and reported from what they left."""
