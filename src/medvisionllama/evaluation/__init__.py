"""How good a mask is, per case and class, on the scan's own grid."""
