"""A question with its sampled responses is a group: its record on disk, its vote, and what is counted on many."""
