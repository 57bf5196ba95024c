"""Jobs on the real servers while a seeded killer ends, stops and starts their processes."""
