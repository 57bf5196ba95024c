"""From a file or URI to batches: reading, formats, tokens, packing, order."""
