"""Many runs that answer one question: which there are, who runs them, what they found."""
