"""The command line: one file per verb, each a thin shell over the function of the same name."""
