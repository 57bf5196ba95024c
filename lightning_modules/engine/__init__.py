"""The fast path: what makes a step cheap without changing its numbers, whatever the architecture."""
