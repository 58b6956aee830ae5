"""Token maps of trained networks on scans, scored against masks."""
