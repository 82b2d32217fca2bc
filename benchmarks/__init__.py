"""Speed and memory, always as ratios against a named rival in the same run."""
