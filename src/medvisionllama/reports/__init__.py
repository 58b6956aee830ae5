"""What a person looks at: one self-contained page per run."""
