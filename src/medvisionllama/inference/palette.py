"""The colours of classes, in pictures and in DICOM masks alike."""

# Okabe and Ito's colours, which stay apart in every common form of colour blindness.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
