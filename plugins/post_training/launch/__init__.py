"""How a trainer process is started and ended."""
