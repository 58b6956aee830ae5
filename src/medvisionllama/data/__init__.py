"""From files to batches: index → splits → plan → cache → crops → augmentation."""
