"""One colour for each class, the same in every picture, label table and segmentation we write."""

import colorsys

# Okabe and Ito's colours, which stay apart in every common form of colour blindness.
OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_GOLDEN = 0.618034


def colour_of(index: int) -> str:
    """Colour of the class with this place in the list of classes, as `#RRGGBB`.

    >>> colour_of(0), colour_of(7)
    ('#E69F00', '#BF9639')
    """
    if index < len(OKABE_ITO):
        return OKABE_ITO[index]
    # Steps of the golden ratio around the circle of hues never fall on an earlier hue.
    number = index - len(OKABE_ITO)
    hue, lightness = (0.116 + number * _GOLDEN) % 1, (0.486, 0.65, 0.35)[number % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, lightness, 0.54))
    return f"#{red:02X}{green:02X}{blue:02X}"


def rgb_of(index: int) -> tuple[int, int, int]:
    """The same as three numbers from 0 to 255."""
    text = colour_of(index)
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
