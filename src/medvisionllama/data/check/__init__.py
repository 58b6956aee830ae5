"""What in a dataset would break or mislead training: facts of each case, rules on them, and one report."""
