"""`fit` turns a configuration into a run folder."""
