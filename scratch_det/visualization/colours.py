"""The colours of lines and bars in all pictures of numbers.

Okabe and Ito's, which colour-blind readers tell apart, with brown in the place of their yellow: it is darker.
"""

BLUE, VERMILION, GREEN, PURPLE, SKY, BROWN, BLACK = LINES = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8B6914", "black",
)  # fmt: skip
