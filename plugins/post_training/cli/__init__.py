"""The command line ``post-training``; ``app`` is where it begins, and what it imports before it is asked."""
